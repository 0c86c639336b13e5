# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Handing one PCI function from driver to driver, by ``driver_override`` and ``drivers_probe`` only.

``new_id`` and ``ids=`` are never used: they name a model, and a second card of that model would go along.

The sysfs writes run in a child process: a driver that does not let go must not block us, and a function must not be
left without a driver because we were killed between two writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._child import Child, Stuck
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import (
    is_vfio_driver,
    read_group,
    read_members,
    viable_with,
)
from ansible_collections.iommufd.host.plugins.module_utils._pci import DEVICES, read_function
from ansible_collections.iommufd.host.plugins.module_utils._plan import Step, run, wait_until

PCI_DRIVERS = "/sys/bus/pci/drivers"
PCI_PROBE = "/sys/bus/pci/drivers_probe"

# A driver can match once before the override is seen; once more than that is enough.
_ROUNDS = 3

# How long a freshly bound function may take until its character device is there. The kernel makes it before the probe
# returns; only the node's appearance in /dev (devtmpfs) lies in between.
_CDEV_SECONDS = 10.0

# How long a move that is under way may go on after a signal, before its driver is taken for one that does not let go.
_SIGNAL_SECONDS = 2.0


# While functions move, udev works on what the kernel has reported of those before, with a dozen processes. Each move
# goes from us to the child and back, and each time would wait for its turn behind them.
_NICE = -10

# A line about vfio's nodes other than /dev/vfio/vfio, which is there at any time and has a rule on every Debian.
_NODE_RULE = re.compile(r'^(?!.*KERNEL=="vfio(?:/vfio)?")[ \t]*[^#\s].*vfio', re.MULTILINE)
_RULES = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d")


def driver_of(host: Host, address: str) -> str | None:
    """The driver a function is bound to now."""
    return host.link_name(f"{DEVICES}/{address}/driver")


def override_of(host: Host, address: str) -> str | None:
    """The function's ``driver_override``; None where it has none (the kernel then says ``(null)``)."""
    value = host.read_line(f"{DEVICES}/{address}/driver_override")
    return None if value == "(null)" else value


def cdev_of(host: Host, address: str) -> str | None:
    """The vfio character device of a bound function ("/dev/vfio/devices/vfio0"), or None.

    Only an attribute ``dev`` proves that the kernel made one: a kernel without ``CONFIG_VFIO_DEVICE_CDEV`` has the
    directory ``vfio-dev/vfioN`` too (drivers/vfio/vfio_main.c).
    """
    directory = f"{DEVICES}/{address}/vfio-dev"
    for name in host.listdir(directory):
        if host.read_line(f"{directory}/{name}/dev"):
            return f"/dev/vfio/devices/{name}"
    return None


def cdev_ready(host: Host, address: str) -> bool:
    """Whether the character device is there and its node is the right one (same major and minor)."""
    node = cdev_of(host, address)
    if node is None:
        return False
    status = host.stat(node)
    number = host.read_line(f"{DEVICES}/{address}/vfio-dev/{os.path.basename(node)}/dev")
    return status is not None and number == f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def cdev_supported(host: Host) -> bool | None:
    """Whether the vfio module in use makes character devices; None while it is not loaded or the tree does not tell.

    With ``CONFIG_VFIO_DEVICE_CDEV`` it registers a range of device numbers named ``vfio-dev``
    (vfio_cdev_init in drivers/vfio/device_cdev.c).
    """
    if not host.is_dir("/sys/module/vfio"):
        return None
    text = host.read_text("/proc/devices")
    if text is None:
        return None
    return any(line.split()[1:] == ["vfio-dev"] for line in text.splitlines())


NO_CDEV = (
    "this kernel's vfio offers no character devices (CONFIG_VFIO_DEVICE_CDEV), only legacy groups. Install a kernel or "
    "modules with iommufd (role iommufd.host.kernel), or accept legacy groups with require_cdev=false"
)


