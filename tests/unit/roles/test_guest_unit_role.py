# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role guest_unit, run by Ansible on this machine into another directory, with a systemctl that only records.

A run of Ansible takes seconds, so one run goes through several states of the host, each a play of its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import typing as t

import pytest

SYSTEMCTL = """#!/bin/sh
echo "$*" >>"$SYSTEMCTL_LOG"
case "$*" in
    --version) echo "systemd $SYSTEMCTL_VERSION" ;;
    "show --property=Id,ActiveState -- "*)
        shift 3
        for unit; do
            state=inactive
            case " $SYSTEMCTL_ACTIVE " in *" $unit "*) state=active ;; esac
            printf 'Id=%s\\nActiveState=%s\\n\\n' "$unit" "$state"
        done ;;
    "show "*)
        printf 'LoadState=loaded\\nActiveState=active\\nUnitFileState=disabled\\nNeedDaemonReload=%s\\n' \
            "$SYSTEMCTL_STALE" ;;
    is-enabled*) echo disabled; exit 1 ;;
esac
exit 0
"""

GUEST: dict[str, t.Any] = {
    "name": "web1",
    "memory": "4G",
    "cpus": 2,
    "devices": ["0000:01:00.0", {"address": "0000:02:00.0", "properties": {"rombar": 0}}],
    "user": "daemon",
    "arguments": ["-drive", "file=/srv/a b 100%.img,if=virtio", "-fw_cfg", 'name=opt/x,string=$HOME "y"'],
    "device_allow": ["/dev/net/tun"],
}


OTHER = {**GUEST, "name": "db1", "devices": ["0000:03:00.0"]}


class Role:
    """Runs the role, several times in one run of Ansible.

    Attributes:
        units: directory that the role writes to.
        variables: of every play.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.units = root / "units"
        self.bin = root / "bin"
        for directory in (self.units, self.bin):
            directory.mkdir()
        for path, text in ((self.bin / "systemctl", SYSTEMCTL), (root / "qemu", "#!/bin/sh\nexit 0\n")):
            path.write_text(text)
            path.chmod(0o755)
        self.qemu = str(root / "qemu")
        self.plays: list[dict[str, t.Any]] = []

    def state(self, name: str) -> State:
        return State(self.root / name)

    def add(
        self, name: str, guests: list[t.Any], version: str = "257 (257.9-1)", active: str = "", check: bool = False,
        stale: str = "no", **variables: t.Any,
    ) -> None:  # fmt: skip
        """Add a play that runs the role, and keeps what became of it in the directory ``name``."""
        kept = self.root / name
        log = self.root / f"{name}.log"
        log.write_text("")
        role = {"name": "iommufd.host.guest_unit", "apply": {"check_mode": check}}
        options = {"guest_unit_guests": guests, "guest_unit_qemu": self.qemu, **variables}
        done = f"cp -a {self.units} {kept}; cp {log} {kept}.calls"
        self.plays.append(
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
                "environment": {
                    "PATH": f"{self.bin}:{os.environ['PATH']}", "SYSTEMCTL_LOG": str(log),
                    "SYSTEMCTL_VERSION": version, "SYSTEMCTL_ACTIVE": active,
                    "SYSTEMCTL_STALE": stale,
                },
                "tasks": [
                    {
                        "block": [{"ansible.builtin.include_role": role, "vars": options}],
                        "rescue": [
                            {
                                "ansible.builtin.copy": {
                                    "content": "{{ ansible_failed_result | to_json }}", "dest": f"{kept}.failed",
                                }
                            }
                        ],
                        "always": [{"ansible.builtin.shell": done}],
                    }
                ],
            }
        )  # fmt: skip

    def run(self) -> str:
        """Run all plays; returns Ansible's output."""
        playbook = self.root / "plays.json"
        playbook.write_text(json.dumps(self.plays))
        # Variables of a role's own are only overridden by these.
        own = {"guest_unit__directory": str(self.units), "guest_unit__owner": os.getuid()}
        command = ["ansible-playbook", "--diff", str(playbook), "-e", json.dumps(own)]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


