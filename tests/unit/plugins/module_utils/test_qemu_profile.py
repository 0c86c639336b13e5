# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _qemu_profile as profile
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._qemu_source import Traits

NEW = Traits("10.0.13", option=False, kconfig=True)
OLD = Traits("7.2.0", option=False, kconfig=False)
PATCHED = Traits("8.0.0", option=True, kconfig=False)


def request(**values: t.Any) -> profile.Request:
    given: dict[str, t.Any] = {
        "iommufd": "auto",
        "profile": "passthrough",
        "targets": ["x86_64"],
        "features": {},
        "devices": {},
        "patches": [],
    }
    return profile.parse_request({**given, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"targets": []}, "at least one"),
        ({"targets": ["x86 64"]}, "targets\\[0\\]"),
        ({"features": {"iommufd": True}}, "the option iommufd decides"),
        ({"devices": {"CONFIG_IOMMUFD": True}}, "the option iommufd decides"),
        ({"features": {"a b": True}}, "a feature of configure"),
        ({"features": {"slirp": "maybe"}}, "true or false"),
        ({"devices": {"lower": True}}, "a Kconfig symbol"),
    ],
)
def test_what_is_no_request(values: dict[str, t.Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        request(**values)


def test_enabled_is_refused_where_it_cannot_be() -> None:
    wanted = request(iommufd="enabled")
    profile.require_possible(wanted, "Linux", NEW)
    profile.require_possible(wanted, "Linux", PATCHED)
    with pytest.raises(HostError, match=r"QEMU 7\.2\.0 has no iommufd\. QEMU has iommufd since 9\.0\."):
        profile.require_possible(wanted, "Linux", OLD)
    with pytest.raises(HostError, match="iommufd is supported only on Linux, and this builder runs FreeBSD"):
        profile.require_possible(wanted, "FreeBSD", None)
    with pytest.raises(HostError, match="the target ppc64 cannot have it"):
        profile.require_possible(request(iommufd="enabled", profile="default", targets=["ppc64"]), "Linux", NEW)
    with pytest.raises(OptionError, match="with profile passthrough one of x86_64"):
        profile.require_possible(request(targets=["x86_64", "ppc64"]), "Linux", NEW)
    for other in ("auto", "disabled"):
        profile.require_possible(request(iommufd=other), "FreeBSD", OLD)


@pytest.mark.parametrize(
    ("iommufd", "traits", "wants"),
    [
        ("enabled", NEW, True),
        ("disabled", NEW, False),
        ("auto", NEW, True),
        ("auto", OLD, None),
        ("disabled", OLD, False),
        ("enabled", PATCHED, True),
    ],
)
def test_what_the_binary_must_say(iommufd: str, traits: Traits, wants: bool | None) -> None:
    assert profile.wants_iommufd(request(iommufd=iommufd), traits) is wants


def test_kconfig_is_told_by_a_device_file() -> None:
    file = "configs/devices/x86_64-softmmu/iommufd-host.mak"
    enabled = profile.device_files(request(iommufd="enabled", devices={"PVPANIC_PCI": True}), NEW)[file]
    assert {"CONFIG_Q35=y", "CONFIG_VFIO_PCI=y", "CONFIG_IOMMUFD=y", "CONFIG_PVPANIC_PCI=y"} <= set(enabled.split())
    assert "PXB" not in enabled
    assert "CONFIG_IOMMUFD=n\n" in profile.device_files(request(iommufd="disabled"), NEW)[file]
    assert "IOMMUFD" not in profile.device_files(request(), OLD)[file]
    whole = request(iommufd="disabled", profile="default")
    assert profile.device_files(whole, NEW)[file] == "include default.mak\nCONFIG_IOMMUFD=n\n"
    assert profile.device_files(request(profile="default"), NEW) == {}


def test_an_option_is_told_by_its_switch() -> None:
    assert "--enable-iommufd" in profile.configure_arguments(request(iommufd="enabled"), PATCHED, "x86_64")
    assert "--disable-iommufd" in profile.configure_arguments(request(iommufd="disabled"), PATCHED, "x86_64")
    for traits, iommufd in ((PATCHED, "auto"), (NEW, "enabled")):
        arguments = profile.configure_arguments(request(iommufd=iommufd), traits, "x86_64")
        assert not any(argument.endswith("-iommufd") for argument in arguments)


def test_arguments_of_the_small_one() -> None:
    arguments = profile.configure_arguments(request(features={"slirp": True, "seccomp": False}), NEW, "x86_64")
    assert "--without-default-devices" in arguments and "--with-devices-x86_64=iommufd-host" in arguments
    assert "--enable-kvm" in arguments and "--disable-tcg" in arguments and "--disable-download" in arguments
    assert "--disable-debug-info" in arguments
    assert "--enable-slirp" in arguments and "--disable-seccomp" in arguments and "--enable-seccomp" not in arguments
    foreign = profile.configure_arguments(request(targets=["aarch64"]), NEW, "x86_64")
    assert "--disable-kvm" in foreign and "--enable-tcg" in foreign
    assert "CONFIG_ARM_VIRT=y" in profile.device_files(request(targets=["aarch64"]), NEW).popitem()[1]


def test_what_the_distribution_names() -> None:
    named = "--enable-gtk --enable-vte\n--audio-drv-list=pa,alsa\n--enable-sdl\n--prefix=/usr\n--enable-x=$(id)\n"
    found = profile.distribution_arguments(named, request(profile="distribution", features={"sdl": False}))
    assert found == ["--enable-gtk", "--enable-vte", "--audio-drv-list=pa,alsa"]


def test_packages_follow_the_features() -> None:
    found = profile.packages(request(features={"slirp": True, "seccomp": False}), NEW)
    assert "libslirp-dev" in found and "libseccomp-dev" not in found and "seabios" in found


def test_both_mechanisms_have_a_summary() -> None:
    assert profile.summary("  iommufd support : YES\n", {"x86_64": ""}) == {
        "text": "iommufd support: YES",
        "targets": {"x86_64": True},
    }
    assert profile.summary("  iommufd support : NO 1\n", {"x86_64": ""})["text"] == "iommufd support: NO"
    both = profile.summary("", {"x86_64": "CONFIG_IOMMUFD=y\n", "arm": "CONFIG_VFIO=y\n"})
    assert both == {"text": "iommufd support: YES", "targets": {"x86_64": True, "arm": False}}


def test_a_stub_that_a_tree_lacks() -> None:
    stubs, header = "hw/cxl/cxl-host-stubs.c", "include/hw/cxl/cxl_host.h"
    tree = {stubs: "void cxl_machine_init(void) {};\n", header: "GSList *cxl_fmws_get_all_sorted(void);\n"}

    def missing(tree: dict[str, str], **values: t.Any) -> dict[str, str]:
        return profile.missing_stubs(profile.Request(**values), lambda name: tree.get(name, ""))

    found = missing(tree)
    assert list(found) == [stubs] and "GSList *cxl_fmws_get_all_sorted(void)\n{" in found[stubs]
    assert missing({**tree, stubs: tree[stubs] + found[stubs]}) == {}  # a later tree that has it
    assert missing({stubs: tree[stubs]}) == {}  # 10.0, which does not know of it
    assert missing({}) == {}
    assert missing(tree, profile="default") == missing(tree, devices={"PXB": True, "CXL": True}) == {}


def test_progress_of_ninja() -> None:
    assert profile.progress("[312/1293] Compiling C object") == (312, 1293)
    assert profile.progress("WARNING: [1/2] x") is None


COMPILER = """\
[1/3] Compiling C object libcommon.a.p/a.c.o
[2/3] Compiling C object libcommon.a.p/b.c.o
FAILED: libcommon.a.p/b.c.o
cc -I. -c ../b.c
../b.c: In function 'b':
../b.c:3:5: error: 'x' undeclared (first use in this function)
    3 |     x = 1;
      |     ^
[3/3] Compiling C object libcommon.a.p/c.c.o
ninja: build stopped: subcommand failed.
"""


@pytest.mark.parametrize(
    ("text", "first", "count"),
    [
        ("checking\n../meson.build:1:0: ERROR: Dependency glib-2.0 not found\nA full log\n", "../meson.build:1", 2),
        ("/usr/bin/ld: a.o: undefined reference to `f'\ncollect2: error: ld\n", "/usr/bin/ld", 2),
        ("[1/9] x\nfatal error: error writing to /tmp/x.s: No space left on device\n", "fatal error", 1),
        ("it just ended\n", "it just ended", 1),
    ],
)
def test_the_first_real_error(text: str, first: str, count: int) -> None:
    found = profile.first_error(text.splitlines())
    assert found[0].startswith(first) and len(found) == count


def test_the_first_error_of_a_compiler() -> None:
    assert profile.first_error(COMPILER.splitlines()) == [
        "../b.c:3:5: error: 'x' undeclared (first use in this function)",
        "    3 |     x = 1;",
        "      |     ^",
    ]
