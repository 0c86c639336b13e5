# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import bz2
import gzip
import lzma
import pathlib
import re
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _persistence as persistence
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._files import (
    FileState,
    former_path,
    temporary_path,
    write_atomic,
)
from ansible_collections.iommufd.host.plugins.module_utils._names import Disk, Names
from ansible_collections.iommufd.host.plugins.module_utils._persistence import (
    CONF,
    DRACUT,
    HOOK,
    RULE,
    SCRIPT,
    TAKEN,
    UNIT,
    UNIT_LINK,
    Entry,
    PutInFront,
    Rebuild,
    find_images,
    front,
    front_length,
    parse,
    plan_persistence,
    read_image,
    render,
    script_content,
)
from ansible_collections.iommufd.host.plugins.module_utils._plan import Command, Plan, RemoveFile, Step, WriteFile
from ansible_collections.iommufd.host.tests.unit.machine import Machine

RELEASE = "6.12.0"
IMAGE = f"/boot/initrd.img-{RELEASE}"
ENTRY = Entry("0000:01:00.0", "vfio-pci", "1b36:0010", Names("nvme", (), (Disk("nvme0n1", "S 1"),)))
OTHER = Entry("0000:15:00.0", "mlx5_vfio_pci", "15b3:101e")


def kept(*entries: Entry) -> dict[str, Entry]:
    return {entry.address: entry for entry in entries}


