# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# shellcheck shell=sh
# Prints as JSON: the distribution, the major version of the emulator that apt would install, where the distribution's
# own packages come from, and whether its backports are among the sources.
. /etc/os-release
emulator=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}\([0-9]*\).*/\2/p')
# shellcheck disable=SC2016 # apt-get fills in what looks like commands
targets=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages')
uri=$(echo "$targets" | sed -n "s/^$VERSION_CODENAME main //p" | head -n 1)
backports=false
echo "$targets" | grep -q "^$VERSION_CODENAME-backports main " && backports=true
printf '{"distribution": "%s", "codename": "%s", "emulator": %s, "uri": "%s", "backports": %s}\n' \
    "$ID" "$VERSION_CODENAME" "${emulator:-0}" "$uri" "$backports"
