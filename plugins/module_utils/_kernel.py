# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The kernel that runs: its release, configuration, command line and modules."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing as t
import zlib

from ansible_collections.iommufd.host.plugins.module_utils._host import READ_LIMIT, Host

_OPTION = re.compile(r"^CONFIG_([A-Za-z0-9_]+)=(.*)$", re.MULTILINE)
_NOT_SET = re.compile(r"^# CONFIG_([A-Za-z0-9_]+) is not set$", re.MULTILINE)

# /lib is a link to /usr/lib wherever /usr is merged, but a report's tree may have the one as well as the other.
_MODULES = ("/usr/lib/modules", "/lib/modules")
# zlib: a gzip header and the largest window.
_GZIP = 31


@dataclasses.dataclass(frozen=True)
class Config:
    """A kernel's build configuration.

    Attributes:
        source: the file it was read from.
        options: value by name without ``CONFIG_`` ("y", "m", a number or a quoted string); "n" for those that the
            file names as not set. An option whose dependencies are not met is not named at all.
        whole: whether the file ends as it should; of a truncated copy the rest is not known.
    """

    source: str
    options: t.Mapping[str, str]
    whole: bool = True

    def get(self, name: str) -> str:
        """The value of an option, "n" where it is not set."""
        return self.options.get(name, "n")

    def known(self, name: str) -> str | None:
        """As :meth:`get`, but None where a truncated copy does not tell."""
        return self.options.get(name, "n" if self.whole else None)

    def has(self, name: str) -> bool:
        """Whether an option is built in or a module."""
        return self.get(name) in ("y", "m")


@dataclasses.dataclass(frozen=True)
class Module:
    """A kernel module as the host has it.

    Attributes:
        name: with underscores, as the kernel writes it.
        state: "loaded", "builtin", "available" (on disk), "missing"; or "unknown" in a captured tree that has no
            index of the kernel's modules.
        path: its file, where there is one ("/usr/lib/modules/6.12…/updates/dkms/iommufd.ko.xz").
        dkms: whether that file was put there beside the kernel's own (updates/, extra/: DKMS or an administrator).
    """

    name: str
    state: str
    path: str | None = None
    dkms: bool = False

    @property
    def usable(self) -> bool:
        return self.state != "missing"

    def to_dict(self) -> dict[str, t.Any]:
        return {"name": self.name, "state": self.state, "path": self.path, "dkms": self.dkms}


@dataclasses.dataclass(frozen=True)
class Release:
    """A kernel's release and how it was found.

    Attributes:
        name: "6.12.95+deb13-amd64"; None where there is no kernel in reach.
        source: "running"; in a captured tree that does not say which kernel ran, the one that would boot: "boot"
            (the boot loader's choice) or "newest" (of those installed).
    """

    name: str | None = None
    source: str | None = None


def release(host: Host) -> str | None:
    """The running kernel's release ("6.12.95+deb13-amd64").

    A captured tree without /proc has it only where exactly one kernel is installed.
    """
    running = _running_release(host)
    if running is not None:
        return running
    installed = installed_releases(host)
    return installed[0] if len(installed) == 1 else None


def decisive_release(host: Host) -> Release:
    """The release that a survey speaks of: the running kernel's or, in an image, that of the one that would boot."""
    running = _running_release(host)
    if running is not None:
        return Release(running, "running")
    installed = installed_releases(host) or sorted(
        {
            name.partition("-")[2]
            for name in host.listdir("/boot")
            if name.startswith(("config-", "vmlinuz-")) and name.partition("-")[2][:1].isdigit()
        }
    )
    if not installed:
        return Release()
    chosen = [
        *(os.path.basename(host.readlink(link) or "").partition("-")[2] for link in ("/vmlinuz", "/boot/vmlinuz")),
        *re.findall(r"^saved_entry=(?:[0-9a-f]{32}-)?(\S+)$", _grub_environment(host), re.MULTILINE),
    ]
    for name in chosen:
        if name in installed:
            return Release(name, "boot")
    return Release(max(installed, key=version_key), "newest")


def _grub_environment(host: Host) -> str:
    return host.read_text("/boot/grub2/grubenv", 65536) or host.read_text("/boot/grub/grubenv", 65536) or ""


