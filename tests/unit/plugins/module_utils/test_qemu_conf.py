# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""cgroup_device_acl in qemu.conf, judged by libvirt's own parser and Augeas lens where they are installed.

The lens is looked for in ``$IOMMUFD_HOST_SHARED`` (or ``../shared`` beside the checkout) under ``data/augeas-lens``,
libvirt's parser in ``$IOMMUFD_HOST_LIBVIRT`` (paths of ``libvirt.so.0``, separated by colons) or where the loader
finds it. Without them the tests that need them are skipped; the others always run. More files as distributions ship
them can be named in ``$IOMMUFD_HOST_QEMU_CONF``.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_conf as conf
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHARED = pathlib.Path(
    os.environ.get("IOMMUFD_HOST_SHARED") or pathlib.Path(__file__).resolve().parents[4].parent / "shared"
)
DEFAULT = conf.built_in("11.3.0")
OURS = ["/dev/iommu", "/dev/vfio/by-path/pci-0000:02:00.0"]

SHIPPED_9 = b"""# head

#cgroup_device_acl = [
#    "/dev/null", "/dev/full", "/dev/zero",
#    "/dev/random", "/dev/urandom",
#    "/dev/ptmx", "/dev/kvm"
#]
#
# RDMA migration requires the following extra files to be added to the list:
#   "/dev/infiniband/rdma_cm",

#user = "root"
"""


class Lens:
    """libvirt's Augeas lens: text -> [(path, value)], or None where the lens refuses the text."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.library = ctypes.CDLL("libaugeas.so.0")
        self.library.aug_init.restype = ctypes.c_void_p
        self.library.aug_init.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
        text = [ctypes.c_void_p, ctypes.c_char_p]
        self.library.aug_rm.argtypes = text
        self.library.aug_set.argtypes = [*text, ctypes.c_char_p]
        self.library.aug_text_store.argtypes = [*text, ctypes.c_char_p, ctypes.c_char_p]
        self.library.aug_match.argtypes = [*text, ctypes.POINTER(ctypes.POINTER(ctypes.c_char_p))]
        self.library.aug_get.argtypes = [*text, ctypes.POINTER(ctypes.c_char_p)]
        no_load, no_modules = 1 << 5, 1 << 6
        self.handle = self.library.aug_init(b"/nonexistent", str(directory).encode(), no_load | no_modules)
        assert self.handle

    def read(self, data: bytes) -> list[tuple[str, str]] | None:
        library, handle = self.library, self.handle
        library.aug_rm(handle, b"/parsed")
        library.aug_rm(handle, b"/augeas/text")
        ended = data if not data or data.endswith(b"\n") else data + b"\n"  # as aug_load does
        library.aug_set(handle, b"/input", ended)
        if library.aug_text_store(handle, b"Libvirtd_qemu.lns", b"/input", b"/parsed") < 0:
            return None
        paths = ctypes.POINTER(ctypes.c_char_p)()
        found = []
        for index in range(library.aug_match(handle, b"/parsed//*", ctypes.byref(paths))):
            value = ctypes.c_char_p()
            library.aug_get(handle, paths[index], ctypes.byref(value))
            found.append(((paths[index] or b"").decode(), (value.value or b"").decode()))
        return found


class Libvirt:
    """libvirt's own parser: text -> list, None (not set), or "refused"."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.virConfReadString.restype = ctypes.c_void_p
        self.library.virConfReadString.argtypes = [ctypes.c_char_p, ctypes.c_uint]
        self.library.virConfFree.argtypes = [ctypes.c_void_p]
        self.strings = ctypes.POINTER(ctypes.c_char_p)
        self.library.virConfGetValueStringList.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_bool,
            ctypes.POINTER(self.strings),
        ]
        self.library.virInitialize()

    def read(self, data: bytes) -> list[str] | str | None:
        handle = self.library.virConfReadString(data, 0)
        if not handle:
            return "refused"
        found = self.strings()
        status = self.library.virConfGetValueStringList(handle, b"cgroup_device_acl", False, ctypes.byref(found))
        result: list[str] | str | None = None if status == 0 else "refused"
        if status == 1:
            result = []
            while found[len(result)] is not None:
                result.append((found[len(result)] or b"").decode())
        self.library.virConfFree(handle)
        return result


