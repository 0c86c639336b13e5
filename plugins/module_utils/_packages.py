# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Distribution packages: what is missing is installed, remembered, and taken away again when it is no longer wanted.

Only what was not on the host before is remembered (in :data:`RECORD`, a file for people to read), so that taking away
never touches a package that somebody else had installed. Debian and its derivatives only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._distribution import read_distribution
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import FileState, own_header, remove, write_atomic
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Step, run

# Which packages are on the host because of us, one a line: name, then the purposes it serves.
RECORD = "/etc/iommufd-host/packages"

_STATUS = "/var/lib/dpkg/status"
_EXTENDED = "/var/lib/apt/extended_states"
_LISTS = "/var/lib/apt/lists"

# A status file of a big desktop is some 10 MB.
_STATUS_LIMIT = 128 * 1024 * 1024

# An apt that is already running (unattended upgrades) is waited for.
_APT = ("-o", "DPkg::Lock::Timeout=600", "-o", "Dpkg::Use-Pty=0")

# "Inst gcc (4:14.2.0-1 …)", "Inst libc6 [2.41-12] (2.41-12+deb13u1 …)", "Purg dkms [3.2.2]", "Remv gcc [4:14.2]"
_SIMULATED = re.compile(r"^(Inst|Purg|Remv) (\S+)(?: \[([^\]]*)\])?", re.MULTILINE)
_UNKNOWN = re.compile(r"E: (?:Unable to locate package (\S+)|Package '(\S+)' has no installation candidate)")


class UnknownPackages(HostError):
    """apt knows no such packages.

    Attributes:
        names: their names.
    """

    def __init__(self, names: t.Sequence[str], said: str) -> None:
        super().__init__(f"apt knows no package {', '.join(names)}", apt=said)
        self.names = list(names)


@dataclasses.dataclass(frozen=True)
class Package:
    """A package in dpkg's status.

    Attributes:
        installed: unpacked and configured.
        partial: neither that nor gone: an installation or removal of it was interrupted.
        needs: names in Depends and Pre-Depends, alternatives included.
        provides: names it also answers to.
    """

    name: str
    version: str
    installed: bool
    partial: bool
    needs: frozenset[str]
    provides: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Change:
    """What apt says it would do.

    Attributes:
        new: packages that were not installed.
        upgraded: packages that would get another version.
        removed: packages that would go.
    """

    new: list[str]
    upgraded: list[str]
    removed: list[str]


def require_apt(host: Host) -> None:
    """Refuse hosts of another family in one sentence.

    Raises:
        HostError: the host has no dpkg and apt-get.
    """
    if not host.exists(_STATUS) or host.which("apt-get") is None:
        name = read_distribution(host).name or "of an unknown distribution"
        raise HostError(
            f"Packages can only be installed on Debian and its derivatives so far, and this host is {name}. "
            "Install what is named here by its own means."
        )


def read_packages(host: Host) -> dict[str, Package]:
    """dpkg's view of the host by package name; empty where there is no dpkg."""
    content = host.read_text(_STATUS, _STATUS_LIMIT)
    packages: dict[str, Package] = {}
    for paragraph in (content or "").split("\n\n"):
        fields: dict[str, str] = {}
        for line in paragraph.splitlines():
            key, colon, value = line.partition(":")
            if colon and key in ("Package", "Status", "Version", "Depends", "Pre-Depends", "Provides"):
                fields[key] = value.strip()
        name = fields.get("Package")
        if not name:
            continue
        state = fields.get("Status", "").split()[-1:]
        package = Package(
            name=name,
            version=fields.get("Version", ""),
            installed=state == ["installed"],
            partial=state not in (["installed"], ["not-installed"], ["config-files"], []),
            needs=_relation_names(fields.get("Depends", "")) | _relation_names(fields.get("Pre-Depends", "")),
            provides=_relation_names(fields.get("Provides", "")),
        )
        # A foreign architecture's twin must not hide the installed one.
        if name not in packages or not packages[name].installed:
            packages[name] = package
    return packages


