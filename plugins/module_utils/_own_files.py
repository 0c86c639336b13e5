# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Steps for files and units that are wholly ours."""

from __future__ import annotations

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, Refusal
from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import Command, RemoveFile, Step, WriteFile

# Removed with the last file in it.
OWN_DIRECTORY = "/etc/iommufd-host"


def read_own(host: Host, path: str) -> bytes | None:
    """The content of a file of ours; None where there is none.

    Raises:
        Refusal: what is at the path is not ours, or no file (a link to /dev/null masks one).
    """
    content = host.read_bytes(path)
    if content is None and host.stat(path, follow=False) is not None:
        raise Refusal(f"{path} exists and is not a file that can be read; it is in the way of one of ours")
    refuse_foreign(path, content)
    return content


def refuse_foreign(path: str, content: bytes | None, remedy: str = "Move it away") -> None:
    """See to it that a file is ours to write over or to remove, or not there.

    Raises:
        Refusal: it is somebody else's.
    """
    if content is not None and OWN_MARK.encode() not in content[:400]:
        raise Refusal(
            f"{path} exists and was not written by this collection (it lacks the line '{OWN_MARK}'). "
            f"{remedy} and run again"
        )


def write_own(host: Host, path: str, content: bytes, mode: int) -> list[Step]:
    """The step that makes a file of ours what it shall be; none where it is.

    Raises:
        Refusal: a file that is not ours is at the path.
    """
    read_own(host, path)
    return write_whole(host, path, content, mode)


def write_whole(host: Host, path: str, content: bytes, mode: int) -> list[Step]:
    """The same for a file at a place that is known to be ours."""
    before = host.read_bytes(path)
    status = host.stat(path)
    if before == content and status is not None and status.st_mode & 0o7777 == mode:
        return []
    return [
        WriteFile(
            f"write {path}",
            path,
            (before or b"").decode("utf-8", "replace"),
            content.decode(),
            path=host.path(path),
            content=content,
            mode=mode,
            enforce_mode=True,
        )
    ]


def remove_own(host: Host, path: str) -> list[Step]:
    """The step that removes a file of ours; none where there is none, or one of somebody else."""
    before = host.read_bytes(path)
    if before is None or OWN_MARK.encode() not in before[:400]:
        return []
    text = before.decode("utf-8", "replace")
    return [RemoveFile(f"remove {path}", path, text, "", path=host.path(path), prune=[host.path(OWN_DIRECTORY)])]


def enable_unit(name: str) -> Step:
    """Have systemd start a unit at boot."""
    enable, disable = ["systemctl", "enable", name], ["systemctl", "disable", name]
    return Command(f"enable {name}", name, "disabled", "enabled", argv=enable, undo_argv=disable)


def disable_unit(name: str) -> Step:
    """Have systemd no longer start a unit at boot."""
    enable, disable = ["systemctl", "enable", name], ["systemctl", "disable", name]
    return Command(f"disable {name}", name, "enabled", "disabled", argv=disable, undo_argv=enable)


def forget_unit() -> Step:
    """Have systemd forget a unit whose file was removed."""
    return Command("make systemd forget the removed unit", argv=["systemctl", "daemon-reload"])


def refuse_without_systemd(host: Host) -> None:
    """Raises:
    HostError: the host has no systemd.
    """
    if not (host.is_dir("/usr/lib/systemd/system") or host.is_dir("/lib/systemd/system")):
        raise HostError(
            "Keeping devices across reboots needs systemd, which this host does not have (persistent=false)"
        )
