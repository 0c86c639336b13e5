# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That the page about troubleshooting has an entry for each message of the collection, and none for what is gone."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _probe
from ansible_collections.iommufd.host.plugins.module_utils._checks import run_checks
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.tests.unit import messages
from ansible_collections.iommufd.host.tests.unit.messages import CHECKOUT, GAP, Message

PAGE = CHECKOUT / "docs/docsite/rst/troubleshooting.rst"
_LETTERS = 7  # a fragment with fewer would fit anything

# Messages of which too little is known beforehand: what they pass on is itself a message, or another program's words.
PASSED_ON = {
    "_ansible.py:_carry_out": "a warning of the module's",
    "_ansible.py:normalize": "what Ansible says of arguments",
    "_ansible.py:run_module": "the error that ends the module",
    "_binding.py:_refuse_driver": "NO_CDEV",
    "_boot_loader.py:apply": "a file that is gone",
    "_child.py:_await": "what the caller says of a driver that does not end",
    "_child.py:do": "what the process that writes to sysfs says",
    "_dkms.py:_warn_of_secure_boot": "SecureBoot.warning",
    "_guest.py:_check_programs": "what _guest_image says",
    "_guest.py:prepare": "what stands in the way",
    "_judgement.py:_judge_cdevs": "a part of what is judged",
    "_lab_host.py:failure": "the message of a host",
    "_lab_image.py:_install_boot_loader": "the message of the boot",
    "_lab_run.py:_failure": "a program and its last words",
    "_libvirt_acl.py:_plan": "what _qemu_conf says of libvirt's configuration",
    "_modules_load.py:apply": "modprobe's words",
    "_packages.py:_simulate": "apt's words",
    "_qemu_source.py:_damaged": "the archive and the reason",
    "_refusing.py:refusing": "what the filter refuses",
    "_systemd_unit.py:apply": "policy_problems and live_problems",
    "_udev.py:apply": "_problem",
    "audit_report.py:run": "how many hosts are ready, in short",
    "rollout_report.py:run": "how far a rollout is",
    "qemu_install.py:install": "what _qemu_artefact says of the archive",
    "select_devices.py:select_devices": "what _selectors says",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    terms: tuple[str, ...]
    body: str


@functools.lru_cache
def entries() -> tuple[Entry, ...]:
    found = re.findall(r"^(``.+``)\n((?:  .*\n|\n(?=  ))+)", PAGE.read_text(), re.MULTILINE)
    return tuple(Entry(tuple(re.findall(r"``(.+?)``", terms)), body) for terms, body in found)


def terms() -> list[str]:
    return [term for entry in entries() for term in entry.terms]


@functools.lru_cache
def names() -> set[str]:
    """What has an id and is looked up by it."""
    checks = {check.id for check in run_checks({})}
    return checks | set(_probe.LINKS) | set(messages.of_evidence())


def letters(text: str) -> int:
    return len(re.sub(r"[^A-Za-z]", "", text))


def covers(term: str, text: str) -> bool:
    pattern = ".*?".join(re.escape(part.strip()) for part in term.split(GAP))
    return letters(term) >= _LETTERS and re.search(pattern, text) is not None


def every_message() -> list[Message]:
    option = Message(str(OptionError("devices[0]", 1, "an address")), "_errors.py:OptionError")
    return [*messages.of_plugins(), *messages.of_links(), *messages.of_playbooks(), *messages.of_meanings(), option]


def test_the_source_is_read() -> None:
    """The reader of messages finds what is known to be there, also what is put together from parts."""
    texts = {message.text for message in messages.of_plugins()}
    assert "Refused, and nothing has been changed. …" in texts
    assert "… is a PCI bridge; it stays with the host. Name the devices behind it" in texts
    assert any(text.startswith("There is no …: the module iommufd is there but not loaded") for text in texts)
    assert any(text.startswith("this kernel's vfio offers no character devices") for text in texts)
    assert any("To be checked again" in text for text in texts)
    assert len(texts) > 250
    assert {"one_descriptor", "passed", "shared", "dma"} <= set(messages.of_evidence())
    assert len(messages.of_meanings()) > 4
    assert any("guest_unit" in message.place for message in messages.of_playbooks())


def test_each_message_has_an_entry() -> None:
    missing = [
        f"{message.place}: {message.text}"
        for message in every_message()
        if message.letters >= _LETTERS and not any(covers(term, message.text) for term in terms())
    ]
    assert missing == [], f"no entry in {PAGE.name} for:\n" + "\n".join(missing)


def test_what_is_only_passed_on_is_named() -> None:
    """A message that consists of variables is either read from its parts, or known to pass another message on."""
    unknown = {
        message.place
        for message in messages.of_plugins()
        if message.letters < _LETTERS and message.place not in PASSED_ON
    }
    assert unknown == set()
    places = {message.place for message in messages.of_plugins()}
    assert set(PASSED_ON) <= places


@pytest.mark.parametrize("name", sorted(names()))
def test_each_id_has_an_entry(name: str) -> None:
    assert name in terms()


def test_no_entry_is_left_over() -> None:
    texts = [message.text for message in every_message()]
    over = [term for term in terms() if term not in names() and not any(covers(term, text) for text in texts)]
    assert over == []


def test_each_entry_has_a_cause_and_a_cure() -> None:
    assert len(entries()) > 100
    for entry in entries():
        cause, mark, cure = entry.body.partition("*Cure:*")
        assert mark, entry.terms
        assert letters(cause) >= 8, entry.terms
        assert letters(cure) >= 8, entry.terms


def test_no_term_stands_twice() -> None:
    assert len(terms()) == len(set(terms()))