class State:
    """What a play left behind: the units by name, what systemctl was told, and why the role failed ("": it did not)."""

    def __init__(self, kept: pathlib.Path) -> None:
        self.path = kept
        self.units = {path.name: path.read_text() for path in sorted(kept.iterdir())}
        self.calls = pathlib.Path(f"{kept}.calls").read_text().splitlines()
        failed = pathlib.Path(f"{kept}.failed")
        self.failed = re.sub(r"\s+", " ", failed.read_text()) if failed.exists() else ""


@pytest.fixture
def role(tmp_path: pathlib.Path) -> Role:
    return Role(tmp_path)


def settings(text: str) -> dict[str, list[str]]:
    """The settings of a unit, with lines that go on joined."""
    found: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(re.sub(r"  +", " ", value))
    return found


UNIT, OTHERS = "iommufd-guest-web1.service", "iommufd-guest-db1.service"
FOREIGN = {"iommufd-guest-mine.service": "[Service]\nExecStart=/bin/true\n", "other.service": "[Service]\n"}


def test_the_life_of_units(role: Role) -> None:
    for name, text in FOREIGN.items():
        (role.units / name).write_text(text)
    role.add("planned", [{**GUEST, "enabled": True}], check=True)
    role.add("present", [{**GUEST, "enabled": True}, OTHER])
    role.add("again", [{**GUEST, "enabled": True}, OTHER])
    role.add("interrupted", [{**GUEST, "enabled": True}, OTHER], stale="yes")
    role.add("fewer", [GUEST])
    role.add("running", [], active=UNIT)
    role.add("refused", [GUEST], guest_unit_state="absent", active=UNIT)
    role.add("stopped", [GUEST], guest_unit_state="absent", active=UNIT, guest_unit_stop=True)
    role.add("gone", [GUEST], guest_unit_state="absent")
    output = role.run()
    states = {name: role.state(name) for name in ("planned", "present", "again", "interrupted", "fewer")}
    assert "+OpenFile=/dev/iommu:iommufd0" in output
    assert states["planned"].units == FOREIGN, "check mode writes nothing"
    assert not any("daemon-reload" in call or "enable " in call for call in states["planned"].calls)

    present = states["present"]
    assert set(present.units) == {UNIT, OTHERS, *FOREIGN}
    check_unit(role, present.units[UNIT])
    assert settings(present.units[OTHERS])["LimitMEMLOCK"] == [str(10 << 30)], "both guests have one user"
    assert f"enable {UNIT}" in present.calls
    assert f"enable {OTHERS}" not in present.calls
    assert "daemon-reload" in present.calls
    assert not any(call.startswith(("start", "restart", "stop")) for call in present.calls)
    systemd_takes(present.path / UNIT)

    assert states["again"].units == present.units
    assert "daemon-reload" not in states["again"].calls, "a second time there is nothing to do"
    assert "daemon-reload" in states["interrupted"].calls, "a run before was killed between writing and this"

    fewer = states["fewer"]
    assert set(fewer.units) == {UNIT, *FOREIGN}
    assert settings(fewer.units[UNIT])["LimitMEMLOCK"] == [str(5 << 30)]

    for name in ("running", "refused"):
        kept = role.state(name)
        assert f"{UNIT}: the guest runs. Shut it down, or set guest_unit_stop" in kept.failed
        assert kept.units == fewer.units
        assert not any(call.startswith(("stop", "disable")) for call in kept.calls)
    stopped = role.state("stopped")
    assert stopped.units == FOREIGN
    assert f"stop {UNIT}" in stopped.calls
    assert stopped.calls[-1] == "daemon-reload"
    gone = role.state("gone")
    assert (gone.failed, gone.calls, gone.units) == ("", [], FOREIGN)


