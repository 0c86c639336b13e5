# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _boot, _boot_entries
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Plan, RemoveFile, WriteFile

MACHINE = "0123456789abcdef0123456789abcdef"
RELEASE = "6.17.1-300.fc43.x86_64"
RECORD = _boot_entries.RECORD


class Machine(Host):
    """A synthetic host with entries in files; plans for it can be carried out, as far as they are about files."""

    def __init__(self, root: pathlib.Path) -> None:
        super().__init__(str(root))
        self.base = root
        self.put("/etc/machine-id", MACHINE + "\n")
        self.put("/proc/sys/kernel/osrelease", RELEASE + "\n")
        self.put("/proc/cmdline", "root=UUID=1 ro rhgb quiet\n")
        self.put(f"/usr/lib/modules/{RELEASE}/config", "CONFIG_INTEL_IOMMU=y\n")
        self.put("/sys/firmware/acpi/tables/DMAR")

    def put(self, path: str, text: str = "", mode: int = 0o644) -> None:
        target = self.base / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode("utf-8", "surrogateescape"))
        target.chmod(mode)

    def entry(self, name: str, options: str = "root=UUID=1 ro rhgb quiet", boot: str = "/boot") -> str:
        path = f"{boot}/loader/entries/{name}.conf"
        self.put(path, f"title Fedora Linux\nversion {name}\nlinux /vmlinuz-{name}\noptions {options}\n")
        return path

    def contents(self) -> dict[str, bytes]:
        files = [path for path in self.base.rglob("*") if path.is_file()]
        return {f"/{path.relative_to(self.base)}": path.read_bytes() for path in files}

    def carry_out(self, plan: Plan, steps: int = 1000) -> None:
        """The first steps of a plan, beneath this root."""
        for step in plan.steps[:steps]:
            if isinstance(step, WriteFile):
                self.put(step.path, step.content.decode("utf-8", "surrogateescape"))
            elif isinstance(step, RemoveFile):
                (self.base / step.path[1:]).unlink()


def fedora(root: pathlib.Path) -> Machine:
    host = Machine(root)
    host.entry(f"{MACHINE}-{RELEASE}")
    host.entry(f"{MACHINE}-6.16.4-200.fc43.x86_64", "root=UUID=1 ro console=tty0 console=ttyS0 crashkernel=1G")
    host.entry(f"{MACHINE}-0-rescue", "root=UUID=1 ro")
    host.put("/etc/kernel/cmdline", "root=UUID=1 ro rhgb quiet")
    host.put("/etc/default/grub", 'GRUB_CMDLINE_LINUX="rhgb quiet"\nGRUB_ENABLE_BLSCFG=true\n')
    host.put("/boot/grub2/grub.cfg", "insmod blscfg\nblscfg\n")
    host.put("/usr/sbin/grub2-mkconfig", "", 0o755)
    host.put("/usr/sbin/grubby", "", 0o755)
    return host


def systemd_boot(root: pathlib.Path) -> Machine:
    host = Machine(root)
    host.entry(f"{MACHINE}-{RELEASE}", boot="/boot/efi")
    host.put("/boot/efi/loader/loader.conf", "timeout 3\n")
    host.put("/etc/kernel/cmdline", "root=UUID=1 ro\n")
    return host


def zipl_bls(root: pathlib.Path) -> Machine:
    host = Machine(root)
    host.entry(f"{MACHINE}-{RELEASE}", "root=/dev/dasda1 ro")
    host.put("/etc/zipl.conf", "[defaultboot]\ndefaultauto\n")
    host.put("/usr/sbin/zipl", "", 0o755)
    return host


def zipl_conf(root: pathlib.Path) -> Machine:
    host = Machine(root)
    host.put("/usr/sbin/zipl", "", 0o755)
    host.put(
        "/etc/zipl.conf",
        "[ubuntu]\ntarget = /boot\nimage = /boot/vmlinuz\nparameters = root=UUID=1 crashkernel=196M\n"
        '[old]\ntarget = /boot\nimage = /boot/vmlinuz.old\nparameters = "root=UUID=1"\n',
    )
    return host


ALL = [fedora, systemd_boot, zipl_bls, zipl_conf]
LOADERS = {fedora: "grub", systemd_boot: "systemd-boot", zipl_bls: "zipl", zipl_conf: "zipl"}


