# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# shellcheck shell=sh
# Prints the packages that a lab needs and this machine lacks, one a line. Its arguments: the hosts' architectures.
PATH=$PATH:/usr/sbin:/sbin
need() {
    command -v "$1" >/dev/null || echo "$2"
}
need mmdebstrap mmdebstrap
need mkfs.ext4 e2fsprogs
need qemu-img qemu-utils
need ssh openssh-client
[ "$(id -u)" = 0 ] || need newuidmap uidmap
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
emulator() {
    version=$("$1" --version 2>/dev/null | sed -n 's/.*version \([0-9]*\)\..*/\1/p')
    [ "${version:-0}" -ge 8 ] || echo "$2"
}
for architecture; do
    case $architecture in
        amd64) emulator qemu-system-x86_64 qemu-system-x86 ;;
        arm64)
            emulator qemu-system-aarch64 qemu-system-arm
            [ -e /usr/share/qemu-efi-aarch64/QEMU_EFI.fd ] || echo qemu-efi-aarch64
            if [ "$(uname -m)" != aarch64 ]; then
                need arch-test arch-test
                [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || echo qemu-user-static
            fi
            ;;
    esac
done