def cpio(files: dict[str, bytes]) -> bytes:
    """A cpio archive as `cpio -o -H newc` writes it."""
    out = b""
    for name, content in [*files.items(), ("TRAILER!!!", b"")]:
        numbers = [0, 0o100644, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + "".join(f"{number:08X}" for number in numbers).encode() + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + content
        out += b"\0" * (-len(out) % 4)
    return out + b"\0" * (-len(out) % 512)


def image_with(*entries: Entry, script: bytes | None = None) -> bytes:
    held = {"bin": b"x"}
    if entries:
        held["./etc/iommufd-host/devices.conf"] = render(entries)
        held["./etc/iommufd-host/devices.sh"] = script_content() if script is None else script
    return cpio({"./kernel/x86/microcode/GenuineIntel.bin": b"m" * 1001}) + gzip.compress(
        cpio({**held, "./usr": b"u"}), mtime=0
    )


@pytest.fixture
def server(machine: Machine) -> Machine:
    """Debian with initramfs-tools and one kernel."""
    machine.directory("/usr/lib/systemd/system")
    machine.directory(f"/usr/lib/modules/{RELEASE}")
    machine.file(IMAGE, image_with())
    for tool in ("mkinitramfs", "update-initramfs"):
        machine.file(f"/usr/sbin/{tool}", "#!/bin/sh\n")
        machine.at(f"/usr/sbin/{tool}").chmod(0o755)
    return machine


def plan(machine: Machine, *entries: Entry, claims: bool = True) -> list[Step]:
    return plan_persistence(machine.host, kept(*entries), lambda release, address: claims)


def carry_out(machine: Machine, steps: list[Step]) -> None:
    """Do the steps, with what systemctl and update-initramfs would do."""
    for step in steps:
        if isinstance(step, (WriteFile, RemoveFile, PutInFront)):
            step.apply()
        elif isinstance(step, Command) and "enable" in step.argv:
            machine.link(UNIT_LINK, UNIT)
        elif isinstance(step, Command) and "disable" in step.argv:
            machine.at(UNIT_LINK).unlink()
        elif isinstance(step, Rebuild):
            machine.file(IMAGE, image_with(*parse(machine.host.read_text(CONF) or "").values()))


def tree(machine: Machine) -> set[str]:
    """What lies in /etc, empty directories of others' included."""
    return {str(path.relative_to(machine.root)) for path in machine.at("/etc").rglob("*") if not path.is_dir()}


def test_entries_come_back_as_they_were_written_in_the_order_of_addresses() -> None:
    text = render([OTHER, ENTRY]).decode()
    assert list(parse(text).values()) == [ENTRY, OTHER]
    assert text.splitlines()[-2:] == [ENTRY.line, OTHER.line]


@pytest.mark.parametrize("line", ["", "# x y z", "0000:01:00.0", "0000:01:00.0 a;b 1b36:0010", "x vfio-pci 1b36:0010"])
def test_damaged_lines_are_passed_over(line: str) -> None:
    assert parse(f"{line}\n{ENTRY.line}\n") == kept(ENTRY)


def test_everything_is_written_once_and_then_nothing(server: Machine) -> None:
    steps = plan(server, ENTRY)
    assert [step.subject for step in steps] == [
        HOOK,
        SCRIPT,
        RULE,
        UNIT,
        "iommufd-host-devices.service",
        CONF,
        IMAGE,
    ]
    carry_out(server, steps)
    assert plan(server, ENTRY) == []


def test_undone_leaves_nothing(server: Machine) -> None:
    before = tree(server)
    image = server.at(IMAGE).read_bytes()
    carry_out(server, plan(server, ENTRY))
    assert server.at(IMAGE).read_bytes() != image
    steps = plan(server)
    assert isinstance(steps[-1], RemoveFile)
    assert steps[-1].subject == HOOK, "the mark that images may hold our files goes last"
    carry_out(server, steps)
    assert tree(server) == before
    assert server.at(IMAGE).read_bytes() == image
    assert plan(server) == []


def test_the_list_goes_first_and_what_reads_it_after_the_images(server: Machine) -> None:
    carry_out(server, plan(server, ENTRY))
    steps = [step.subject for step in plan(server)]
    assert steps[:2] == [CONF, IMAGE]
    assert set(steps[2:]) == {"iommufd-host-devices.service", RULE, UNIT, SCRIPT, HOOK}


def test_a_clean_host_needs_nothing_to_keep_nothing(server: Machine) -> None:
    assert plan(server) == []


@pytest.mark.parametrize("done", range(8))
def test_a_run_that_was_killed_is_completed(server: Machine, done: int) -> None:
    carry_out(server, plan(server, ENTRY)[:done])
    carry_out(server, plan(server, ENTRY))
    assert plan(server, ENTRY) == []
    steps = plan(server)
    carry_out(server, steps[:done])
    carry_out(server, plan(server))
    assert tree(server) == set()
    assert server.at(IMAGE).read_bytes() == image_with()


@pytest.mark.parametrize("entries", [(), (ENTRY,)])
def test_what_a_killed_run_left_unfinished_is_removed(server: Machine, entries: tuple[Entry, ...]) -> None:
    carry_out(server, plan(server, *entries))
    before = tree(server)
    left = [temporary_path(IMAGE), former_path(IMAGE), temporary_path(RULE), temporary_path(CONF)]
    for path in left:
        server.file(path, "half a f")
    steps = plan(server, *entries)
    assert sorted(step.subject for step in steps) == sorted(left)
    carry_out(server, steps)
    assert tree(server) == before
    assert not server.at(left[0]).exists() and not server.at(left[1]).exists()
    assert plan(server, *entries) == []


def test_an_image_without_a_driver_for_the_device_stays(server: Machine) -> None:
    assert IMAGE not in [step.subject for step in plan(server, ENTRY, claims=False)]


def test_an_image_is_made_anew_for_a_second_device(server: Machine) -> None:
    carry_out(server, plan(server, ENTRY))
    assert [step.subject for step in plan(server, ENTRY, OTHER)] == [CONF, IMAGE]


def test_an_image_that_would_take_what_is_no_longer_wanted_is_made_anew(server: Machine) -> None:
    carry_out(server, plan(server, ENTRY, OTHER))
    assert [step.subject for step in plan(server, ENTRY, claims=False)] == [CONF, IMAGE]


def test_an_image_with_an_older_script_is_made_anew(server: Machine) -> None:
    carry_out(server, plan(server, ENTRY))
    server.file(IMAGE, image_with(ENTRY, script=b"#!/bin/sh\n"))
    assert [step.subject for step in plan(server, ENTRY)] == [IMAGE]


def test_files_in_front_of_an_image_leave_the_rest_alone(server: Machine) -> None:
    before = image_with()
    step = PutInFront("put", path=IMAGE, conf=render([ENTRY]), host=server.host)
    step.apply()
    after = server.at(IMAGE).read_bytes()
    assert after.endswith(before)
    assert front_length(after) == len(after) - len(before)
    assert front_length(before) == 0
    step.undo()
    assert server.at(IMAGE).read_bytes() == before


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_what_goes_in_front_is_an_archive_that_others_read(tmp_path: pathlib.Path) -> None:
    subprocess.run(["cpio", "-id", "--quiet"], input=front(render([ENTRY])), cwd=tmp_path, check=True)
    assert (tmp_path / CONF[1:]).read_bytes() == render([ENTRY])
    assert (tmp_path / SCRIPT[1:]).stat().st_mode & 0o777 == 0o755
    subprocess.run(["sh", "-n", str(tmp_path / "conf/conf.d/iommufd-host")], check=True)


def test_microcode_in_front_is_not_ours() -> None:
    assert front_length(cpio({"kernel/x86/microcode/GenuineIntel.bin": b"m"})) == 0


def anew(machine: Machine, *entries: Entry) -> bool:
    return isinstance(plan(machine, *entries)[-1], Rebuild)


def test_an_image_that_holds_our_files_inside_is_made_anew(server: Machine) -> None:
    carry_out(server, plan(server, ENTRY))
    server.file(IMAGE, image_with(ENTRY))
    assert anew(server, ENTRY, OTHER)


def test_an_image_that_a_boot_loader_copies_is_made_anew(server: Machine) -> None:
    assert not anew(server, ENTRY)
    server.file("/etc/initramfs/post-update.d/systemd-boot", "#!/bin/sh\n")
    assert anew(server, ENTRY)


def test_an_image_that_cannot_be_read_is_made_anew(server: Machine) -> None:
    server.file(IMAGE, "garbage")
    assert anew(server, ENTRY)


@pytest.mark.parametrize("path", [CONF, SCRIPT, RULE, UNIT, HOOK])
def test_somebody_elses_file_is_refused(server: Machine, path: str) -> None:
    server.file(path, "mine\n")
    with pytest.raises(Refusal, match=re.escape(path)):
        plan(server, ENTRY)
    assert all(step.subject != path for step in plan(server)), "nor is it removed"


def test_images_without_a_known_tool_are_an_error(server: Machine) -> None:
    server.at("/usr/sbin/mkinitramfs").unlink()
    with pytest.raises(HostError, match="neither initramfs-tools nor dracut"):
        plan(server, ENTRY)


def test_a_host_without_an_initramfs_needs_no_tool(server: Machine) -> None:
    server.at("/usr/sbin/mkinitramfs").unlink()
    server.at(IMAGE).unlink()
    assert plan(server, ENTRY)[0].subject == SCRIPT


def test_dracut_has_one_file(server: Machine) -> None:
    server.at("/usr/sbin/mkinitramfs").unlink()
    server.file("/usr/bin/dracut", "#!/bin/sh\n")
    server.at("/usr/bin/dracut").chmod(0o755)
    steps = plan(server, ENTRY)
    assert steps[0].subject == DRACUT
    rebuild = steps[-1]
    assert isinstance(rebuild, Rebuild)
    assert rebuild.generator.argv(rebuild.image) == ["dracut", "--force", IMAGE, RELEASE]


def test_without_systemd_nothing_is_kept(server: Machine) -> None:
    shutil.rmtree(server.at("/usr/lib/systemd"))
    with pytest.raises(HostError, match="systemd"):
        plan(server, ENTRY)


def test_images_of_installed_kernels_only(server: Machine) -> None:
    server.file("/boot/initrd.img-5.10.0", "x")
    server.file("/boot/initramfs-6.12.0.img", "x")
    server.file("/boot/initramfs-6.12.0kdump.img", "x")
    assert [image.path for image in find_images(server.host)] == ["/boot/initramfs-6.12.0.img", IMAGE]


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, lzma.compress, bz2.compress])
def test_files_are_read_out_of_an_image(machine: Machine, compress: t.Callable[[bytes], bytes]) -> None:
    early = cpio({"kernel/x86/microcode/AuthenticAMD.bin": b"m" * 5000})
    main = cpio({".": b"", "./etc/a": b"one", "./etc/b": b"", "./usr/c": b"three!"})
    machine.file("/boot/image", early + compress(main))
    assert read_image(machine.host, "/boot/image", ["/usr/c", "/etc/b", "/nothing"]) == {
        "/usr/c": b"three!",
        "/etc/b": b"",
    }


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_zstd(machine: Machine) -> None:
    packed = subprocess.run(["zstd", "-qc"], input=cpio({"etc/a": b"one"}), stdout=subprocess.PIPE, check=True).stdout
    machine.file("/boot/image", cpio({"x": b""}) + packed)
    assert read_image(machine.host, "/boot/image", ["/etc/a"]) == {"/etc/a": b"one"}