@pytest.fixture(scope="module", params=["9.0.0", "12.8.0"])
def lens(request: pytest.FixtureRequest) -> Lens:
    directory = SHARED / "data" / "augeas-lens" / request.param
    if not directory.is_dir():
        pytest.skip(f"no lens in {directory}")
    try:
        return Lens(directory)
    except OSError:
        pytest.skip("Augeas is not installed")


@pytest.fixture(scope="module")
def parsers() -> list[Libvirt]:
    found = []
    for path in os.environ.get("IOMMUFD_HOST_LIBVIRT", "libvirt.so.0").split(":"):
        try:
            found.append(Libvirt(path))
        except (OSError, AttributeError):
            continue
    if not found:
        pytest.skip("libvirt is not installed")
    return found


# -- generated files ---------------------------------------------------------------------------------------------------

NAMES = ["/dev/null", "/dev/kvm", "/dev/iommu", "/dev/vfio/vfio", "/dev/net/tun", "/dev/a b", "/dev/#x", "/dev/],"]


@st.composite
def lists(draw: t.Callable[..., t.Any], newline: str, plain: bool) -> str:
    """A list; ``plain``: only in forms that the Augeas lens knows."""
    quotes = ['"'] if plain else ['"', "'", '"""']
    blanks = st.sampled_from(["", " ", newline, newline + "    ", "  " + newline + "\t"])
    items = [
        f"{quote}{name}{quote}"
        for name, quote in draw(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(quotes)), max_size=5))
    ]
    text = "[" + draw(blanks)
    for number, item in enumerate(items):
        text += item + draw(blanks)
        if number < len(items) - 1 or (draw(st.booleans()) and not plain):
            text += "," + draw(blanks)
    return text + "]"


@st.composite
def files(draw: t.Callable[..., t.Any], plain: bool = False) -> bytes:
    """A qemu.conf; ``plain``: only what the Augeas lens reads, too."""
    newline = "\n" if plain else draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    prefix = "" if plain else draw(st.sampled_from(["", "", " "]))
    commented = ["# a comment", "#", '#cgroup_device_acl = [ "/dev/example" ]', '#user = "x"']
    parts: list[str] = []
    for kind in draw(st.lists(st.sampled_from(["comment", "default", "list", "other", "others", "blank"]), max_size=7)):
        equals = draw(st.sampled_from([" = ", "=", "\t=  "]))
        if kind == "comment":
            parts.append(draw(st.sampled_from(commented)) + newline)
        elif kind == "default":
            version = draw(st.sampled_from(["9.0.0", "11.3.0", "12.8.0"]))
            rows = ["cgroup_device_acl = [", *(f'    "{name}",' for name in conf.built_in(version)), "]"]
            rows[-2] = rows[-2][:-1]
            lead = draw(st.sampled_from(["#", "# "]))
            parts.append("".join(lead + row + newline for row in rows))
        elif kind == "list":
            tail = "" if plain else draw(st.sampled_from(["", "", " ", " # why", ";", "; user = 'x'"]))
            parts.append(prefix + "cgroup_device_acl" + equals + draw(lists(newline, plain)) + tail + newline)
        elif kind == "other":
            parts.append(prefix + "user" + equals + '"#[ root"' + newline)
        elif kind == "others":
            parts.append("max_files" + equals + "7" + newline)
        else:
            parts.append(draw(st.sampled_from(["", "  "])) + newline)
    text = "".join(parts)
    if draw(st.booleans()):
        text = text[: -len(newline)] if text.endswith(newline) else text
    return text.encode()


