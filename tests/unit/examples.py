# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The examples of all texts for people and of the documentation of modules and filters; and what they may say."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import pathlib
import re
import textwrap
import typing as t

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

CHECKOUT = pathlib.Path(__file__).parents[2]
COLLECTION = "iommufd.host."
TEXTS = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("roles/*/README.md")),
    *sorted(str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("docs/docsite/rst/*.rst")),
)
# Inventories, and tasks that they name as hooks.
FILES = tuple(
    str(path.relative_to(CHECKOUT)) for path in sorted(CHECKOUT.glob("examples/*/*.yml")) if path.name != "awx.yml"
)
# Variables of playbooks, which no role declares (comments at the top of each playbook tell of them), and of the hooks.
PLAY_VARIABLES = re.compile(
    r"drain_to|iommufd_hosts|lab_hosts|audit_(dir|fail|table_hosts|pipelining|root)|ansible_[a-z_]+"
    r"|rollout_(waves|require|on_failure|max_failures|put_back|dir|window|timezone|reconnect|drain|post|failed)"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A piece of a text in some language.

    Attributes:
        place: file and line, for people.
        language: "yaml", "console", …; empty where the text does not say.
        text: without the indentation that it has in the text.
    """

    place: str
    language: str
    text: str

    def __str__(self) -> str:
        return self.place


def of_text(path: str) -> list[Example]:
    """The examples of one text, Markdown or reStructuredText."""
    content = (CHECKOUT / path).read_text()
    if path.endswith(".md"):
        pattern = re.compile(
            r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
        )
    else:
        pattern = re.compile(
            r"^(?P<indent> *)\.\. code-block:: (?P<language>\S+)\n\n(?P<text>(?:(?P=indent)  +.*\n|\n)+)", re.MULTILINE
        )
    return [
        Example(
            f"{path}:{content[: match.start()].count(chr(10)) + 1}", match["language"], textwrap.dedent(match["text"])
        )
        for match in pattern.finditer(content)
    ]


@functools.lru_cache
def of_texts() -> tuple[Example, ...]:
    return tuple(example for path in TEXTS if (CHECKOUT / path).exists() for example in of_text(path))


@functools.lru_cache
def documented(kind: str) -> dict[str, dict[str, t.Any]]:
    """DOCUMENTATION and EXAMPLES of all modules or filters, by their short name."""
    found = {}
    for path in sorted((CHECKOUT / "plugins" / kind).glob("[a-z]*.py")):
        texts = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in ("DOCUMENTATION", "EXAMPLES") and isinstance(node.value, ast.Constant):
                    texts[name] = yaml.safe_load(str(node.value.value))
        options = texts["DOCUMENTATION"].setdefault("options", {})
        for fragment in texts["DOCUMENTATION"].get("extends_documentation_fragment", ()):
            for name, option in fragment_options(fragment).items():
                options[name] = {**option, **options.get(name, {})}
        found[path.stem] = texts
    return found


def fragment_options(name: str) -> dict[str, t.Any]:
    """The options of a documentation fragment of ours ("iommufd.host._guest.verify")."""
    file, _dot, part = name.removeprefix(COLLECTION).partition(".")
    module = importlib.import_module(f"ansible_collections.iommufd.host.plugins.doc_fragments.{file}")
    text = getattr(module.ModuleDocFragment, part.upper() or "DOCUMENTATION")
    options: dict[str, t.Any] = yaml.safe_load(text)["options"]
    return options


def of_files() -> list[Example]:
    return [Example(path, "yaml", (CHECKOUT / path).read_text()) for path in FILES]


def of_modules() -> list[Example]:
    found = []
    for kind in ("modules", "filter"):
        for name, texts in documented(kind).items():
            if texts.get("EXAMPLES"):
                found.append(Example(f"{kind}/{name}", "yaml", yaml.safe_dump(texts["EXAMPLES"], sort_keys=False)))
    return found


@functools.lru_cache
def role_options() -> dict[str, dict[str, t.Any]]:
    """The options of each role, by its name."""
    found = {}
    for path in sorted(CHECKOUT.glob("roles/*/meta/argument_specs.yml")):
        found[path.parts[-3]] = yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"]
    return found


def of_role(variable: str) -> dict[str, t.Any] | None:
    """The option that declares a variable, of whatever role it is."""
    return next((options[variable] for options in role_options().values() if variable in options), None)


# -- what is accepted --------------------------------------------------------------------------------------------------


def templated(value: t.Any) -> bool:
    """Whether a value is only known when a play runs."""
    if isinstance(value, str):
        return "{{" in value
    if isinstance(value, dict):
        return any(map(templated, value.values()))
    return isinstance(value, list) and any(map(templated, value))


def objections(options: t.Mapping[str, t.Any], given: t.Mapping[str, t.Any]) -> list[str]:
    """What speaks against arguments, by documented options; what is templated is only looked at for its name."""
    known = {key for name, option in options.items() for key in (name, *(option.get("aliases") or ()))}
    unknown = [f"unknown: {key}" for key in given if key not in known]
    fixed = {key: value for key, value in given.items() if key in known and not templated(value)}
    late = {key for key in given if key in known and key not in fixed}
    spec = {name: _spec(option) for name, option in options.items() if name not in late}
    return unknown + list(ArgumentSpecValidator(spec).validate(fixed).error_messages)


def _spec(option: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    spec = {key: option[key] for key in ("type", "elements", "choices", "required", "aliases") if key in option}
    nested = option.get("options") or option.get("suboptions")
    # Elements that may be a string or a dictionary are for the module to look into.
    if nested and (option.get("type") == "dict" or option.get("elements") == "dict"):
        spec["options"] = {name: _spec(one) for name, one in nested.items()}
    return spec


def module_objections(name: str, arguments: t.Any) -> list[str]:
    module = documented("modules").get(name)
    if module is None:
        return [f"there is no module {name}"]
    return objections(module["DOCUMENTATION"].get("options") or {}, arguments or {})


def variable_objections(variables: t.Mapping[str, t.Any]) -> list[str]:
    """What speaks against variables of hosts, groups, plays and roles; all must be of a role or a playbook."""
    found = []
    for name, value in variables.items():
        option = of_role(name)
        if option is not None:
            found += [f"{name}: {text}" for text in objections({name: {**option, "required": False}}, {name: value})]
        elif not PLAY_VARIABLES.fullmatch(name):
            found.append(f"no role or playbook has a variable {name}")
    return found


# -- what an example is ------------------------------------------------------------------------------------------------


def is_playbook(content: t.Any) -> bool:
    return isinstance(content, list) and all(
        "hosts" in one or "ansible.builtin.import_playbook" in one for one in content
    )


def is_tasks(content: t.Any) -> bool:
    return isinstance(content, list) and not is_playbook(content) and all("name" in one for one in content)


def is_inventory(content: t.Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(group, dict) and set(group) <= {"hosts", "children", "vars"} for group in content.values())
    )


def is_molecule(content: t.Any) -> bool:
    return isinstance(content, dict) and {"scenario", "ansible"} >= set(content) > set()


def tasks_of(node: t.Any) -> t.Iterator[dict[str, t.Any]]:
    """All tasks of a list of plays or tasks, blocks included."""
    for one in node if isinstance(node, list) else ():
        if "hosts" not in one:
            yield one
        for key in ("pre_tasks", "tasks", "post_tasks", "block", "rescue", "always", "handlers"):
            yield from tasks_of(one.get(key))


def groups_of(inventory: t.Mapping[str, t.Any]) -> t.Iterator[tuple[str, dict[str, t.Any]]]:
    for name, group in inventory.items():
        yield name, group or {}
        yield from groups_of((group or {}).get("children") or {})