@pytest.mark.parametrize("content", [b"garbage that is no image", cpio({"etc/a": b"one"})[:118], b"\x1f\x8bxx" * 9])
def test_a_damaged_image_is_not_read(machine: Machine, content: bytes) -> None:
    machine.file("/boot/image", content)
    assert read_image(machine.host, "/boot/image", ["/etc/a"]) is None


@pytest.mark.parametrize("content", [b"", b"\0" * 9000])
def test_an_empty_image_holds_nothing(machine: Machine, content: bytes) -> None:
    machine.file("/boot/image", content)
    assert read_image(machine.host, "/boot/image", ["/etc/a"]) == {}


def test_a_missing_image_is_not_read(machine: Machine) -> None:
    assert read_image(machine.host, "/boot/image", ["/etc/a"]) is None


# -- the script ----------------------------------------------------------------------------------------------------


class Script:
    """The script on a synthetic host, where an attribute keeps what is written to it."""

    def __init__(self, machine: Machine, shell: list[str]) -> None:
        self.machine = machine
        self.shell = shell
        machine.file("/proc/cmdline", "quiet\n")
        machine.file("/proc/self/mountinfo", "")
        machine.file("/proc/swaps", "Filename Type Size Used Priority\n")
        machine.file("/dev/kmsg", "")
        machine.directory("/sys/class/block")
        machine.file(CONF, render([ENTRY]))
        text = script_content().decode()
        for place in ("/sys/", "/proc/", "/etc/", "/dev/kmsg", TAKEN):
            text = re.sub(rf"(?<![\w$/\"]){place}", f"{machine.root}{place}", text)
        text = text.replace('"/sys/', f'"{machine.root}/sys/').replace(">/dev/kmsg", f">>{machine.root}/dev/kmsg")
        text = text.replace(f">{machine.root}/dev/kmsg", f">>{machine.root}/dev/kmsg")
        machine.file(SCRIPT, text)

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.shell, str(self.machine.at(SCRIPT)), *arguments], stderr=subprocess.PIPE, timeout=30, check=True
        )
        assert done.stderr == b""
        return self.machine.at("/dev/kmsg").read_text()

    def override(self) -> str:
        return self.machine.at(f"{self.machine.paths[ENTRY.address]}/driver_override").read_text().strip()


