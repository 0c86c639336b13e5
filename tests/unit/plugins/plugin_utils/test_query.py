# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError, OptionError
from ansible_collections.iommufd.host.plugins.module_utils._selectors import choose, parse_selectors
from ansible_collections.iommufd.host.plugins.plugin_utils import _query
from ansible_collections.iommufd.host.plugins.plugin_utils._query import answer_queries, compile_query, has_query

DEVICES: list[dict[str, t.Any]] = [
    {"address": "0000:01:00.0", "class_id": "0x010802", "driver": "nvme", "numa_node": 0, "sriov": None, "in_use": []},
    {"address": "0000:02:00.0", "class_id": "0x020000", "driver": None, "numa_node": 1, "sriov": {"total_vfs": 7}},
]


@pytest.mark.parametrize(
    ("expression", "addresses"),
    [
        ("driver == 'nvme'", ["0000:01:00.0"]),
        ("numa_node == `1` && sriov.total_vfs >= `4`", ["0000:02:00.0"]),
        ("numa_node", ["0000:01:00.0", "0000:02:00.0"]),
        ("in_use", []),
        ("sriov", ["0000:02:00.0"]),
        ("driver && starts_with(driver, 'nv')", ["0000:01:00.0"]),
        ("missing", []),
    ],
)
def test_a_device_matches_where_the_result_is_true_for_jmespath(expression: str, addresses: list[str]) -> None:
    matches = compile_query("devices[0].query", expression)
    assert [one["address"] for one in DEVICES if matches(one)] == addresses


@pytest.mark.parametrize("expression", ["driver ==", "[", "nosuch(driver)", "starts_with(driver, 'nv')"])
def test_what_cannot_be_evaluated_is_an_error_that_names_the_option(expression: str) -> None:
    with pytest.raises(OptionError, match=r"^devices\[0\]\.query: .*JMESPath"):
        matches = compile_query("devices[0].query", expression)
        [matches(one) for one in DEVICES]


@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_an_option_error(text: str) -> None:
    try:
        answer_queries("devices", [{"query": text}], DEVICES)
    except OptionError as caught:
        assert caught.option == "devices[0].query"


def test_the_module_gets_addresses_and_all_else_as_it_was() -> None:
    selectors = ["03:00.0", {"query": "driver == 'nvme'", "numa_node": 0, "excluded": True}, {"class": "nvme"}]
    assert has_query(selectors)
    answered = answer_queries("devices", selectors, DEVICES)
    assert answered == [
        "03:00.0",
        {
            "query": {"expression": "driver == 'nvme'", "addresses": ["0000:01:00.0"]},
            "numa_node": 0,
            "excluded": True,
        },
        {"class": "nvme"},
    ]
    assert selectors[1] == {"query": "driver == 'nvme'", "numa_node": 0, "excluded": True}


def test_host_and_controller_choose_alike() -> None:
    selector = {"query": "driver == 'nvme'"}
    here = choose(parse_selectors("devices", [selector], compile_query), DEVICES)
    there = choose(parse_selectors("devices", answer_queries("devices", [selector], DEVICES)), DEVICES)
    assert here == there
    nothing = answer_queries("devices", [{"query": "driver == 'tg3'"}], DEVICES)
    with pytest.raises(
        OptionError, match=r"^devices\[0\]: \{'query': \"driver == 'tg3'\"\} is not accepted: it matches"
    ):
        choose(parse_selectors("devices", nothing), DEVICES)
    assert here.chosen[0].reason == "query driver == 'nvme', devices[0]"


def test_another_selector_that_is_malformed_is_told_before_the_host_is_asked() -> None:
    with pytest.raises(OptionError, match=r"^devices\[1\]\.class: "):
        answer_queries("devices", [{"query": "driver"}, {"class": "nmve"}], [])


@pytest.mark.parametrize("selectors", [None, "01:00.0", ["01:00.0"], [{"class": "nvme"}], {"query": "x"}])
def test_without_a_query_there_is_nothing_to_do(selectors: t.Any) -> None:
    assert not has_query(selectors)


def test_without_jmespath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_query, "jmespath", None)
    with pytest.raises(HostError, match="needs the Python library jmespath on the controller"):
        answer_queries("devices", [{"query": "driver"}], DEVICES)
