#!/usr/bin/env bash
# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# On the lab host: a guest with two devices over iommufd, started by libvirt, or by a systemd unit that passes descriptors.
# The guest lists its PCI functions and the serial number of the NVMe disk that it reads by DMA, and powers off.
set -euo pipefail

images=/var/lib/libvirt/images
serial=/var/log/libvirt/qemu/proof-serial.log
uuid=0d5f7a3e-8f0c-4b57-9f1c-6f2f6f0e8a11
unit=/etc/systemd/system/proof-guest.service
wait_for=${WAIT:-300}
emulator=${EMULATOR:-/usr/bin/qemu-system-x86_64}

prepare() {
    local work module
    work=$(mktemp -d)
    mkdir -p "$work"/{bin,dev,proc,sys,modules}
    cp /usr/bin/busybox "$work/bin/"
    while read -r _insmod module; do
        case $module in *.xz) xz -dc "$module" >"$work/modules/$(basename "$module" .xz)" ;; *) cp "$module" "$work/modules/" ;; esac
        basename "$module" .xz >>"$work/modules/order"
    done < <(modprobe --show-depends nvme | grep '^insmod')
    cat >"$work/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
while read -r m; do /bin/busybox insmod /modules/$m; done </modules/order
for _try in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/nvme/nvme0/serial ] && break; /bin/busybox sleep 1; done
for d in /sys/bus/pci/devices/*; do echo "PROOF pci $(/bin/busybox cat $d/vendor):$(/bin/busybox cat $d/device)"; done
echo "PROOF nvme $(/bin/busybox cat /sys/class/nvme/nvme0/serial)"
echo "PROOF end"
/bin/busybox poweroff -f
INIT
    chmod 755 "$work/init"
    (cd "$work" && find . | busybox cpio -o -H newc | gzip -1) >"$images/proof-initrd"
    cp "/boot/vmlinuz-$(uname -r)" "$images/proof-kernel"
    chmod 644 "$images"/proof-*
    rm -rf "$work"
}

# How QEMU gets the devices: it opens them itself, as with a libvirt before 12.1, or libvirt passes descriptors.
opening() {
    cat <<XML
  <qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='iommufd,id=iommufd0'/>
    <qemu:arg value='-device'/><qemu:arg value='vfio-pci,host=0000:01:00.0,iommufd=iommufd0,bus=pcie.0,addr=0x10'/>
    <qemu:arg value='-device'/><qemu:arg value='vfio-pci,host=0000:02:00.0,iommufd=iommufd0,bus=pcie.0,addr=0x11'/>
  </qemu:commandline>
XML
}

passing() {
    for bus in 0x01 0x02; do
        cat <<XML
    <hostdev mode='subsystem' type='pci' managed='no'>
      <driver name='vfio' iommufd='yes'/>
      <source><address domain='0x0000' bus='$bus' slot='0x00' function='0x0'/></source>
    </hostdev>
XML
    done
}

# domain DEVICES EXTENSION: XML within <devices>, and after it.
domain() {
    cat <<XML
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>proof</name>
  <uuid>$uuid</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$images/proof-kernel</kernel>
    <initrd>$images/proof-initrd</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>$emulator</emulator>
    <serial type='file'><source path='$serial'/></serial>
    <memballoon model='none'/>
$1
  </devices>
$2
</domain>
XML
}

# The guest said its devices, the NVMe's serial number among them.
seen() {
    grep -a 'PROOF' "$1" | tr -d '\r'
    grep -aq 'PROOF nvme PROOF0' "$1"
}

# libvirt DEVICES EXTENSION
libvirt() {
    virsh --quiet destroy proof 2>/dev/null || true
    rm -f "$serial"
    domain "$@" >/var/tmp/proof/domain.xml
    virsh --quiet create /var/tmp/proof/domain.xml
    local pid
    pid=$(pgrep -f 'guest=proof,' | head -1)
    echo "QEMU runs as $(ps -o user= -p "$pid"), capabilities $(awk '/^CapEff/ { print $2 }' "/proc/$pid/status")"
    echo "QEMU holds $(readlink /proc/"$pid"/fd/* | grep -E '^/dev/(iommu|vfio/)' | sort | tr '\n' ' ')"
    echo "profile $(cat "/proc/$pid/attr/current")"
    echo "program $(readlink "/proc/$pid/exe")"
    for _second in $(seq "$wait_for"); do
        grep -aq 'PROOF end' "$serial" && break
        sleep 1
    done
    virsh --quiet destroy proof 2>/dev/null || true
    seen "$serial"
}

write_unit() {
    cat >"$unit" <<UNIT
[Unit]
Description=Proof of the launcher mode

[Service]
User=nobody
Group=kvm
NoNewPrivileges=yes
ExecStart=/usr/bin/qemu-system-x86_64 -machine q35,accel=kvm -cpu host -m 512 -display none -nodefaults -no-reboot \\
  -serial stdio -kernel $images/proof-kernel -initrd $images/proof-initrd -append "console=ttyS0 quiet" \\
  -object iommufd,id=iommufd0,fd=3 \\
  -device vfio-pci,id=dev0,iommufd=iommufd0,fd=4,bus=pcie.0,addr=0x10 \\
  -device vfio-pci,id=dev1,iommufd=iommufd0,fd=5,bus=pcie.0,addr=0x11
UNIT
    systemctl daemon-reload
    chmod o+x "$images"
}

launch() {
    systemctl start proof-guest.service
    for _second in $(seq "$wait_for"); do
        systemctl is-active --quiet proof-guest.service || break
        sleep 1
    done
    journalctl -u proof-guest.service -b -o cat >/var/tmp/proof/launcher.log
    systemctl show -p Result,ExecMainStatus proof-guest.service
    seen /var/tmp/proof/launcher.log
}

forget() {
    systemctl stop proof-guest.service
    # libvirt leaves its profile behind where a start has failed.
    rm -f "$unit" "/etc/apparmor.d/libvirt/libvirt-$uuid"
    systemctl daemon-reload
}

case $1 in
prepare) prepare ;;
libvirt) libvirt "" "$(opening)" ;;
libvirt-passing) libvirt "$(passing)" "" ;;
unit) write_unit ;;
launch) launch ;;
forget) forget ;;
esac
