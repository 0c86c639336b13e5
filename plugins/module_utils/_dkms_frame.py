# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the DKMS package of iommufd consists of, apart from the kernel's own sources.

Compiled as external modules against a stock kernel, iommufd and vfio need three things that its own build would give
them: the options that the kernel was not configured with, defined for these modules; the span iterator of
lib/interval_tree.c, which the kernel compiles for iommufd only; and a mark in every module, so that DKMS, which
compares source versions, does not take vfio_iommu_type1 for the one that is there already.
"""

from __future__ import annotations

from ansible_collections.iommufd.host.plugins.module_utils._files import OWN_MARK, own_header

NAME = "iommufd"

# Counted up with every change of the texts below: DKMS tells builds apart by it, so a host gets the new ones.
VERSION = "1"

SOURCE_TREE = "/usr/src"
DKMS_TREE = "/var/lib/dkms"
TREE = f"{SOURCE_TREE}/{NAME}-{VERSION}"

# Built module -> its directory. vfio's structures differ with iommufd on, so the whole set is rebuilt.
MODULES = {
    "iommufd": "drivers/iommu/iommufd",
    "vfio": "drivers/vfio",
    "vfio_iommu_type1": "drivers/vfio",
    "vfio-pci-core": "drivers/vfio/pci",
    "vfio-pci": "drivers/vfio/pci",
}

# What is needed of the kernel's sources. `prepare.sh` has the same list.
KERNEL_PATHS = ("drivers/iommu/iommu-priv.h", "drivers/iommu/iommufd", "drivers/vfio", "lib/interval_tree.c")

_DKMS_CONF = (
    own_header()
    + f"""\
PACKAGE_NAME="{NAME}"
PACKAGE_VERSION="{VERSION}"
AUTOINSTALL="yes"
# A kernel that has iommufd of its own needs none of this.
BUILD_EXCLUSIVE_CONFIG="!CONFIG_IOMMUFD"
PRE_BUILD="prepare.sh $kernelver"
# Debug information and BTF are dropped anyway; not making them saves time.
MAKE[0]="make -C $kernel_source_dir M=$dkms_tree/{NAME}/{VERSION}/build CONFIG_IOMMUFD=m CONFIG_VFIO_DEVICE_CDEV=y \
CONFIG_VFIO_MDEV= CONFIG_DEBUG_INFO= CONFIG_DEBUG_INFO_BTF_MODULES= modules"
"""
    + "".join(
        f'BUILT_MODULE_NAME[{number}]="{name}"\n'
        f'BUILT_MODULE_LOCATION[{number}]="{directory}"\n'
        f'DEST_MODULE_LOCATION[{number}]="/updates/dkms"\n'
        for number, (name, directory) in enumerate(MODULES.items())
    )
)

_PREPARE = (
    "#!/bin/sh\n"
    + own_header()
    + f"""\
# prepare.sh RELEASE          puts the sources for a kernel in place; DKMS runs it in a copy of this directory
# prepare.sh --unpack SERIES  only takes the sources of a series ("6.12") out of the kernel's source tarball
# Ends with 77, which DKMS takes as "skip this kernel", where there are no sources of the kernel's series.
set -eu
tree={TREE}

# What is in linux-SERIES/SOURCE: the tarball that it was taken from, with size and time of change.
stamp() {{
    stat -L -c '%n %s %Y' "$1"
}}

unpack() {{
    new="$tree/.linux-$1.new"
    rm -rf "$new"
    mkdir "$new"
    tar -C "$new" -xf "$2" --strip-components=1 --wildcards --no-wildcards-match-slash --no-same-owner \\
        '*/drivers/iommu/iommu-priv.h' '*/drivers/iommu/iommufd' '*/drivers/vfio' '*/lib/interval_tree.c'
    stamp "$2" > "$new/SOURCE"
    rm -rf "$tree/linux-$1"
    mv -T "$new" "$tree/linux-$1"
}}

