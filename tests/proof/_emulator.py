# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A newer emulator than this machine has: forky's, in a directory of its own."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

# Kept: it is a distribution's package, and nobody else's business.
PLACE = pathlib.Path("/var/cache/iommufd-host-proof-emulator")

# Named like the emulator, which sees all of this machine but its programs and their settings. The process stays the one
# that was started, so that its number and its end are the emulator's.
_WRAPPER = """\
#!/bin/sh
exec unshare --mount -- sh -c '
    root=$1
    shift
    mount --make-rprivate / || exit 1
    for directory in /*; do
        case $directory in /bin | /boot | /etc | /lib* | /lost+found | /sbin | /usr) continue ;; esac
        [ -d "$directory" ] && [ ! -L "$directory" ] || continue
        mkdir -p "$root$directory" && mount --rbind "$directory" "$root$directory" || exit 1
    done
    exec chroot "$root" sh -c "cd \\"\\$0\\" && exec /usr/bin/qemu-system-x86_64 \\"\\$@\\"" "$(pwd)" "$@"
' sh @ROOT@ "$@"
"""


def newer_emulator() -> pathlib.Path:
    """Have one; its path."""
    root, wrapper = PLACE / "forky", PLACE / "qemu-system-x86_64"
    if not (root / "usr/bin/qemu-system-x86_64").exists():
        shutil.rmtree(root, ignore_errors=True)
        PLACE.mkdir(exist_ok=True)
        # Its package index may be past its date on a mirror that lags behind.
        make = ["mmdebstrap", "--mode=root", "--variant=minbase", '--aptopt=Acquire::Check-Valid-Until "false"']
        make += ["--include=qemu-system-x86", "forky", str(root)]
        subprocess.run(["unshare", "--mount", "--", *make], check=True)
    wrapper.write_text(_WRAPPER.replace("@ROOT@", str(root)))
    wrapper.chmod(0o755)
    return wrapper
