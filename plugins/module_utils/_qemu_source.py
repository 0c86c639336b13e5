# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""QEMU's sources: where they come from, whether they are the right ones, and what their tree has.

Nothing of an archive is trusted before its checksum was compared, and nothing is unpacked before every member was
looked at. Whatever the kind, :func:`fetch` ends with files on the builder and one digest that stands for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import typing as t
import urllib.error
import urllib.parse
import zlib

from ansible_collections.iommufd.host.plugins.module_utils._ansible import open_location
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._files import sha256
from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._plan import run

_KINDS = ("url", "path", "git", "package")
_ACCEPTED = "a dictionary with exactly one of url, path, git and package"
_CHUNK = 1 << 20

# What a tree is known by; all other members of an archive are only looked at, not read.
_TOLD_BY = ("VERSION", "meson_options.txt", "pythondeps.toml", "backends/Kconfig")

# Beyond it a "text" file of an archive is no text file.
_TEXT_LIMIT = 1 << 20

# One signed text and nothing around it (RFC 4880, section 7); in the text, lines that begin with a dash are escaped.
_SIGNED = re.compile(
    r"-----BEGIN PGP SIGNED MESSAGE-----\n(?:Hash: [^\n]*\n)*\n(?:(?!-)[^\n]*\n|- [^\n]*\n)*"
    r"-----BEGIN PGP SIGNATURE-----\n(?:[A-Za-z]+: [^\n]*\n)*\n[A-Za-z0-9+/=\n]*-----END PGP SIGNATURE-----\n*"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A source as the user named it; of ``url``, ``path``, ``git`` and ``package`` exactly one is set.

    Attributes:
        url: of a tarball or of a Debian source package's ``.dsc``.
        path: on the builder: a tarball, a ``.dsc``, or a source tree.
        checksum: SHA-256 of the tarball or of the ``.dsc``, hexadecimal.
        signature: URL or path of a detached OpenPGP signature of the tarball.
        keyring: path on the builder of the keys that a signature must be made with.
        git: URL or path of a repository.
        commit: the full id of the commit.
        package: name of a distribution source package.
        version: its version.
        suite: the suite of the builder's archive to take it from, where that is not the builder's own.
    """

    url: str = ""
    path: str = ""
    checksum: str = ""
    signature: str = ""
    keyring: str = ""
    git: str = ""
    commit: str = ""
    package: str = ""
    version: str = ""
    suite: str = ""

    def describe(self) -> str:
        """For people, without what a URL may carry of credentials."""
        if self.git:
            return f"{_bare_url(self.git)} at {self.commit}"
        if self.package:
            return f"source package {self.package} {self.version}".rstrip()
        return _bare_url(self.url) or self.path


def _bare_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def parse_source(value: t.Mapping[str, t.Any]) -> Source:
    """The option ``source``.

    Raises:
        OptionError: it is not one of the kinds, or one of its values is not what it must be.
    """
    given = {name: str(content) for name, content in value.items() if content not in (None, "")}
    kinds = [name for name in _KINDS if name in given]
    if len(kinds) != 1:
        raise OptionError("source", dict(given), _ACCEPTED)
    source = Source(**given)
    if source.checksum:
        checksum = re.sub(r"^sha256:", "", source.checksum).lower()
        if not re.fullmatch(r"[0-9a-f]{64}", checksum):
            raise OptionError("source.checksum", source.checksum, "a SHA-256 of 64 hexadecimal digits")
        source = dataclasses.replace(source, checksum=checksum)
    elif source.url:
        raise OptionError("source.checksum", "", "a SHA-256 of 64 hexadecimal digits", "a URL needs one")
    if source.url and urllib.parse.urlsplit(source.url).scheme not in ("https", "http", "ftp", "file"):
        raise OptionError("source.url", source.url, "an https, http, ftp or file URL")
    if source.path and not source.path.startswith("/"):
        raise OptionError("source.path", source.path, "an absolute path on the builder")
    if source.git and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", source.commit):
        raise OptionError("source.commit", source.commit, "the full id of a commit, 40 hexadecimal digits")
    if source.git and (source.git.startswith("-") or "::" in source.git):
        raise OptionError("source.git", source.git, "the URL or path of a git repository")
    if source.package and not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", source.package):
        raise OptionError("source.package", source.package, "the name of a source package")
    if source.package and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+:~-]*", source.version):
        raise OptionError("source.version", source.version, "the version of the source package, as 1:10.0.2+ds-2")
    if source.suite and not re.fullmatch(r"[a-z][a-z0-9./-]*", source.suite):
        raise OptionError("source.suite", source.suite, "the name of a suite, as trixie")
    if source.signature and not source.keyring:
        raise OptionError("source.keyring", "", "the path of a keyring on the builder", "a signature needs one")
    return source


# -- fetching ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A source that lies on the builder.

    Attributes:
        digest: stands for all of its content; goes into the key.
        tarballs: the archives that :func:`examine` has to look at.
        dsc: path of the ``.dsc`` where it is a Debian source package, whose tarballs lie beside it.
        tree: path of the directory where it is a source tree.
    """

    digest: str
    tarballs: tuple[str, ...] = ()
    dsc: str = ""
    tree: str = ""


def present(source: Source, downloads: str) -> Fetched | None:
    """The source without any network access, as far as that goes; None where it would have to be fetched.

    Raises:
        HostError: what is here is not what the checksum says, or cannot be read.
        OptionError: a path does not exist.
    """
    try:
        return _present(source, downloads)
    except OSError as error:
        raise HostError(f"{error.filename or source.describe()} cannot be read: {error.strerror}") from error


def _present(source: Source, downloads: str) -> Fetched | None:
    if source.git:
        tarball = f"{downloads}/{source.commit}.tar"
        return Fetched(f"git:{source.commit}", (tarball,)) if os.path.exists(tarball) else None
    if source.package:
        dsc = f"{downloads}/{_dsc_name(source)}"
        return _read_dsc(dsc, sha256(dsc)) if os.path.exists(dsc) else None
    if source.url:
        path = f"{downloads}/{_file_name(source)}"
        if not os.path.exists(path):
            return None
        if path.endswith(".dsc") and any(not os.path.exists(one) for one in dsc_files(path)):
            return None
        return _local(path, source)
    if not os.path.exists(source.path):
        raise OptionError("source.path", source.path, "a tarball, a .dsc or a directory", "there is no such file")
    return _local(source.path, source)


def known_digest(source: Source, downloads: str) -> str | None:
    """The digest of a source, where it can be told without fetching anything.

    Raises:
        HostError: what is here is not what the checksum says.
        OptionError: a path does not exist.
    """
    if source.git:
        return f"git:{source.commit}"
    if source.url:
        return f"sha256:{source.checksum}"
    found = present(source, downloads)
    return found.digest if found is not None else None


def fetch(source: Source, downloads: str) -> Fetched:
    """Have the source on the builder.

    Args:
        source: what to fetch.
        downloads: directory of the builder's downloads.

    Raises:
        HostError: it does not come, or it is not what the checksum or the signature says. What does not fit the
            checksum is not left here.
    """
    os.makedirs(downloads, 0o755, exist_ok=True)
    found = present(source, downloads)
    if found is None:
        if source.git:
            _export_commit(source, downloads)
        elif source.package:
            _fetch_package(source, downloads)
        else:
            _fetch_url(source, downloads)
        found = present(source, downloads)
    if found is None:
        raise HostError(f"{source.describe()} did not come")
    if source.keyring:
        _verify_signature(source, found, downloads)
    return found


def _file_name(source: Source) -> str:
    """A name that no other content has; a ``.dsc`` keeps its own, since it names its companions."""
    name = posixpath.basename(urllib.parse.unquote(urllib.parse.urlsplit(source.url).path)) or "source"
    name = re.sub(r"[^A-Za-z0-9+._~-]", "_", name)
    return f"{source.checksum[:16]}/{name}" if name.endswith(".dsc") else f"{source.checksum[:16]}-{name}"


def _local(path: str, source: Source) -> Fetched:
    if os.path.isdir(path):
        if source.checksum:
            raise OptionError("source.checksum", source.checksum, "nothing for a directory")
        return Fetched(f"tree:{tree_digest(path)}", tree=path)
    digest = sha256(path)
    if source.checksum and digest != source.checksum:
        raise HostError(f"{path} has the SHA-256 {digest}, and {source.checksum} was asked for. It was not used")
    return _read_dsc(path, digest) if path.endswith(".dsc") else Fetched(f"sha256:{digest}", (path,))


def tree_digest(path: str) -> str:
    """A digest of a source tree: names, content, links and execute bits, but no times; without ``.git``."""
    digest = hashlib.sha256()
    for directory, directories, files in os.walk(path):
        directories[:] = sorted(one for one in directories if one != ".git")
        for name in sorted([*files, *(one for one in directories if os.path.islink(os.path.join(directory, one)))]):
            full = os.path.join(directory, name)
            digest.update(os.fsencode(os.path.relpath(full, path)) + b"\0")
            if os.path.islink(full):
                digest.update(b"link " + os.fsencode(os.readlink(full)))
            elif os.path.isfile(full):
                digest.update(b"x " if os.access(full, os.X_OK) else b"- ")
                digest.update(sha256(full).encode())
            digest.update(b"\0")
    return digest.hexdigest()


def _fetch_url(source: Source, downloads: str) -> None:
    path = f"{downloads}/{_file_name(source)}"
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    download(source.url, path, source.checksum)
    if path.endswith(".dsc"):
        base = source.url.rpartition("/")[0]
        for file, checksum in dsc_files(path).items():
            download(f"{base}/{urllib.parse.quote(os.path.basename(file), safe='~')}", file, checksum)


def download(url: str, path: str, checksum: str) -> None:
    """Fetch a file whole or not at all.

    Args:
        url: where it is.
        path: where it goes.
        checksum: its SHA-256.

    Raises:
        HostError: it does not come, there is no room for it, or its checksum is another.
    """
    partial = f"{path}.part"
    digest = hashlib.sha256()
    try:
        with open_location(url, timeout=60) as answer, open(partial, "wb") as file:
            expected = answer.headers.get("Content-Length")
            for chunk in iter(lambda: answer.read(_CHUNK), b""):
                digest.update(chunk)
                file.write(chunk)
            size = file.tell()
        if expected is not None and size < int(expected):
            raise HostError(f"{_bare_url(url)} ended after {size} of {expected} bytes")
        if digest.hexdigest() != checksum:
            raise HostError(
                f"{_bare_url(url)} has the SHA-256 {digest.hexdigest()}, and {checksum} was asked for. It was not used"
            )
        os.replace(partial, path)
    except urllib.error.URLError as error:
        raise HostError(f"{_bare_url(url)} did not come: {getattr(error, 'reason', None) or error}") from error
    except OSError as error:
        raise HostError(f"{_bare_url(url)} did not come: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


# -- git ---------------------------------------------------------------------------------------------------------------


def _export_commit(source: Source, downloads: str) -> None:
    """A commit as a tarball. Its id is the hash of its content, so nothing else needs to be compared."""
    repository = f"{downloads}/{source.commit}.git"
    tarball = f"{downloads}/{source.commit}.tar"
    shutil.rmtree(repository, ignore_errors=True)
    try:
        run(["git", "init", "--quiet", "--bare", repository])
        git = ["git", "--git-dir", repository, "-c", "protocol.ext.allow=never", "-c", "transfer.fsckObjects=true"]
        try:
            run([*git, "fetch", "--quiet", "--depth=1", source.git, source.commit], 3600)
        except HostError:  # a server that gives only what a branch or tag names
            run([*git, "fetch", "--quiet", source.git, "+refs/*:refs/*"], 7200)
        run([*git, "archive", "--format=tar", "--prefix=qemu/", f"--output={tarball}.part", source.commit], 600)
        os.replace(f"{tarball}.part", tarball)
    except HostError as error:
        raise HostError(f"{source.describe()} did not come: {error.message}", **error.details) from error
    finally:
        shutil.rmtree(repository, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{tarball}.part")


# -- Debian source packages --------------------------------------------------------------------------------------------


def _dsc_name(source: Source) -> str:
    # The epoch of a version is not part of file names (Debian Policy 5.6.12).
    return f"{source.package}_{re.sub(r'^[0-9]+:', '', source.version)}.dsc"


def dsc_files(path: str) -> dict[str, str]:
    """The SHA-256 of a source package's files by their paths beside the ``.dsc``.

    Raises:
        HostError: it lists none, or a name that leads elsewhere.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(_TEXT_LIMIT)
    block = re.search(r"^Checksums-Sha256:[ \t]*\n((?:[ \t]+\S.*\n)+)", text, re.MULTILINE)
    files: dict[str, str] = {}
    for line in (block[1] if block else "").splitlines():
        words = line.split()
        if len(words) != 3 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._~-]*", words[2]):
            raise HostError(f"{path} is no source package: {line.strip()!r}")
        files[f"{os.path.dirname(path)}/{words[2]}"] = words[0]
    if not files:
        raise HostError(f"{path} is no source package: it has no list Checksums-Sha256")
    return files


def _read_dsc(path: str, digest: str) -> Fetched:
    """A source package whose files are all there, as its ``.dsc`` describes them."""
    files = dsc_files(path)
    for file, checksum in files.items():
        if not os.path.exists(file):
            raise HostError(f"{path} needs {os.path.basename(file)} beside it, which is not there")
        if sha256(file) != checksum:
            raise HostError(f"{file} is not the file that {os.path.basename(path)} describes: its SHA-256 differs")
    tarballs = sorted((file for file in files if ".tar." in file and not file.endswith(".asc")), key=_orig_first)
    return Fetched(f"sha256:{digest}", tuple(tarballs), dsc=path)


def _orig_first(path: str) -> tuple[bool, str]:
    return ".orig.tar." not in path, path


def _fetch_package(source: Source, downloads: str) -> None:
    """Have apt fetch a source package, which checks it against the archive's signatures.

    The machine's own apt is not changed: source lists are derived from it in a directory of their own.
    """
    place = f"{downloads}/.apt-{os.getpid()}"
    try:
        for directory in ("lists/partial", "cache/archives/partial", "parts", "files"):
            os.makedirs(f"{place}/{directory}", 0o755)
        with open(f"{place}/parts/source.sources", "w", encoding="utf-8") as file:
            file.write(source_stanzas(Host(), source.suite))
        options = [
            "-q",
            "-o",
            "Dir::Etc::SourceList=/dev/null",
            "-o",
            f"Dir::Etc::SourceParts={place}/parts",
            "-o",
            f"Dir::State::Lists={place}/lists",
            "-o",
            f"Dir::Cache={place}/cache",
            "-o",
            "APT::Sandbox::User=root",
        ]
        run(["apt-get", *options, "update"], 900)
        wanted = f"{source.package}={source.version}"
        there = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", f"{place}/files"]
        run([*there, "apt-get", *options, "source", "--download-only", wanted], 1800)
        names = os.listdir(f"{place}/files")
        for name in sorted(names, key=lambda one: one.endswith(".dsc")):  # the .dsc last: it says that all are there
            os.replace(f"{place}/files/{name}", f"{downloads}/{name}")
    except HostError as error:
        # apt's own first words; its command line here is long and tells nobody anything.
        words = re.search(r"^E: (.+)$", str(error.details.get("stderr")), re.MULTILINE)
        why = words[1] if words else error.message
        raise HostError(f"{source.describe()} did not come: {why}", **error.details) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def source_stanzas(host: Host, suite: str) -> str:
    """Source lists in the format of deb822, for the archives that the machine's own apt names.

    Args:
        host: the builder.
        suite: the one suite to use instead of the machine's own ones.

    Raises:
        HostError: apt has no archive to derive one from.
    """
    found: list[str] = []
    for uri, suites, components, signed_by in _archives(host):
        # The archive that has a suite beside the machine's own is the main one, not that of security updates.
        if suite and "security" in uri:
            continue
        stanza = f"Types: deb-src\nURIs: {uri}\nSuites: {suite or suites}\nComponents: {components}\n"
        found.append(stanza + (f"Signed-By: {signed_by}\n" if signed_by else ""))
        if suite:
            break
    if not found:
        raise HostError("apt names no archive of packages on this builder that a source package could come from")
    return "\n".join(found)


def _archives(host: Host) -> t.Iterator[tuple[str, str, str, str]]:
    """URI, suites, components and keyring of the machine's binary package sources."""
    directory = "/etc/apt/sources.list.d"
    for name in host.listdir(directory):
        if name.endswith(".sources"):
            for stanza in re.split(r"\n\s*\n", host.read_text(f"{directory}/{name}") or ""):
                fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
                if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes") != "no":
                    for uri in fields.get("URIs", "").split():
                        yield uri, fields.get("Suites", ""), fields.get("Components", ""), fields.get("Signed-By", "")
    one_line = [f"{directory}/{name}" for name in host.listdir(directory) if name.endswith(".list")]
    for path in ["/etc/apt/sources.list", *one_line]:
        for line in (host.read_text(path) or "").splitlines():
            match = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)$", line.partition("#")[0].strip())
            if match:
                signed_by = re.search(r"signed-by=(\S+)", match[1] or "")
                yield match[2], match[3], match[4], signed_by[1] if signed_by else ""


def _verify_signature(source: Source, found: Fetched, downloads: str) -> None:
    """Have gpgv check a detached signature of the tarball, or the one inside a ``.dsc``."""
    if found.dsc:
        # gpgv passes over what stands around the signed text, and the checksums could be read from there.
        with open(found.dsc, encoding="utf-8", errors="replace") as file:
            text = file.read(_TEXT_LIMIT + 1)
        if len(text) > _TEXT_LIMIT or not _SIGNED.fullmatch(text):
            raise HostError(
                f"{source.describe()} is not signed by a key of {source.keyring} as a whole. It was not used"
            )
        _ask_gpgv(source, [found.dsc])
        return
    if not source.signature or not found.tarballs:
        raise OptionError("source.signature", source.signature, "the URL or path of the tarball's signature")
    signature = source.signature
    temporary = f"{downloads}/.signature-{os.getpid()}"
    try:
        if not signature.startswith("/"):
            try:
                with open_location(signature, timeout=60) as answer, open(temporary, "wb") as file:
                    file.write(answer.read(_TEXT_LIMIT))
            except OSError as error:
                raise HostError(f"the signature {_bare_url(signature)} did not come: {error}") from error
            signature = temporary
        _ask_gpgv(source, [signature, found.tarballs[0]])
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _ask_gpgv(source: Source, files: t.Sequence[str]) -> None:
    try:
        run(["gpgv", "--quiet", "--keyring", source.keyring, *files])
    except HostError as error:
        words = str(error.details.get("stderr") or error.message).strip().splitlines()[-1]
        raise HostError(
            f"{source.describe()} is not signed by a key of {source.keyring} ({words}). It was not used"
        ) from error


# -- looking into a source ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a tree has, as far as building it depends on that.

    Attributes:
        version: QEMU's ("10.0.13").
        option: ``meson_options.txt`` has an option ``iommufd``.
        kconfig: Kconfig has a symbol ``IOMMUFD``.
        meson: the oldest meson that it accepts ("1.5.0"); empty where it does not say.
        pycotap: it wants the Python package of that name, too.
        wheels: it brings meson along.
        date: seconds since 1970 of its release, for everything that would otherwise carry the time of the build.
    """

    version: str
    option: bool
    kconfig: bool
    meson: str = ""
    pycotap: bool = False
    wheels: bool = False
    date: int = 0


def examine(found: Fetched) -> Traits:
    """Look at every member of a source without unpacking any.

    Raises:
        HostError: an archive is damaged or has a member that no source needs, or it is not QEMU's.
    """
    if found.tree:
        texts: dict[str, str] = {}
        for name in _TOLD_BY:
            with contextlib.suppress(OSError), open(f"{found.tree}/{name}", encoding="utf-8", errors="replace") as file:
                texts[name] = file.read(_TEXT_LIMIT)
        wheels = Host().listdir(f"{found.tree}/python/wheels")
        # Copies of one tree have other times. A day that every archive format can hold stands for all of them.
        return _traits(found.tree, texts, wheels, 315532800)
    texts, wheels, date = {}, [], 0
    for number, tarball in enumerate(found.tarballs):
        for member, content in _members(tarball, _TOLD_BY if number == 0 else ()):
            name = _inside(member.name)
            if content is not None:
                texts[name] = content.decode("utf-8", "replace")
                date = max(date, int(member.mtime))
            if number == 0 and name.startswith("python/wheels/"):
                wheels.append(posixpath.basename(name))
    return _traits(found.tarballs[0], texts, wheels, date)


def _traits(where: str, texts: t.Mapping[str, str], wheels: t.Sequence[str], date: int) -> Traits:
    version = re.fullmatch(r"\d+\.\d+(\.\d+)*", texts.get("VERSION", "").strip())
    if version is None or "meson_options.txt" not in texts:
        raise HostError(f"{where} is no source of QEMU: its top directory has no VERSION and meson_options.txt")
    needs = re.search(r"^\[meson\]\n(.*?)(?=^\[|\Z)", texts.get("pythondeps.toml", ""), re.MULTILINE | re.DOTALL)
    group = re.sub(r"#.*", "", needs[1]) if needs else ""
    meson = re.search(r'^meson\s*=.*?accepted\s*=\s*">=([\d.]+)"', group, re.MULTILINE)
    return Traits(
        version=version[0],
        option=re.search(r"""option\(\s*['"]iommufd['"]""", texts["meson_options.txt"]) is not None,
        kconfig=re.search(r"^config IOMMUFD$", texts.get("backends/Kconfig", ""), re.MULTILINE) is not None,
        meson=meson[1] if meson else "",
        pycotap=re.search(r"^pycotap\s*=", group, re.MULTILINE) is not None,
        wheels=any(name.startswith("meson-") for name in wheels),
        date=date,
    )


def _members(path: str, wanted: t.Collection[str] = ()) -> t.Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Members of a tarball in order, each of them harmless; content for those that are wanted.

    Raises:
        HostError: it is damaged, or a member is none that a source may have.
    """
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                _require_harmless(path, member)
                file = None
                if member.isreg() and _inside(member.name) in wanted and member.size <= _TEXT_LIMIT:
                    file = archive.extractfile(member)
                yield member, file.read() if file is not None else None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> HostError:
    if isinstance(error, OSError) and error.errno is not None:
        return HostError(f"{error.filename or path}: {error.strerror}")
    return HostError(f"{path} is truncated or damaged: {error or type(error).__name__}")


def _require_harmless(archive: str, member: tarfile.TarInfo) -> None:
    name = member.name
    # A hard link is a copy of the file that it names, made by root.
    for path in (name, member.linkname if member.islnk() else ""):
        if path.startswith("/") or ".." in path.split("/"):
            raise HostError(f"{archive} was not unpacked: its member {name!r} leads out of its directory")
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise HostError(f"{archive} was not unpacked: its member {name!r} is a device node or a pipe")


def _inside(name: str) -> str:
    """A member's path below the archive's top directory; empty for that itself."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts[1:])


# -- unpacking ---------------------------------------------------------------------------------------------------------


def unpack(tarball: str, target: str, uid: int) -> None:
    """Unpack an archive without its top directory. Only what lies inside is written, whatever the archive says.

    Links that lead out of the tree are left out: no source needs one, and some archives of QEMU's carry such.

    Args:
        tarball: the archive.
        target: a directory that does not exist yet.
        uid: whom all of it belongs to.

    Raises:
        HostError: it is damaged, has a member that no source may have, or there is no room for it.
    """
    os.mkdir(target, 0o755)
    os.chown(target, uid, uid)
    links: set[str] = set()
    try:
        with tarfile.open(tarball, "r|*") as archive:
            for member in archive:
                _require_harmless(tarball, member)
                name = _inside(member.name)
                if not name:
                    continue
                if any(_below(name, link) for link in links):
                    raise HostError(f"{tarball} was not unpacked: its member {member.name!r} lies behind a link")
                _unpack_member(archive, member, target, name, links, uid)
    except HostError:
        raise
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise _damaged(tarball, error) from error


def _below(name: str, link: str) -> bool:
    return name == link or name.startswith(link + "/")


def _unpack_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, target: str, name: str, links: set[str], uid: int
) -> None:
    path = f"{target}/{name}"
    _make_directories(target, posixpath.dirname(name), uid)
    if member.isdir():
        _make_directories(target, name, uid)
        return
    if member.issym():
        end = posixpath.normpath(posixpath.join("/top", posixpath.dirname(name), member.linkname))
        if member.linkname.startswith("/") or not end.startswith("/top/"):
            return
        links.add(name)
        os.symlink(member.linkname, path)
    elif member.islnk():
        original = _inside(member.linkname)
        if any(_below(original, link) for link in links):
            raise HostError(f"the archive's member {member.name!r} names a file behind a link")
        shutil.copyfile(f"{target}/{original}", path, follow_symlinks=False)
        os.chmod(path, 0o755 if member.mode & 0o100 else 0o644)
        os.utime(path, (member.mtime, member.mtime))
    else:
        content = archive.extractfile(member)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            if content is not None:
                shutil.copyfileobj(content, file, _CHUNK)
            os.fchmod(file.fileno(), 0o755 if member.mode & 0o100 else 0o644)
        os.utime(path, (member.mtime, member.mtime))
    os.lchown(path, uid, uid)


def _make_directories(target: str, name: str, uid: int) -> None:
    path = target
    for part in name.split("/"):
        path = f"{path}/{part}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
            os.chown(path, uid, uid)


def copy_tree(tree: str, target: str, uid: int) -> None:
    """Copy a source tree without its ``.git``; links as links.

    Raises:
        HostError: it cannot be read, or there is no room for it.
    """
    try:
        shutil.copytree(tree, target, symlinks=True, ignore=shutil.ignore_patterns(".git"))
        for directory, directories, files in os.walk(target):
            for name in [*directories, *files]:
                os.lchown(os.path.join(directory, name), uid, uid)
        os.chown(target, uid, uid)
    except shutil.Error as error:
        raise HostError(f"{tree} could not be copied: {error.args[0][0][2]}") from error
    except OSError as error:
        raise HostError(f"{tree} could not be copied: {error.strerror}") from error