SHELLS = [["sh"], ["bash", "--posix"], ["busybox", "sh"]]


@pytest.fixture(params=SHELLS, ids=lambda shell: shell[0])
def script(machine: Machine, request: pytest.FixtureRequest) -> Script:
    if shutil.which(request.param[0]) is None:
        pytest.skip(f"{request.param[0]} is not installed")
    return Script(machine, request.param)


def test_the_override_is_set_before_there_is_a_driver(script: Script) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity)
    assert "<6>iommufd-host: 0000:01:00.0: driver_override vfio-pci" in script.run("init")
    assert script.override() == "vfio-pci"


def test_a_device_of_another_kind_is_left_alone(script: Script) -> None:
    script.machine.pci(ENTRY.address, "8086:10d3")
    assert "is 8086:10d3, not 1b36:0010: left alone" in script.run("init")
    assert script.override() == "(null)"


def test_a_device_that_is_not_there_is_no_error(script: Script) -> None:
    assert script.run("init") == ""


def test_the_kernel_argument_turns_it_off(script: Script) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity)
    script.machine.file("/proc/cmdline", "quiet iommufd_host=off\n")
    assert "all devices stay with the host" in script.run("init")
    assert script.override() == "(null)"


def test_only_the_device_that_appeared(script: Script) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity)
    script.machine.pci("0000:02:00.0", ENTRY.identity)
    assert script.run("add", "0000:02:00.0") == ""
    assert script.override() == "(null)"


def test_a_free_device_is_taken_back_from_the_host(script: Script) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity, driver="nvme")
    assert "0000:01:00.0: taken back from nvme" in script.run("init")
    assert script.machine.at("/sys/bus/pci/drivers/nvme/unbind").read_text() == "0000:01:00.0\n"


def taken_by_the_image(script: Script) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity)
    script.machine.file("/sys/bus/pci/drivers_probe", "")
    script.run("init")
    assert script.machine.at(TAKEN).read_text() == "0000:01:00.0 vfio-pci\n"


@pytest.mark.parametrize("left", [(), (OTHER,)])
def test_what_an_older_image_has_taken_goes_back(script: Script, left: tuple[Entry, ...]) -> None:
    taken_by_the_image(script)
    script.machine.at(CONF).unlink()
    if left:
        script.machine.file(CONF, render(left))
    assert "0000:01:00.0: the initramfs has an older list: back with the host" in script.run("boot")
    assert script.override() == ""
    assert script.machine.at("/sys/bus/pci/drivers_probe").read_text() == "0000:01:00.0\n"
    assert not script.machine.at(TAKEN).exists()


def test_what_is_on_the_list_stays_taken(script: Script) -> None:
    taken_by_the_image(script)
    script.machine.directory("/sys/bus/pci/drivers/vfio-pci")
    assert "back with the host" not in script.run("boot")
    assert script.override() == "vfio-pci"
    assert not script.machine.at(TAKEN).exists()