DEVICES = st.lists(st.sampled_from([*OURS, "/dev/kvm", "/dev/vfio/devices/vfio0"]), max_size=3, unique=True)
VERSIONS = st.sampled_from(["9.0.0", "11.3.0", "12.8.0"])
MANY = hypothesis.settings(max_examples=1000, deadline=None)


def expected(data: bytes, devices: t.Sequence[str], default: t.Sequence[str]) -> list[str] | None:
    before = conf.active_list(data)
    base = list(default) if before is None else before
    missing = [device for device in devices if device not in base]
    return before if not missing else base + missing


@MANY
@hypothesis.given(files(), DEVICES, DEVICES, VERSIONS)
def test_merge_is_right_minimal_idempotent_and_taken_back_to_the_byte(
    data: bytes, devices: list[str], earlier: list[str], version: str
) -> None:
    default = conf.built_in(version)
    result = conf.merge(data, devices, default)
    assert conf.active_list(result) == expected(data, devices, default)
    conf.check(data, result, expected(data, devices, default))
    assert conf.merge(result, devices, default) == result
    assert conf.strip(result, default) == data
    # Another list of ours before makes no difference: the list is ours as a whole.
    assert conf.merge(conf.merge(data, earlier, default), devices, default) == result


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(files(), DEVICES, VERSIONS)
def test_foreign_lines_stay(data: bytes, devices: list[str], version: str) -> None:
    result = conf.merge(data, devices, conf.built_in(version))
    rest = iter(result)
    assert all(byte in rest for byte in data), "every byte of the original is there, in order"


def test_libvirt_reads_what_we_read_and_what_we_meant(parsers: list[Libvirt]) -> None:
    @MANY
    @hypothesis.given(files(), DEVICES, VERSIONS)
    def run(data: bytes, devices: list[str], version: str) -> None:
        default = conf.built_in(version)
        result = conf.merge(data, devices, default)
        for parser in parsers:
            if data.strip():
                assert parser.read(data) == conf.active_list(data)
            if result.strip():
                assert parser.read(result) == expected(data, devices, default)

    run()


def test_libvirt_refuses_what_we_refuse(parsers: list[Libvirt]) -> None:
    pieces = [
        "cgroup_device_acl",
        "=",
        "[",
        "]",
        '"',
        "'",
        '"""',
        ",",
        "#",
        "\n",
        "\r",
        " ",
        ";",
        "a",
        "7",
        "/dev/x",
        "-",
    ]

    @hypothesis.settings(max_examples=1000, deadline=None)
    @hypothesis.given(st.lists(st.sampled_from(pieces), max_size=14).map("".join))
    def run(text: str) -> None:
        data = text.encode()
        hypothesis.assume(data.strip())
        ours: list[str] | str | None
        try:
            ours = conf.active_list(data)
        except (conf.SyntaxProblem, HostError):
            ours = "refused"
        for parser in parsers:
            assert parser.read(data) == ours

    run()


def test_the_lens_reads_the_result_wherever_it_reads_the_original(lens: Lens) -> None:
    @MANY
    @hypothesis.given(files(plain=True), DEVICES, VERSIONS)
    def run(data: bytes, devices: list[str], version: str) -> None:
        before = lens.read(data)
        assert before is not None
        default = conf.built_in(version)
        result = conf.merge(data, devices, default)
        after = lens.read(result)
        assert after is not None, result

        def others(tree: list[tuple[str, str]]) -> list[str]:
            return [value for path, value in tree if "cgroup_device_acl" not in path and "iommufd.host:" not in value]

        assert others(after) == others(before)
        wanted = expected(data, devices, default)
        first = [
            value
            for path, value in after
            if path.startswith(("/parsed/cgroup_device_acl/", "/parsed/cgroup_device_acl[1]/"))
        ]
        assert first == (wanted or [])

    run()


def test_the_lens_reads_a_list_that_ended_with_a_comma(lens: Lens) -> None:
    data = b'cgroup_device_acl = [\n    "/dev/null",\n]\n'
    assert lens.read(data) is None
    result = conf.merge(data, OURS, DEFAULT)
    assert lens.read(result) is not None
    assert conf.strip(result, DEFAULT) == data


