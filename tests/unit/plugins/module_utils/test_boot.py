# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import struct
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _boot, _boot_loader, _grub_config
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, FileState, own_header, write_atomic
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan

DROP_IN = "/etc/default/grub.d/60-iommufd-host.cfg"
CONFIG = "/boot/grub/grub.cfg"
ENTRIES = """\
### BEGIN /etc/grub.d/10_linux ###
menuentry 'Debian GNU/Linux' {{
\tlinux\t/boot/vmlinuz-6.12 root=UUID=1 ro {linux} {default}
\tinitrd\t/boot/initrd.img-6.12
}}
submenu 'Advanced options' {{
\tmenuentry 'recovery mode' {{
\t\tlinux\t/boot/vmlinuz-6.12 root=UUID=1 ro single {linux}
\t}}
}}
### END /etc/grub.d/10_linux ###
### BEGIN /etc/grub.d/40_custom ###
menuentry 'memtest' {{
\tlinux\t/boot/memtest quiet
}}
### END /etc/grub.d/40_custom ###
"""


class Debian(Host):
    """A synthetic host with GRUB."""

    def __init__(self, root: pathlib.Path, linux: str = "", default: str = "quiet", table: str = "DMAR") -> None:
        super().__init__(str(root))
        self.base = root
        self.put(
            "/etc/default/grub",
            f'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="{default}"\nGRUB_CMDLINE_LINUX="{linux}"\n',
        )
        self.entries(linux, default)
        self.put("/usr/sbin/grub-mkconfig", "for x in ${sysconfdir}/default/grub.d/*.cfg ; do")
        (root / "usr/sbin/grub-mkconfig").chmod(0o755)
        self.put("/proc/sys/kernel/osrelease", "6.12\n")
        self.put("/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-6.12 root=UUID=1 ro {linux} {default}\n")
        self.kernel(
            "CONFIG_INTEL_IOMMU=y\nCONFIG_INTEL_IOMMU_DEFAULT_ON_INTGPU_OFF=y\nCONFIG_AMD_IOMMU=y\nCONFIG_VIRTIO_IOMMU=m\nCONFIG_ARM_SMMU_V3=y\n"
        )
        if table:
            self.put(f"/sys/firmware/acpi/tables/{table}")

    def put(self, path: str, text: str = "") -> None:
        target = self.base / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def kernel(self, config: str) -> None:
        self.put("/boot/config-6.12", config)

    def entries(self, linux: str, default: str) -> None:
        self.put(CONFIG, ENTRIES.format(linux=linux, default=default))

    def groups(self) -> None:
        (self.base / "sys/kernel/iommu_groups/0").mkdir(parents=True)


