# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import pathlib
import re
import subprocess
import typing as t

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _dkms, _kernel
from ansible_collections.iommufd.host.plugins.module_utils._dkms_frame import FILES, MODULES, TREE, VERSION
from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._host import Host, Output
from ansible_collections.iommufd.host.plugins.module_utils._plan import WriteFile

RELEASE = "6.12.117+deb13-amd64"
OLDER = "6.12.9+deb13-amd64"
UNSET = "# CONFIG_IOMMUFD is not set\nCONFIG_VFIO=m\nCONFIG_VFIO_PCI_CORE=m\nCONFIG_VFIO_PCI=m\n"


class Debian(Host):
    """A synthetic Debian host whose apt knows every package, or not."""

    def __init__(self, root: pathlib.Path) -> None:
        super().__init__(str(root))
        self.base = root
        self.unknown: list[str] = []
        self.asked: list[list[str]] = []
        self.put("/proc/sys/kernel/osrelease", RELEASE + "\n")
        self.put("/var/lib/apt/lists/x_Packages", "")
        self.put("/usr/bin/apt-get", "")
        self.put("/usr/bin/xz", "")
        (root / "usr/bin/apt-get").chmod(0o755)
        (root / "usr/bin/xz").chmod(0o755)
        self.packages()

    def put(self, path: str, text: str = "") -> None:
        target = self.base / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def packages(self, *names: str) -> None:
        stanzas = [f"Package: {name}\nStatus: install ok installed\nVersion: 6.12.117-1\n" for name in names]
        self.put("/var/lib/dpkg/status", "\n".join(stanzas))

    def kernel(self, release: str = RELEASE, config: str = UNSET, headers: bool = False, dep: str = "") -> None:
        self.put(f"/usr/lib/modules/{release}/modules.dep", dep or "kernel/drivers/vfio/vfio.ko.xz:\n")
        self.put(f"/boot/config-{release}", config)
        if headers:
            self.put(f"/usr/lib/modules/{release}/build/include/x")

    def built(self, release: str = RELEASE, version: str = VERSION) -> None:
        """As DKMS leaves it."""
        paths = [f"updates/dkms/{name}.ko.xz" for name in MODULES]
        self.kernel(release, headers=True, dep="".join(f"{path}:\n" for path in paths))
        for path in paths:
            self.put(f"/usr/lib/modules/{release}/{path}")
        self.put(f"/var/lib/dkms/iommufd/{version}/{release}/x86_64/log/make.log")
        (self.base / f"var/lib/dkms/iommufd/kernel-{release}-x86_64").symlink_to(f"{version}/{release}/x86_64")

    def tree(self) -> None:
        for name, text in FILES.items():
            self.put(f"{TREE}/{name}", text)
        (self.base / TREE[1:] / "prepare.sh").chmod(0o755)
        for path in (self.base / TREE[1:]).rglob("*"):
            if path.is_file() and path.suffix != ".sh":
                path.chmod(0o644)
        self.put(f"{TREE}/linux-6.12/SOURCE", "/usr/src/linux-source-6.12.tar.xz 1 1\n")

    def complete(self) -> None:
        self.packages("dkms", "linux-source-6.12", f"linux-headers-{RELEASE}")
        self.put("/usr/src/linux-source-6.12.tar.xz")
        self.built()
        self.tree()

    def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
        self.asked.append(list(argv))
        unknown = [name for name in argv if name in self.unknown]
        if unknown:
            return Output(100, "", "".join(f"E: Unable to locate package {name}\n" for name in unknown))
        verb = "Purg" if "purge" in argv else "Inst"
        names = [name for name in argv if not name.startswith("-")][2:]
        return Output(0, "".join(f"{verb} {name} (1)\n" for name in names), "")


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Debian:
    return Debian(tmp_path)


def present(host: Host, **wishes: t.Any) -> _dkms.Planned:
    return _dkms.plan_present(host, _dkms.Wanted(**{"check": True, **wishes}))


def test_a_kernel_with_iommufd_needs_nothing(host: Debian) -> None:
    host.kernel(config="CONFIG_IOMMUFD=m\n", dep="kernel/drivers/iommu/iommufd/iommufd.ko.zst:\n")
    planned = present(host)
    assert planned.kernels[0].state == "native"
    assert not planned.plan.changed
    assert host.asked == []


