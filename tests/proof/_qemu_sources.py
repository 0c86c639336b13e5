# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which versions of QEMU's source package there are."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

from _lab import CHECKOUT, check

sys.path.insert(0, str(CHECKOUT / "build/collections"))

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._qemu_source import source_stanzas


def source_versions(suite: str, directory: pathlib.Path) -> list[str]:
    """The versions of QEMU's source package that a suite of the machine's own archive lists, the newest first.

    Args:
        suite: its name.
        directory: place for apt's lists, which are gone again in the end.
    """
    place = directory / "apt"
    for directory in ("parts", "lists/partial"):
        (place / directory).mkdir(parents=True, exist_ok=True)
    (place / "parts/source.sources").write_text(source_stanzas(Host(), suite))
    options = ["-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={place}/parts"]
    options += ["-o", f"Dir::State::Lists={place}/lists", "-o", "APT::Sandbox::User=root"]
    subprocess.run(["apt-get", "-q", *options, "update"], check=True)
    text = subprocess.run(["apt-cache", *options, "showsrc", "qemu"], check=True, capture_output=True, text=True).stdout
    shutil.rmtree(place)
    versions = re.findall(r"^Version: (\S+)$", text, re.MULTILINE)
    check(versions, f"{suite} lists no source package qemu")
    return versions[::-1]
