# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A tiny source tree that is built as QEMU's is: configure, ninja, a compiler, a binary that answers questions.

It decides about iommufd as the real trees do, by Kconfig and a device file, or by an option of configure. What is real
is the machinery around it; QEMU itself is built by ``tests/proof/qemu-build``.
"""

from __future__ import annotations

import os
import pathlib
import tarfile

CONFIGURE = r"""#!/bin/sh
# Usage as QEMU's own; what this tree does not know of is passed over.
source=$(cd "$(dirname "$0")" && pwd)
devices= option= flags= prefix=
for argument; do
  case $argument in
    --with-devices-x86_64=*) devices=${argument#*=} ;;
    --enable-iommufd) option=YES ;;
    --disable-iommufd) option=NO ;;
    --extra-cflags=*) flags=${argument#*=} ;;
    --prefix=*) prefix=${argument#*=} ;;
  esac
done
has=n
if grep -q "'iommufd'" "$source/meson_options.txt"; then
  test "$option" = NO || has=y
  test $has = y && echo "  iommufd support : YES" || echo "  iommufd support : NO"
elif grep -q '^config IOMMUFD' "$source/backends/Kconfig" 2>/dev/null; then
  test -n "$devices" || devices=default
  grep -q '^CONFIG_IOMMUFD=y' "$source/configs/devices/x86_64-softmmu/$devices.mak" && has=y
fi
: > x86_64-softmmu-config-devices.mak
test $has = y && echo CONFIG_IOMMUFD=y >> x86_64-softmmu-config-devices.mak
test $has = y && flags="$flags -DCONFIG_IOMMUFD"
cat > build.ninja <<END
rule cc
  command = cc -O1 $flags -c \$in -o \$out
rule link
  command = cc \$in -o \$out
rule install
  command = install -D -m 0755 qemu-system-x86_64 \$\${DESTDIR}$prefix/bin/qemu-system-x86_64
build one.o: cc $source/one.c
build two.o: cc $source/two.c
build main.o: cc $source/main.c
build qemu-system-x86_64: link one.o two.o main.o
build install: install qemu-system-x86_64
default qemu-system-x86_64
END
"""

MAIN = r"""
#include <stdio.h>
#include <string.h>
int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "-version")) {
        puts("QEMU emulator version %s");
    } else if (argc == 3 && !strcmp(argv[1], "-object")) {
        puts("List of user creatable objects:\n  iothread");
#ifdef CONFIG_IOMMUFD
        puts("  iommufd");
#endif
    } else if (argc == 3) {
        puts("vfio-pci options:\n  addr=<int32>\n  host=<str>");
#ifdef CONFIG_IOMMUFD
        puts("  fd=<str>\n  iommufd=<link<iommufd>>");
#endif
    }
    return 0;
}
"""


def make_tree(
    path: pathlib.Path, version: str = "10.0.99", kconfig: bool = True, option: bool = False, code: str = ""
) -> pathlib.Path:
    """Write the tree.

    Args:
        path: a directory that does not exist yet.
        version: QEMU's.
        kconfig: it decides by Kconfig.
        option: it decides by an option, as the first version of the patches did.
        code: put into one of its C files.
    """
    files = {
        "VERSION": f"{version}\n",
        "meson_options.txt": "option('iommufd', type : 'feature', value : 'auto')\n" if option else "\n",
        "pythondeps.toml": "[meson]\n",
        "backends/Kconfig": "config IOMMUFD\n    bool\n    depends on VFIO\n" if kconfig else "\n",
        "configs/devices/x86_64-softmmu/default.mak": "CONFIG_IOMMUFD=y\n" if kconfig else "\n",
        "configure": CONFIGURE,
        "main.c": MAIN.replace("%s", version),
        "one.c": f"const char *here(void) {{ return __FILE__; }}\n{code}\n",
        "two.c": "int two(void) { return 2; }\n",
        "COPYING": "the licence\n",
        # The real trees have the firmware that QEMU's release tarballs bring along.
        **{f"pc-bios/{name}": f"{name}\n" for name in FIRMWARE},
    }
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (path / "configure").chmod(0o755)
    for directory, _directories, _files in os.walk(path):
        os.chmod(directory, 0o755)
    return path


FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin", "efi-virtio.rom")


def make_tarball(tree: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """The tree as a release tarball."""
    with tarfile.open(path, "w:xz") as archive:
        archive.add(tree, "qemu-10.0.99")
    return path