def test_a_fresh_stock_kernel(host: Debian) -> None:
    host.kernel()
    host.packages("linux-image-amd64")
    planned = present(host)
    assert [kernel.state for kernel in planned.kernels] == ["missing"]
    summary = planned.plan.summary()
    assert summary[0] == (
        f"install the packages dkms linux-source-6.12 linux-headers-{RELEASE} linux-headers-amd64 linux-source"
    )
    assert summary[-3:] == [
        "take iommufd and vfio of Linux 6.12 out of /usr/src/linux-source-6.12.tar.xz",
        f"write {_dkms._KEY_NOTE}",
        f"build and install iommufd and vfio for kernel {RELEASE} with DKMS",
    ]
    assert {step.subject for step in planned.plan.steps} >= {f"{TREE}/{name}" for name in FILES}


def test_an_image_in_the_making_gets_them_for_its_newest_kernel(host: Debian) -> None:
    host.kernel()
    host.put("/proc/sys/kernel/osrelease", "6.1.0-40-amd64\n")  # that of the machine which makes the image
    with pytest.raises(HostError, match=r"6\.1\.0-40-amd64 has no modules installed"):
        present(host)
    summary = present(host, offline=True).plan.summary()
    assert summary[-1] == f"build and install iommufd and vfio for kernel {RELEASE} with DKMS"


def test_the_metapackage_of_headers_comes_only_with_that_of_the_image(host: Debian) -> None:
    host.kernel()
    assert "linux-headers-amd64" not in present(host).installs


def test_the_next_series_comes_with_its_sources_but_for_backports(host: Debian) -> None:
    host.kernel("7.2.12+deb13-amd64")
    host.put("/proc/sys/kernel/osrelease", "7.2.12+deb13-amd64\n")
    stanza = "Package: linux-image-amd64\nStatus: install ok installed\nVersion: 7.2.12-1{}\n"
    host.put("/var/lib/dpkg/status", stanza.format(""))
    assert {"linux-source", "linux-source-7.2", "linux-headers-amd64"} <= set(present(host).installs)
    host.put("/var/lib/dpkg/status", stanza.format("~bpo13+1"))
    assert {"linux-source-7.2", "linux-headers-amd64"} <= set(present(host).installs)
    assert "linux-source" not in present(host).installs


def test_an_initramfs_that_shall_hold_vfio_is_made_anew(host: Debian) -> None:
    host.complete()
    host.put("/etc/initramfs-tools/modules", "# vfio\n")
    for name in ("mkinitramfs", "update-initramfs"):
        host.put(f"/usr/sbin/{name}")
        (host.base / f"usr/sbin/{name}").chmod(0o755)
    host.put(f"/boot/initrd.img-{RELEASE}")
    anew = f"make /boot/initrd.img-{RELEASE} anew, which holds vfio"
    assert anew not in _dkms.plan_absent(host).plan.summary()
    host.put("/etc/initramfs-tools/modules", "vfio_pci ids=10de:1b80\n")
    assert present(host).plan.summary() == []
    assert anew in _dkms.plan_absent(host).plan.summary()
    host.kernel(headers=True)
    assert present(host).plan.summary()[-1] == anew


@pytest.mark.parametrize(
    ("enabled", "certificate", "enrolled", "says"),
    [
        (None, None, None, None),
        (False, "/x.pub", False, None),
        (True, "/x.pub", True, None),
        (True, "/x.pub", False, r"not enrolled.*mokutil --import /x.pub"),
        (True, "/x.pub", None, r"may not be enrolled.*mokutil --import /x.pub"),
        (True, None, None, "no key"),
    ],
)
def test_what_secure_boot_wants_of_a_person(
    enabled: bool | None, certificate: str | None, enrolled: bool | None, says: str | None
) -> None:
    warning = _dkms.SecureBoot(enabled, certificate, enrolled).warning
    assert (warning is None) == (says is None)
    assert says is None or (warning is not None and re.search(says, warning))


def test_a_key_that_is_not_enrolled_is_warned_of_at_every_run(host: Debian) -> None:
    host.complete()
    path = host.base / "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x06\0\0\0\x01")
    for name in ("openssl", "mokutil"):
        host.put(f"/usr/bin/{name}")
        (host.base / f"usr/bin/{name}").chmod(0o755)
    host.put("/var/lib/dkms/mok.pub")
    planned = present(host)
    assert (planned.plan.summary(), len(planned.warnings)) == ([], 1)
    _dkms.look_again(host, planned)
    assert len(planned.warnings) == 1