if [ "$1" = --unpack ]; then
    series=$2
else
    series=$(echo "$1" | sed -n 's/^\\([0-9][0-9]*\\.[0-9][0-9]*\\).*/\\1/p')
fi
known="$tree/linux-$series/SOURCE"
tarball=/usr/src/linux-source-$series.tar.xz
if [ -s "$tree/source-$series" ]; then  # the tarball that the user named
    tarball=$(cat "$tree/source-$series")
fi
if [ -e "$tarball" ]; then
    if [ ! -e "$known" ] || [ "$(cat "$known")" != "$(stamp "$tarball")" ]; then
        echo "taking the sources of Linux $series from $tarball"
        unpack "$series" "$tarball"
    fi
elif [ ! -e "$known" ]; then
    echo "iommufd: no sources of Linux $series here ($tarball): not built for $1." >&2
    echo "iommufd: install linux-source-$series, then run: dkms autoinstall -k $1" >&2
    exit 77
fi
if [ "$1" != --unpack ]; then
    cp -r "$tree/linux-$series/." .
    cp -r "$tree/frame/." .
    rm -rf frame linux-[0-9]*
fi
"""
)

_HEADER = f"""\
/* {OWN_MARK}; edits are lost. */
/*
 * Included before every source file of these modules: what the kernel was not configured with, and a mark by which
 * modinfo (and DKMS, which compares source versions) tells them from the kernel's own.
 */
#ifndef IOMMUFD_HOST_H
#define IOMMUFD_HOST_H
#define CONFIG_IOMMUFD_MODULE 1
#define CONFIG_VFIO_DEVICE_CDEV 1
#ifndef CONFIG_INTERVAL_TREE_SPAN_ITER
#define CONFIG_INTERVAL_TREE_SPAN_ITER 1
#define IOMMUFD_HOST_SPAN_ITER 1
#endif
#endif
"""

# REUSE-IgnoreStart: the licence of the file below, not of this one
_SPAN_ITER = f"""\
/* {OWN_MARK}; edits are lost. */
/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The span iterator of lib/interval_tree.c, which the kernel leaves out without iommufd. The rest of that file is in
 * the kernel already and exported there; in here it stays private to the module.
 */
#include <linux/export.h>
#include <linux/module.h>
#ifdef IOMMUFD_HOST_SPAN_ITER
#undef EXPORT_SYMBOL
#undef EXPORT_SYMBOL_GPL
#define EXPORT_SYMBOL(symbol)
#define EXPORT_SYMBOL_GPL(symbol)
#include "../../../lib/interval_tree.c"
#endif
"""
# REUSE-IgnoreEnd


def _makefile(*lines: str) -> str:
    return own_header() + "".join(line + "\n" for line in lines)


# kbuild prefers a Kbuild to the Makefile beside it, which stays the kernel's own and says what is in each module.
_WITH_HEADER = ("include $(src)/Makefile", "ccflags-y += -include $(src)/iommufd_host.h")

# The frame, by path below the DKMS source tree. `frame/` is laid over the kernel's sources before a build.
FILES: dict[str, str] = {
    "dkms.conf": _DKMS_CONF,
    "prepare.sh": _PREPARE,
    "frame/Kbuild": _makefile("obj-m += drivers/iommu/iommufd/ drivers/vfio/"),
    "frame/drivers/iommu/iommufd/Kbuild": _makefile(*_WITH_HEADER, "iommufd-y += span_iter.o"),
    "frame/drivers/iommu/iommufd/span_iter.c": _SPAN_ITER,
    "frame/drivers/iommu/iommufd/iommufd_host.h": _HEADER,
    "frame/drivers/vfio/Kbuild": _makefile(*_WITH_HEADER),
    "frame/drivers/vfio/iommufd_host.h": _HEADER,
    "frame/drivers/vfio/pci/Kbuild": _makefile(*_WITH_HEADER),
    "frame/drivers/vfio/pci/iommufd_host.h": _HEADER,
}
