# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Handing one PCI function from driver to driver, by ``driver_override`` and ``drivers_probe`` only.

``new_id`` and ``ids=`` are never used: they name a model, and a second card of that model would go along.

The sysfs writes run in a child process, for two reasons. A driver that does not let go blocks the writer in the kernel,
where no signal reaches it; it must not be us who wait there. And the writes of one function belong together: a child
finishes them even when its parent is killed in between, so that a function is never left without a driver.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import signal
import time
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._iommu import is_vfio_driver
from ansible_collections.iommufd.host.plugins.module_utils._pci import DEVICES
from ansible_collections.iommufd.host.plugins.module_utils._plan import Step, reason, run, wait_until

PCI_DRIVERS = "/sys/bus/pci/drivers"
PCI_PROBE = "/sys/bus/pci/drivers_probe"

# How long a freshly bound function may take until its character device is there. The kernel makes it before the probe
# returns; only the node's appearance in /dev (devtmpfs) lies in between.
_CDEV_SECONDS = 10.0


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


@dataclasses.dataclass(frozen=True)
class Handover:
    """The writes that move one function.

    Attributes:
        address: the function.
        override: ``driver_override`` to set; None clears it.
        release: drivers that must let go; a function bound to another one is left with it.
        probe: whether the kernel shall then look for a driver.
    """

    address: str
    override: str | None
    release: tuple[str, ...]
    probe: bool = True


class Stuck(HostError):
    """A driver did not let go of its device in time; the request still waits in the kernel."""


def hand_over(host: Host, move: Handover, back: Handover, timeout: float) -> None:
    """Do the writes of a move in a child process and wait for it, but not for ever.

    Args:
        host: the live host (or a tree, in tests).
        move: what is to be done.
        back: what the child does on its own when nobody waits any more at its end (the old driver let go only after
            the time-out, or the parent was killed), so that the function is as it was before.
        timeout: seconds.

    Raises:
        Stuck: the old driver did not let go in time.
        HostError: the function is gone, or the kernel refused a write.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _child(host, move, back, sender)
    os.close(sender)
    answer = b""
    deadline = time.monotonic() + timeout
    try:
        while True:
            ready, _writable, _failed = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Stuck(_stuck(host, move.address, child, timeout), stuck_process=child)
            chunk = os.read(receiver, 4096)
            if not chunk:
                break
            answer += chunk
    finally:
        os.close(receiver)
    _pid, status = os.waitpid(child, 0)
    if answer != b"ok":
        words = answer.decode("utf-8", "replace") or f"the process that wrote to sysfs ended with status {status}"
        raise HostError(words)


def _child(host: Host, move: Handover, back: Handover, sender: int) -> t.NoReturn:
    """The child's whole life. It holds on to nothing of its parent: a child stuck in the kernel must keep neither the
    parent's lock nor the pipes on which Ansible waits for the module's end."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(sender, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 16 else 1 << 16)
        try:
            _move(host, move)
            answer = b"ok"
        except Exception as error:  # whatever it is, the parent must hear of it
            answer = reason(error).encode()
        try:
            os.write(3, answer)
        except BrokenPipeError:
            _move(host, back)
    finally:
        os._exit(0)


def _move(host: Host, move: Handover) -> None:
    device = f"{DEVICES}/{move.address}"
    if not host.exists(device):
        raise HostError(f"{move.address} is no longer there")
    # The kernel takes an empty line as "no override" (driver_set_override in drivers/base/driver.c).
    _write(host.path(f"{device}/driver_override"), move.override or "\n")
    if driver_of(host, move.address) in move.release:
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


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def _stuck(host: Host, address: str, child: int, timeout: float) -> str:
    driver = driver_of(host, address) or "the driver"
    where = host.read_line(f"/proc/{child}/wchan")
    within = f" (in {where})" if where and where != "0" else ""
    return (
        f"{driver} did not let go of {address} within {timeout:g} s. The request still waits in the kernel{within}, as "
        f"process {child}; should the driver let go later, that process gives the device back to it"
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
    """

    address: str = ""
    driver: str = "vfio-pci"
    from_driver: str | None = None
    from_override: str | None = None
    require_cdev: bool = True
    timeout: float = 30.0
    host: Host = dataclasses.field(default_factory=Host)

    def _forward(self) -> Handover:
        release = () if self.from_driver in (None, self.driver) else (self.from_driver,)
        return Handover(self.address, self.driver, release)

    def _back(self) -> Handover:
        release = () if self.from_driver == self.driver else (self.driver,)
        return Handover(self.address, self.from_override, release, probe=self.from_driver is not None)

    def __post_init__(self) -> None:
        self._stuck: Stuck | None = None

    def apply(self) -> None:
        try:
            hand_over(self.host, self._forward(), self._back(), self.timeout)
        except Stuck as error:
            self._stuck = error
            raise
        bound = driver_of(self.host, self.address)
        if bound != self.driver:
            raise HostError(
                f"{self.address} did not go to {self.driver}, it is bound to {bound or 'no driver'}"
                + last_words(self.host, self.address)
            )
        if self.require_cdev and not wait_until(lambda: cdev_ready(self.host, self.address), _CDEV_SECONDS, 0.02):
            if cdev_supported(self.host) is False:
                raise HostError(NO_CDEV)
            raise HostError(
                f"{self.address} is bound to {self.driver}, but its character device did not appear within "
                f"{_CDEV_SECONDS:g} s" + last_words(self.host, self.address)
            )

    def undo(self) -> None:
        if self._stuck is not None:
            raise self._stuck  # the kernel holds the device's lock: whoever else writes to it would be stuck too
        if not self.host.exists(f"{DEVICES}/{self.address}"):
            return  # unplugged meanwhile: nothing to put back
        hand_over(self.host, self._back(), self._back(), self.timeout)
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
    """

    address: str = ""
    from_driver: str | None = None
    from_override: str | None = None
    modalias: str | None = None
    expected: tuple[str, ...] = ()
    timeout: float = 30.0
    host: Host = dataclasses.field(default_factory=Host)

    def __post_init__(self) -> None:
        self._stuck: Stuck | None = None

    def _back(self) -> Handover:
        current = driver_of(self.host, self.address)
        release = () if current in (None, self.from_driver) else (current,)
        return Handover(self.address, self.from_override, release, probe=self.from_driver is not None)

    def apply(self) -> None:
        release = (self.from_driver,) if self.from_driver and is_vfio_driver(self.from_driver) else ()
        back = Handover(self.address, self.from_override, (), probe=self.from_driver is not None)
        if self.expected and self.modalias:
            # As udev would have done at boot, the blacklist heeded (-b); the module may be there without any device.
            self.host.ask(["modprobe", "-q", "-b", "--", self.modalias], timeout=60.0)
        try:
            hand_over(self.host, Handover(self.address, None, release), back, self.timeout)
        except Stuck as error:
            self._stuck = error
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
        hand_over(self.host, back, back, self.timeout)
        _expect(self.host, self.address, self.from_driver)


def _expect(host: Host, address: str, driver: str | None) -> None:
    bound = driver_of(host, address)
    if bound != driver:
        raise HostError(
            f"{address} had {driver or 'no driver'} and now has {bound or 'no driver'}" + last_words(host, address)
        )