def test_a_complete_host_needs_nothing_and_asks_nobody(host: Debian) -> None:
    host.complete()
    planned = present(host)
    assert planned.plan.summary() == []
    assert planned.kernels[0].state == "dkms"
    assert host.asked == []


def test_a_run_killed_before_the_build_only_builds(host: Debian) -> None:
    host.complete()
    for path in (host.base / "usr/lib/modules" / RELEASE / "updates/dkms").iterdir():
        path.unlink()
    (host.base / f"var/lib/dkms/iommufd/kernel-{RELEASE}-x86_64").unlink()
    host.put("/var/lib/dkms/mok.key")
    planned = present(host)
    assert planned.kernels[0].state == "partial"
    # The tarball is not the one that the sources were taken from, so they are taken anew for the build.
    assert planned.plan.summary()[-1].startswith("build and install")
    assert not any("packages" in line or "write" in line for line in planned.plan.summary())


def test_a_module_that_is_gone_is_built_again(host: Debian) -> None:
    host.complete()
    (host.base / "usr/lib/modules" / RELEASE / "updates/dkms/vfio.ko.xz").unlink()
    assert present(host).plan.summary()[-1].startswith("build and install")


def test_an_edited_file_is_written_again(host: Debian) -> None:
    host.complete()
    host.put(f"{TREE}/dkms.conf", FILES["dkms.conf"] + "# edited\n")
    assert present(host).plan.summary() == [f"write {TREE}/dkms.conf"]


def test_a_tarball_that_is_newer_does_not_start_a_build(host: Debian) -> None:
    host.complete()
    host.put("/usr/src/linux-source-6.12.tar.xz", "upgraded")
    assert present(host).plan.summary() == []


def test_an_older_build_of_ours_is_replaced(host: Debian) -> None:
    host.complete()
    (host.base / f"var/lib/dkms/iommufd/kernel-{RELEASE}-x86_64").unlink()
    host.built(version="0")
    host.put("/usr/src/iommufd-0/dkms.conf", FILES["dkms.conf"])
    summary = present(host).plan.summary()
    assert summary[0].startswith("remove iommufd and vfio built by DKMS")
    assert "remove /usr/src/iommufd-0" in summary
    assert summary[-1].startswith("build and install")


def test_a_new_kernel_without_headers_gets_them(host: Debian) -> None:
    host.complete()
    newer = "6.12.120+deb13-amd64"
    host.kernel(newer)
    planned = present(host)
    assert planned.installs == [f"linux-headers-{newer}"]
    assert planned.plan.summary()[-1] == f"build and install iommufd and vfio for kernel {newer} with DKMS"


def test_an_old_kernel_without_headers_is_left_alone(host: Debian) -> None:
    host.complete()
    host.kernel(OLDER)
    planned = present(host)
    assert [kernel.release for kernel in planned.kernels] == [OLDER, RELEASE]
    assert planned.plan.summary() == []


def test_no_sources_is_one_clear_error(host: Debian) -> None:
    host.kernel(headers=True)
    host.unknown = ["linux-source-6.12"]
    with pytest.raises(HostError, match=r"no sources to build it from: the package linux-source-6\.12") as caught:
        present(host)
    assert RELEASE in caught.value.message


def test_headers_that_left_the_archive_are_explained(host: Debian) -> None:
    host.kernel()
    host.unknown = [f"linux-headers-{RELEASE}"]
    with pytest.raises(HostError, match=r"Upgrade the kernel .* reboot into it"):
        present(host)


def test_a_metapackage_that_apt_does_not_know_is_left_out(host: Debian) -> None:
    host.kernel()
    host.packages("linux-image-amd64")
    host.unknown = ["linux-headers-amd64"]
    assert f"linux-headers-{RELEASE}" in present(host).installs
    assert "linux-headers-amd64" not in present(host).installs


def test_packages_that_may_not_be_installed_are_named(host: Debian) -> None:
    host.kernel()
    with pytest.raises(HostError, match=r"dkms linux-source-6\.12 linux-headers-"):
        present(host, install_packages=False)


def test_without_package_lists_check_mode_warns(host: Debian) -> None:
    host.kernel()
    (host.base / "var/lib/apt/lists/x_Packages").unlink()
    planned = present(host)
    assert host.asked == []
    assert "have not been fetched" in planned.warnings[0]
    assert planned.installs[0] == "dkms"