def settle(host: Host, timeout: float = 30.0) -> None:
    """Wait until udev has worked off what the kernel reported: it loads drivers, names nodes and hands devices over.

    Whoever plans before that sees a function without the driver that it is about to get.

    Args:
        host: the host.
        timeout: seconds after which it is taken as it is.
    """
    # systemd-udevd keeps this file while anything is queued: the usual case costs no process.
    if host.exists("/run/udev/queue"):
        host.ask(["udevadm", "settle", f"--timeout={timeout:.0f}"], timeout=timeout + 5)


def nodes_are_udevs(host: Host) -> bool:
    """Whether udev has a part in vfio's nodes: a rule that speaks of them, or their labels for SELinux.

    Where it has none, a node is as soon as the kernel has made it as it is going to stay.
    """
    if host.is_dir("/sys/fs/selinux"):
        return True
    # Where /lib is no link yet, the distribution's rules lie there.
    directories = _RULES if host.readlink("/lib") is not None else (*_RULES, "/lib/udev/rules.d")
    for directory in directories:
        for name in host.listdir(directory):
            text = host.read_text(f"{directory}/{name}") if name.endswith(".rules") else None
            if text is not None and _NODE_RULE.search(text) is not None:
                return True
    return False


@contextlib.contextmanager
def _ahead_of_udev() -> t.Iterator[None]:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, min(before, _NICE))
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


@dataclasses.dataclass(frozen=True)
class Handover:
    """The writes that move one function.

    Attributes:
        address: the function.
        override: ``driver_override`` to set; None clears it.
        release: drivers that must let go; a function bound to another one is left with it.
        probe: whether the kernel shall then look for a driver.
        insist: whether a driver that takes the function in the meantime must let go, too. That of a new VF may have
            matched before the override was set: the kernel holds the device's lock while it probes, our own probe
            waits for that, and then finds the function taken.
    """

    address: str
    override: str | None
    release: tuple[str, ...]
    probe: bool = True
    insist: bool = False


class Mover:
    """Moves functions, in one child process for all of them (see _child.py).

    Args:
        host: the live host (or a tree, in tests).
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._child = Child(lambda request: _move(host, Handover(**request)))

    def hand_over(self, move: Handover, back: Handover, timeout: float) -> None:
        """Do the writes of a move.

        Args:
            move: what is to be done.
            back: what puts the function back should the old driver let go only after the time-out.
            timeout: seconds for the old driver to let go.

        Raises:
            Stuck: it did not.
            HostError: the function is gone, or the kernel refused a write.
        """

        def words(child: int) -> str:
            return _stuck(self._host, move, child, timeout)

        with _ahead_of_udev():  # the child keeps the rank in which it is started
            self._child.do(dataclasses.asdict(move), dataclasses.asdict(back), timeout, words)

    def is_through(self) -> bool:
        """Whether nothing of the last move is under way any more, a signal having ended the wait for it."""
        return self._child.is_through(_SIGNAL_SECONDS)


def _move(host: Host, move: Handover) -> None:
    device = f"{DEVICES}/{move.address}"
    if not host.exists(device):
        raise HostError(f"{move.address} is no longer there")
    # The kernel takes an empty line as "no override" (driver_set_override in drivers/base/driver.c).
    _write(host.path(f"{device}/driver_override"), move.override or "\n")
    for _round in range(_ROUNDS if move.insist else 1):
        driver = driver_of(host, move.address)
        if driver is not None and (driver in move.release or (move.insist and driver != move.override)):
            try:
                _write(host.path(f"{device}/driver/unbind"), move.address)
            except OSError as error:
                # ENODEV, ENOENT: it let go of its own accord in between.
                if error.errno not in (errno.ENODEV, errno.ENOENT):
                    raise
        if move.probe and driver_of(host, move.address) is None:
            try:
                _write(host.path(PCI_PROBE), move.address)
            except OSError as error:
                # EINVAL: a driver was found and its probe failed; the caller sees that nothing is bound.
                if error.errno != errno.EINVAL:
                    raise
        if driver_of(host, move.address) in (None, move.override):
            return


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def _stuck(host: Host, move: Handover, child: int, timeout: float) -> str:
    driver = driver_of(host, move.address)
    where = host.read_line(f"/proc/{child}/wchan")
    within = f" (in {where})" if where and where != "0" else ""
    if driver is not None and driver not in move.release:
        # The old driver has let go, and another one's probe does not end.
        said = f"{driver} has been taking {move.address} for more than {timeout:g} s"
        later = "should it end later"
    else:
        said = f"{driver or 'the driver'} did not let go of {move.address} within {timeout:g} s"
        later = "should the driver let go later"
    return (
        f"{said}. The request still waits in the kernel{within}, as process {child}; {later}, that process gives the "
        "device back to what it had"
    )


def _interrupted(host: Host, address: str) -> Stuck:
    """What to say of a function whose move was under way when a signal ended the wait: as for one that is stuck, the
    child puts it back on its own, and waiting for the device's lock would only hold up the others."""
    return Stuck(
        f"{driver_of(host, address) or 'the driver'} was letting go of {address} when the run was interrupted; "
        "the process that waits for it gives the device back"
    )


