# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every message with which the collection can stop or warn, read from its source.

A message is a template: what is filled in when it is given is "…" here. Where a message is put together from variables,
what these can be is looked up in the same function, at the top of the module, and in what functions of the module
return.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import pathlib
import re
import typing as t

import yaml

CHECKOUT = pathlib.Path(__file__).parents[2]
GAP = "…"

# Classes whose first argument ends a module, and calls that collect what speaks against one, or a warning.
_ERRORS = {
    "AnsibleActionFail",
    "AnsibleError",
    "AnsibleFilterError",
    "HostError",
    "Refusal",
    "Stuck",
    "UnknownPackages",
    "_Failed",
}
_COLLECTORS = re.compile(r"(^|\.)(refusals\.add|problems\.append|passing\.append|warnings\.append|module\.warn)$")
# Functions that return such messages, or lists of them.
_SPEAKERS = re.compile(r"(^|_)(problems?|warnings?|missing_rules)$")
_MOST = 64  # readings of one expression


@dataclasses.dataclass(frozen=True)
class Message:
    """A template and the place that it comes from."""

    text: str
    place: str

    @property
    def letters(self) -> int:
        """How much of it is known beforehand."""
        return len(re.sub(r"[^A-Za-z]", "", self.text))


class _Module:
    """The readings of expressions of one file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.tree = ast.parse(path.read_text())
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

    def read(self, node: ast.expr | None, scope: ast.AST, depth: int = 4) -> list[str]:
        """What a string expression can be."""
        if isinstance(node, ast.Constant):
            return [str(node.value)] if isinstance(node.value, str) else [GAP]
        if isinstance(node, ast.JoinedStr):
            parts = [self.read(one, scope, depth) for one in node.values]
            return self._row(parts)
        if isinstance(node, ast.FormattedValue):
            return self.read(node.value, scope, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._row([self.read(node.left, scope, depth), self.read(node.right, scope, depth)])
        if isinstance(node, ast.IfExp):
            return self.read(node.body, scope, depth) + self.read(node.orelse, scope, depth)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.read(value, scope, depth)]
        if isinstance(node, ast.Starred):  # of a function that returns several, the first
            called = node.value.func if isinstance(node.value, ast.Call) else None
            function = self.functions[called.id] if isinstance(called, ast.Name) else None
            returned = [one.value for one in ast.walk(function) if isinstance(one, ast.Return)] if function else []
            return [text for one in returned if isinstance(one, ast.Tuple) for text in self.read(one.elts[0], scope)]
        if depth and isinstance(node, ast.Name):
            return self._named(node.id, scope, depth - 1)
        if depth and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = self.functions.get(node.func.id)
            if function is not None:
                returned = (one.value for one in ast.walk(function) if isinstance(one, ast.Return))
                return [text for value in returned for text in self._returned(value, function, depth - 1)] or [GAP]
        return [GAP]

    def _returned(self, value: ast.expr | None, function: ast.FunctionDef, depth: int) -> list[str]:
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        return [text for part in parts for text in self.read(part, function, depth)]

    def _named(self, name: str, scope: ast.AST, depth: int) -> list[str]:
        found: list[str] = []
        for place in (scope, self.tree):
            nodes = ast.walk(place) if place is scope else iter(self.tree.body)
            for node in nodes:
                targets = node.targets if isinstance(node, ast.Assign) else ()
                value = node.value if isinstance(node, ast.Assign) else None
                for target in targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        found += self.read(value, scope, depth)
                    elif isinstance(target, ast.Tuple) and isinstance(value, (ast.Tuple, ast.Call)):
                        names = [one.id if isinstance(one, ast.Name) else "" for one in target.elts]
                        if name in names and isinstance(value, ast.Tuple):
                            found += self.read(value.elts[names.index(name)], scope, depth)
            if found:
                break
        return found or [GAP]

    def _row(self, parts: list[list[str]]) -> list[str]:
        rows = itertools.islice(itertools.product(*parts), _MOST)
        return ["".join(row) for row in rows]


def _scopes(tree: ast.Module) -> t.Iterator[tuple[ast.AST, ast.AST]]:
    """Each node with the innermost function around it."""

    def walk(node: ast.AST, scope: ast.AST) -> t.Iterator[tuple[ast.AST, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, (ast.FunctionDef, ast.Lambda)) else scope
            yield child, inner
            yield from walk(child, inner)

    yield from walk(tree, tree)


def _tidy(text: str) -> str:
    return re.sub(rf"{GAP}+", GAP, re.sub(r"\s+", " ", text)).strip()


def _said(node: ast.AST, scope: ast.AST) -> t.Iterator[ast.expr]:
    """The expressions at a place that become a message."""
    speaks = _SPEAKERS.search(getattr(scope, "name", "")) is not None
    if speaks and isinstance(node, ast.Return) and node.value is not None:
        yield node.value
    elif speaks and isinstance(node, (ast.List, ast.ListComp)):
        yield from node.elts if isinstance(node, ast.List) else [node.elt]
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    if node.args and (
        called.rpartition(".")[2] in _ERRORS or _COLLECTORS.search(called) or (speaks and called.endswith(".append"))
    ):
        yield node.args[0]
    for keyword in node.keywords:
        if keyword.arg == "warnings" and isinstance(keyword.value, (ast.List, ast.ListComp)):
            yield from keyword.value.elts if isinstance(keyword.value, ast.List) else [keyword.value.elt]
        elif keyword.arg == "msg":
            yield keyword.value


@functools.lru_cache
def of_plugins() -> tuple[Message, ...]:
    """The messages of all Python files."""
    found: dict[tuple[str, str], Message] = {}
    for path in sorted((CHECKOUT / "plugins").rglob("*.py")):
        module = _Module(path)
        for node, scope in _scopes(module.tree):
            place = f"{path.name}:{getattr(scope, 'name', '')}"
            for expression in _said(node, scope):
                for text in module.read(expression, scope):
                    one = Message(_tidy(text), place)
                    # A list that is returned, or nothing, is no message; its elements are read where they come in.
                    # Neither are the words of a command.
                    if not isinstance(node, (ast.Return, ast.List, ast.ListComp)) or (
                        one.letters > 9 and " " in one.text
                    ):
                        found[one.text, place] = one
    return tuple(found.values())


@functools.lru_cache
def of_links() -> tuple[Message, ...]:
    """What the probe says of a link that is broken."""
    module = _Module(CHECKOUT / "plugins/module_utils/_probe.py")
    found = []
    for node, scope in _scopes(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Link" and "BROKEN" in ast.unparse(node):
            texts = module.read(node.args[2], scope)
            found += [Message(_tidy(text), f"_probe.py:{getattr(scope, 'name', '')}") for text in texts]
    return tuple(found)


@functools.lru_cache
def of_evidence() -> tuple[str, ...]:
    """The ids of what guest_verify judges."""
    found: dict[str, None] = {}
    for path in sorted((CHECKOUT / "plugins/module_utils").glob("*.py")):
        if "\ndef judge(" not in path.read_text():
            continue
        module = _Module(path)
        for node, scope in _scopes(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "item":
                found.update(dict.fromkeys(module.read(node.args[0], scope)))
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and "item(" in ast.unparse(node):
                found.update(dict.fromkeys(text for one in node.iter.elts for text in module.read(one, scope)))
    return tuple(name for name in found if name != GAP)


@functools.lru_cache
def of_meanings() -> tuple[Message, ...]:
    """What QEMU's words mean: pairs of a pattern and a text, wherever they are."""
    found = []
    for path in sorted((CHECKOUT / "plugins/module_utils").glob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body if "\n_MEANINGS = " in text else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MEANINGS":
                assert isinstance(node.value, ast.Tuple)
                pairs = [one for one in node.value.elts if isinstance(one, ast.Tuple)]
                found += [Message(str(ast.literal_eval(pair.elts[-1])), f"{path.name}:_MEANINGS") for pair in pairs]
    return tuple(found)


@functools.lru_cache
def of_playbooks() -> tuple[Message, ...]:
    """What roles and playbooks say when they stop."""
    found = []
    for path in sorted([*CHECKOUT.glob("roles/*/tasks/*.yml"), *CHECKOUT.glob("playbooks/**/*.yml")]):
        for task in _tasks(yaml.safe_load(path.read_text())):
            stop = task.get("ansible.builtin.assert") or task.get("ansible.builtin.fail") or {}
            text = stop.get("fail_msg") or stop.get("msg")
            if text:
                place = str(path.relative_to(CHECKOUT))
                found.append(Message(_tidy(re.sub(r"\{\{.*?\}\}", GAP, text, flags=re.DOTALL)), place))
    return tuple(found)


def _tasks(node: t.Any) -> t.Iterator[dict[str, t.Any]]:
    for one in node if isinstance(node, list) else ():
        if isinstance(one, dict):
            yield one
            for key in ("tasks", "block", "rescue", "always"):
                yield from _tasks(one.get(key))