@pytest.mark.parametrize(
    ("release", "config", "words"),
    [
        ("6.1.0-40-amd64", UNSET, "came with Linux 6.6"),
        (RELEASE, UNSET.replace("VFIO=m", "VFIO=y"), "CONFIG_VFIO=y"),
        ("6.12.1-custom", "", "configuration is not known"),
    ],
)
def test_kernels_that_cannot_have_it(host: Debian, release: str, config: str, words: str) -> None:
    host.kernel(release, config)
    host.put("/proc/sys/kernel/osrelease", release + "\n")
    with pytest.raises(HostError, match=words):
        present(host)


def test_a_kernel_that_is_gone_from_the_disk(host: Debian) -> None:
    host.kernel("6.12.120+deb13-amd64")
    with pytest.raises(HostError, match="Reboot into an installed kernel"):
        present(host)


def test_a_foreign_tree_is_refused(host: Debian) -> None:
    host.kernel(headers=True)
    host.put(f"{TREE}/dkms.conf", 'PACKAGE_NAME="iommufd"\n')
    with pytest.raises(HostError, match="of somebody else"):
        present(host)
    with pytest.raises(HostError, match="of somebody else"):
        _dkms.plan_absent(host)


def test_a_source_that_is_not_there_is_an_option_error(host: Debian) -> None:
    host.kernel(headers=True)
    with pytest.raises(OptionError, match="there is no such file"):
        present(host, source="/srv/linux.tar.xz")


def test_a_source_of_another_series_is_an_option_error(tmp_path: pathlib.Path) -> None:
    class Told(Debian):
        def ask(self, argv: t.Sequence[str], timeout: float = 30.0, stdin: str = "") -> Output | None:
            if argv[0] == "tar":
                return Output(0, "VERSION = 7\nPATCHLEVEL = 2\nSUBLEVEL = 13\n", "")
            return super().ask(argv, timeout, stdin)

    host = Told(tmp_path)
    host.kernel(headers=True)
    host.put("/srv/linux.tar.gz")
    with pytest.raises(OptionError, match=r"it is Linux 7\.2\.13"):
        present(host, source="/srv/linux.tar.gz")


def test_the_stock_vfio_is_unloaded_when_nothing_uses_it(host: Debian) -> None:
    host.kernel(headers=True)
    for name, count in (("vfio_pci", 0), ("vfio_pci_core", 1), ("vfio", 1)):
        host.put(f"/sys/module/{name}/initstate", "live\n")
        host.put(f"/sys/module/{name}/refcnt", f"{count}\n")
    host.put("/sys/module/vfio_pci_core/holders/vfio_pci")
    host.put("/sys/module/vfio/holders/vfio_pci_core")
    planned = present(host)
    assert planned.plan.summary()[-1] == "unload the stock kernel's vfio_pci, vfio_pci_core, vfio"
    assert planned.reboot_reasons == []


def test_the_stock_vfio_in_use_takes_a_reboot(host: Debian) -> None:
    host.kernel(headers=True)
    host.put("/sys/module/vfio/initstate", "live\n")
    host.put("/sys/module/vfio/refcnt", "1\n")
    host.put("/sys/bus/pci/drivers/vfio-pci/0000:01:00.0")
    planned = present(host)
    assert not any("unload" in line for line in planned.plan.summary())
    assert "0000:01:00.0 is bound to vfio-pci" in planned.reboot_reasons[0]


def test_absent_takes_everything_away(host: Debian) -> None:
    host.complete()
    host.put("/etc/iommufd-host/packages", "dkms iommufd_dkms\nlinux-source-6.12 iommufd_dkms\n")
    host.put("/var/lib/dkms/mok.key")
    host.put("/var/lib/dkms/mok.pub")
    assert _dkms.plan_absent(host).plan.summary() == [
        "remove iommufd and vfio built by DKMS, and put the kernels' own modules back",
        f"remove {TREE}",
        "remove /var/lib/dkms/mok.key, made by DKMS",
        "remove /var/lib/dkms/mok.pub, made by DKMS",
        "purge the packages dkms linux-source-6.12",
    ]