def shipped() -> list[pathlib.Path]:
    """qemu.conf as distributions ship it: those of the recordings, and those named in the environment."""
    named = [pathlib.Path(path) for path in os.environ.get("IOMMUFD_HOST_QEMU_CONF", "").split(":") if path]
    return sorted((SHARED / "data" / "qemu-conf").glob("qemu.conf*")) + named


@pytest.mark.parametrize("path", shipped() or [None], ids=str)
def test_shipped_files_differ_only_in_the_inserted_lines(path: pathlib.Path | None) -> None:
    if path is None:
        pytest.skip(f"no qemu.conf in {SHARED} and IOMMUFD_HOST_QEMU_CONF")
    data = path.read_bytes()
    default = conf.commented_default(data)
    assert default is not None
    version = path.name.split("-")[1] if path.name.count("-") else None
    assert version is None or default == conf.built_in(version)
    result = conf.merge(data, OURS, default)
    before, after = data.splitlines(), result.splitlines()
    at = before.index(b"#]") + 1
    added = len(after) - len(before)
    assert after[:at] == before[:at]
    assert after[at + added :] == before[at:]
    assert conf.active_list(result) == [*default, *OURS]
    assert conf.strip(result, default) == data


# -- the forms one by one ----------------------------------------------------------------------------------------------


def test_commented_default_becomes_a_list_of_ours_below_it() -> None:
    result = conf.merge(SHIPPED_9, ["/dev/iommu"], conf.commented_default(SHIPPED_9) or [])
    assert (
        b'#    "/dev/ptmx", "/dev/kvm"\n#]\n'
        b'# iommufd.host: libvirt\'s default list and "/dev/iommu"\n'
        b"cgroup_device_acl = [\n"
        b'    "/dev/null", "/dev/full", "/dev/zero",\n'
        b'    "/dev/random", "/dev/urandom", "/dev/ptmx",\n'
        b'    "/dev/kvm",\n'
        b'    "/dev/iommu"\n'
        b"]\n#\n# RDMA"
    ) in result


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param('X = [ "a", "b" ]\n', 'X = [ "a", "b", "/dev/iommu" ]\n', id="one line"),
        pytest.param('X = [\n  "a",\n  "b"\n]\n', 'X = [\n  "a",\n  "b",\n  "/dev/iommu"\n]\n', id="many lines"),
        pytest.param('X = [ "a", ]\n', 'X = [ "a", "/dev/iommu" ]\n', id="trailing comma"),
        pytest.param("X=['a']\n", "X=['a', \"/dev/iommu\"]\n", id="single quotes"),
        pytest.param('X = ["""a"""]\n', 'X = ["""a""", "/dev/iommu"]\n', id="triple quotes"),
        pytest.param("X = []\n", 'X = [ "/dev/iommu"]\n', id="empty"),
        pytest.param('X = [ "a" ]', 'X = [ "a", "/dev/iommu" ]', id="no final newline"),
        pytest.param('X = [ "a" ]\nX = [ "b" ]\n', 'X = [ "a", "/dev/iommu" ]\nX = [ "b" ]\n', id="twice"),
    ],
)
def test_a_list_of_somebody_else_gets_only_our_entries(before: str, after: str) -> None:
    data = before.replace("X", "cgroup_device_acl").encode()
    result = conf.merge(data, ["/dev/iommu"], DEFAULT)
    lines = result.decode().replace("cgroup_device_acl", "X").splitlines(keepends=True)
    mark = [line for line in lines if "iommufd.host" in line]
    assert len(mark) == 1
    assert "".join(line for line in lines if line not in mark) == after
    assert conf.own_devices(result) == ["/dev/iommu"]
    assert conf.strip(result, DEFAULT) == data