@pytest.mark.parametrize("make", ALL)
def test_there_and_back(tmp_path: pathlib.Path, make: t.Callable[[pathlib.Path], Machine]) -> None:
    host = make(tmp_path)
    fresh = host.contents()
    decided = _boot.decide_present(host, ["iommu.strict=1"], True)
    assert decided.loader is not None
    assert (decided.loader.name, decided.args) == (LOADERS[make], ["intel_iommu=on", "iommu.strict=1"])
    host.carry_out(decided.plan)
    files = {path: text for path, text in host.contents().items() if "entries" in path or "zipl.conf" in path}
    lines = [line for text in files.values() for line in text.decode().splitlines() if line[:6] in ("option", "parame")]
    assert lines and all(line.rstrip('"').endswith(" intel_iommu=on iommu.strict=1") for line in lines)
    again = _boot.decide_present(host, ["iommu.strict=1"], True)
    assert (again.plan.summary(), again.args) == ([], decided.args)

    fewer = _boot.decide_present(host, [], True)
    host.carry_out(fewer.plan)
    assert not any(b"iommu.strict" in text for text in host.contents().values())
    assert _boot.decide_present(host, [], True).plan.summary() == []

    host.carry_out(_boot.decide_absent(host, []).plan)
    assert host.contents() == fresh
    assert _boot.decide_absent(host, []).plan.summary() == []


@pytest.mark.parametrize("make", ALL)
def test_killed_after_any_step(tmp_path: pathlib.Path, make: t.Callable[[pathlib.Path], Machine]) -> None:
    host = make(tmp_path)
    fresh = host.contents()
    steps = len(_boot.decide_present(host, [], True).plan.steps)
    for done in range(steps + 1):
        host.carry_out(_boot.decide_present(host, [], True).plan, done)
        host.carry_out(_boot.decide_absent(host, []).plan)
        assert host.contents() == fresh
    host.carry_out(_boot.decide_present(host, [], True).plan)
    complete = host.contents()
    for done in range(steps + 1):
        host.carry_out(_boot.decide_absent(host, []).plan, done)
        host.carry_out(_boot.decide_present(host, [], True).plan)
        assert host.contents() == complete


def test_what_others_have_stays_and_what_they_turned_off_is_turned_on_behind_it(tmp_path: pathlib.Path) -> None:
    host = fedora(tmp_path)
    theirs = host.entry(f"{MACHINE}-theirs", "root=UUID=1 intel_iommu=on ro")
    off = host.entry(f"{MACHINE}-off", "root=UUID=1 intel_iommu=on intel_iommu=off")
    fresh = host.contents()
    decided = _boot.decide_present(host, [], True)
    assert "intel_iommu=off is configured (/boot/loader/entries/" in decided.iommu.reason
    host.carry_out(decided.plan)
    assert host.contents()[theirs] == fresh[theirs]
    assert host.contents()[off].endswith(b"options root=UUID=1 intel_iommu=on intel_iommu=off intel_iommu=on\n")
    assert f"intel_iommu=on {theirs}\n" in host.contents()[RECORD].decode()
    host.carry_out(_boot.decide_absent(host, []).plan)
    assert host.contents() == fresh


def test_the_entry_of_a_new_kernel_gets_it_and_gives_it_back(tmp_path: pathlib.Path) -> None:
    host = fedora(tmp_path)
    host.carry_out(_boot.decide_present(host, [], True).plan)
    bare = host.entry(f"{MACHINE}-6.18.0", "root=UUID=1 ro")
    made = host.entry(f"{MACHINE}-6.18.1", host.contents()["/etc/kernel/cmdline"].decode())
    assert host.contents()[made].endswith(b"quiet intel_iommu=on\n")
    decided = _boot.decide_present(host, [], True)
    assert decided.plan.summary() == [f"write {bare}"]
    host.carry_out(decided.plan)
    host.carry_out(_boot.decide_absent(host, []).plan)
    assert not any(b"intel_iommu" in text for text in host.contents().values())


def test_entries_of_others_are_left_alone(tmp_path: pathlib.Path) -> None:
    host = systemd_boot(tmp_path)
    host.put("/boot/efi/loader/entries/memtest.conf", "title Memtest\nefi /memtest.efi\noptions x\n")
    host.put("/boot/efi/loader/entries/other.conf", f"machine-id {'f' * 32}\nlinux /k\noptions x\n")
    host.put("/boot/efi/loader/entries/x.conf.bak", "linux /k\noptions x\n")
    changed = [step.subject for step in _boot.decide_present(host, [], True).plan.steps]
    assert changed == [RECORD, f"/boot/efi/loader/entries/{MACHINE}-{RELEASE}.conf", "/etc/kernel/cmdline"]


