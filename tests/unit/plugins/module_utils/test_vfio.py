# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import signal
import time
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils._child import Stuck
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._plan import Action, Plan, wait_until
from ansible_collections.iommufd.host.plugins.module_utils._vfio import (
    Bind,
    Handover,
    Mover,
    Release,
    cdev_of,
    cdev_ready,
    cdev_supported,
    nodes_are_udevs,
    override_of,
    settle,
)
from ansible_collections.iommufd.host.tests.unit.machine import Machine

ADDRESS = "0000:01:00.0"


@pytest.fixture
def disk(machine: Machine) -> Machine:
    machine.pci(ADDRESS, "1b36:0010", "010802", driver="nvme", group=13)
    machine.file("/sys/bus/pci/drivers/nvme/unbind", "")
    machine.file("/sys/bus/pci/drivers_probe", "")
    return machine


def written(machine: Machine, path: str) -> str:
    return machine.at(path).read_text()


def test_the_writes_of_a_move(disk: Machine) -> None:
    move = Handover(ADDRESS, "vfio-pci", ("nvme",))
    Mover(disk.host).hand_over(move, move, 10)
    assert override_of(disk.host, ADDRESS) == "vfio-pci"
    assert written(disk, "/sys/bus/pci/drivers/nvme/unbind") == ADDRESS
    assert written(disk, "/sys/bus/pci/drivers_probe") == "", "it still has a driver"


def test_only_the_named_driver_must_let_go(disk: Machine) -> None:
    move = Handover(ADDRESS, None, ("vfio-pci",))
    Mover(disk.host).hand_over(move, move, 10)
    assert written(disk, "/sys/bus/pci/drivers/nvme/unbind") == ""


def test_a_function_without_driver_is_probed(disk: Machine) -> None:
    disk.at(f"{disk.paths[ADDRESS]}/driver").unlink()
    move = Handover(ADDRESS, "vfio-pci", ("nvme",))
    Mover(disk.host).hand_over(move, move, 10)
    assert written(disk, "/sys/bus/pci/drivers_probe") == ADDRESS


def test_a_function_that_has_gone_is_an_error(machine: Machine) -> None:
    move = Handover(ADDRESS, "vfio-pci", ())
    with pytest.raises(HostError, match="no longer there"):
        Mover(machine.host).hand_over(move, move, 10)


def test_a_write_that_is_refused_is_an_error(disk: Machine) -> None:
    os.unlink(disk.at(f"{disk.paths[ADDRESS]}/driver_override"))
    os.mkdir(disk.at(f"{disk.paths[ADDRESS]}/driver_override"))
    move = Handover(ADDRESS, "vfio-pci", ())
    with pytest.raises(HostError, match="driver_override: Is a directory"):
        Mover(disk.host).hand_over(move, move, 10)


def test_a_driver_that_has_just_taken_a_new_function_must_let_go_too(disk: Machine) -> None:
    # When the plan was made nothing had it; nvme was still probing.
    Mover(disk.host).hand_over(Handover(ADDRESS, "vfio-pci", (), insist=True), Handover(ADDRESS, None, ()), 10)
    assert written(disk, "/sys/bus/pci/drivers/nvme/unbind") == ADDRESS
    step = Bind("bind it", address=ADDRESS, from_driver=None, timeout=5, host=disk.host)
    disk.file("/sys/bus/pci/drivers/nvme/unbind", "")
    with pytest.raises(HostError, match="is bound to nvme"):
        step.apply()
    assert written(disk, "/sys/bus/pci/drivers/nvme/unbind") == ADDRESS


def test_one_process_moves_all(disk: Machine) -> None:
    mover = Mover(disk.host)
    other = "0000:02:00.0"
    disk.pci(other, "1b36:0010", "010802", driver="nvme", group=14)
    for address in (ADDRESS, other):
        mover.hand_over(Handover(address, "vfio-pci", ("nvme",)), Handover(address, None, ()), 10)
        assert override_of(disk.host, address) == "vfio-pci"
    with pytest.raises(HostError, match=r"0000:03:00\.0 is no longer there"):
        mover.hand_over(Handover("0000:03:00.0", "vfio-pci", ()), Handover("0000:03:00.0", None, ()), 10)
    mover.hand_over(Handover(ADDRESS, None, ()), Handover(ADDRESS, None, ()), 10)
    assert override_of(disk.host, ADDRESS) is None, "a failure is not the end of it"


def stuck_driver(machine: Machine) -> str:
    """A driver that does not let go: nobody reads the other end of a FIFO."""
    path = str(machine.at("/sys/bus/pci/drivers/nvme/unbind"))
    os.unlink(path)
    os.mkfifo(path)
    return path