def _relation_names(value: str) -> frozenset[str]:
    names = (re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", part) for part in re.split(r"[,|]", value))
    return frozenset(match[1] for match in names if match)


def missing(packages: t.Mapping[str, Package], names: t.Iterable[str]) -> list[str]:
    """Those of some packages that are not installed (configured), in the order given."""
    return [name for name in names if name not in packages or not packages[name].installed]


def have_lists(host: Host) -> bool:
    """Whether apt has package lists at all; a fresh image often has none."""
    return any("_Packages" in name or name.endswith("_InRelease") for name in host.listdir(_LISTS))


# -- the record ------------------------------------------------------------------------------------------------------


def read_record(host: Host) -> dict[str, set[str]]:
    """Which packages are here because of us: purposes by package name."""
    record: dict[str, set[str]] = {}
    for line in (host.read_text(RECORD) or "").splitlines():
        words = line.partition("#")[0].split()
        if words:
            record.setdefault(words[0], set()).update(words[1:])
    return record


def format_record(record: t.Mapping[str, t.Collection[str]]) -> str:
    """The record as a file."""
    lines = [
        own_header(),
        "# Packages that were not on this host before; taken away again with the part that needed them.\n",
    ]
    lines.extend(f"{name} {' '.join(sorted(purposes))}\n" for name, purposes in sorted(record.items()))
    return "".join(lines)


def _write_record(record: t.Mapping[str, t.Collection[str]]) -> None:
    if not record:
        remove(RECORD)
        with contextlib.suppress(OSError):  # others of our files may lie there
            os.rmdir(os.path.dirname(RECORD))
        return
    os.makedirs(os.path.dirname(RECORD), 0o755, exist_ok=True)
    write_atomic(RECORD, FileState(format_record(record).encode(), 0o644, os.geteuid(), os.getegid()))


# -- asking apt ------------------------------------------------------------------------------------------------------


def simulate_install(host: Host, names: t.Sequence[str]) -> Change:
    """What installing some packages (without recommended ones) would do.

    Raises:
        UnknownPackages: apt does not know some of them.
        HostError: apt cannot do it for another reason; quotes it.
    """
    return _simulate(host, ["install", "--no-install-recommends", *names])


def simulate_build_dep(host: Host, dsc: str) -> Change:
    """What installing the build dependencies of a source package would do.

    Those of its architecture-independent packages (QEMU's firmware, which takes a dozen cross compilers) are left out.

    Args:
        host: the host.
        dsc: path of its ``.dsc``.

    Raises:
        HostError: apt cannot do it; quotes it.
    """
    return _simulate(host, ["build-dep", "--arch-only", "--no-install-recommends", dsc])


def simulate_purge(host: Host, names: t.Sequence[str]) -> Change:
    """What purging some packages would do.

    Raises:
        HostError: apt cannot do it; quotes it.
    """
    return _simulate(host, ["purge", *names])


def _simulate(host: Host, arguments: t.Sequence[str]) -> Change:
    output = host.ask(["apt-get", "-s", "-q", *arguments], timeout=300)
    if output is None:
        raise HostError(f"`apt-get -s {' '.join(arguments)}` gave no answer")
    if not output.ok:
        unknown = [name for pair in _UNKNOWN.findall(output.stderr) for name in pair if name]
        if unknown:
            raise UnknownPackages(unknown, output.stderr)
        # What it lacks stands in the other stream, and that is what tells somebody something.
        unmet = re.findall(r"\bDepends: (.+? but .+)$", output.stdout, re.MULTILINE)
        lines = unmet or (output.stderr or output.stdout).strip().splitlines()[-4:]
        words = " / ".join(line.strip() for line in lines)
        raise HostError(f"apt-get cannot {' '.join(arguments)}: {words}", apt=output.stdout[-4000:])
    return parse_simulation(output.stdout)


def parse_simulation(text: str) -> Change:
    """The packages in the output of ``apt-get -s``."""
    change = Change([], [], [])
    for verb, name, version in _SIMULATED.findall(text):
        if verb != "Inst":
            change.removed.append(name)
        elif version:
            change.upgraded.append(name)
        else:
            change.new.append(name)
    return change


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class InstallPackages(Step):
    """Install packages, without recommended ones, and remember those that were not there.

    Attributes:
        names: the packages.
        purpose: the part that needs them, a word; the record has it.
        refresh: fetch the package lists first. They are fetched anyway when apt does not know a package.
        optional: those of the packages that are left out where apt does not know them.
        explain: turns "apt knows no such package" into an error that says what that means here.
        change: what apt says it will do, where that has been asked already.
        added: the packages that it installed, those that others needed included (once applied).
    """

    names: t.Sequence[str] = ()
    purpose: str = ""
    refresh: bool = False
    optional: t.Collection[str] = ()
    explain: t.Callable[[UnknownPackages], HostError] | None = None
    change: Change | None = None
    added: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._record: dict[str, set[str]] = {}

    def apply(self) -> None:
        host = Host()
        # What a power cut left half-installed would make apt refuse everything else.
        if host.listdir("/var/lib/dpkg/updates") or any(one.partial for one in read_packages(host).values()):
            run(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], 1800)
        if self.refresh:
            refresh_lists()
        change = self.change if self.change is not None and not self.refresh else self._simulate(host)
        self._record = read_record(host)
        self._remember(change)
        try:
            self._install()
        except HostError:
            if self.refresh:
                raise
            # Lists that lag behind the archive name files that it no longer has. What is newer may need other packages.
            refresh_lists()
            self.refresh = True
            self._remember(self._simulate(host))
            self._install()

    def _remember(self, change: Change) -> None:
        """Before the installation: a run that is killed in the middle must still know what was not there."""
        if change.removed:
            raise HostError(
                f"installing {' '.join(self.names)} would remove {' '.join(change.removed)}; nothing was installed"
            )
        self.added += [name for name in change.new if name not in self.added]
        record = {name: set(purposes) for name, purposes in self._record.items()}
        for name in self.added:
            record.setdefault(name, set()).add(self.purpose)
        _write_record(record)

    def _simulate(self, host: Host) -> Change:
        try:
            return simulate_install(host, self.names)
        except UnknownPackages as error:
            if set(error.names) <= set(self.optional):
                self.names = [name for name in self.names if name not in error.names]
                return simulate_install(host, self.names) if self.names else Change([], [], [])
            if self.refresh:
                raise (self.explain(error) if self.explain is not None else error) from error
        refresh_lists()
        self.refresh = True
        return self._simulate(host)

    def _install(self) -> None:
        if not self.names:
            return
        run(
            [
                "apt-get",
                "-y",
                "-q",
                *_APT,
                "-o",
                "Dpkg::Options::=--force-confdef",
                "-o",
                "Dpkg::Options::=--force-confold",
                "--no-install-recommends",
                "--no-remove",
                "install",
                *self.names,
            ],
            3600,
        )

    def undo(self) -> None:
        packages = read_packages(Host())
        there = [name for name in self.added if _bare(name) in packages and packages[_bare(name)].version]
        if there:
            run(["apt-get", "-y", "-q", *_APT, "purge", *there], 1800)
        _write_record(self._record)


