# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _peer_to_peer
from ansible_collections.iommufd.host.plugins.module_utils._host import Host


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(_peer_to_peer, "PATH", str(tmp_path / "kept.json"))
    return Host()


@pytest.fixture
def qemu(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "qemu"
    path.write_text("one")
    return str(path)


def test_nothing_is_known_at_first(host: Host, qemu: str) -> None:
    assert _peer_to_peer.read(host, "7.2", qemu) is None


def test_a_measurement_counts_for_its_kernel_and_its_binary_alone(host: Host, qemu: str) -> None:
    _peer_to_peer.keep(host, "7.2", qemu, "11.1", True, "3 BARs were mapped")
    assert _peer_to_peer.read(host, "7.2", qemu) == {
        "works": True, "detail": "3 BARs were mapped", "kernel": "7.2", "qemu": "11.1",
    }  # fmt: skip
    assert _peer_to_peer.read(host, "6.12", qemu) is None
    pathlib.Path(qemu).write_text("another")
    assert _peer_to_peer.read(host, "7.2", qemu) is None


def test_the_last_measurement_counts(host: Host, qemu: str) -> None:
    for works in (True, False):
        _peer_to_peer.keep(host, "7.2", qemu, "11.1", works, "")
    assert len(_peer_to_peer.read_all(host)) == 1
    found = _peer_to_peer.read(host, "7.2", qemu)
    assert found is not None
    assert found["works"] is False


def test_of_many_the_last_ones_are_kept(host: Host, qemu: str) -> None:
    for number in range(20):
        _peer_to_peer.keep(host, f"6.{number}", qemu, "11.1", True, "")
    assert [one["kernel"] for one in _peer_to_peer.read_all(host)] == [f"6.{number}" for number in range(4, 20)]


def test_what_cannot_be_kept_is_no_failure(qemu: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peer_to_peer, "PATH", "/proc/no-such-directory/kept.json")
    _peer_to_peer.keep(host, "7.2", qemu, "11.1", True, "")
    assert _peer_to_peer.read_all(host) == []


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"works": "yes", "kernel": "7.2"}]', '[{"works": true}]'])
def test_what_is_damaged_is_nothing(host: Host, qemu: str, text: str) -> None:
    pathlib.Path(_peer_to_peer.PATH).write_text(text)
    assert _peer_to_peer.read(host, "7.2", qemu) is None
    _peer_to_peer.keep(host, "7.2", qemu, "11.1", True, "")
    assert _peer_to_peer.read(host, "7.2", qemu) is not None
