#!/usr/bin/env bash
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Runs on the lab host of tests/proof/survey, as root: gives each device the use that the run expects.
set -euxo pipefail

# nvme's and igb's numbers follow the order of their probes, so each is looked up by its PCI address.
disk() { basename "$(readlink -f /sys/bus/pci/devices/"$1"/nvme/nvme*/nvme*n1)" | sed 's,c[0-9]*n,n,;s,^,/dev/,'; }
net() { ls /sys/bus/pci/devices/"$1"/net; }

cd /
udevadm settle --timeout=300

# LVM on RAID1 on two disks: a filesystem and swap.
mdadm --create /dev/md0 --run --level=1 --metadata=1.2 --raid-devices=2 "$(disk 0000:01:00.0)" "$(disk 0000:02:00.0)"
vgcreate vg /dev/md0
lvcreate -y -n data -L 24M vg
lvcreate -y -n more -L 16M vg
mkfs.ext4 -q /dev/vg/data
mkdir -p /srv/data /srv/secret /srv/files /srv/image
mount /dev/vg/data /srv/data
mkswap /dev/vg/more
swapon /dev/vg/more

# dm-crypt, with a key derivation that an emulated processor can do.
printf secret >/run/key
cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file=/run/key "$(disk 0000:03:00.0)"
cryptsetup open --key-file=/run/key "$(disk 0000:03:00.0)" secret
mkfs.ext4 -q /dev/mapper/secret
mount /dev/mapper/secret /srv/secret

# Swap.
mkswap "$(disk 0000:04:00.0)"
swapon "$(disk 0000:04:00.0)"

# A filesystem with a swap file, and with an image that is mounted.
mkfs.ext4 -q "$(disk 0000:05:00.0)"
mount "$(disk 0000:05:00.0)" /srv/files
dd if=/dev/zero of=/srv/files/swap bs=1M count=16 status=none
chmod 600 /srv/files/swap
mkswap /srv/files/swap
swapon /srv/files/swap
truncate -s 16M /srv/files/image
mkfs.ext4 -q /srv/files/image
mount -o loop /srv/files/image /srv/image

# A disk that a process has open.
setsid sleep infinity 3<"$(disk 0000:06:00.0)" >/dev/null 2>&1 </dev/null &

# A running guest with a disk: QEMU has it from the moment it starts, so its processors need not run.
modprobe vfio-pci
give() {
    echo vfio-pci >/sys/bus/pci/devices/"$1"/driver_override
    if [ -e /sys/bus/pci/devices/"$1"/driver ]; then echo "$1" >/sys/bus/pci/devices/"$1"/driver/unbind; fi
    echo "$1" >/sys/bus/pci/drivers_probe
}
give 0000:07:00.0
setsid qemu-system-x86_64 -name guest=proof -machine q35 -accel tcg -m 64 -nodefaults -display none -S \
    -device vfio-pci,host=0000:07:00.0 >/tmp/guest.log 2>&1 </dev/null &

# The emulator answers IPv6 router solicitations; new interfaces shall have what is given to them here, and no more.
sysctl --quiet --write net.ipv6.conf.default.accept_ra=0

# A VLAN on a bond on two ports, with addresses of both kinds and a route.
modprobe bonding mode=1 max_bonds=0 miimon=100
ip link add bond0 type bond mode active-backup miimon 100
for port in 0000:09:00.0 0000:0a:00.0; do
    ip link set "$(net $port)" down
    ip link set "$(net $port)" master bond0
done
ip link set bond0 up
ip link add link bond0 name bond0.7 type vlan id 7
ip link set bond0.7 up
ip address add 192.0.2.1/24 dev bond0.7
ip address add 2001:db8::1/64 dev bond0.7 nodad
ip route add 198.51.100.0/24 via 192.0.2.254

# A VF on vfio-pci.
echo 1 >/sys/bus/pci/devices/0000:0b:00.0/sriov_numvfs
udevadm settle --timeout=300
give "$(basename "$(readlink /sys/bus/pci/devices/0000:0b:00.0/virtfn0)")"

# A bridge, a macvtap, an interface in another namespace.
ip link add br0 type bridge
ip link set "$(net 0000:0c:00.0)" master br0
ip link set "$(net 0000:0c:00.0)" up
ip link set br0 up
ip address add 203.0.113.1/24 dev br0
ip link add link "$(net 0000:0d:00.0)" name macvtap0 type macvtap mode bridge
ip netns add blue
ip link set "$(net 0000:0e:00.0)" netns blue

udevadm settle --timeout=300
for _try in $(seq 60); do
    if readlink /proc/"$(pgrep -x qemu-system-x86)"/fd/* | grep -q '/dev/vfio/[0-9]'; then break; fi
    sleep 1
done
cat /tmp/guest.log
lsblk
ip -br address