def test_a_driver_that_does_not_let_go_is_not_waited_for(disk: Machine) -> None:
    path = stuck_driver(disk)
    started = time.monotonic()
    step = Bind("bind it", address=ADDRESS, from_driver="nvme", timeout=0.3, host=disk.host)
    with pytest.raises(HostError, match=r"nvme did not let go of 0000:01:00\.0 within 0\.3 s") as caught:
        Plan([step]).apply()
    assert time.monotonic() - started < 30
    assert caught.value.details["not_undone"]
    # It lets go after all: the process that waited puts things back, for nobody else will.
    with open(path, "rb") as reader:
        assert reader.read() == ADDRESS.encode()
    assert wait_until(lambda: override_of(disk.host, ADDRESS) is None, 5)


def test_a_signal_does_not_wait_for_a_driver_that_does_not_let_go(disk: Machine) -> None:
    path = stuck_driver(disk)
    undone: list[str] = []
    first = Action("do the first", take_back=lambda: undone.append("first"))
    stuck = Bind("bind it", address=ADDRESS, from_driver="nvme", timeout=60, host=disk.host)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            Plan([first, stuck]).apply()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 20
    assert undone == ["first"]
    assert os.read(os.open(path, os.O_RDONLY), 100).decode() == ADDRESS, "the child still finishes"
    assert wait_until(lambda: override_of(disk.host, ADDRESS) is None, 10), "and puts it back"


class Interrupted(Mover):
    """A signal comes when the first move has just been done."""

    interrupted = False

    def hand_over(self, move: Handover, back: Handover, timeout: float) -> None:
        super().hand_over(move, back, timeout)
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt


def test_a_signal_right_after_a_move_has_it_taken_back(disk: Machine) -> None:
    # No driver of the host claims the function: that it has none does not tell that the move is still under way.
    disk.at(f"{disk.paths[ADDRESS]}/driver").unlink()
    disk.file(f"{disk.paths[ADDRESS]}/driver_override", "vfio-pci\n")
    step = Release(
        "give it back",
        address=ADDRESS,
        from_driver="vfio-pci",
        from_override="vfio-pci",
        host=disk.host,
        mover=Interrupted(disk.host),
    )
    with pytest.raises(KeyboardInterrupt):
        Plan([step]).apply()
    assert override_of(disk.host, ADDRESS) == "vfio-pci"


def test_a_driver_that_does_not_end_its_probe_is_told_as_such(disk: Machine) -> None:
    """As nvme, whose probe waits for an answer of the disk: vfio-pci, which had it, has let go long since."""
    stuck_driver(disk)
    with pytest.raises(Stuck, match=r"nvme has been taking 0000:01:00\.0 for more than 0\.3 s.* should it end later"):
        # It blocks in the same way; who holds what is what the words tell by.
        Mover(disk.host).hand_over(
            Handover(ADDRESS, None, ("vfio-pci",), insist=True), Handover(ADDRESS, None, ()), 0.3
        )


def test_giving_back_undone_by_the_process_alone_takes_it_from_the_hosts_driver(disk: Machine) -> None:
    """As after SIGKILL between the move and its answer: an override without its driver would be neither nor."""
    alone: list[Handover] = []

    class Kept(Mover):
        def hand_over(self, move: Handover, back: Handover, timeout: float) -> None:
            alone.append(back)  # it has been done, and nvme has the disk

    Release(
        "give it back",
        address=ADDRESS,
        from_driver="vfio-pci",
        from_override="vfio-pci",
        host=disk.host,
        mover=Kept(disk.host),
    ).apply()
    Mover(disk.host).hand_over(alone[0], alone[0], 10)
    assert written(disk, "/sys/bus/pci/drivers/nvme/unbind") == ADDRESS
    assert override_of(disk.host, ADDRESS) == "vfio-pci"


def test_stuck_names_the_process(disk: Machine) -> None:
    path = stuck_driver(disk)
    move = Handover(ADDRESS, "vfio-pci", ("nvme",))
    with pytest.raises(Stuck) as caught:
        Mover(disk.host).hand_over(move, Handover(ADDRESS, None, ()), 0.2)
    child = caught.value.details["stuck_process"]
    assert os.path.exists(f"/proc/{child}")
    with open(path, "rb") as reader:
        reader.read()
    assert os.waitpid(child, 0)[0] == child


def test_a_function_that_stays_with_its_driver_is_put_back(disk: Machine) -> None:
    disk.file(f"{disk.paths[ADDRESS]}/driver_override", "old\n")
    step = Bind("bind it", address=ADDRESS, from_driver="nvme", from_override="old", timeout=5, host=disk.host)
    with pytest.raises(HostError, match="did not go to vfio-pci, it is bound to nvme") as caught:
        Plan([step]).apply()
    assert caught.value.details["undone"] == ["bind it"]
    assert override_of(disk.host, ADDRESS) == "old"


def test_only_a_number_makes_a_character_device(disk: Machine) -> None:
    disk.cdev(ADDRESS, 3)
    assert cdev_of(disk.host, ADDRESS) is None
    disk.cdev(ADDRESS, 3, "241:3")
    assert cdev_of(disk.host, ADDRESS) == "/dev/vfio/devices/vfio3"
    assert not cdev_ready(disk.host, ADDRESS), "no node yet"
    disk.file("/dev/vfio/devices/vfio3", "")
    assert not cdev_ready(disk.host, ADDRESS), "not that device"


