# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The audit playbook itself, on hosts that are trees on the controller, one that fails and one out of reach."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from xml.etree import ElementTree

import fleet
import pytest


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fingerprint(root: pathlib.Path) -> str:
    """All names, kinds, modes, links and times below a directory: whatever changes a file changes its ctime."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest.update(f"{path} {status.st_mode:o} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
    return digest.hexdigest()


class Audit:
    """An inventory and the playbook."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.hosts: dict[str, dict[str, object]] = {}

    def run(self, *arguments: str, report: str = "report") -> subprocess.CompletedProcess[str]:
        inventory = {
            "all": {
                "hosts": self.hosts,
                "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
            }
        }
        (self.directory / "hosts.json").write_text(json.dumps(inventory))
        command = ["ansible-playbook", "-i", "hosts.json", "iommufd.host.audit"]
        return subprocess.run(
            [*command, "-e", f"audit_dir={self.directory}/{report}", *arguments],
            cwd=self.directory,
            env={**os.environ, "HOME": str(self.directory / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    made = Audit(tmp_path_factory.mktemp("audit"))
    (made.directory / "home").mkdir()
    for kind in ("split", "stock"):
        root = made.directory / "trees" / kind
        root.mkdir(parents=True)
        fleet.server(root, kind, 60)
        made.hosts[kind] = {"audit_root": str(root)}
    made.hosts["missing"] = {"audit_root": str(made.directory / "nowhere")}
    made.hosts["gone"] = {
        "ansible_connection": "ssh",
        "ansible_host": "127.0.0.1",
        "ansible_port": closed_port(),
        "ansible_ssh_timeout": 5,
        # With a module on ssh's standard input Ansible tells now ssh's reason, now that the pipe broke.
        "audit_pipelining": False,
    }
    return made


def test_a_fleet(audit: Audit) -> None:
    before = fingerprint(audit.directory / "trees")
    ran = audit.run("--diff")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert fingerprint(audit.directory / "trees") == before
    assert not (audit.directory / "home" / ".ansible" / "tmp").exists()  # where modules lie that are not piped
    folder = audit.directory / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "junit.xml", "report.json"]

    report = json.loads((folder / "report.json").read_text())
    assert {name: host["status"] for name, host in report["hosts"].items()} == {
        "split": "not_ready",
        "stock": "not_ready",
        "missing": "failed",
        "gone": "unreachable",
    }
    assert report["summary"] == {"hosts": 4, "ready": 0, "not_ready": 2, "failed": 1, "unreachable": 1}
    assert "nowhere" in report["hosts"]["missing"]["reason"]
    assert "Connection refused" in report["hosts"]["gone"]["reason"]
    assert len(report["hosts"]["split"]["survey"]["devices"]) == 60
    assert "group.viable" in report["hosts"]["split"]["reason"]

    suites = ElementTree.parse(folder / "junit.xml").getroot()
    assert {suite.get("name") for suite in suites if suite.get("errors") == "1"} == {"missing", "gone"}
    page = (folder / "index.html").read_text()
    assert all(f'<a href="#host/{name}">{name}</a>' in page for name in audit.hosts)

    for words in (
        "gone     unreachable   -     -     -",
        "missing  failed        -     -     -",
        "4 hosts: 2 not ready, 1 failed, 1 unreachable",
        f"report: {folder}/index.html",
    ):
        assert words in ran.stdout
    assert "+4 hosts: 2 not ready" in ran.stdout  # the difference is that of the tables
    # One survey of each host, and nothing else ran on any.
    assert ran.stdout.count("TASK [") == 4


def test_again_there_is_nothing_new(audit: Audit) -> None:
    def found() -> dict[str, object]:
        report = json.loads((audit.directory / "report" / "report.json").read_text())
        return {key: value for key, value in report.items() if key != "generated"}

    before = found()
    ran = audit.run()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert found() == before
    assert "changed=1" not in ran.stdout


def test_some_hosts_and_a_verdict_for_ci(audit: Audit) -> None:
    ran = audit.run("--limit", "stock,gone", "-e", "audit_fail=true", report="limited")
    assert ran.returncode == 2
    assert "2 of 2 hosts are not ready." in ran.stdout + ran.stderr
    report = json.loads((audit.directory / "limited" / "report.json").read_text())
    assert list(report["hosts"]) == ["stock", "gone"]
    assert (audit.directory / "limited" / "index.html").exists()


def test_check_mode_writes_nothing_at_all(audit: Audit) -> None:
    before = fingerprint(audit.directory / "trees")
    ran = audit.run("--check", report="checked")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not (audit.directory / "checked").exists()
    assert fingerprint(audit.directory / "trees") == before
    assert "4 hosts: 2 not ready, 1 failed, 1 unreachable" in ran.stdout
    assert "changed=1" in ran.stdout  # it would write the report


def test_a_directory_that_cannot_be_written(audit: Audit) -> None:
    (audit.directory / "file").write_text("")
    ran = audit.run("--limit", "stock", report="file/below")
    assert ran.returncode == 2
    assert "cannot be written: Not a directory." in ran.stdout + ran.stderr


def test_recorded_servers(audit: Audit, vgpu_node: pathlib.Path, iommu_off: pathlib.Path) -> None:
    hosts, audit.hosts = audit.hosts, {"vgpu": {"audit_root": str(vgpu_node)}, "off": {"audit_root": str(iommu_off)}}
    before = fingerprint(vgpu_node), fingerprint(iommu_off)
    ran = audit.run(report="recorded")
    audit.hosts = hosts
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (fingerprint(vgpu_node), fingerprint(iommu_off)) == before
    report = json.loads((audit.directory / "recorded" / "report.json").read_text())
    assert [len(host["survey"]["devices"]) for host in report["hosts"].values()] == [226, 208]
    assert report["hosts"]["off"]["reason"] == "This check fails: iommu.enabled."
