# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The report's page in a real browser."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys
import typing as t

import fleet
import pytest
from browser import Browser

from ansible_collections.iommufd.host.plugins.module_utils._host import Host
from ansible_collections.iommufd.host.plugins.module_utils._survey import survey
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import Report, build_report
from ansible_collections.iommufd.host.tests.unit import reports

_RESULT = pathlib.Path(__file__).resolve().parents[2] / "build" / "page.json"


def write(directory: pathlib.Path, report: Report) -> pathlib.Path:
    path = directory / "index.html"
    path.write_text("".join(to_page(report)), "utf-8")
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, servers: dict[str, t.Any]) -> pathlib.Path:
    """A host of every kind, failed and unreachable ones too."""
    results: dict[str, object] = {f"{kind}.example.net": survey for kind, survey in servers.items()}
    results["failed.example.net"] = {"failed": True, "msg": "No Python."}
    results["gone.example.net"] = {"unreachable": True, "msg": "Connection refused"}
    return write(tmp_path_factory.mktemp("small"), build_report(results, reports.TIME, "0.2.0"))


def visible(browser: Browser) -> list[str]:
    found = browser.run(
        "[...document.querySelectorAll('#matrix tbody tr')].filter(row => row.offsetHeight)"
        ".map(row => row.querySelector('a').textContent)"
    )
    return [str(name).removesuffix(".example.net") for name in found]


def follow(browser: Browser, script: str) -> None:
    """Run a script that leads to another address of the page, and wait until it has been drawn."""
    browser.run(
        f"new Promise(done => {{ addEventListener('hashchange', () => setTimeout(done), {{once: true}}); {script} }})"
    )


def clean(browser: Browser, page: pathlib.Path) -> None:
    """No console error or warning, no exception, and no request but for the page itself."""
    assert browser.problems == []
    assert [one.partition("#")[0] for one in browser.requests] == [page.resolve().as_uri()]


def test_the_fleet(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    assert visible(browser)[:2] == ["gone", "failed"]
    assert visible(browser)[-2:] == ["ready", "warned"]
    assert browser.run("document.querySelectorAll('#matrix .mark.fail').length") >= 6
    symbol = "getComputedStyle(document.querySelector('#matrix .mark.fail'), '::before').content"
    assert browser.run(symbol) == '"✕" / ""'
    assert browser.run("document.getElementById('shown').textContent") == "8 hosts"
    clean(browser, small)


def test_the_head_and_the_first_column_stay(browser: Browser, small: pathlib.Path) -> None:
    browser.size(700, 500)
    browser.open(small)
    place = "document.querySelector('{}').getBoundingClientRect().{} - document.querySelector('.scroll').offset{}"
    head, first = place.format("thead th", "top", "Top"), place.format("tbody th", "left", "Left")
    before = browser.run(head), browser.run(first)
    browser.run("document.querySelector('.scroll').scrollTo(300, 150)")
    assert browser.run("document.querySelector('.scroll').scrollLeft") == 300
    assert (browser.run(head), browser.run(first)) == before
    browser.size(1440, 900)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("ready.example", ["ready"]),
        ("fail:iommu.enabled", ["off"]),
        ("status:unreachable", ["gone"]),
        ("REFUSED", ["gone"]),
        ("group.viable host driver", ["split"]),
        ("10de:26b9 vfio-pci", ["ready", "split", "warned"]),
        ("nvidia vg0-root debian", ["off", "stock"]),
        ("nowhere to be found", []),
    ],
)
def test_the_filter(browser: Browser, small: pathlib.Path, words: str, names: list[str]) -> None:
    browser.open(small)
    browser.press("/", 191, "/")  # leads to the field
    browser.type(words)
    browser.press("Enter", 13, "\r")
    assert sorted(visible(browser)) == names
    assert browser.run("document.getElementById('shown').textContent") == f"{len(names)} of 8 hosts"
    clean(browser, small)