def test_a_key_that_the_first_build_made_goes_with_the_modules_where_dkms_stays(host: Debian) -> None:
    host.kernel(headers=True)
    host.packages("dkms")
    note = f"write {_dkms._KEY_NOTE}"
    steps = present(host).plan.summary()
    assert steps.index(note) < next(index for index, line in enumerate(steps) if "with DKMS" in line)
    step = next(one for one in present(host).plan.steps if one.summary == note)
    assert isinstance(step, WriteFile)
    host.complete()
    host.put(_dkms._KEY_NOTE, step.content.decode())
    host.put("/var/lib/dkms/mok.key")
    host.put("/var/lib/dkms/mok.pub")
    assert note not in present(host).plan.summary()
    assert _dkms.plan_absent(host).plan.summary()[2:] == [
        "remove /var/lib/dkms/mok.key, made by DKMS",
        "remove /var/lib/dkms/mok.pub, made by DKMS",
        f"remove {_dkms._KEY_NOTE}",
    ]


def test_a_key_that_was_there_before_stays(host: Debian) -> None:
    host.kernel(headers=True)
    host.packages("dkms")
    host.put("/var/lib/dkms/mok.key")
    assert not any(_dkms._KEY_NOTE in line for line in present(host).plan.summary())
    host.complete()
    assert not any("mok" in line for line in _dkms.plan_absent(host).plan.summary())


def test_absent_leaves_the_key_to_other_dkms_packages(host: Debian) -> None:
    host.complete()
    host.put("/etc/iommufd-host/packages", "dkms iommufd_dkms\n")
    host.put("/var/lib/dkms/mok.key")
    host.put("/var/lib/dkms/zfs/2.3/source")
    assert not any("mok" in line for line in _dkms.plan_absent(host).plan.summary())


def test_absent_on_a_host_without_us_does_nothing(host: Debian) -> None:
    host.kernel()
    host.packages("dkms")
    assert _dkms.plan_absent(host).plan.summary() == []
    assert host.asked == []


def test_secure_boot(host: Debian) -> None:
    assert _dkms.read_secure_boot(host) == _dkms.SecureBoot(None, None, None)
    path = host.base / "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x06\0\0\0\x01")
    assert _dkms.read_secure_boot(host).enabled is True
    host.kernel(headers=True)
    assert {"openssl", "mokutil"} <= set(present(host).installs)


@pytest.mark.parametrize(
    ("release", "flavour", "version"),
    [
        ("6.12.117+deb13-amd64", "amd64", "6.12.117"),
        ("6.12.90+deb13.1-cloud-amd64", "cloud-amd64", "6.12.90"),
        ("6.1.0-40-rt-amd64", "rt-amd64", "6.1.0"),
        ("7.2.13+deb14-arm64", "arm64", "7.2.13"),
        ("6.16.3+deb13-amd64", "amd64", "6.16.3"),
        ("6.18.44-fc-v669", None, None),
    ],
)
def test_debian_releases(release: str, flavour: str | None, version: str | None) -> None:
    kernel = _dkms.Kernel(release, "", True, True, "missing", False, "")
    assert (kernel.flavour, kernel.version) == (flavour, version)


def test_releases_sort_as_people_do() -> None:
    names = ["6.12.117+deb13-amd64", "6.12.9+deb13-amd64", "7.2.1+deb14-amd64", "6.1.0-40-amd64"]
    assert sorted(names, key=_dkms.version_key) == [names[3], names[1], names[0], names[2]]


