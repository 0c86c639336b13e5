# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools

import pytest

from ansible_collections.iommufd.host.plugins.module_utils import _kernel_line
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._kernel_line import COMMAND_LINE, ENTRY, ZIPL


@pytest.mark.parametrize("value", ["a b", 'x="y"', "$(reboot)", "", "=on", "a;b", "iommu=pt\n"])
def test_arguments_that_would_not_arrive_are_refused(value: str) -> None:
    with pytest.raises(OptionError, match=r"args\[1\]"):
        _kernel_line.check_arguments("args", ["intel_iommu=on", value])
    _kernel_line.check_arguments("args", ["vfio-pci.disable_vga=1", "console=ttyS0,115200n8", "nosmt"])


@pytest.mark.parametrize(
    ("line", "wanted", "missing"),
    [
        ("a=1 b", ["a=1"], []),
        ("a=1 a=2", ["a=1"], ["a=1"]),
        ("a=2 a=1", ["a=1"], []),
        ("a-b=1 a_b=2", ["a-b=1"], ["a-b=1"]),
        ("console=tty0 console=ttyS0", ["console=tty0", "console=ttyS0"], []),
        ("console=ttyS0 console=tty0", ["console=tty0", "console=ttyS0"], ["console=ttyS0"]),
        ("", ["a"], ["a"]),
    ],
)
def test_the_last_value_counts(line: str, wanted: list[str], missing: list[str]) -> None:
    assert _kernel_line.ineffective(line.split(), wanted) == missing


BLS = "title Fedora\nlinux /vmlinuz-6.12\ninitrd /initramfs.img $tuned_initrd\noptions root=UUID=1 ro quiet\n"


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [
        (ENTRY, BLS, BLS.replace("ro quiet", "ro quiet intel_iommu=on iommu=pt")),
        (ENTRY, "linux /k\noptions a\noptions b \n", "linux /k\noptions a\noptions b intel_iommu=on iommu=pt \n"),
        (ENTRY, "linux /k\n", "linux /k\noptions intel_iommu=on iommu=pt\n"),
        (ENTRY, "linux /k", "linux /k\noptions intel_iommu=on iommu=pt"),
        (ENTRY, "options intel_iommu=off", "options intel_iommu=off intel_iommu=on iommu=pt"),
        (ENTRY, "options intel_iommu=on x\n", "options intel_iommu=on x iommu=pt\n"),
        (ENTRY, "options\tx\r\n", "options\tx intel_iommu=on iommu=pt\r\n"),
        (COMMAND_LINE, "root=/dev/x ro", "root=/dev/x ro intel_iommu=on iommu=pt"),
        (COMMAND_LINE, "# mine\nroot=/dev/x\n ro  \n\n", "# mine\nroot=/dev/x\n ro intel_iommu=on iommu=pt  \n\n"),
        (COMMAND_LINE, "", "intel_iommu=on iommu=pt\n"),
        (
            ZIPL,
            '[a]\nparameters="x y"\n[b]\n  parameters = z \n',
            '[a]\nparameters="x y intel_iommu=on iommu=pt"\n[b]\n  parameters = z intel_iommu=on iommu=pt \n',
        ),
    ],
)
def test_arguments_are_added_and_taken_out_again(form: _kernel_line.Form, before: str, after: str) -> None:
    wanted = ["intel_iommu=on", "iommu=pt"]
    assert form.add(before, wanted) == after
    assert form.add(after, wanted) == after
    assert all(not _kernel_line.ineffective(line, wanted) for line in form.lines(after))
    ours = [one for one in wanted if any(_kernel_line.ineffective(line, [one]) for line in form.lines(before))]
    assert form.take_out(after, ours) == before


@pytest.mark.parametrize("form", [ENTRY, COMMAND_LINE])
def test_whatever_stood_there_stands_there_afterwards(form: _kernel_line.Form) -> None:
    pieces = ["", "\n", "options a=1\n", "options  b", "# x\n", "\t", ' q="a b"', "linux /k\n"]
    pieces += ["intel_iommu=off ", "\r\n"]
    for parts in itertools.product(pieces, repeat=3):
        before = "".join(parts)
        after = form.add(before, ["intel_iommu=on"])
        assert not _kernel_line.ineffective(form.lines(after)[0], ["intel_iommu=on"])
        assert form.take_out(after, ["intel_iommu=on"]) == before


def test_a_word_inside_another_is_not_taken_for_it() -> None:
    assert ENTRY.take_out("options xiommu=pt iommu=ptx\n", ["iommu=pt"]) == "options xiommu=pt iommu=ptx\n"
    assert ENTRY.add("options intel_iommu=on\n", ["iommu=pt"]) == "options intel_iommu=on iommu=pt\n"