def test_bytes_of_others_survive(tmp_path: pathlib.Path) -> None:
    host = systemd_boot(tmp_path)
    path = "/boot/efi/loader/entries/x.conf"
    host.put(path, "title caf\udce9\r\nlinux /k\r\noptions a\r\n")
    host.carry_out(_boot.decide_present(host, [], True).plan)
    assert host.contents()[path] == b"title caf\xe9\r\nlinux /k\r\noptions a intel_iommu=on\r\n"


def test_zipl_runs_after_its_files_and_again_where_they_are_put_back(tmp_path: pathlib.Path) -> None:
    plan = _boot.decide_present(zipl_bls(tmp_path), [], True).plan
    names = plan.summary()
    assert names.index("have zipl install the boot entries") == names.index(f"write {plan.steps[2].subject}") + 1
    assert "write the old entries again" in names[1]


def test_zipl_interrupted_before_it_ran_runs(tmp_path: pathlib.Path) -> None:
    host = zipl_bls(tmp_path)
    host.carry_out(_boot.decide_present(host, [], True).plan)
    host.put("/boot/bootmap")
    os.utime(tmp_path / "boot/bootmap", (1000, 1000))
    assert _boot.decide_present(host, [], True).plan.summary() == ["have zipl install the boot entries"]


def test_sections_of_zipl_that_cannot_be_told_apart_are_refused(tmp_path: pathlib.Path) -> None:
    host = zipl_conf(tmp_path)
    text = (tmp_path / "etc/zipl.conf").read_text()
    host.put("/etc/zipl.conf", text.replace('"root=UUID=1"', '"root=UUID=1 intel_iommu=on"'))
    with pytest.raises(HostError, match=r"Some sections of /etc/zipl\.conf have intel_iommu=on"):
        _boot.decide_present(host, [], True)
    host.put("/etc/zipl.conf", text + "[third]\nimage=/boot/x\n")
    with pytest.raises(HostError, match="no parameters"):
        _boot.decide_present(host, [], True)


def test_unified_kernel_images_are_refused_where_something_is_needed(tmp_path: pathlib.Path) -> None:
    host = systemd_boot(tmp_path)
    host.put("/boot/efi/EFI/Linux/debian.efi")
    with pytest.raises(HostError, match=r"unified kernel images \(/boot/efi/EFI/Linux/debian.efi\).*kernel-install"):
        _boot.decide_present(host, [], True)
    host.put(f"/usr/lib/modules/{RELEASE}/config", "CONFIG_INTEL_IOMMU=y\nCONFIG_INTEL_IOMMU_DEFAULT_ON=y\n")
    assert _boot.decide_present(host, [], True).plan.summary() == []


def test_what_cannot_be_overridden_is_refused_with_its_place(tmp_path: pathlib.Path) -> None:
    host = fedora(tmp_path)
    path = host.entry("off", "root=UUID=1 iommu=off")
    with pytest.raises(Refusal, match=f"iommu=off is among.*{path}"):
        _boot.decide_present(host, [], True)


def test_kernelopts_are_read_where_rhel_8_kept_them(tmp_path: pathlib.Path) -> None:
    host = fedora(tmp_path)
    host.entry("old", "$kernelopts $tuned_params")
    host.put("/boot/grub2/grubenv", "# GRUB Environment Block\nkernelopts=root=UUID=1 iommu=off \n###")
    with pytest.raises(Refusal, match="iommu=off"):
        _boot.decide_present(host, [], True)


def test_which_of_two_boot_loaders_started_the_host(tmp_path: pathlib.Path) -> None:
    host = fedora(tmp_path)
    host.put("/boot/efi/loader/loader.conf")
    assert _boot.find_boot_loader(host).name == "grub"
    path = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    host.put(path)
    (tmp_path / path[1:]).write_bytes(b"\x06\0\0\0" + "systemd-boot 257.9\0".encode("utf-16-le"))
    assert _boot.find_boot_loader(host).name == "systemd-boot"


@pytest.mark.parametrize("make", [fedora, systemd_boot])
def test_entries_are_replaced_for_a_boot_loader(
    tmp_path: pathlib.Path, make: t.Callable[[pathlib.Path], Machine]
) -> None:
    steps = [step for step in _boot.decide_present(make(tmp_path), [], True).plan.steps if isinstance(step, WriteFile)]
    entries = [step.path for step in steps if "/loader/entries/" in step.path]
    assert entries
    assert [step.path for step in steps if step.for_boot_loader] == entries
