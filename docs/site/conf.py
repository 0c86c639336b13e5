# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sphinx's configuration of the documentation site (make docs). Everything is on this machine: nothing is fetched."""

from __future__ import annotations

import pathlib
import re
import typing as t

from docutils import nodes

project = "iommufd.host"
copyright = "2026, the iommufd.host authors"
title = html_title = html_short_title = "iommufd.host"

extensions = ["sphinx_antsibull_ext"]
nitpicky = True
highlight_language = "YAML+Jinja"
pygments_style = "ansible"

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_use_index = False
html_static_path = [str(pathlib.Path(__file__).parent / "static")]
html_css_files = ["site.css"]


# What the reference says of Ansible in general, by its label there.
_ANSIBLE = "https://docs.ansible.com/ansible/latest/"
_PAGES = {
    "action_plugins": "plugins/action.html",
    "ansible_configuration_settings": "reference_appendices/config.html",
    "callback_plugins": "plugins/callback.html",
    "common_return_values": "reference_appendices/common_return_values.html",
}
_MODULE = re.compile(r"ansible_collections\.(?P<page>ansible\.builtin\.[a-z_]+_[a-z]+)$")


def elsewhere(_app: t.Any, _env: t.Any, node: t.Any, content: t.Any) -> t.Any:
    """A link into Ansible's own documentation; Sphinx would have to fetch an inventory of it to make one by itself."""
    label = str(node.get("reftarget", ""))
    found = _MODULE.match(label)
    page = f"collections/{found['page'].replace('.', '/')}.html" if found else _PAGES.get(label)
    return None if page is None else nodes.reference("", "", content, refuri=_ANSIBLE + page, internal=False)


def without_contents(_app: t.Any, doctree: t.Any) -> None:
    """The theme shows each page's contents beside it, so a list of them in the page is left to other sites."""
    for topic in list(doctree.findall(nodes.topic)):
        if "contents" in topic["classes"]:
            topic.parent.remove(topic)
    for title in doctree.findall(nodes.title):
        title.attributes.pop("refid", None)  # the way back to that list


def setup(app: t.Any) -> None:
    app.connect("doctree-read", without_contents)
    app.connect("missing-reference", elsewhere)
