# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A built QEMU as one relocatable archive: ``manifest.json`` first, then the files that it lists with their hashes.

The archive of the same files is the same to the last bit, whoever packs it and when. QEMU finds its data relative to
its binary (get_relocated_path in util/cutils.c, since 5.2), so the archive can be unpacked anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError
from ansible_collections.iommufd.host.plugins.module_utils._files import sha256

FORMAT = 1
MANIFEST = "manifest.json"

Json = dict[str, t.Any]

# Beyond it a manifest is none.
_MANIFEST_LIMIT = 4 << 20


def key_of(decides: t.Mapping[str, t.Any]) -> str:
    """The key of everything that decides a result: 32 hexadecimal digits."""
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def list_files(stage: str) -> dict[str, Json]:
    """The files of a tree by relative path, each with ``sha256``, ``size`` and ``mode``, or ``link``.

    Raises:
        HostError: something in it is neither a file nor a directory nor a link inside the tree.
    """
    found: dict[str, Json] = {}
    for directory, directories, files in os.walk(stage):
        directories.sort()
        for name in sorted([*files, *(one for one in directories if os.path.islink(os.path.join(directory, one)))]):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, stage)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(path)
                end = posixpath.normpath(posixpath.join("/top", posixpath.dirname(relative), target))
                if target.startswith("/") or not end.startswith("/top/"):
                    raise HostError(f"the build installed a link that leads out of it: {relative} -> {target}")
                found[relative] = {"link": target}
            elif stat.S_ISREG(status.st_mode):
                mode = "0755" if status.st_mode & 0o100 else "0644"
                found[relative] = {"sha256": sha256(path), "size": status.st_size, "mode": mode}
            else:
                raise HostError(f"the build installed {relative}, which is neither a file nor a link")
    return dict(sorted(found.items()))


def pack(stage: str, manifest: Json, path: str, date: int) -> None:
    """Write the archive, whole or not at all.

    Args:
        stage: the tree.
        manifest: its description; its ``files`` are those of :func:`list_files`.
        path: the archive, compressed with xz.
        date: time that every member carries, in seconds since 1970.

    Raises:
        OSError: there is no room for it.
    """
    partial = f"{path}.part"
    try:
        with lzma.open(partial, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            _pack_all(archive, stage, manifest, date)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _pack_all(archive: tarfile.TarFile, stage: str, manifest: Json, date: int) -> None:
    text = json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"
    _add(archive, MANIFEST, io.BytesIO(text), len(text), 0o644, date)
    for name, one in sorted(manifest["files"].items()):
        if "link" in one:
            member = _member(name, 0, 0o777, date)
            member.type, member.linkname = tarfile.SYMTYPE, one["link"]
            archive.addfile(member)
        else:
            with open(f"{stage}/{name}", "rb") as file:
                _add(archive, name, file, one["size"], int(one["mode"], 8), date)


def _member(name: str, size: int, mode: int, date: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, mode, date
    return member  # owner and group are 0 and without names


def _add(archive: tarfile.TarFile, name: str, file: t.IO[bytes], size: int, mode: int, date: int) -> None:
    archive.addfile(_member(name, size, mode, date), file)


def read_manifest(path: str) -> Json:
    """The manifest of an archive.

    Raises:
        HostError: it is damaged, or no archive of ours.
    """
    try:
        with tarfile.open(path, "r|xz") as archive:
            member = archive.next()
            if member is None or member.name != MANIFEST or not member.isreg() or member.size > _MANIFEST_LIMIT:
                raise HostError(f"{path} is no archive of a QEMU that qemu_build made: it begins with no {MANIFEST}")
            file = archive.extractfile(member)
            manifest = json.loads(file.read() if file is not None else b"")
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise HostError(f"{path} is truncated or damaged, or no archive that qemu_build made: {error}") from error
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
    return check_manifest(path, manifest)


def check_manifest(path: str, manifest: t.Any) -> Json:
    """A manifest that this version understands.

    Raises:
        HostError: it is none.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise HostError(f"{path}: its manifest is not of format {FORMAT}. Build it again with this version")
    if not isinstance(manifest.get("key"), str) or not isinstance(manifest.get("files"), dict):
        raise HostError(f"{path}: its manifest has no key or no files")
    return manifest


def unpack(path: str, target: str) -> Json:
    """Unpack an archive, each file compared with its hash while it is written.

    Args:
        path: the archive.
        target: a directory that does not exist yet.

    Returns:
        The manifest.

    Raises:
        HostError: it is damaged, has a member that its manifest does not list or lacks one that it lists, or there is
            no room; what was unpacked is gone again.
    """
    manifest = read_manifest(path)
    files: dict[str, Json] = manifest["files"]
    try:
        os.mkdir(target, 0o755)
        missing = set(files)
        with tarfile.open(path, "r|xz") as archive:
            for member in archive:
                if member.name == MANIFEST:
                    continue
                if member.name not in missing:
                    raise HostError(f"{path} has a member {member.name!r} that its manifest does not list")
                missing.discard(member.name)
                _unpack_one(path, archive, member, files[member.name], target)
        if missing:
            raise HostError(f"{path} lacks {min(missing)!r}, which its manifest lists")
        with open(f"{target}/{MANIFEST}", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
            file.write("\n")
            os.fchmod(file.fileno(), 0o644)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, (tarfile.TarError, lzma.LZMAError, EOFError)):
            raise HostError(f"{path} is truncated or damaged: {error or type(error).__name__}") from error
        if isinstance(error, OSError):
            raise HostError(f"{target}: {error.strerror}. Nothing was installed") from error
        raise
    return manifest


def _unpack_one(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo, listed: Json, target: str) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or not (member.isreg() or member.issym()):
        raise HostError(f"{path} was not unpacked: its member {name!r} is none that qemu_build makes")
    _make_directories(target, posixpath.dirname(name))
    if member.issym():
        end = posixpath.normpath(posixpath.join("/top", posixpath.dirname(name), member.linkname))
        if member.linkname != listed.get("link") or member.linkname.startswith("/") or not end.startswith("/top/"):
            raise HostError(f"{path} was not unpacked: its link {name!r} is not the one that its manifest lists")
        os.symlink(member.linkname, f"{target}/{name}")
        return
    content = archive.extractfile(member)
    digest = hashlib.sha256()
    # O_EXCL and directories that are checked to be none of the archive's links: nothing is written elsewhere.
    descriptor = os.open(f"{target}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while content is not None:
            chunk = content.read(1 << 20)
            if not chunk:
                break
            digest.update(chunk)
            file.write(chunk)
        os.fchmod(file.fileno(), 0o755 if listed.get("mode") == "0755" else 0o644)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != listed.get("sha256"):
        raise HostError(f"{path} is damaged: {name} is not the file that its manifest lists. Nothing was installed")


def _make_directories(target: str, name: str) -> None:
    path = target
    for part in [one for one in name.split("/") if one]:
        path = f"{path}/{part}"
        try:
            os.mkdir(path, 0o755)
            os.chmod(path, 0o755)
        except FileExistsError:
            if os.path.islink(path):
                raise HostError(f"the archive has a file behind a link ({name})") from None


def verify(target: str, manifest: Json) -> str | None:
    """Whether an unpacked tree is as its manifest says; the first difference in words, or None."""
    for name, listed in manifest["files"].items():
        path = f"{target}/{name}"
        try:
            if "link" in listed:
                if os.readlink(path) != listed["link"]:
                    return f"{name} is another link"
            elif os.path.islink(path) or os.path.getsize(path) != listed["size"] or sha256(path) != listed["sha256"]:
                return f"{name} was changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