def check_unit(role: Role, text: str) -> None:
    assert text.startswith("# Managed by the Ansible collection iommufd.host; edits are lost.\n")
    found = settings(text)
    assert found["OpenFile"] == [
        "/dev/iommu:iommufd0",
        r"/dev/vfio/by-path/pci-0000\x3a01\x3a00.0:vfio0",
        r"/dev/vfio/by-path/pci-0000\x3a02\x3a00.0:vfio1",
        "/dev/kvm:kvm",
    ]
    assert "/dev/vfio/devices" not in text, "the number of a cdev is another one after a boot"
    assert found["DevicePolicy"] == ["closed"]
    assert found["DeviceAllow"] == [
        "/dev/iommu rw",
        "/dev/vfio/by-path/pci-0000:01:00.0 rw",
        "/dev/vfio/by-path/pci-0000:02:00.0 rw",
        "/dev/kvm rw",
        "/dev/net/tun rw",
    ]
    assert found["Requires"] == [rf"dev-vfio-by\x2dpath-pci\x2d0000:0{bus}:00.0.device" for bus in (1, 2)]
    assert set(found["Requires"]) < set(found["After"])
    assert found["User"] == ["daemon"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == [""]
    assert found["LimitMEMLOCK"] == [str(10 << 30)]
    assert found["ExecStop"][0].startswith("-/usr/bin/python3 -c ")
    assert found["TimeoutStopSec"] == ["90"]
    (command,) = found["ExecStart"]
    assert command.startswith(f"{role.qemu} -name guest=web1 ")
    assert "-sandbox on," in command
    assert "-device vfio-pci,id=vfio1,fd=5,iommufd=iommufd0,rombar=0 " in command
    assert command.endswith('"file=/srv/a b 100%%.img,if=virtio" -fw_cfg "name=opt/x,string=$$HOME \\"y\\""')


def verify(tool: str, unit: pathlib.Path) -> list[str]:
    """What `systemd-analyze verify` says about a unit."""
    done = subprocess.run(
        [tool, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]


def systemd_takes(unit: pathlib.Path) -> None:
    """Hold a unit against the systemd that is here; nothing is said where there is none."""
    tool = os.environ.get("IOMMUFD_HOST_SYSTEMD_ANALYZE") or shutil.which("systemd-analyze")
    if tool is None:
        return
    version = int(subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split()[1])
    said = verify(tool, unit)
    if version < 253:  # there is no OpenFile= yet: exactly those lines are not known, and no other
        assert len([line for line in said if "OpenFile" in line]) == 4
        said = [line for line in said if "OpenFile" not in line]
    assert said == []
    # It does say what is wrong: another quoting of the colon, and a setting that there is not.
    wrong = unit.with_name("iommufd-guest-wrong.service")
    wrong.write_text(unit.read_text().replace(r"\x3a", r"\:").replace("LimitMEMLOCK=", "LimitMEMLOCKS="))
    said = verify(tool, wrong)
    assert any("LimitMEMLOCKS" in line for line in said)
    assert version < 253 or len([line for line in said if "OpenFile" in line]) == 2


def test_refusals_change_nothing(role: Role) -> None:
    mine = "[Service]\nExecStart=/bin/true\n"
    (role.units / OTHERS).write_text(mine)
    cases = {
        "old": ([GUEST], "252 (252.38-1)", "systemd 252 has no OpenFile="),
        "colon": ([GUEST], "255 (255.4-1ubuntu8)", "systemd 255 does not open a path with a colon"),
        "user": ([{**GUEST, "user": "nobody-of-that-name"}], "257 (257.9-1)", "nobody-of-that-name"),
        "memory": ([{**GUEST, "memory": "lots"}], "257 (257.9-1)", "guests[0].memory: 'lots' is not accepted"),
        "foreign": ([OTHER], "257 (257.9-1)", f"{role.units}/{OTHERS}: there and not written by this collection"),
    }
    for name, (guests, version, _words) in cases.items():
        role.add(name, guests, version)
    role.add("later", [GUEST], "255 (255.21-1.fc40)")
    role.run()
    for name, (_guests, _version, words) in cases.items():
        state = role.state(name)
        assert words in state.failed, name
        assert state.units == {OTHERS: mine}
    later = role.state("later")
    assert (later.failed, set(later.units)) == ("", {UNIT, OTHERS}), "the fault is mended in later releases of 255"