@dataclasses.dataclass
class PurgePackages(Step):
    """Purge packages that are ours, and forget them. Cannot be undone, and says so: the last step of a plan."""

    names: t.Sequence[str] = ()
    purpose: str = ""

    def __post_init__(self) -> None:
        self._there: list[str] = []

    def apply(self) -> None:
        host = Host()
        packages = read_packages(host)
        self._there = [name for name in map(_bare, self.names) if name in packages and packages[name].installed]
        if host.listdir("/var/lib/dpkg/updates"):
            run(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], 1800)
        if self.names:
            run(["apt-get", "-y", "-q", *_APT, "purge", *self.names], 1800)
        record = read_record(host)
        for purposes in record.values():
            purposes.discard(self.purpose)
        _write_record({name: purposes for name, purposes in record.items() if purposes})

    def undo(self) -> None:
        gone = missing(read_packages(Host()), self._there)
        if gone:
            raise HostError(f"{', '.join(gone)} was purged; a run with state present installs it again")


def refresh_lists() -> None:
    """Fetch the package lists. A source that does not answer is no reason to stop: others may have what is needed."""
    with contextlib.suppress(HostError):
        run(["apt-get", "-q", *_APT, "update"], 900)


def _bare(name: str) -> str:
    return name.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Removal:
    """What can be taken away of a purpose's packages.

    Attributes:
        purge: packages to purge.
        keep: those that stay, with the reason.
        forget: whether the record has anything of the purpose at all.
    """

    purge: list[str]
    keep: dict[str, str]
    forget: bool


