# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""iommufd in a lab host's image, as the module iommufd_dkms would put it on the host.

On an emulated processor the build takes minutes, on the machine that makes the image seconds. So the code that runs on
a host runs here in the image's root directory, entered by chroot: the host finds what it would have made itself, and
can take it back.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import sys
import tarfile
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils import _dkms, _dkms_frame

_PACKAGE = _dkms.__name__.rpartition(".")[0]

# Where the code lies in the image while it is made.
DIRECTORY = "lab-iommufd"

_SCRIPT = f"""\
import sys
sys.path.insert(0, "/{DIRECTORY}")
from {_PACKAGE} import _dkms
from {_PACKAGE}._errors import HostError
from {_PACKAGE}._host import Host
try:
    planned = _dkms.plan_present(Host(), _dkms.Wanted(offline=True))
    print(*planned.plan.summary(), sep="\\n", flush=True)
    planned.plan.apply()
except HostError as error:
    sys.exit("\\n".join([error.message, *error.details.get("log", [])]))
"""


def key() -> str:
    """Hash of what decides on the modules in the image, besides the kernel itself."""
    frame = [_dkms_frame.VERSION, _dkms_frame.FILES, _dkms_frame.KERNEL_PATHS, _SCRIPT]
    return hashlib.sha256(json.dumps(frame, sort_keys=True).encode()).hexdigest()[:16]


def write_archive(path: str, files: t.Mapping[str, tuple[int, str]]) -> None:
    """Write a tar archive of files, each a mode and a text."""
    with tarfile.open(path, "w") as archive:
        for name, (mode, text) in sorted(files.items()):
            data = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))


def write_payload(path: str) -> None:
    """Write a tar archive of the code that runs in the image, to be unpacked in its root directory."""
    write_archive(path, {f"{DIRECTORY}/{name}": (0o644, text) for name, text in _sources().items()})


def _sources() -> dict[str, str]:
    """The script, and the source of each module of ours that ``_dkms`` has brought in, by path."""
    found = {"install.py": _SCRIPT}
    for name in sorted(sys.modules):
        if name.startswith(f"{_PACKAGE}._"):
            # The loader knows the source, be it on disk or in the archive that Ansible sends.
            loader = t.cast(t.Any, importlib.import_module(name).__loader__)
            found[name.replace(".", "/") + ".py"] = loader.get_source(name)
    return found