def test_crlf_is_kept() -> None:
    data = b'user = "x"\r\n\r\ncgroup_device_acl = [\r\n  "/dev/null"\r\n]\r\n'
    result = conf.merge(data, ["/dev/iommu"], DEFAULT)
    assert b"\n" not in result.replace(b"\r\n", b"")
    assert conf.strip(result, DEFAULT) == data


def test_an_entry_that_was_there_is_not_ours() -> None:
    data = b'cgroup_device_acl = [ "/dev/null", "/dev/iommu" ]\n'
    assert conf.merge(data, ["/dev/iommu"], DEFAULT) == data
    assert conf.strip(data, DEFAULT) == data


def test_an_entry_added_by_somebody_to_our_list_stays() -> None:
    ours = conf.merge(SHIPPED_9, OURS, conf.built_in("9.0.0"))
    edited = ours.replace(b'    "/dev/iommu",', b'    "/dev/iommu",\n    "/dev/net/tun",')
    stripped = conf.strip(edited, conf.built_in("9.0.0"))
    assert conf.active_list(stripped) == [*conf.built_in("9.0.0"), "/dev/net/tun"]
    assert conf.own_devices(stripped) == []
    again = conf.merge(edited, OURS, conf.built_in("9.0.0"))
    assert conf.active_list(again) == [*conf.built_in("9.0.0"), "/dev/net/tun", *OURS]


def test_our_list_follows_a_new_default() -> None:
    old = conf.merge(b"", ["/dev/iommu"], conf.built_in("9.0.0"))
    new = conf.merge(old, ["/dev/iommu"], conf.built_in("12.8.0"))
    assert conf.active_list(new) == [*conf.built_in("12.8.0"), "/dev/iommu"]


def test_a_commented_example_is_not_the_default() -> None:
    assert conf.commented_default(b'#cgroup_device_acl = [ "/dev/example" ]\n' + SHIPPED_9) == conf.built_in("9.0.0")
    assert conf.commented_default(b'#cgroup_device_acl = [ "/dev/example" ]\n') is None


@pytest.mark.parametrize(
    ("version", "kvm", "userfaultfd"),
    [("9.0.0-4+deb12u2", True, False), ("11.3.0", True, True), ("12.8.0", False, True), (None, True, True)],
)
def test_built_in_lists(version: str | None, kvm: bool, userfaultfd: bool) -> None:
    devices = conf.built_in(version)
    assert ("/dev/kvm" in devices, "/dev/userfaultfd" in devices) == (kvm, userfaultfd)


@pytest.mark.parametrize(
    ("text", "line"),
    [('user = "x\n', 1), ("a = 1\nb\n", 2), ('\ncgroup_device_acl = [ "a" # no\n ]', 2), ("a = 1 b = 2", 1)],
)
def test_a_file_that_libvirt_refuses_is_not_edited(text: str, line: int) -> None:
    with pytest.raises(conf.SyntaxProblem, match=f"^line {line}: "):
        conf.merge(text.encode(), OURS, DEFAULT)


@pytest.mark.parametrize("text", ['cgroup_device_acl = "a"', "cgroup_device_acl = [ 1 ]", "cgroup_device_acl = 1"])
def test_a_setting_that_is_no_list_of_strings(text: str) -> None:
    with pytest.raises(HostError, match="not a list of strings"):
        conf.merge(text.encode(), OURS, DEFAULT)


def test_check_notices_an_edit_that_changes_another_setting() -> None:
    with pytest.raises(HostError, match="could not be edited safely"):
        conf.check(b'user = "a"\n', b'user = "b"\n', None)
    with pytest.raises(HostError, match="could not be edited safely"):
        conf.check(b'user = "a"\n', b'user = "a"\n', ["/dev/iommu"])


def test_other_settings_are_read_as_libvirt_does() -> None:
    data = b'user = \'+0\'\nmax_files = 7\nsecurity_driver = [ "none", "x" ]\nuser = "late"\n# group = "no"\n'
    assert conf.settings(data) == {"user": "+0", "max_files": "7", "security_driver": ["none", "x"]}
