# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The pictures of the documentation: screenshots.py DIRECTORY"""

from __future__ import annotations

import pathlib
import sys
import tempfile

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "build" / "collections"))

import fleet
from browser import Browser

from ansible_collections.iommufd.host.plugins.plugin_utils._audit_page import to_page
from ansible_collections.iommufd.host.plugins.plugin_utils._audit_report import build_report


def main(directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Browser() as browser:
        page = pathlib.Path(scratch) / "index.html"
        surveys = fleet.servers(pathlib.Path(scratch))
        report = build_report(fleet.results(surveys, 24, seed=685), "2026-11-22T11:20:00Z", "0.2.0")
        page.write_text("".join(to_page(report)), "utf-8")
        browser.size(1440, 860)
        browser.scheme("light")
        browser.open(page)
        browser.screenshot(directory / "audit.png")
        ready = next(name for name, host in report["hosts"].items() if host["status"] == "ready")
        browser.size(1440, 800)
        browser.scheme("dark")
        browser.open(page, f"#host/{ready}")
        browser.run("document.getElementById('groups').scrollIntoView()")
        browser.screenshot(directory / "audit-host.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
