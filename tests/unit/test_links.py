# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That links within the repository lead somewhere, and that texts name files that are there.

References between the pages of the documentation are Sphinx's to check (make docs), and the page in the browser's.
"""

from __future__ import annotations

import pathlib
import re

import pytest

CHECKOUT = pathlib.Path(__file__).parents[2]
MARKDOWN = sorted(
    str(path.relative_to(CHECKOUT))
    for path in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("roles/*/README.md"), *CHECKOUT.glob("tests/*/README.md")]
)
GUIDES = sorted(str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("docs/docsite/rst/*.rst"))
_TOP = "|".join(("changelogs", "docs", "examples", "extensions", "meta", "playbooks", "plugins", "roles", "tests"))


def prose(path: str) -> str:
    """A text without its blocks of code, where nothing is a link."""
    return re.sub(r"^( *)```.*?^\1```$", "", (CHECKOUT / path).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", prose(str(path.relative_to(CHECKOUT))), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings)
    return {text.strip().lower().replace(" ", "-") for text in plain}


def broken(path: str, text: str) -> list[str]:
    """The links of a Markdown text that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _mark, anchor = link.partition("#")
        target = (CHECKOUT / path).parent / name if name else CHECKOUT / path
        if not target.exists() or (anchor and anchor not in anchors(target.resolve())):
            found.append(link)
    return found


@pytest.mark.parametrize("path", MARKDOWN)
def test_links_lead_somewhere(path: str) -> None:
    assert broken(path, prose(path)) == []


def test_a_broken_link_would_be_found() -> None:
    assert broken("README.md", "[a](roles/nosuch) [b](README.md#nosuch) [c](#nosuch) [d](#naming-devices)") == [
        "roles/nosuch",
        "README.md#nosuch",
        "#nosuch",
    ]


@pytest.mark.parametrize("path", MARKDOWN + GUIDES)
def test_files_that_are_named_are_there(path: str) -> None:
    """Paths of the repository in texts: `tests/proof/README.md`, but not those with a wildcard or a placeholder."""
    named = re.findall(rf"`((?:{_TOP})/[\w./-]+)`", prose(path))
    missing = [
        name for name in named if not any((base / name).exists() for base in (CHECKOUT, (CHECKOUT / path).parent))
    ]
    assert missing == []


def test_every_guide_is_reached() -> None:
    """Each is in the site's table of contents and in the README."""
    listed = (CHECKOUT / "docs/docsite/extra-docs.yml").read_text()
    readme = (CHECKOUT / "README.md").read_text()
    for path in GUIDES:
        assert f"- {pathlib.Path(path).stem}\n" in listed, path
        assert f"({path})" in readme, path