def test_an_override_of_somebody_else_stays(script: Script) -> None:
    taken_by_the_image(script)
    script.machine.at(CONF).unlink()
    script.machine.file(f"{script.machine.paths[ENTRY.address]}/driver_override", "uio_pci_generic\n")
    assert "back with the host" not in script.run("boot")
    assert script.override() == "uio_pci_generic"


def test_in_the_image_of_dracut_nothing_goes_back(script: Script) -> None:
    script.machine.file("/etc/initrd-release", "")
    script.machine.pci(ENTRY.address, ENTRY.identity)
    script.machine.file("/sys/bus/pci/drivers_probe", "")
    script.machine.directory("/sys/bus/pci/drivers/vfio-pci")
    script.run("boot")
    assert script.machine.at(TAKEN).read_text() == "0000:01:00.0 vfio-pci\n"
    script.machine.at(CONF).unlink()
    script.run("boot")
    assert script.machine.at(TAKEN).exists()


def disk(machine: Machine) -> None:
    machine.pci(ENTRY.address, ENTRY.identity, driver="nvme")
    machine.disk("sda", ENTRY.address)
    machine.partition("sda", "sda1")


def test_a_mounted_disk_is_left_with_the_host(script: Script) -> None:
    disk(script.machine)
    script.machine.mounts((script.machine.number("sda1"), "/", "ext4", "/dev/root"))
    assert "sda1 is mounted on /: left with the host" in script.run("boot")
    assert script.override() == "(null)"


def test_a_mount_with_a_number_of_its_own_is_found_by_its_source(script: Script) -> None:
    disk(script.machine)
    script.machine.mounts(("0:31", "/data", "btrfs", "/dev/sda1"))
    assert "sda1 is mounted on /data: left with the host" in script.run("boot")


def test_a_disk_below_another_is_left_with_the_host(script: Script) -> None:
    disk(script.machine)
    script.machine.block("md0")
    script.machine.stack("sda1", "md0")
    assert "sda1 is part of md0: left with the host" in script.run("boot")


def test_swap_is_left_with_the_host(script: Script) -> None:
    disk(script.machine)
    script.machine.file("/proc/swaps", "Filename Type Size Used Priority\n/dev/sda1 partition 1 0 -2\n")
    assert "sda1 is swap: left with the host" in script.run("boot")


def test_an_unused_disk_is_taken_back(script: Script) -> None:
    disk(script.machine)
    script.machine.mounts(("8:99", "/", "ext4", "/dev/vda1"))
    assert "taken back from nvme" in script.run("init")


@pytest.mark.parametrize(("flags", "left"), [("0x1003", True), ("0x1002", False)])
def test_an_interface_that_is_up_is_left_with_the_host(script: Script, flags: str, left: bool) -> None:
    script.machine.pci(ENTRY.address, ENTRY.identity, driver="e1000e")
    script.machine.interface("eth0", ENTRY.address)
    script.machine.file(f"{script.machine.paths['eth0']}/flags", flags + "\n")
    assert ("eth0 is up: left with the host" in script.run("init")) == left


def test_the_digest_changes_with_the_files_that_bring_the_script_along(monkeypatch: pytest.MonkeyPatch) -> None:
    before = script_content()
    monkeypatch.setattr(persistence, "_HOOK", "another")
    assert script_content() != before


def test_shellcheck(tmp_path: pathlib.Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    texts = (
        script_content(),
        persistence._HOOK.encode(),
        persistence._IMAGE_CONF.encode(),
        persistence._DRACUT.replace("install_optional_items+=", "items=").encode(),
    )
    for number, content in enumerate(texts):
        path = tmp_path / f"{number}.sh"
        path.write_bytes(content)
        # SC2034: names for fields of a line that are not needed.
        subprocess.run(["shellcheck", "-s", "sh", "-e", "SC2034", str(path)], check=True)


def test_a_signal_right_behind_the_change_of_an_image_is_taken_back(
    server: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = server.at(IMAGE).read_bytes()

    def interrupted(target: str, state: FileState, for_boot_loader: bool = False) -> None:
        monkeypatch.undo()
        write_atomic(target, state, for_boot_loader)
        raise KeyboardInterrupt

    monkeypatch.setattr(persistence, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Plan([PutInFront("put", path=IMAGE, conf=render([ENTRY]), host=server.host)]).apply()
    assert server.at(IMAGE).read_bytes() == before
