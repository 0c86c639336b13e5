# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A QEMU for passthrough against QEMU's default configuration, and the roll-out of a finished archive.

QEMU's default configuration is all its machines. It is built without user emulation and documents, which configure has
by default, too: so the ratio is worse for us than it could be. And of x86_64 alone, which is what a user who knows
configure would build by hand.

Needs root and a source package of QEMU 9.0 or later (``QEMU_DSC=/path/qemu_10.0.13+ds-0+deb13u1.dsc``), and the
packages that building it needs (a build by ``qemu_build`` leaves them there). Takes as long as three builds, of
which the longest has some 10,000 objects.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import typing as t

from bench import CHECKOUT, Row, alternate

sys.path.insert(0, str(CHECKOUT / "build/collections"))

from ansible_collections.iommufd.host.plugins.module_utils import (
    _qemu_artefact,
    _qemu_build,
    _qemu_install,
    _qemu_sandbox,
    _qemu_source,
)
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import wait_until
from ansible_collections.iommufd.host.plugins.module_utils._qemu_profile import Request


def rows() -> t.Iterator[Row]:
    dsc = os.environ.get("QEMU_DSC", "")
    if os.geteuid() != 0 or not os.path.exists(dsc):
        print("    not run: needs root and QEMU_DSC, the path of a source package of QEMU")
        return
    place = tempfile.mkdtemp(dir="/var/tmp", prefix="iommufd-host-bench-")
    os.chmod(place, 0o755)
    try:
        # Each has a cache of its own that is empty in the beginning: where ccache is installed it helps neither.
        small, small_work, archive = _build(_qemu_build.Builder(f"{place}/small"), dsc, "passthrough")
        yield _rollout(pathlib.Path(place), archive)
        # The goal is against the default configuration, which is of all machines; one of them stands beside it.
        for targets, against, goal in (
            (("x86_64",), "QEMU's default configuration, of x86_64 alone", None),
            (_all_targets(dsc), "QEMU's default configuration", 0.25),
        ):
            whole, whole_work, _archive = _build(
                _qemu_build.Builder(f"{place}/{len(targets)}"), dsc, "default", targets
            )
            yield Row("QEMU for passthrough, x86_64, built", small, whole, against, goal)
            # A busy machine makes the wall times what they are; this is what the builds themselves take.
            yield Row("the same, processor time", small_work, whole_work, against, goal)
    finally:
        shutil.rmtree(place)


def _all_targets(dsc: str) -> tuple[str, ...]:
    """All machines of the source, as its configure finds them."""
    tarball = next(pathlib.Path(dsc).parent.glob(pathlib.Path(dsc).name.split("-")[0] + ".orig.tar.*"))
    with tarfile.open(tarball) as archive:
        names = [pathlib.PurePath(name) for name in archive.getnames()]
    return tuple(
        sorted(name.stem.removesuffix("-softmmu") for name in names if name.match("*/configs/targets/*-softmmu.mak"))
    )


def _build(
    builder: _qemu_build.Builder, dsc: str, profile: str, targets: tuple[str, ...] = ("x86_64",)
) -> tuple[float, float, str]:
    """Seconds from the sources to the finished archive, those of processors in it, and the archive's path."""
    builder.make()
    fetched = _qemu_source.fetch(_qemu_source.parse_source({"path": dsc}), builder.downloads)
    # Most machines cannot have it.
    request = Request(iommufd="enabled" if len(targets) == 1 else "auto", profile=profile, targets=targets)
    decides = _qemu_build.decides(Host(), request, fetched.digest)
    key = _qemu_artefact.key_of(decides)
    # Without the low priority that a build otherwise has: it would measure what else runs here.
    limits = _qemu_sandbox.Limits(len(os.sched_getaffinity(0)), 8 << 30, niceness=0)
    traits = _qemu_source.examine(fetched)
    started = time.monotonic()
    _qemu_build.start(_qemu_build.Job(builder, key, decides, request, fetched, dsc, traits, limits, 5))
    if not wait_until(lambda: not _qemu_build.is_running(builder, key), 7200, 0.5):
        raise RuntimeError("the build takes more than two hours")
    state = _qemu_build.read_state(builder, key)
    if state is None or state["error"] is not None:
        raise RuntimeError(f"profile {profile}: {state and state['error']}")
    return time.monotonic() - started, state["processor"], builder.artefact(key)


def _rollout(place: pathlib.Path, archive: str) -> Row:
    """Unpacked, every file compared, libraries looked up, the binary asked, and switched to."""
    key = _qemu_artefact.read_manifest(archive)["key"]
    numbers = iter(range(1000))

    def ours() -> None:
        directory = f"{place}/host{next(numbers)}/qemu"
        wanted = _qemu_install.Wanted(key, archive)
        _qemu_install.plan_present(Host(), _qemu_install.read_installed(Host(), directory), wanted).apply()

    def other() -> None:
        directory = place / f"tar{next(numbers)}"
        directory.mkdir()
        subprocess.run(["tar", "-xJf", archive, "-C", str(directory)], check=True)

    mine, tar = alternate(ours, other)
    return Row("that QEMU put on a host, checked", mine, tar, "tar, unchecked", 5.0)