def test_whether_vfio_makes_character_devices(machine: Machine) -> None:
    machine.file("/proc/devices", "Character devices:\n 10 misc\n241 vfio\n")
    assert cdev_supported(machine.host) is None
    machine.directory("/sys/module/vfio")
    assert cdev_supported(machine.host) is False
    machine.file("/proc/devices", "Character devices:\n 10 misc\n241 vfio-dev\n")
    assert cdev_supported(machine.host) is True


class Asked(Host):
    """A host that notes what it is asked."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.asked: list[list[str]] = []

    def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
        self.asked.append(list(argv))
        return Output(0, "", "")


def test_udev_is_waited_for_only_when_it_is_busy(machine: Machine) -> None:
    host = Asked(str(machine.root))
    settle(host)
    assert host.asked == []
    machine.file("/run/udev/queue", "")
    settle(host, 5)
    assert host.asked == [["udevadm", "settle", "--timeout=5"]]


@pytest.mark.parametrize(
    ("path", "text", "answer"),
    [
        ("/etc/udev/rules.d/90-x.rules", 'SUBSYSTEM=="vfio", GROUP="kvm"\n', True),
        ("/usr/lib/udev/rules.d/50-x.rules", 'A=="b"\n  KERNEL=="vfio[0-9]*", SYMLINK+="x"\n', True),
        ("/lib/udev/rules.d/50-x.rules", 'SUBSYSTEM=="vfio-dev", MODE="0660"\n', True),
        ("/usr/lib/udev/rules.d/50-x.rules", '# vfio has none\nSUBSYSTEM=="net", NAME="x"\n', False),
        ("/usr/lib/udev/rules.d/50-x.rules", '\nKERNEL=="vfio", OPTIONS+="static_node=vfio/vfio"\n', False),
        ("/usr/lib/udev/rules.d/50-x.rules", 'KERNEL=="vfio*", OPTIONS+="static_node=vfio/vfio"\n', True),
        ("/usr/lib/udev/rules.d/50-x.rules.old", 'SUBSYSTEM=="vfio", GROUP="kvm"\n', False),
        ("/sys/fs/selinux/enforce", "0", True),
    ],
)
def test_whether_nodes_wait_for_udev(machine: Machine, path: str, text: str, answer: bool) -> None:
    assert not nodes_are_udevs(machine.host)
    machine.file(path, text)
    assert nodes_are_udevs(machine.host) == answer


def test_a_move_goes_ahead_of_others_and_only_the_move(disk: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    asked: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda _which, _who, rank: asked.append(rank))
    move = Handover(ADDRESS, "vfio-pci", ("nvme",))
    Mover(disk.host).hand_over(move, move, 10)
    with pytest.raises(HostError):
        Mover(disk.host).hand_over(Handover("0000:09:00.0", None, ()), move, 10)
    assert asked == [min(-10, before), before] * 2


class Grouped(Mover):
    """Binds, as a kernel does that finds out only then which IOMMU group a function is in."""

    def __init__(self, machine: Machine, group: int | None) -> None:
        super().__init__(machine.host)
        self._machine = machine
        self._group = group

    def hand_over(self, move: Handover, back: Handover, timeout: float) -> None:
        path = self._machine.paths[move.address]
        self._machine.link(f"{path}/driver", f"/sys/bus/pci/drivers/{move.override}")
        if self._group is not None:
            self._machine.link(f"{path}/iommu_group", f"/sys/kernel/iommu_groups/{self._group}")
            self._machine.link(f"/sys/kernel/iommu_groups/{self._group}/devices/{move.address}", path)


def late(machine: Machine, group: int | None, *moving: str) -> Bind:
    machine.pci(ADDRESS, "1234:11e8", "00ff00")
    machine.directory("/sys/kernel/iommu_groups/13/devices")
    mover = Grouped(machine, group)
    return Bind(
        "take it", address=ADDRESS, host=machine.host, mover=mover, require_cdev=False, late_group=True, moving=moving
    )


def test_a_group_that_comes_late_and_can_go_as_a_whole(machine: Machine) -> None:
    machine.pci("0000:02:00.0", "1b36:0010", "010802", driver="nvme", group=13)
    late(machine, 13, ADDRESS, "0000:02:00.0").apply()


def test_a_group_that_comes_late_and_holds_a_device_of_the_host(machine: Machine) -> None:
    machine.pci("0000:02:00.0", "1b36:0010", "010802", driver="nvme", group=13)
    with pytest.raises(HostError, match=r"0000:01:00\.0 came into IOMMU group 13, .*0000:02:00\.0 \(nvme\)"):
        late(machine, 13, ADDRESS).apply()


def test_no_group_even_then(machine: Machine) -> None:
    with pytest.raises(HostError, match="in no IOMMU group on vfio-pci either"):
        late(machine, None, ADDRESS).apply()