def last_words(host: Host, address: str) -> str:
    """What the kernel log says last about a function, as a clause to add to a message; empty where it says nothing."""
    log = host.ask(["dmesg"], timeout=10.0)
    if log is None or not log.ok:
        return ""
    lines = [line for line in log.stdout.splitlines() if address in line and "iommufd-host:" not in line]
    return f" (kernel log: {lines[-1].strip()})" if lines else ""


@dataclasses.dataclass
class LoadDriver(Step):
    """Load the module of a vfio driver; does nothing for one that is there."""

    driver: str = ""
    module: str = ""
    require_cdev: bool = True
    host: Host = dataclasses.field(default_factory=Host)

    def __post_init__(self) -> None:
        self._loaded = False

    def apply(self) -> None:
        self._loaded = not self.host.is_dir(f"{PCI_DRIVERS}/{self.driver}")
        if self._loaded:
            run(["modprobe", self.module])
        if not self.host.is_dir(f"{PCI_DRIVERS}/{self.driver}"):
            raise HostError(f"module {self.module} is loaded, but there is no PCI driver {self.driver}")
        if self.require_cdev and cdev_supported(self.host) is False:
            raise HostError(NO_CDEV)

    def undo(self) -> None:
        if self._loaded and self.host.is_dir(f"{PCI_DRIVERS}/{self.driver}"):
            run(["modprobe", "-r", self.module])


@dataclasses.dataclass
class Bind(Step):
    """Give one function to a vfio driver.

    Attributes:
        address: the function.
        driver: the vfio driver.
        from_driver: the driver it has when the plan is made.
        from_override: its ``driver_override`` then.
        require_cdev: whether its character device must appear.
        timeout: seconds for the old driver to let go.
        mover: what moves the functions of this call.
        late_group: whether it has no IOMMU group yet, so that the group can be looked at only afterwards.
        moving: addresses that this call gives to vfio drivers.
    """

    address: str = ""
    driver: str = "vfio-pci"
    from_driver: str | None = None
    from_override: str | None = None
    require_cdev: bool = True
    timeout: float = 30.0
    host: Host = dataclasses.field(default_factory=Host)
    mover: Mover | None = None
    late_group: bool = False
    moving: t.Collection[str] = ()

    def _forward(self) -> Handover:
        release = () if self.from_driver in (None, self.driver) else (self.from_driver,)
        return Handover(self.address, self.driver, release, insist=self.from_driver is None)

    def _back(self) -> Handover:
        release = () if self.from_driver == self.driver else (self.driver,)
        return Handover(self.address, self.from_override, release, probe=self.from_driver is not None)

    def __post_init__(self) -> None:
        self._stuck: Stuck | None = None
        self._mover = self.mover or Mover(self.host)

    def apply(self) -> None:
        try:
            self._mover.hand_over(self._forward(), self._back(), self.timeout)
        except Stuck as error:
            self._stuck = error
            raise
        except KeyboardInterrupt:
            if not self._mover.is_through():
                self._stuck = _interrupted(self.host, self.address)
            raise
        bound = driver_of(self.host, self.address)
        if bound != self.driver:
            raise HostError(
                f"{self.address} did not go to {self.driver}, it is bound to {bound or 'no driver'}"
                + last_words(self.host, self.address)
            )
        if self.late_group:
            self._check_group()
        if self.require_cdev and not wait_until(lambda: cdev_ready(self.host, self.address), _CDEV_SECONDS, 0.02):
            if cdev_supported(self.host) is False:
                raise HostError(NO_CDEV)
            raise HostError(
                f"{self.address} is bound to {self.driver}, but its character device did not appear within "
                f"{_CDEV_SECONDS:g} s" + last_words(self.host, self.address)
            )

    def _check_group(self) -> None:
        function = read_function(self.host, self.address)
        group = (
            None if function is None or function.iommu_group is None else read_group(self.host, function.iommu_group)
        )
        if group is None:
            raise HostError(f"{self.address} is in no IOMMU group on {self.driver} either: no IOMMU is in its way")
        blocking = viable_with(group, read_members(self.host, group), self.moving)
        if blocking:
            listed = ", ".join(f"{one.address} ({one.driver})" for one in blocking)
            raise HostError(
                f"{self.address} came into IOMMU group {group.number}, which also holds {listed}; a group goes to a "
                "guest as a whole or not at all"
            )

    def undo(self) -> None:
        if self._stuck is not None:
            raise self._stuck  # the kernel holds the device's lock: whoever else writes to it would be stuck too
        if not self.host.exists(f"{DEVICES}/{self.address}"):
            return  # unplugged meanwhile: nothing to put back
        self._mover.hand_over(self._back(), self._back(), self.timeout)
        _expect(self.host, self.address, self.from_driver)