def _running_release(host: Host) -> str | None:
    running = host.read_line("/proc/sys/kernel/osrelease")
    if running is None and host.live:
        running = os.uname().release
    words = (host.read_line("/proc/version") or "").split()
    if running is None and words[:2] == ["Linux", "version"]:
        running = words[2] if len(words) > 2 else None
    if running is None:  # a report of sos: "Linux node7 5.14.0-427.el9.x86_64 #1 SMP …"
        words = (host.read_line("/sos_commands/kernel/uname_-a") or "").split()
        running = words[2] if words[:1] == ["Linux"] and len(words) > 2 else None
    return running if running is not None and "/" not in running else None


def version_key(text: str) -> list[tuple[int, str]]:
    """A key that sorts releases as a person would: 6.12.9 before 6.12.117."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part)
        for part in re.findall(r"\d{1,18}|[^\d.+-]+", text)
    ]


def installed_releases(host: Host) -> list[str]:
    """The releases of all kernels with modules on this host."""
    return sorted(
        {name for parent in _MODULES for name in host.listdir(parent) if host.exists(f"{parent}/{name}/modules.dep")}
    )


def modules_directory(host: Host, kernel: str) -> str:
    """Where the modules of a release lie."""
    known = (f"{parent}/{kernel}" for parent in _MODULES if host.is_dir(f"{parent}/{kernel}"))
    return next(known, f"{_MODULES[0]}/{kernel}")


def read_config(host: Host, kernel: str | None = None) -> Config | None:
    """The configuration of a kernel, or None where the host does not keep it.

    Args:
        host: the host.
        kernel: its release; the running one where not given.
    """
    running = release(host)
    kernel = kernel or running
    if kernel is not None:
        modules = modules_directory(host, kernel)
        for path in (
            f"/boot/config-{kernel}",
            f"{modules}/config",
            f"/usr/lib/modules/{kernel}/config",
            f"/lib/modules/{kernel}/config",
            f"/usr/lib/kernel/config-{kernel}",
            f"/lib/kernel/config-{kernel}",
            f"/usr/lib/ostree-boot/config-{kernel}",
        ):
            config = _parse_config(path, host.read_text(path))
            if config is not None:
                return config
    if kernel == running:
        packed = host.read_bytes("/proc/config.gz")
        if packed:
            unpacker = zlib.decompressobj(_GZIP)
            try:  # bounded, and satisfied with what a truncated copy still holds
                text = unpacker.decompress(packed, READ_LIMIT).decode("utf-8", "replace")
            except zlib.error:
                text = ""
            config = _parse_config("/proc/config.gz", text)
            if config is not None:
                return dataclasses.replace(config, whole=config.whole and unpacker.eof)
    if kernel is None:
        return None
    # Those who build modules have it among the headers.
    headers = (f"{modules_directory(host, kernel)}/build/.config", f"/usr/src/linux-headers-{kernel}/.config")
    return next(filter(None, (_parse_config(path, host.read_text(path)) for path in headers)), None)


def _parse_config(path: str, text: str | None) -> Config | None:
    """A configuration; None where the file is not there or is none."""
    options = {name: value.strip() for name, value in _OPTION.findall(text or "")}
    if text is None or not options:
        return None
    return Config(path, {**dict.fromkeys(_NOT_SET.findall(text), "n"), **options}, text.endswith("\n"))


def command_line(host: Host) -> str | None:
    """The running kernel's command line."""
    return host.read_line("/proc/cmdline")


def arguments(line: str | None) -> list[str]:
    """The arguments on a kernel command line; a quoted one stays whole."""
    return re.findall(r'(?:[^\s"]|"[^"]*")+', line or "")


