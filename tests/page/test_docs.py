# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The documentation site (make docs) in a real browser."""

from __future__ import annotations

import functools
import html.parser
import pathlib
import typing as t
import urllib.parse

import pytest
from browser import Browser

SITE = pathlib.Path(__file__).resolve().parents[2] / "build/docs/html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
PHONE = 375


def test_the_site_is_there() -> None:
    assert "index.html" in PAGES, "build it with `make docs`"
    assert {"docsite/getting_started.html", "docsite/troubleshooting.html", "vfio_bind_module.html"} <= set(PAGES)
    assert len(PAGES) > 40


@pytest.mark.parametrize("page", PAGES)
def test_each_page_loads_and_can_be_read_on_a_phone(browser: Browser, page: str) -> None:
    browser.size(PHONE, 700)
    browser.open(SITE / page)
    assert browser.problems == []
    # Nothing from elsewhere, and nothing that is not there.
    asked = [urllib.parse.urlsplit(request) for request in browser.requests]
    assert [one.geturl() for one in asked if one.scheme not in ("file", "data")] == []
    assert [
        one.path for one in asked if one.scheme == "file" and not pathlib.Path(urllib.parse.unquote(one.path)).exists()
    ] == []
    assert browser.run("document.title").strip() != ""
    # The page of the search gets its heading with the first result.
    assert browser.run("document.querySelectorAll('h1').length") == (0 if page == "search.html" else 1)
    # Themes and Sphinx show some of their errors in the page.
    assert browser.run("document.querySelectorAll('.system-message, .problematic, .contents').length") == 0
    assert "ERROR:" not in browser.run("document.body.innerText")
    # Wide things scroll by themselves; the page does not.
    assert browser.run("document.documentElement.scrollWidth") <= PHONE
    smallest = (
        "Math.min(...[...document.querySelectorAll('article p')].map(p => parseFloat(getComputedStyle(p).fontSize)))"
    )
    if browser.run("document.querySelectorAll('article p').length"):
        assert browser.run(smallest) >= 12


def test_the_diagram_is_drawn(browser: Browser) -> None:
    for width in (PHONE, 1280):
        browser.size(width, 800)
        browser.open(SITE / "docsite/architecture.html")
        box = "document.querySelector('figure.diagram svg').getBoundingClientRect().{}"
        assert browser.run(box.format("width")) >= 600
        # No text is wider than the picture, and none is outside of its box.
        outside = (
            "[...document.querySelectorAll('figure.diagram text')].filter(text => {"
            " const box = text.getBBox(), right = box.x + box.width, bottom = box.y + box.height;"
            " const boxes = [...document.querySelectorAll('figure.diagram rect')].map(rect => rect.getBBox());"
            " const inner = boxes.filter(one => one.x <= box.x && one.y <= box.y && one.x + one.width >= box.x"
            " && one.y + one.height >= box.y).sort((a, b) => a.width * a.height - b.width * b.height)[0];"
            " return !inner || right > inner.x + inner.width || bottom > inner.y + inner.height;"
            "}).map(text => text.textContent)"
        )
        assert browser.run(outside) == []


def test_the_search_finds_a_page(browser: Browser) -> None:
    browser.size(1280, 800)
    browser.open(SITE / "search.html", "?q=cgroup_device_acl")
    found = browser.run(
        "new Promise(done => { const look = tries => {"
        " const links = [...document.querySelectorAll('#search-results li a')].map(link => link.getAttribute('href'));"
        " links.length || !tries ? done(links) : setTimeout(() => look(tries - 1), 50) }; look(200) })"
    )
    assert any("cgroup_acl_module.html" in str(link) for link in found)


# -- links -------------------------------------------------------------------------------------------------------------


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := given.get(key))}
        link = given.get("href") if tag in ("a", "link") else given.get("src")
        if link:
            self.links.append(link)


@functools.cache
def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed((SITE / page).read_text("utf-8"))
    return reader


def broken(page: str) -> t.Iterator[str]:
    for link in read(page).links:
        parts = urllib.parse.urlsplit(link)
        if parts.scheme:
            continue
        target = ((SITE / page).parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else SITE / page
        if not target.is_file():
            yield link
        elif target.suffix == ".html":
            anchor = urllib.parse.unquote(parts.fragment)
            if anchor and anchor not in read(str(target.relative_to(SITE))).ids:
                yield link


@pytest.mark.parametrize("page", PAGES)
def test_no_internal_link_is_broken(page: str) -> None:
    # "#" alone is a control of the theme.
    assert [link for link in broken(page) if link != "#"] == []