def test_a_changed_frame_has_a_new_version() -> None:
    # DKMS tells builds apart by version only. When this fails: count VERSION up, then put the new sum here.
    text = "".join(f"{name}\n{content}" for name, content in FILES.items())
    assert (VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == ("1", "636c9d10ae3f2186")


class TestPrepare:
    """The script that DKMS runs before a build, beneath another directory."""

    @pytest.fixture
    def tree(self, tmp_path: pathlib.Path) -> pathlib.Path:
        tree = tmp_path / TREE[1:]
        for name, content in FILES.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.replace("/usr/src", str(tmp_path / "usr/src")))
        return tree

    @staticmethod
    def tarball(tree: pathlib.Path, words: str) -> None:
        top = tree.parent / "linux-source-6.12"
        for name in ("drivers/iommu/iommu-priv.h", "drivers/iommu/iommufd/main.c", "drivers/vfio/pci/vfio_pci.c"):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(words)
        for name in ("lib/interval_tree.c", "tools/drivers/vfio/no.c", "net/core.c"):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(words)
        subprocess.run(["tar", "-C", tree.parent, "-cf", f"{top}.tar.xz", top.name], check=True)

    @staticmethod
    def run(tree: pathlib.Path, *arguments: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(tree / "prepare.sh"), *arguments]
        return subprocess.run(command, cwd=cwd or tree, capture_output=True, text=True, check=False)

    def test_puts_sources_and_frame_together(self, tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
        self.tarball(tree, "first")
        build = tmp_path / "build"
        (build / "frame").mkdir(parents=True)
        done = self.run(tree, RELEASE, cwd=build)
        assert done.returncode == 0, done.stderr
        assert (build / "drivers/vfio/pci/vfio_pci.c").read_text() == "first"
        assert (build / "drivers/vfio/pci/Kbuild").read_text() == FILES["frame/drivers/vfio/pci/Kbuild"]
        assert (build / "drivers/iommu/iommufd/span_iter.c").exists()
        assert not (build / "tools").exists()
        assert not (build / "frame").exists()
        assert sorted(path.name for path in (tree / "linux-6.12").iterdir()) == ["SOURCE", "drivers", "lib"]

    def test_takes_a_changed_tarball_anew_and_keeps_an_old_copy_where_it_is_gone(self, tree: pathlib.Path) -> None:
        self.tarball(tree, "first")
        assert self.run(tree, "--unpack", "6.12").returncode == 0
        self.tarball(tree, "second, which is longer" * 1000)
        assert self.run(tree, "--unpack", "6.12").returncode == 0
        assert (tree / "linux-6.12/lib/interval_tree.c").read_text().startswith("second")
        (tree.parent / "linux-source-6.12.tar.xz").unlink()
        done = self.run(tree, "--unpack", "6.12")
        assert done.returncode == 0
        assert "taking" not in done.stdout

    def test_a_series_without_sources_is_skipped_not_failed(self, tree: pathlib.Path) -> None:
        done = self.run(tree, "7.2.13+deb14-amd64")
        assert done.returncode == 77
        assert "no sources of Linux 7.2" in done.stderr


@pytest.fixture
def kernels(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
    """The host as the live one, as far as DKMS and the kernels' modules go."""
    host = Debian(tmp_path)
    monkeypatch.setattr(_kernel, "_MODULES", (str(tmp_path / "usr/lib/modules"),))
    monkeypatch.setattr(_dkms, "DKMS_TREE", str(tmp_path / "var/lib/dkms"))
    monkeypatch.setattr(_dkms, "run", lambda argv, timeout=0.0: "")
    return host


def test_a_build_that_failed_leaves_those_for_other_kernels(kernels: Debian) -> None:
    kernels.built()
    kernels.kernel(OLDER, headers=True)
    kernels.put(f"/usr/lib/modules/{OLDER}/updates/dkms/vfio.ko.xz")
    _dkms._take_build_back(OLDER, True)
    assert not (kernels.base / f"usr/lib/modules/{OLDER}/updates").exists()
    assert sorted(kernels.listdir(f"/usr/lib/modules/{RELEASE}/updates/dkms")) == sorted(
        f"{one}.ko.xz" for one in MODULES
    )
    assert kernels.exists(f"/var/lib/dkms/iommufd/{VERSION}/{RELEASE}")
    _dkms._take_build_back(RELEASE, True)
    assert not (kernels.base / "var/lib/dkms/iommufd").exists()


@pytest.mark.parametrize("note", [None, "", "whole"])
def test_a_module_that_was_set_aside_without_a_note_goes_back(kernels: Debian, note: str | None) -> None:
    kernels.kernel()
    saved = f"/var/lib/dkms/iommufd/original_module/{RELEASE}/x86_64/vfio.ko.xz"
    place = f"/usr/lib/modules/{RELEASE}/kernel/drivers/vfio/vfio.ko.xz"
    kernels.put(saved, "the kernel's own")
    if note is not None:
        kernels.put(f"{saved}.origin", note and f"{kernels.base}{place}\n")
    _dkms.restore(RELEASE)
    assert kernels.read_text(place) == "the kernel's own"
    assert not kernels.exists(saved)


def test_a_module_of_which_nothing_tells_where_it_was_is_kept(kernels: Debian) -> None:
    kernels.kernel(dep="updates/dkms/vfio.ko.xz:\n")
    saved = f"/var/lib/dkms/iommufd/original_module/{RELEASE}/x86_64/vfio.ko.xz"
    kernels.put(saved, "the kernel's own")
    with pytest.raises(HostError, match=f"nothing tells where it was.*linux-image-{re.escape(RELEASE)}"):
        _dkms.restore(RELEASE)
    assert kernels.read_text(saved) == "the kernel's own"