def plan_removal(host: Host, purpose: str, named: t.Collection[str] = ()) -> Removal:
    """Decide which of the packages that came for a purpose can go.

    One stays if it serves another purpose of ours too, if somebody marked it as wanted since (``apt-mark manual``, or
    an ``apt install`` that names it), or if a package that is not ours needs it by now.

    Args:
        host: the host.
        purpose: as given to :class:`InstallPackages`.
        named: the packages that were named when installing; those are marked as wanted from the start.

    Raises:
        HostError: apt cannot say what would go.
    """
    record = read_record(host)
    ours = {name for name, purposes in record.items() if purpose in purposes}
    if not ours:
        return Removal([], {}, False)
    packages = read_packages(host)
    automatic = _automatic(host)
    keep: dict[str, str] = {}
    for name in sorted(ours):
        if record[name] - {purpose}:
            keep[name] = "also serves " + ", ".join(sorted(record[name] - {purpose}))
        elif _bare(name) not in packages or not packages[_bare(name)].version:
            keep[name] = "is not there any more"
        elif _bare(name) not in automatic and name not in named and packages[_bare(name)].installed:
            keep[name] = "has been marked as wanted since"
    gone = {name for name, why in keep.items() if why == "is not there any more"}
    _keep_what_is_needed(packages, ours, keep)
    while True:
        purge = sorted(ours - set(keep))
        if not purge:
            break
        others = [name for name in simulate_purge(host, purge).removed if _bare(name) not in {_bare(n) for n in purge}]
        if not others:
            break
        before = len(keep)
        _keep_what_is_needed(packages, ours, keep, others)
        if len(keep) == before:  # apt sees a tie that the status file does not show
            keep.update({name: f"{', '.join(others)} would go with it" for name in purge})
    return Removal(purge, {name: why for name, why in keep.items() if name not in gone}, True)


def _keep_what_is_needed(
    packages: t.Mapping[str, Package],
    ours: t.Collection[str],
    keep: dict[str, str],
    staying: t.Iterable[str] = (),
) -> None:
    """Extend ``keep`` by what the packages that stay need, and what those need in turn."""
    todo = [_bare(name) for name in [*keep, *staying]]
    seen = set(todo)
    while todo:
        package = packages.get(todo.pop())
        if package is None or not package.installed:
            continue
        for name in sorted(ours):
            one = packages.get(_bare(name))
            if one is None or name in keep or not ({one.name} | one.provides) & package.needs:
                continue
            keep[name] = f"{package.name} needs it"
            if one.name not in seen:
                seen.add(one.name)
                todo.append(one.name)


def _automatic(host: Host) -> set[str]:
    """Names of packages that apt installed as dependencies only."""
    text = host.read_text(_EXTENDED, _STATUS_LIMIT) or ""
    return set(re.findall(r"^Package: (\S+)\n(?:\S.*\n)*?Auto-Installed: 1$", text, re.MULTILINE))