def test_verdicts_and_frequent_failures_filter_too(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    browser.run("document.querySelector('.tile[data-status=ready]').click()")
    assert visible(browser) == ["ready", "warned"]
    browser.run("document.querySelector('.tile[data-status=\"\"]').click()")
    browser.run("document.querySelector('[data-filter=\"fail:kernel.iommufd\"]').click()")
    assert sorted(visible(browser)) == ["off", "stock"]


def test_sorting(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    browser.run("document.querySelector('th.name button').click()")
    assert visible(browser) == sorted(visible(browser))
    browser.run("document.querySelector('[data-check=\"group.viable\"] button').click()")
    assert visible(browser)[0] == "split"
    browser.run("document.querySelector('[data-check=\"group.viable\"] button').click()")
    assert visible(browser)[-1] == "split"


def test_a_hosts_section(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    follow(browser, "document.querySelector('a[href=\"#host/ready.example.net\"]').click()")
    assert browser.run("document.activeElement.textContent") == "ready.example.net"
    assert browser.run("document.querySelectorAll('.group .function').length") == 226
    boxes = browser.run("document.querySelector('#groups').innerText")
    for words in (
        "NUMA node 0",
        "NUMA node 1",
        "nvme0n1 > nvme0n1p2 > vg0-root is mounted on /",
        "eno2 > bond0 > br0: part of the bridge br0",
        "PF, 8 of 16 VFs",
        "VF of 0000:81:00.0",
        "the running guest train-7",
        "/dev/vfio/devices/vfio3",
    ):
        assert words in boxes
    assert browser.run("document.querySelectorAll('.group.bad').length") == 0
    assert browser.run("document.querySelector('.function.is-used').title").startswith("in use\n")
    facts = browser.run("document.querySelector('.facts').innerText")
    assert "qemu-system-x86_64" in facts and "IOMMUFD=m" in facts and "train-7" in facts
    browser.run(
        "new Promise(done => { const fold = document.querySelector('#host > details');"
        " fold.addEventListener('toggle', () => setTimeout(done)); fold.open = true })"
    )
    assert len(json.loads(browser.run("document.querySelector('#host pre').textContent"))["functions"]) == 226
    follow(browser, "history.back()")
    assert len(visible(browser)) == 8
    clean(browser, small)


def test_a_check_in_the_matrix_leads_to_its_remedy(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    follow(browser, "document.querySelector('tr:has(a[href=\"#host/stock.example.net\"]) .mark.fail').click()")
    target = browser.run("document.querySelector('li.target').innerText")
    assert "kernel.iommufd" in target and "Debian builds its kernels without iommufd" in target and "DKMS" in target
    place = browser.run("document.querySelector('li.target').getBoundingClientRect().toJSON()")
    assert 0 <= place["top"] < place["bottom"] <= 900


def test_what_is_not_viable_not_grouped_or_not_known(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small, "#host/split.example.net")
    assert "not viable" in browser.run("document.querySelector('.group.bad h4').innerText")
    browser.open(small, "#host/off.example.net")
    assert "the IOMMU is off" in browser.run("document.querySelector('.group.loose h4').innerText")
    assert browser.run("document.querySelectorAll('.function').length") == 226
    browser.open(small, "#host/captured.example.net")
    assert "could not be told" in browser.run("document.querySelector('.lead').innerText")
    browser.open(small, "#host/gone.example.net")
    assert browser.run("document.getElementById('host').innerText.includes('Connection refused')")
    clean(browser, small)


def test_keys(browser: Browser, small: pathlib.Path) -> None:
    browser.open(small)
    browser.run("document.querySelector('tbody a').focus()")
    browser.run("void (window.led = new Promise(done => addEventListener('hashchange', () => setTimeout(done))))")
    browser.press("Enter", 13, "\r")
    browser.run("window.led")
    assert browser.run("document.getElementById('fleet').hidden") is True
    follow(browser, "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))")
    assert browser.run("document.getElementById('fleet').hidden") is False


def test_light_and_dark(browser: Browser, small: pathlib.Path) -> None:
    def brightness() -> float:
        color = "getComputedStyle(document.body).backgroundColor"
        return statistics.fmean(browser.run(f"{color}.match(/\\d+/g).slice(0, 3).map(Number)"))

    for scheme, other in (("light", "dark"), ("dark", "light")):
        browser.scheme(scheme)
        browser.open(small)
        by_system = brightness()
        browser.run("document.getElementById('theme').click()")
        by_hand = brightness()
        assert (by_system > 200, by_hand > 200) == (scheme == "light", other == "light")
    browser.scheme("light")
    clean(browser, small)


def test_contrast(browser: Browser, small: pathlib.Path) -> None:
    """Words on the page keep a contrast of 4.5 to 1, as WCAG 2.2 asks for (1.4.3), in light and in dark."""
    script = """(() => {
      const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const known = new Map();
      const draw = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data]; };
      const rgb = (css) => { if (!known.has(css)) known.set(css, draw(css)); return known.get(css); };
      const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
      const own = (e) => rgb(getComputedStyle(e).backgroundColor);
      const ground = (e) => { while (!own(e)[3]) e = e.parentElement; return own(e); };
      const speaks = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      const low = new Set();
      for (const e of document.querySelectorAll("main *, header *")) {
        if (!e.checkVisibility() || e.closest(".sr") || !speaks(e)) continue;
        const pair = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (ratio < 4.5) low.add(`${e.className || e.tagName} ${ratio.toFixed(2)}`);
      }
      return [...low];
    })()"""
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        for fragment in ("", "#host/split.example.net", "#host/stock.example.net/kernel.iommufd"):
            browser.open(small, fragment)
            assert browser.run(script) == [], (scheme, fragment)
    browser.scheme("light")


def test_hostile_hosts(browser: Browser, tmp_path: pathlib.Path) -> None:
    made = reports.hostile_report()
    page = write(tmp_path, made)
    browser.open(page)
    assert browser.run("document.querySelectorAll('#matrix tbody tr').length") == len(made["hosts"])
    elements = set(browser.run("[...new Set([...document.querySelectorAll('*')].map(e => e.localName))]"))
    assert not elements & {"img", "iframe", "object"}
    assert browser.run("document.scripts.length") == 2
    for index in range(len(made["hosts"])):
        href = browser.run(f"document.querySelectorAll('tbody a')[{index}].getAttribute('href')")
        browser.open(page, href)
        assert browser.run("document.getElementById('host').hidden") is False
        assert browser.run("document.querySelectorAll('#host img, #host script').length") == 0
        assert browser.run("document.querySelectorAll('#host h2').length") >= 1
        clean(browser, page)


def test_recorded_servers(
    browser: Browser, vgpu_node: pathlib.Path, iommu_off: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    surveys = {"vgpu": survey(Host(str(vgpu_node))), "off": survey(Host(str(iommu_off)))}
    page = write(tmp_path, build_report(surveys, reports.TIME, None))
    browser.open(page, "#host/vgpu")
    assert browser.run("document.querySelectorAll('.function').length") == 226
    assert browser.run("document.querySelectorAll('.group').length") == 106
    boxes = browser.run("document.querySelector('#groups').textContent")
    assert "mgmt-bo > mgmt-br" in boxes
    assert browser.run("[...document.querySelectorAll('.more')].filter(e => /VF of/.test(e.textContent)).length") == 16
    browser.open(page, "#host/off")
    assert browser.run("document.querySelectorAll('.function').length") == 208
    clean(browser, page)


def test_a_fleet_of_500_hosts(browser: Browser, servers: dict[str, t.Any], tmp_path: pathlib.Path) -> None:
    page = write(tmp_path, build_report(fleet.results(servers, 500), reports.TIME, "0.2.0"))
    browser.send("Performance.enable", timeDomain="threadTicks")
    loads = []
    for _round in range(3):
        loads.append(browser.open(page))
    metrics = {one["name"]: one["value"] for one in browser.send("Performance.getMetrics")["metrics"]}
    timed = (
        "(async () => { const start = performance.now(); %s; await new Promise(requestAnimationFrame);"
        " return (performance.now() - start) / 1000 })()"
    )
    ask = "document.getElementById('filter').value = '%s'; document.querySelector('.filter').requestSubmit()"
    figures = {
        "hosts": 500,
        "functions": 226,
        "bytes": page.stat().st_size,
        "load_s": round(statistics.median(loads), 3),
        "load_cpu_s": round(metrics["TaskDuration"], 3),
        "first_filter_s": round(browser.run(timed % (ask % "10de:26b9")), 3),
        "next_filter_s": round(browser.run(timed % (ask % "fail:kernel.iommufd")), 3),
        "busy_machine": round(os.getloadavg()[0], 1),
    }
    shown = browser.run("document.getElementById('shown').textContent")
    follow(browser, "document.querySelector('#matrix tbody tr:not([hidden]) a').click()")
    assert browser.run("document.querySelectorAll('.function').length") == 226
    browser.send("Performance.disable")
    clean(browser, page)
    _RESULT.parent.mkdir(exist_ok=True)
    _RESULT.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n500 hosts: {figures}", file=sys.__stdout__)
    assert shown.endswith(" of 500 hosts") and not shown.startswith("0 ")
    # The goal is 2 s on a machine of its own; what is asserted holds on any busy one.
    assert figures["load_s"] < 20
    assert figures["first_filter_s"] < 10