@dataclasses.dataclass
class Release(Step):
    """Take one function from its vfio driver and give it to the driver it would have had.

    Attributes:
        address: the function.
        from_driver: the driver it has when the plan is made.
        from_override: its ``driver_override`` then.
        modalias: its modalias: the host driver's module may never have been loaded.
        expected: drivers of the host that claim such a device; empty: none, it stays without.
        timeout: seconds for the vfio driver to let go.
        mover: what moves the functions of this call.
    """

    address: str = ""
    from_driver: str | None = None
    from_override: str | None = None
    modalias: str | None = None
    expected: tuple[str, ...] = ()
    timeout: float = 30.0
    host: Host = dataclasses.field(default_factory=Host)
    mover: Mover | None = None

    def __post_init__(self) -> None:
        self._stuck: Stuck | None = None
        self._mover = self.mover or Mover(self.host)

    def _back(self) -> Handover:
        current = driver_of(self.host, self.address)
        release = () if current in (None, self.from_driver) else (current,)
        return Handover(self.address, self.from_override, release, probe=self.from_driver is not None)

    def apply(self) -> None:
        release = (self.from_driver,) if self.from_driver and is_vfio_driver(self.from_driver) else ()
        # Done when nobody waits any more, after the move: the host's driver, which has it by then, must let go again.
        insist = self.from_driver in (None, self.from_override)
        back = Handover(self.address, self.from_override, (), probe=self.from_driver is not None, insist=insist)
        if self.expected and self.modalias:
            # As udev would have done at boot, the blacklist heeded (-b); the module may be there without any device.
            self.host.ask(["modprobe", "-q", "-b", "--", self.modalias], timeout=60.0)
        try:
            self._mover.hand_over(Handover(self.address, None, release), back, self.timeout)
        except Stuck as error:
            self._stuck = error
            raise
        except KeyboardInterrupt:
            if not self._mover.is_through():
                self._stuck = _interrupted(self.host, self.address)
            raise
        bound = driver_of(self.host, self.address)
        if bound is not None and is_vfio_driver(bound):
            raise HostError(f"{self.address} is still bound to {bound}" + last_words(self.host, self.address))

    def undo(self) -> None:
        if self._stuck is not None:
            raise self._stuck
        if not self.host.exists(f"{DEVICES}/{self.address}"):
            return
        back = self._back()
        self._mover.hand_over(back, back, self.timeout)
        _expect(self.host, self.address, self.from_driver)


def _expect(host: Host, address: str, driver: str | None) -> None:
    bound = driver_of(host, address)
    if bound != driver:
        raise HostError(
            f"{address} had {driver or 'no driver'} and now has {bound or 'no driver'}" + last_words(host, address)
        )
