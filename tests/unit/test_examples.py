# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""That every example in a text for people, and each of the directory examples, is one that works.

It is parsed as what it is, its variables and arguments are held against what roles and modules document, playbooks pass
Ansible's own syntax check, and commands name what there is. What the examples of filters and of the survey show is run
beside the filters' own tests.
"""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
import typing as t

import jinja2
import pytest
import yaml
from ansible.cli.adhoc import AdHocCLI
from ansible.cli.playbook import PlaybookCLI
from ansible.parsing.splitter import parse_kv

from ansible_collections.iommufd.host.plugins.module_utils import _selectors
from ansible_collections.iommufd.host.plugins.plugin_utils._query import compile_query
from ansible_collections.iommufd.host.tests.unit import examples
from ansible_collections.iommufd.host.tests.unit.examples import CHECKOUT, COLLECTION, Example

LANGUAGES = {"yaml", "console", "text", "ini", ""}
ALL = [*examples.of_texts(), *examples.of_modules(), *examples.of_files()]
YAML = [example for example in ALL if example.language == "yaml"]
CONSOLE = [example for example in ALL if example.language == "console"]
# Keywords of a task that are no module.
_KEYWORDS = re.compile(r"^[a-z_]+$")


def content(example: Example) -> t.Any:
    return yaml.safe_load(example.text)


def test_examples_are_found() -> None:
    for path in examples.TEXTS:
        assert any(example.place.startswith(f"{path}:") for example in ALL), path
    assert {"examples/demo/hosts.yml", "examples/fleet/inventory.yml"} <= set(examples.FILES)
    assert len(YAML) > 50
    assert len(CONSOLE) > 10


def test_each_has_a_language() -> None:
    assert [str(example) for example in ALL if example.language not in LANGUAGES] == []
    # Without a language only output is shown: no example of what somebody is to write.
    plain = [example for example in ALL if not example.language]
    assert [str(example) for example in plain if re.search(r"^(- |\$ |# )", example.text, re.MULTILINE)] == []


@pytest.mark.parametrize("example", YAML, ids=str)
def test_yaml_is_what_it_should_be(example: Example) -> None:
    node = content(example)
    if examples.is_molecule(node):
        known = {
            "destroy",
            "create",
            "prepare",
            "converge",
            "idempotence",
            "side_effect",
            "verify",
            "cleanup",
            "syntax",
        }
        assert set(node.get("scenario", {}).get("test_sequence", [])) <= known
    elif examples.is_playbook(node):
        assert playbook_objections(node) == []
    elif examples.is_tasks(node):
        assert task_objections(node) == []
    elif examples.is_inventory(node):
        assert inventory_objections(node) == []
    else:
        assert isinstance(node, dict), "neither a playbook nor tasks, an inventory or variables"
        assert examples.variable_objections(node) == []


def playbook_objections(plays: list[dict[str, t.Any]]) -> list[str]:
    found = []
    for play in plays:
        book = play.get("ansible.builtin.import_playbook", "")
        if book.startswith(COLLECTION) and not (CHECKOUT / f"playbooks/{book.removeprefix(COLLECTION)}.yml").exists():
            found.append(f"there is no playbook {book}")
        if book:
            found += examples.variable_objections(play.get("vars") or {})
        for entry in play.get("roles") or ():
            found += role_objections(entry)
        found += task_objections(list(examples.tasks_of([play])))
    return found


def role_objections(entry: t.Mapping[str, t.Any]) -> list[str]:
    name = str(entry["role"]).removeprefix(COLLECTION)
    options = examples.role_options().get(name)
    if options is None:
        return [f"there is no role {entry['role']}"]
    own = {key: value for key, value in entry.items() if key.startswith(f"{name}_")}
    given = {**own, **(entry.get("vars") or {})}
    return examples.objections({key: {**value, "required": False} for key, value in options.items()}, given)


def task_objections(tasks: list[dict[str, t.Any]]) -> list[str]:
    found = []
    for task in examples.tasks_of(tasks):
        called = [key for key in task if not _KEYWORDS.match(key)]
        if "block" not in task and len(called) != 1:
            found.append(f"{task.get('name')}: not one module but {called}")
        for key in called:
            if key.startswith(COLLECTION):
                found += [
                    f"{key}: {text}" for text in examples.module_objections(key.removeprefix(COLLECTION), task[key])
                ]
    return found


def inventory_objections(inventory: dict[str, t.Any]) -> list[str]:
    found = []
    for name, group in examples.groups_of(inventory):
        found += [f"{name}: {text}" for text in examples.variable_objections(group.get("vars") or {})]
        for host, variables in (group.get("hosts") or {}).items():
            found += [f"{host}: {text}" for text in examples.variable_objections(variables or {})]
    return found


def test_all_plays_pass_the_syntax_check(tmp_path: pathlib.Path) -> None:
    """Ansible's own: modules, roles and playbooks are found, keywords are known. Once for all, for it takes seconds."""
    books: dict[str, str] = {}
    groups = {"localhost"}
    for number, example in enumerate(YAML):
        node = content(example)
        if examples.is_tasks(node):
            node = [{"hosts": "localhost", "tasks": node}]
        elif not examples.is_playbook(node):
            continue
        groups |= {play["hosts"] for play in node if "hosts" in play}
        path = tmp_path / f"{number}.yml"
        path.write_text(yaml.safe_dump(node, sort_keys=False))
        books[str(path)] = example.place
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(
        yaml.safe_dump({name: {"hosts": {"one.example.com": None}} for name in [*sorted(groups), "lab"]})
    )
    assert len(books) > 40
    done = subprocess.run(
        ["ansible-playbook", "-i", str(inventory), "--syntax-check", *books],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stderr
    for path, place in books.items():
        said = said.replace(path, place)
    assert done.returncode == 0, said
    assert "[WARNING]" not in said, said


def test_the_inventories_are_read(tmp_path: pathlib.Path) -> None:
    whole = {}
    for example in YAML:
        node = content(example)
        if examples.is_inventory(node):
            for name, group in node.items():
                whole[f"example{len(whole)}"] = {"children": {f"{name}_{len(whole)}": group}}
    path = tmp_path / "hosts.yml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    done = subprocess.run(
        ["ansible-inventory", "-i", str(path), "--list"], capture_output=True, text=True, timeout=120, check=True
    )
    assert len(whole) > 8
    assert "hv1.example.com" in json.loads(done.stdout)["_meta"]["hostvars"]


