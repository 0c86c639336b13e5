# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import html.parser
import json
import re
import typing as t
import zlib

from hypothesis import given

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report
from ansible_collections.iommufd.host.tests.unit.reports import (
    REPORTS,
    check,
    device,
    good_checks,
    hostile_report,
    report,
    unhurried,
)


class Page(html.parser.HTMLParser):
    """A page read back: its elements, and that they are closed in order."""

    VOID = ("meta", "input", "col", "wbr", "rect")

    def __init__(self, made: Report) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.script: list[str] = []
        self.text = "".join(to_page(made))
        self.text.encode()
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self) -> tuple[dict[str, t.Any], list[dict[str, t.Any]]]:
        lines = zlib.decompress(base64.b64decode(self.script[0])).decode().splitlines()
        shared, *hosts = (json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines)
        return shared, hosts

    def functions(self, host: int = 0) -> list[dict[str, t.Any]]:
        shared, hosts = self.data()

        def said(value: t.Any) -> t.Any:
            if isinstance(value, list):
                return [said(one) for one in value]
            return None if value < 0 else shared["strings"][value]

        return [
            {name: value if name == "platform" else said(value) for name, value in zip(shared["function"], row)}
            for row in hosts[host]["functions"]
        ]


def survey(*devices: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    return {"checks": good_checks(), "devices": list(devices), **more}


def test_nothing_but_the_page() -> None:
    page = Page(report(one=survey(device())))
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not [tag for tag, _attributes in page.elements if tag in ("img", "link", "iframe", "object", "base")]
    for _tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcset")]
    assert [one["href"] for one in page.all("a")] == ["report.json", "junit.xml", "#host/one"]


def test_the_matrix() -> None:
    bad = {
        "checks": [check("iommu.enabled", "fail", "Off."), check("kernel.new_thing", "warn"), check("kvm", "strange")]
    }
    page = Page(report(good=survey(), bad=bad, gone={"unreachable": True, "msg": "refused"}))
    rows = [row for row in page.all("tr") if "data-index" in row]
    assert [row["data-status"] for row in rows] == ["unreachable", "not_ready", "ready"]  # the worst first
    heads = [one["data-check"] for one in page.all("th") if "data-check" in one]
    assert heads[:4] == ["iommu.enabled", "kernel.new_thing", "kernel.iommufd", "kernel.cdev"]
    assert set(heads) == {
        "iommu.enabled",
        "kernel.iommufd",
        "kernel.cdev",
        "kernel.new_thing",
        "node.iommu",
        "qemu.iommufd",
        "kvm",
    }
    marks = [one["class"] for one in page.all("span") if "mark" in str(one.get("class"))]
    assert marks[4:] == ["mark fail", "mark warn", "mark other"] + ["mark ok"] * 5


def test_states_of_functions() -> None:
    page = Page(
        report(
            one=survey(
                device("a", driver="vfio-pci", in_use=[{"kind": "guest", "name": "vm", "detail": "a guest has it"}]),
                device("b", in_use=[{"kind": "mount", "name": "/", "detail": "sda is mounted on /"}]),
                device("c"),
                device("d", class_id="0x060400", driver="pcieport"),
                device("e", in_use=None),
                device("f", class_id="0x088000", driver=None),
                device("g", sriov={"total_vfs": 16, "num_vfs": 4, "physfn": None}),
                device("h", sriov={"total_vfs": None, "num_vfs": None, "physfn": "g"}, driver="mlx5_vfio_pci"),
            )
        )
    )
    functions = page.functions()
    assert [one["state"] for one in functions] == ["vfio", "used", "free", "bridge", "unknown", "free", "free", "vfio"]
    assert [one["platform"] for one in functions] == [0, 0, 0, 1, 0, 1, 0, 0]
    assert functions[1]["uses"] == ["mount: sda is mounted on /"]
    assert functions[2]["identity"] == "10de:26b9" and functions[2]["vendor"] == "NVIDIA"
    assert functions[2]["class"] == "3D controller"
    assert (functions[6]["vfs"], functions[7]["physfn"]) == ("4 of 16", "g")
    labels = [one["aria-label"] for one in page.all("svg") if one.get("class") == "meter"]
    assert labels == ["2 on vfio, 2 free, 1 in use"]  # bridges and system peripherals are not to be given away


def test_groups_that_are_not_viable() -> None:
    groups = [
        {"number": 1, "type": "DMA", "vfio": ["a"], "blocking": ["b"], "others": []},
        {"number": 2, "type": "DMA", "vfio": ["a"], "blocking": [], "others": None},
        {"number": 3, "vfio": [], "blocking": ["b"]},
    ]
    _shared, hosts = Page(report(one=survey(groups=groups))).data()
    assert [group[2] for group in hosts[0]["groups"]] == [1, 0, 0]


def test_sections_that_nobody_knows_yet_are_carried_along() -> None:
    _shared, hosts = Page(
        report(one=survey(firmware={"vendor": "X", "list": [1, {"a": None}]}, ratio=float("nan")))
    ).data()
    assert hosts[0]["facts"] == {"firmware": {"vendor": "X", "list": [1, {"a": None}]}, "ratio": "nan"}


def test_strings_are_kept_once() -> None:
    page = Page(report(**{f"hv{number}": survey(*(device() for _index in range(100))) for number in range(50)}))
    shared, _hosts = page.data()
    assert len(shared["strings"]) == len(set(shared["strings"])) < 100
    assert len(page.text) < 150_000


def test_hostile_hosts() -> None:
    page = Page(hostile_report())
    harmless = Page(
        report(one={"checks": [check("kvm", "fail")], "devices": [device()], "kernel": {"release": "6.12"}})
    )
    # No element that a harmless page has not, no attribute that would act, and nothing that ends the data early.
    assert {tag for tag, _attributes in page.elements} == {tag for tag, _attributes in harmless.elements}
    assert len(page.all("script")) == 2
    assert not [name for _tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("</script>") == 2
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", page.script[0])
    shared, hosts = page.data()
    assert len(hosts) == len(hostile_report()["hosts"])
    assert all(text.isprintable() for text in shared["strings"])
    hrefs = [str(one["href"]) for one in page.all("a")][2:]
    assert all(re.fullmatch(r"#host/[A-Za-z0-9._~%-]*", href) for href in hrefs)


@unhurried
@given(REPORTS)
def test_whatever_a_survey_holds(made: Report) -> None:
    _shared, hosts = Page(made).data()
    assert len(hosts) == len(made["hosts"])