def test_a_kernel_with_the_iommu_on_by_default_needs_nothing(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.groups()
    decided = _boot.decide_present(host, [], True)
    assert (decided.args, decided.plan.summary(), decided.reasons) == ([], [], [])
    assert decided.iommu.kind == "VT-d"
    assert "CONFIG" not in decided.iommu.reason
    assert "/boot/config-6.12" in decided.iommu.reason


def test_a_kernel_that_leaves_it_off_needs_the_argument(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    decided = _boot.decide_present(host, [], True)
    assert decided.args == ["intel_iommu=on"]
    assert decided.plan.summary() == [f"write {DROP_IN}", f"write the boot entries ({CONFIG})"]
    assert decided.plan.steps[0].after == own_header() + 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"\n'
    assert decided.plan.steps[1].before == "quiet\n"
    assert decided.plan.steps[1].after == "intel_iommu=on quiet\n"
    assert decided.reasons == ["intel_iommu=on is not in effect in the running kernel yet"]


def test_what_others_turned_off_behind_us_is_turned_on_behind_them(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, default="quiet intel_iommu=off")
    decided = _boot.decide_present(host, [], True)
    assert decided.configured == "intel_iommu=on quiet intel_iommu=off intel_iommu=on"
    assert 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on"' in decided.plan.steps[0].after
    assert decided.reasons == ["intel_iommu=on is not in effect in the running kernel yet"]


def applied(host: Debian, decided: _boot.Decided, linux: str, default: str) -> None:
    """The host as applying the plan would leave it."""
    host.put(DROP_IN, decided.plan.steps[0].after)
    host.entries(linux, default)
    os.utime(host.base / DROP_IN[1:], (1000, 1000))


def test_a_second_run_has_nothing_to_do_and_the_reboot_stays_due(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, default="quiet intel_iommu=off")
    decided = _boot.decide_present(host, [], True)
    applied(host, decided, "intel_iommu=on", "quiet intel_iommu=off intel_iommu=on")
    again = _boot.decide_present(host, [], True)
    assert again.args == ["intel_iommu=on"]
    assert again.plan.summary() == []
    assert again.reasons == decided.reasons
    host.put("/proc/cmdline", "root=UUID=1 ro intel_iommu=on quiet intel_iommu=off intel_iommu=on\n")
    host.groups()
    assert _boot.decide_present(host, [], True).reasons == []


def test_a_run_killed_before_the_entries_were_written_writes_them(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    decided = _boot.decide_present(host, [], True)
    host.put(DROP_IN, decided.plan.steps[0].after)
    assert _boot.decide_present(host, [], True).plan.summary() == [f"write the boot entries ({CONFIG})"]
    # Entries that already have it, but are older than the file, may still have what the file had before.
    host.entries("intel_iommu=on", "quiet")
    os.utime(host.base / CONFIG[1:], (1000, 1000))
    assert _boot.decide_present(host, [], True).plan.summary() == [f"write the boot entries ({CONFIG})"]


def test_an_argument_that_others_have_configured_is_not_added_again(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, linux="intel_iommu=on")
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    decided = _boot.decide_present(host, ["quiet"], True)
    assert decided.args == []
    assert decided.plan.summary() == []


def test_one_entry_without_it_is_enough_to_write_them_all(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    decided = _boot.decide_present(host, [], True)
    applied(host, decided, "", "quiet intel_iommu=on")  # the recovery entry lacks it
    assert _boot.decide_present(host, [], True).plan.summary() == [f"write the boot entries ({CONFIG})"]


@pytest.mark.parametrize("table", ["IVRS", "IORT", "VIOT"])
def test_other_iommus_need_no_argument(tmp_path: pathlib.Path, table: str) -> None:
    host = Debian(tmp_path, table=table)
    host.groups()
    assert _boot.decide_present(host, [], True).args == []


def test_a_machine_without_an_iommu_is_told_so(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, table="")
    with pytest.raises(HostError, match="firmware announces no IOMMU"):
        _boot.decide_present(host, [], True)
    assert _boot.decide_present(host, ["nosmt"], False).args == ["nosmt"]


@pytest.mark.parametrize(("table", "argument"), [("IVRS", "amd_iommu=off"), ("DMAR", "iommu=off")])
def test_what_cannot_be_overridden_is_refused_by_name(tmp_path: pathlib.Path, table: str, argument: str) -> None:
    with pytest.raises(Refusal, match=argument):
        _boot.decide_present(Debian(tmp_path, default=f"quiet {argument}", table=table), [], True)


def test_off_by_hand_at_the_last_boot_takes_a_reboot_only(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.put("/proc/cmdline", "root=UUID=1 ro quiet intel_iommu=off\n")
    decided = _boot.decide_present(host, [], True)
    assert decided.plan.summary() == []
    assert decided.reasons == ["the running kernel was started with intel_iommu=off, which is not configured"]


def test_no_groups_without_a_reason_is_a_warning(tmp_path: pathlib.Path) -> None:
    decided = _boot.decide_present(Debian(tmp_path), [], True)
    assert decided.reasons == []
    assert "No device is in an IOMMU group" in decided.warnings[0]


def test_absent_takes_ours_out_and_nothing_else(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, linux="console=ttyS0")
    host.put(DROP_IN, own_header() + 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX iommu=pt"\n')
    host.entries("console=ttyS0 iommu=pt", "quiet")
    host.put("/proc/cmdline", "root=UUID=1 ro console=ttyS0 iommu=pt quiet\n")
    decided = _boot.decide_absent(host, [])
    assert decided.plan.summary() == [f"remove {DROP_IN}", f"write the boot entries ({CONFIG})"]
    assert decided.plan.steps[1].before == "console=ttyS0 iommu=pt quiet\n"
    assert decided.plan.steps[1].after == "console=ttyS0 quiet\n"
    assert decided.reasons == ["iommu=pt is still in effect in the running kernel"]


def test_absent_after_a_killed_absent_still_writes_the_entries(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.entries("intel_iommu=on", "quiet")
    assert _boot.decide_absent(host, []).plan.summary() == [f"write the boot entries ({CONFIG})"]


def test_absent_on_a_host_without_us_does_nothing(tmp_path: pathlib.Path) -> None:
    assert _boot.decide_absent(Debian(tmp_path, linux="intel_iommu=on"), []).plan.summary() == []


def test_a_foreign_file_at_our_path_is_left_alone(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.put(DROP_IN, 'GRUB_CMDLINE_LINUX="mine"\n')
    with pytest.raises(HostError, match="was not written by this collection"):
        _boot.decide_absent(host, [])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["/run/ostree-booted"], "rpm-ostree kargs"),
        (["/etc/default/u-boot"], "U-Boot"),
        (["/boot/extlinux/extlinux.conf"], "extlinux"),
        (["/boot/grub2/grub.cfg"], "GRUB without"),
        (["/usr/bin/grubby", "/boot/loader/loader.conf"], "not known"),
        ([], "not known"),
    ],
)
def test_other_boot_loaders_are_named_and_only_matter_where_something_is_needed(
    tmp_path: pathlib.Path, files: list[str], says: str
) -> None:
    host = Debian(tmp_path)
    (tmp_path / CONFIG[1:]).unlink()
    for path in files:
        host.put(path)
        (tmp_path / path[1:]).chmod(0o755)
    assert _boot.decide_present(host, [], True).loader is None
    with pytest.raises(HostError, match=f"{says}.*by hand: nosmt"):
        _boot.decide_present(host, ["nosmt"], True)


def test_drop_ins_of_others_are_read_in_order(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, linux="one")
    host.put("/etc/default/grub.d/10-x.cfg", 'GRUB_CMDLINE_LINUX="${GRUB_CMDLINE_LINUX} two"  # words\n')
    host.put("/etc/default/grub.d/20-x.cfg", "GRUB_CMDLINE_LINUX='only three'\n")
    host.put("/etc/default/grub.d/30-x.cfg.bak", "GRUB_CMDLINE_LINUX=no\n")
    assert _boot.Grub(host).foreign() == {"/etc/default/grub": ["only", "three", "quiet"]}


def test_past_the_iommu_only_when_asked(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    assert _boot.decide_present(host, [], True).args == []
    assert _boot.decide_present(host, [], True, passthrough=True).args == ["iommu=pt"]
    arm = Debian(tmp_path / "arm", table="")
    arm.put("/sys/class/iommu/smmu3.0x9050000/x")
    assert _boot.decide_present(arm, [], True, passthrough=True).args == ["iommu.passthrough=1"]
    assert _boot.decide_present(arm, [], False, passthrough=True).args == ["iommu.passthrough=1"]


@pytest.mark.parametrize(("nodes", "kind"), [([0, 2, 4], "SMMUv3"), ([0, 3], "SMMU"), ([0, 1, 2], None), ([], None)])
def test_the_smmu_of_an_arm_machine_is_in_its_iort(tmp_path: pathlib.Path, nodes: list[int], kind: str | None) -> None:
    host = Debian(tmp_path, table="")
    table = b"IORT".ljust(36, b"\0") + struct.pack("<III", len(nodes), 48, 0)
    for node in nodes:
        table += struct.pack("<BH", node, 20).ljust(20, b"\0")
    host.put("/sys/firmware/acpi/tables/IORT")
    (tmp_path / "sys/firmware/acpi/tables/IORT").write_bytes(table)
    assert _boot.read_iommu(host, {}).kind == kind


def test_a_kernel_without_the_driver_is_told_so(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path, table="IVRS")
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    with pytest.raises(HostError, match=r"built without CONFIG_AMD_IOMMU \(/boot/config-6.12\)"):
        _boot.decide_present(host, [], True)
    host.groups()  # whatever the file says
    assert _boot.decide_present(host, [], True).args == []


class TestGrubWithoutDropIns:
    """As SUSE and Arch have it."""

    @pytest.fixture
    def host(self, tmp_path: pathlib.Path) -> Debian:
        host = Debian(tmp_path, default="quiet intel_iommu=off")
        host.put("/usr/sbin/grub-mkconfig", ". /etc/default/grub")
        host.put("/usr/sbin/grub2-mkconfig", ". /etc/default/grub")
        (tmp_path / "usr/sbin/grub2-mkconfig").chmod(0o755)
        (tmp_path / "boot/grub2").mkdir()
        (tmp_path / CONFIG[1:]).rename(tmp_path / "boot/grub2/grub.cfg")
        return host

    def test_marked_lines_at_the_end(self, host: Debian) -> None:
        before = (host.base / "etc/default/grub").read_bytes()
        decided = _boot.decide_present(host, [], True)
        assert decided.plan.summary() == ["write /etc/default/grub", "write the boot entries (/boot/grub2/grub.cfg)"]
        after = decided.plan.steps[0].after
        assert after == before.decode() + (
            f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"  # {OWN_MARK}\n'
            f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on"  # {OWN_MARK}\n'
        )
        host.put("/etc/default/grub", after)
        again = _boot.decide_present(host, [], True)
        assert (again.args, again.loader and again.loader.owned()) == (["intel_iommu=on"], ["intel_iommu=on"])
        assert again.plan.summary() == ["write the boot entries (/boot/grub2/grub.cfg)"]
        assert _boot.decide_absent(host, []).plan.steps[0].after == before.decode()


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_generated_entries_are_replaced_for_a_boot_loader(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    config = tmp_path / "grub.cfg"
    config.write_text("old\n")
    for_boot_loader = []

    def write(path: str, state: FileState, boot: bool = False, **more: bool) -> None:
        for_boot_loader.append(more.get("for_boot_loader", boot))
        write_atomic(path, state)
        if interrupted and len(for_boot_loader) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(_boot_loader, "run", lambda argv, timeout=0.0, stdin="", **more: "### BEGIN new\n")
    monkeypatch.setattr(_boot_loader, "write_atomic", write)
    plan = Plan([_boot_loader._WriteEntries("write the boot entries", path=str(config))])
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            plan.apply()
    else:
        plan.apply()
    assert config.read_text() == ("old\n" if interrupted else "### BEGIN new\n")
    assert for_boot_loader == [True] * (2 if interrupted else 1)


def test_a_masked_drop_in_is_refused_before_anything_is_done(tmp_path: pathlib.Path) -> None:
    host = Debian(tmp_path)
    host.kernel("CONFIG_INTEL_IOMMU=y\n")
    (tmp_path / DROP_IN[1:]).parent.mkdir(parents=True)
    (tmp_path / DROP_IN[1:]).symlink_to("/dev/null")
    with pytest.raises(Refusal, match="is not a file that can be read"):
        _boot.decide_present(host, [], True)
    assert _boot.decide_absent(host, []).plan.summary() == []


TITLES = """\
set default="${{saved_entry}}"
### BEGIN /etc/grub.d/10_linux ###
menuentry '{system}' --class debian $menuentry_id_option 'gnulinux-simple-1' {{
}}
submenu '{more} {system}' $menuentry_id_option 'gnulinux-advanced-1' {{
\tmenuentry '{system}, {with_} Linux 6.12' $menuentry_id_option 'gnulinux-6.12-advanced-1' {{
\t}}
}}
"""
GERMAN = {"system": "Debian", "more": "Erweiterte Optionen f\u00fcr", "with_": "mit"}
ENGLISH = {"system": "Debian", "more": "Advanced options for", "with_": "with"}


@pytest.mark.parametrize(
    ("saved", "lost"),
    [
        ("", False),
        ("0", False),
        ("1>0", False),
        ("gnulinux-advanced-1>gnulinux-6.12-advanced-1", False),
        ("no such entry", False),  # nothing that this run could lose
        ("Erweiterte Optionen f\u00fcr Debian>Debian, mit Linux 6.12", True),
        ("1>Debian, mit Linux 6.12", True),
    ],
)
def test_an_entry_that_the_host_starts_by_name_is_not_lost(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, saved: str, lost: bool
) -> None:
    config = tmp_path / "grub.cfg"
    config.write_text(TITLES.format(**GERMAN))
    (tmp_path / "grubenv").write_text(f"# GRUB Environment Block\nsaved_entry={saved}\n#####")
    after = TITLES.format(**ENGLISH)
    monkeypatch.setattr(_boot_loader, "run", lambda argv, timeout=0.0, stdin="", **more: after)
    plan = Plan([_boot_loader._WriteEntries("write the boot entries", path=str(config))])
    if lost:
        with pytest.raises(HostError, match=f"has no entry '{saved}' any more"):
            plan.apply()
    else:
        plan.apply()
    assert config.read_text() == (TITLES.format(**GERMAN) if lost else after)


def test_entries_are_written_in_the_hosts_own_language_byte_for_byte(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(str(tmp_path))
    (tmp_path / "etc/default").mkdir(parents=True)
    (tmp_path / "etc/default/locale").write_text('#  File generated by update-locale\nLANG="de_DE"\nTZ=UTC\n')
    (tmp_path / "boot").mkdir()
    config = tmp_path / "boot/grub.cfg"
    config.write_text("old\n")
    program = tmp_path / "x-mkconfig"
    program.write_text('#!/bin/sh\nprintf \'### BEGIN %s%s f\\374r\\n\' "$LANG" "$LC_ALL"\n')
    program.chmod(0o755)
    check = tmp_path / "x-script-check"
    check.write_text("#!/bin/sh\nexec grep -aq f\n")
    check.chmod(0o755)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    step = _boot_loader._WriteEntries("write", path=str(config), command=str(tmp_path / "x"), host=host)
    Plan([step]).apply()
    assert config.read_bytes() == b"### BEGIN de_DE f\xfcr\n"


@pytest.mark.parametrize(("saved", "kernel"), [("", "6.12"), ("Advanced options for Debian>0", "6.13")])
def test_entries_that_were_last_written_in_english_stay_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, saved: str, kernel: str
) -> None:
    """By all titles where they are the same; where a kernel has gone since, by the one that is started."""
    (tmp_path / "grub.cfg").write_text(TITLES.format(**ENGLISH))
    (tmp_path / "grubenv").write_text(f"saved_entry={saved}\n")

    def run(argv: list[str], timeout: float, **more: t.Any) -> str:
        return TITLES.format(**(GERMAN if more.get("locale") else ENGLISH)).replace("6.12", kernel)

    monkeypatch.setattr(_boot_loader, "run", run)
    monkeypatch.setattr(_grub_config, "locale", lambda host: {"LANG": "de_DE.UTF-8"})
    Plan([_boot_loader._WriteEntries("write the boot entries", path=str(tmp_path / "grub.cfg"))]).apply()
    assert (tmp_path / "grub.cfg").read_text() == TITLES.format(**ENGLISH).replace("6.12", kernel)


def test_a_title_that_is_no_utf_8_is_not_lost_either(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host in Latin-1; the message can be shown."""
    config = tmp_path / "grub.cfg"
    config.write_bytes(TITLES.format(**GERMAN).encode("latin-1"))
    (tmp_path / "grubenv").write_bytes("saved_entry=Erweiterte Optionen f\u00fcr Debian>0\n".encode("latin-1"))
    monkeypatch.setattr(_boot_loader, "run", lambda argv, timeout=0.0, stdin="", **more: TITLES.format(**ENGLISH))
    with pytest.raises(HostError, match="has no entry 'Erweiterte Optionen f\ufffdr Debian>0' any more"):
        Plan([_boot_loader._WriteEntries("write the boot entries", path=str(config))]).apply()
    assert config.read_bytes() == TITLES.format(**GERMAN).encode("latin-1")