@pytest.mark.parametrize("example", YAML, ids=str)
def test_selectors_are_understood(example: Example) -> None:
    for name, devices in _values(content(example), ("devices_list", "verify_devices")):
        if not examples.templated(devices):
            _selectors.parse_selectors(name, devices, compile_query)


@pytest.mark.parametrize("example", YAML, ids=str)
def test_templates_are_templates(example: Example) -> None:
    """Their syntax; and what they name of this collection is there."""
    filters = examples.documented("filter")
    for text in _strings(content(example)):
        if "{{" in text:
            jinja2.Environment(extensions=["jinja2.ext.do"]).parse(text)
            for name in re.findall(r"\|\s*iommufd\.host\.([a-z_]+)", text):
                assert name in filters, name


@pytest.mark.parametrize("example", ALL, ids=str)
def test_what_is_named_of_the_collection_is_there(example: Example) -> None:
    known = {
        *examples.documented("modules"),
        *examples.documented("filter"),
        *examples.role_options(),
        *(path.stem for path in CHECKOUT.glob("playbooks/*.yml")),
    }
    assert set(re.findall(r"\biommufd\.host\.([a-z][a-z_]+)", example.text)) <= known


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(example: Example) -> list[list[str]]:
    """The commands of a console: what follows a prompt, without comments."""
    lines = re.findall(r"^[$#] (.*)$", example.text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("example", CONSOLE, ids=str)
def test_commands_name_what_there_is(example: Example) -> None:
    found = commands(example)
    assert found
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    for words in found:
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert named
            assert set(named) <= {*targets, *(f"proof-{path.name}" for path in CHECKOUT.glob("tests/proof/[a-z]*"))}
        elif words[0] == "ansible-playbook":
            assert playbook_command_objections(words[1:]) == []
        elif words[0] == "ansible":
            options = AdHocCLI(words)
            options.init_parser()
            given = options.parser.parse_args(words[1:])
            name = given.module_name.removeprefix(COLLECTION)
            assert examples.module_objections(name, parse_kv(given.module_args)) == []


def playbook_command_objections(words: list[str]) -> list[str]:
    cli = PlaybookCLI(["ansible-playbook", *words])
    cli.init_parser()
    given = cli.parser.parse_args(words)
    variables: dict[str, t.Any] = {}
    for text in given.extra_vars:
        if not text.startswith("@"):
            variables.update(parse_kv(text))
    found = examples.variable_objections(variables)
    for book in given.args:
        if book.startswith(COLLECTION):
            if not (CHECKOUT / f"playbooks/{book.removeprefix(COLLECTION)}.yml").exists():
                found.append(f"there is no playbook {book}")
        elif not book.endswith(".yml"):
            found.append(f"{book} is neither a playbook of ours nor a file")
    return found


# -- AWX ---------------------------------------------------------------------------------------------------------------

AWX = yaml.safe_load((CHECKOUT / "examples/fleet/awx.yml").read_text())["controller_templates"]
# Kinds of questions of AWX whose answers can be checked here, with the type of the answer.
ANSWERS = {"text": str, "integer": int, "multiplechoice": str}


def awx_objections(template: dict[str, t.Any]) -> list[str]:
    """What speaks against a job template: its playbook, its variables, and each answer that its survey accepts."""
    name = template["playbook"].removesuffix(".yml")
    found = [] if (CHECKOUT / f"playbooks/{name}.yml").exists() else [f"there is no playbook {name}"]
    found += given_objections(template.get("extra_vars") or {})
    for question in (template.get("survey_spec") or {}).get("spec") or ():
        possible = [*question.get("choices", ()), *(question[key] for key in ("default",) if key in question)]
        if question["type"] == "integer":
            possible += [question["min"], question["max"]]
        found += [
            f"{question['variable']}: {answer!r} is no answer to a question of type {question['type']}"
            for answer in possible
            if not isinstance(answer, ANSWERS[question["type"]])
        ]
        if question["type"] == "multiplechoice" and question["default"] not in question["choices"]:
            found.append(f"{question['variable']}: {question['default']} is not offered")
        for answer in possible:
            found += given_objections({question["variable"]: answer})
    return found


def given_objections(variables: dict[str, t.Any]) -> list[str]:
    """As for any variables; those of rollout.yml are also held against what the policy of a rollout may be."""
    policy = examples.documented("modules")["rollout_report"]["DOCUMENTATION"]["options"]["policy"]["suboptions"]
    told = {name.removeprefix("rollout_"): value for name, value in variables.items() if name.startswith("rollout_")}
    return [
        *examples.variable_objections(variables),
        *examples.objections(policy, {name: value for name, value in told.items() if name in policy}),
    ]


@pytest.mark.parametrize("template", AWX, ids=lambda template: template["name"])
def test_job_templates_of_awx(template: dict[str, t.Any]) -> None:
    assert awx_objections(template) == []


def test_answers_leave_alone_what_the_inventory_says_of_a_group() -> None:
    """An answer is an extra variable, which counts for all hosts, above all else."""
    inventory = yaml.safe_load((CHECKOUT / "examples/fleet/inventory.yml").read_text())
    of_groups = {name for _group, node in examples.groups_of(inventory) for name in node.get("vars") or {}}
    asked = {question["variable"] for template in AWX for question in template.get("survey_spec", {}).get("spec") or ()}
    assert asked
    assert asked & of_groups == set()


def test_a_mistake_would_be_found() -> None:
    """The tests' own tools refuse what is wrong."""
    assert examples.variable_objections({"devices_lst": []}) == ["no role or playbook has a variable devices_lst"]
    assert examples.variable_objections({"access_mode": "grup"}) != []
    assert examples.module_objections("vfio_bind", {"device": ["0000:01:00.0"]}) != []
    assert examples.module_objections("access_probe", {"mode": "group"}) != []
    # Of a documentation fragment.
    assert examples.module_objections("guest_verify", {"devices": ["0000:01:00.0"], "launcher": "none"}) != []
    assert examples.module_objections("host_plan", {"verify": {"launcher": "systemd"}}) == []
    assert examples.module_objections("host_plan", {"verify": {"launcher": "none"}}) != []
    assert role_objections({"role": "iommufd.host.verify", "verify_cpus": "many"}) != []
    assert playbook_command_objections(["-i", "hosts.yml", "iommufd.host.sight"]) != []
    assert playbook_command_objections(["-i", "hosts.yml", "iommufd.host.site", "-e", "kernel_rebot=true"]) != []
    question = {"variable": "rollout_require", "type": "multiplechoice", "choices": ["all"], "default": "all"}
    for wrong in (
        {"variable": "rollout_requires"},
        {"choices": ["all", "some"]},
        {"default": "possible"},
        {"choices": ["all", False]},
        {"variable": "rollout_max_failures"},
    ):
        assert awx_objections({"playbook": "rollout.yml", "survey_spec": {"spec": [{**question, **wrong}]}}) != []
    assert awx_objections({"playbook": "rollout.yml", "survey_spec": {"spec": [question]}}) == []
    assert awx_objections({"playbook": "roll_out.yml"}) != []
    assert awx_objections({"playbook": "audit.yml", "extra_vars": {"audit_fial": True}}) != []


def _values(node: t.Any, names: t.Container[str]) -> t.Iterator[tuple[str, t.Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in names:
            yield key, value
        else:
            yield from _values(value, names)


def _strings(node: t.Any) -> t.Iterator[str]:
    if isinstance(node, str):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _strings(value)