class ModuleIndex:
    """The modules of one kernel: depmod's indexes, each read when it is first asked for.

    Args:
        host: the host.
        kernel: a release; the running one where not given.
    """

    def __init__(self, host: Host, kernel: str | None = None) -> None:
        self.host = host
        self.running = release(host)
        self.kernel = kernel or self.running
        self.directory = modules_directory(host, self.kernel) if self.kernel else None
        self._aliases: dict[str, dict[str, list[tuple[str, str]]]] = {}
        self._matched: dict[str, list[str]] = {}

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """Path of each module by name, relative to :attr:`directory`, as depmod decided (updates/ before kernel/)."""
        return {_name(path): path for path in self.dependencies}

    @functools.cached_property
    def dependencies(self) -> dict[str, list[str]]:
        """modules.dep: for each module's path those that it needs, all relative to :attr:`directory`."""
        found = {}
        for line in self._text("modules.dep").splitlines():
            path, colon, needs = line.partition(":")
            if colon:
                found[path.strip()] = needs.split()
        return found

    @functools.cached_property
    def builtin(self) -> set[str]:
        """Names of what would be modules, built into the kernel."""
        return {_name(line.strip()) for line in self._text("modules.builtin").splitlines() if line.strip()}

    @functools.cached_property
    def loaded(self) -> set[str] | None:
        """Names of loaded modules; None where the tree does not tell or where it is not the running kernel."""
        if self.kernel != self.running:
            return None
        text = self.host.read_text("/proc/modules")
        if text is not None:
            return {line.split()[0] for line in text.splitlines() if line.strip()}
        names = self.host.listdir("/sys/module")
        # /sys/module also has built-in code with parameters; only a loaded module has a state.
        return {name for name in names if self.host.exists(f"/sys/module/{name}/initstate")} or None

    def _patterns(self, bus: str) -> dict[str, list[tuple[str, str]]]:
        """modules.alias for a bus: pairs of pattern and module by the vendor's part of the pattern ("v000010DE",
        "v*"), so that a look-up tries only a few of some ten thousand."""
        if bus not in self._aliases:
            found: dict[str, list[tuple[str, str]]] = {}
            for pattern, module in re.findall(rf"^alias ({bus}:\S+) (\S+)$", self._alias_text, re.MULTILINE):
                found.setdefault(_vendor(pattern), []).append((pattern, module))
            self._aliases[bus] = found
        return self._aliases[bus]

    def state(self, name: str) -> Module:
        """A module by name ("vfio-pci" and "vfio_pci" are the same)."""
        name = name.replace("-", "_")
        path = self.files.get(name)
        full = f"{self.directory}/{path}" if path is not None else None
        beside = path is not None and not path.startswith("kernel/")
        if self.loaded is not None and name in self.loaded:
            return Module(name, "loaded", full, beside)
        if full is not None:
            return Module(name, "available", full, beside)
        if name in self.builtin:
            return Module(name, "builtin")
        return Module(name, "missing" if self.files or self.host.live else "unknown")

    def closure(self, name: str) -> list[str]:
        """Files to load for a module, in the order in which they must be loaded, as the host sees them.

        Empty where it is built in or missing (ask :meth:`state`).
        """
        path = self.files.get(name.replace("-", "_"))
        if path is None:
            return []
        # modules.dep lists a module's needs with the deepest last.
        return [f"{self.directory}/{one}" for one in [*reversed(self.dependencies[path]), path]]

    def drivers_for(self, modalias: str) -> list[str]:
        """Names of the modules that claim a device, by its modalias ("pci:v…"); the most specific first."""
        return self._match("pci", modalias)

    def vfio_drivers_for(self, modalias: str) -> list[str]:
        """Names of the vfio drivers for a device, by its modalias ("pci:v…"); the most specific first.

        Variant drivers announce themselves by aliases of the bus ``vfio_pci`` (Linux 5.16); vfio-pci itself matches
        every device and so comes last.
        """
        return self._match("vfio_pci", f"vfio_{modalias}")

    def _match(self, bus: str, modalias: str) -> list[str]:
        if modalias not in self._matched:  # the VFs of a function are all alike
            self._matched[modalias] = self._search(bus, modalias)
        return list(self._matched[modalias])

    def _search(self, bus: str, modalias: str) -> list[str]:
        patterns = self._patterns(bus)
        found: list[tuple[int, str]] = []
        for pattern, module in [*patterns.get(_vendor(modalias), []), *patterns.get("v*", [])]:
            if _glob(pattern).fullmatch(modalias):
                found.append((pattern.count("*"), module))
        names: list[str] = []
        for _wild, module in sorted(found, key=lambda pair: pair[0]):
            if module not in names:
                names.append(module)
        return names

    @functools.cached_property
    def _alias_text(self) -> str:
        return self._text("modules.alias")

    def _text(self, name: str) -> str:
        return (self.host.read_text(f"{self.directory}/{name}") or "") if self.directory is not None else ""


def _name(path: str) -> str:
    """The kernel's name for a module's file ("kernel/drivers/vfio/pci/vfio-pci.ko.xz" is "vfio_pci")."""
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _vendor(alias: str) -> str:
    """The vendor's part of a PCI modalias or of a pattern for it ("pci:v000010DEd…" has "v000010DE")."""
    return alias.partition(":")[2].partition("d")[0]


@functools.lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    """An alias pattern: "*" any text, "?" any character, "[…]" a set."""
    parts = re.split(r"(\*|\?|\[[^\]]*\])", pattern)
    known = {"*": ".*", "?": "."}
    text = "".join(known.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    try:
        return re.compile(text)
    except re.error:
        return re.compile(re.escape(pattern))
