# Copyright (c) 2026, the iommufd.host authors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The list ``cgroup_device_acl`` in libvirt's ``qemu.conf``, edited so that everything else stays byte for byte.

libvirt replaces its built-in list by the one in the file, so our devices are merged with the list that libvirt would
use without us. What is ours is written down in the file itself, in one comment line (the *mark*) above the list:

- ``# iommufd.host: libvirt's default list and "/dev/iommu"``: no list was set; the whole setting below is ours.
- ``# iommufd.host: added "/dev/iommu" to cgroup_device_acl``: somebody's own list; only these entries are ours.
- the same with ``after the last comma of``: that list ended with a comma, which libvirt takes and its Augeas lens
  does not; our entries stand behind it, so that the lens takes the result.

:func:`strip` is the exact inverse of :func:`merge`.

The grammar is that of libvirt's ``src/util/virconf.c`` (9.0 to 12.8): statements end at a line end or a semicolon, a
line ends with LF, CR or both, strings have single, double or triple quotes, a list takes one comma too many at its
end and no comment inside, and of a setting defined twice the **first** counts.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ansible_collections.iommufd.host.plugins.module_utils._errors import HostError

SETTING = b"cgroup_device_acl"

_COMMON = ("/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/ptmx")

# libvirt's built-in lists (defaultDeviceACL in src/qemu/qemu_cgroup.c), for a qemu.conf without its commented default.
# A version between two rows gets the wider of its neighbours: libvirt skips a path that does not exist.
BUILT_IN: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((12, 8), (*_COMMON, "/dev/userfaultfd")),
    ((9, 1), (*_COMMON, "/dev/kvm", "/dev/userfaultfd")),
    ((0, 0), (*_COMMON, "/dev/kvm")),
)

_DEFAULT_MARK = "# iommufd.host: libvirt's default list and {devices}"
_ADDED_MARK = "# iommufd.host: added {devices} {where} cgroup_device_acl"
_AFTER_COMMA = "after the last comma of"
_MARK = re.compile(
    rb"# iommufd\.host: (?:(?P<default>libvirt's default list and)|added) "
    rb'(?P<devices>"[^"]*"(?:, "[^"]*")*)(?: (?P<where>to|after the last comma of) cgroup_device_acl)?[ \t]*'
)

_BLANK = b" \t"
_EOL = b"\r\n"


class SyntaxProblem(Exception):
    """libvirt's parser would refuse the file here."""

    def __init__(self, data: bytes, position: int, what: str) -> None:
        self.line = data.count(b"\n", 0, position) + 1
        super().__init__(f"line {self.line}: {what}")


@dataclasses.dataclass(frozen=True)
class Value:
    """A value in the file.

    Attributes:
        kind: ``string``, ``number`` or ``list``.
        start: offset of its first byte.
        end: offset after its last byte.
        text: a string's content, a number's digits.
        items: a list's elements.
        last_comma: offset of a comma after the last element, or None.
    """

    kind: str
    start: int
    end: int
    text: bytes = b""
    items: tuple[Value, ...] = ()
    last_comma: int | None = None


@dataclasses.dataclass(frozen=True)
class Statement:
    """A comment line (``name`` empty) or a setting.

    Attributes:
        start: offset of its first byte.
        end: offset after its last byte, a setting's own trailing comment included; the line end is not.
        name: the setting's name.
        value: the setting's value; None for a comment.
    """

    start: int
    end: int
    name: bytes = b""
    value: Value | None = None


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def parse(self) -> list[Statement]:
        statements: list[Statement] = []
        if not self.data.strip(_BLANK + _EOL):
            return statements  # libvirt refuses a file of nothing but blanks; what we add makes it one that it takes
        while self.at < len(self.data):
            self._skip(_BLANK + _EOL)
            statements.append(self._statement())
            self._skip(_BLANK)
            if self.at >= len(self.data):
                break
            if self._here() == b";":
                self.at += 1
            elif self._here() not in (b"\r", b"\n"):
                raise SyntaxProblem(self.data, self.at, "expecting a separator")
            self._skip(_BLANK + _EOL)
        return statements

    def _here(self) -> bytes:
        return self.data[self.at : self.at + 1]

    def _skip(self, what: bytes) -> None:
        while self.at < len(self.data) and self.data[self.at] in what:
            self.at += 1

    def _to_line_end(self) -> None:
        while self.at < len(self.data) and self.data[self.at] not in _EOL:
            self.at += 1

    def _statement(self) -> Statement:
        start = self.at
        if self._here() == b"#":
            self._to_line_end()
            return Statement(start, self.at)
        name = re.compile(rb"[A-Za-z][A-Za-z0-9_]*").match(self.data, self.at)
        if name is None:
            raise SyntaxProblem(self.data, self.at, "expecting a name")
        self.at = name.end()
        self._skip(_BLANK)
        if self._here() != b"=":
            raise SyntaxProblem(self.data, self.at, "expecting an assignment")
        self.at += 1
        value = self.value()
        end = self.at
        self._skip(_BLANK)
        if self._here() == b"#":
            self._to_line_end()
            end = self.at
        return Statement(start, end, name.group(), value)

    def value(self) -> Value:
        self._skip(_BLANK)
        here = self._here()
        if here in (b'"', b"'"):
            return self._string()
        if here == b"[":
            return self._list()
        start = self.at
        number = re.compile(rb"[-+]?[0-9]+").match(self.data, self.at)
        if number is None:
            raise SyntaxProblem(self.data, self.at, "expecting a value")
        self.at = number.end()
        return Value("number", start, self.at, number.group())

    def _string(self) -> Value:
        start = self.at
        quote = self._here()
        # libvirt looks for triple quotes only where at least seven bytes are left.
        if self.data.startswith(b'"""', start) and start + 6 < len(self.data):
            quote = b'"""'
        begin = start + len(quote)
        end = self.data.find(quote, begin)
        if end < 0 or (len(quote) == 1 and re.search(rb"[\r\n]", self.data[begin:end])):
            raise SyntaxProblem(self.data, start, "unterminated string")
        self.at = end + len(quote)
        return Value("string", start, self.at, self.data[begin:end])

    def _list(self) -> Value:
        start = self.at
        self.at += 1
        items: list[Value] = []
        comma: int | None = None
        self._skip(_BLANK + _EOL)
        while self._here() != b"]":
            if self.at >= len(self.data):
                raise SyntaxProblem(self.data, start, "list is not closed with ]")
            if items:
                if self._here() != b",":
                    raise SyntaxProblem(self.data, self.at, "expecting a separator in list")
                comma = self.at
                self.at += 1
                self._skip(_BLANK + _EOL)
                if self._here() == b"]":
                    break
            items.append(self.value())
            comma = None
            self._skip(_BLANK + _EOL)
        self.at += 1
        return Value("list", start, self.at, items=tuple(items), last_comma=comma)


def parse(data: bytes) -> list[Statement]:
    """The statements of a libvirt configuration file, in order.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
    """
    return _Parser(data).parse()


def active_list(data: bytes) -> list[str] | None:
    """The list that is set, or None where libvirt uses its own.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
    """
    statement = _active(data, parse(data))
    if statement is None or statement.value is None:
        return None
    return [_text(item) for item in statement.value.items]


def settings(data: bytes) -> dict[str, str | list[str]]:
    """All settings by name, as text or as a list of texts; of one set twice the first.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
    """
    found: dict[str, str | list[str]] = {}
    for statement in parse(data):
        if statement.value is not None:
            value = statement.value
            text = [_text(item) for item in value.items] if value.kind == "list" else _text(value)
            found.setdefault(statement.name.decode("ascii", "replace"), text)
    return found


def definitions(data: bytes) -> int:
    """How often the list is set; libvirt uses the first."""
    return sum(statement.name == SETTING for statement in parse(data))


def commented_default(data: bytes) -> list[str] | None:
    """The default list as the file's own comment shows it, or None.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
    """
    found = _commented(data, parse(data))
    return None if found is None else found[0]


def built_in(version: str | None) -> list[str]:
    """libvirt's built-in list by version ("11.3.0"); the widest one where the version is not known."""
    numbers = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version or "")
    known = (int(numbers.group(1)), int(numbers.group(2))) if numbers else (11, 3)
    return list(next(devices for since, devices in BUILT_IN if known >= since))


def own_devices(data: bytes) -> list[str]:
    """The entries that are ours, by the file's marks.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
    """
    found: list[str] = []
    for statement in parse(data):
        mark = None if statement.name else _MARK.fullmatch(data, statement.start, statement.end)
        if mark:
            found.extend(name for name in _mark_devices(mark) if name not in found)
    return found


def merge(data: bytes, devices: t.Sequence[str], default: t.Sequence[str]) -> bytes:
    """The file with the devices in the list, and nothing else of ours in it.

    Args:
        data: the file, with or without entries of ours.
        devices: absolute paths.
        default: the list that the installed libvirt uses where none is set.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
        HostError: the setting is there, but is no list of strings (libvirt refuses that too).
    """
    bare = strip(data, default)
    statements = parse(bare)
    active = _active(bare, statements)
    wanted = list(dict.fromkeys(devices))
    if active is None or active.value is None:
        missing = [device for device in wanted if device not in default]
        return _add_list(bare, statements, missing, default) if missing else bare
    present = [_text(item) for item in active.value.items]
    missing = [device for device in wanted if device not in present]
    return _add_entries(bare, active, active.value, missing) if missing else bare


def strip(data: bytes, default: t.Sequence[str] = ()) -> bytes:
    """The file without what is ours; exactly the bytes that :func:`merge` was given, where nobody edited since.

    Args:
        data: the file.
        default: libvirt's default list: where our setting holds more than that, somebody else used it, and it stays.

    Raises:
        SyntaxProblem: libvirt would refuse the file.
        HostError: the setting is there, but is no list of strings.
    """
    while True:
        statements = parse(data)
        for index, statement in enumerate(statements):
            mark = None if statement.name else _MARK.fullmatch(data, statement.start, statement.end)
            if mark:
                data = _take_out(data, statements, index, mark, default)
                break
        else:
            return data


def check(before: bytes, after: bytes, expected: t.Sequence[str] | None) -> None:
    """Compare an edited file with the original as libvirt reads them, before it is put in place.

    Args:
        before: the file as it was.
        after: the file as it is to be.
        expected: the list that libvirt must find in it (None: none set).

    Raises:
        HostError: the edit would not do what it must, or would change another setting.
    """

    def others(data: bytes) -> list[tuple[bytes, bytes]]:
        return [
            (s.name, data[s.value.start : s.value.end])
            for s in parse(data)
            if s.value is not None and s.name != SETTING
        ]

    if active_list(after) != (None if expected is None else list(expected)) or others(before) != others(after):
        raise HostError(
            "qemu.conf could not be edited safely: the result would not read as intended. Nothing was done."
        )


# -- inside ------------------------------------------------------------------------------------------------------------


def _text(value: Value) -> str:
    return value.text.decode("utf-8", "surrogateescape")


def _active(data: bytes, statements: list[Statement]) -> Statement | None:
    for statement in statements:
        if statement.name == SETTING and statement.value is not None:
            value = statement.value
            if value.kind != "list" or any(item.kind != "string" for item in value.items):
                line = data.count(b"\n", 0, statement.start) + 1
                raise HostError(f"line {line}: cgroup_device_acl is not a list of strings; libvirt refuses that")
            return statement
    return None


def _commented(data: bytes, statements: list[Statement]) -> tuple[list[str], int] | None:
    """The commented default and the offset after its last line (line end not included)."""
    for index, statement in enumerate(statements):
        if statement.name or not re.match(rb"#[# \t]*cgroup_device_acl[ \t]*=", data[statement.start : statement.end]):
            continue
        text = b""
        for position, line in enumerate(statements[index : index + 64]):
            if line.name or (position and not _adjacent(data, statements[index + position - 1], line)):
                break
            text += data[line.start : line.end].lstrip(b"# \t") + b"\n"
            try:
                value = _Parser(text.partition(b"=")[2]).value()
            except SyntaxProblem:
                continue
            entries = [_text(item) for item in value.items if item.kind == "string"]
            # A commented list without /dev/null is somebody's example, not the default of any libvirt.
            if value.kind == "list" and "/dev/null" in entries:
                return entries, line.end
            break
    return None


def _adjacent(data: bytes, first: Statement, second: Statement) -> bool:
    return data[first.end : second.start] in (b"\n", b"\r\n", b"\r")


def _quoted(devices: t.Iterable[str]) -> str:
    return ", ".join(f'"{device}"' for device in devices)


def _mark_devices(mark: re.Match[bytes]) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in re.findall(rb'"([^"]*)"', mark.group("devices"))]


def _newline(data: bytes) -> bytes:
    # Comments may end with CR LF and the Augeas lens still reads the file; once anything else does, it cannot anyway.
    return b"\r\n" if re.search(rb"(?m)^(?!#)[^\n]*\r\n", data) else b"\n"


def _eol_at(data: bytes, position: int) -> int:
    """Length of the line end at a position; 0 where there is none."""
    if data.startswith(b"\r\n", position):
        return 2
    return 1 if data[position : position + 1] in (b"\r", b"\n") else 0


def _insert_lines(data: bytes, position: int, lines: list[str]) -> bytes:
    """Insert lines at the start of a line or at the end of the file; a missing final line end stays missing."""
    newline = _newline(data)
    text = newline.join(line.encode("utf-8", "surrogateescape") for line in lines)
    if position == len(data) and data and data[-1] not in _EOL:
        return data + newline + text
    return data[:position] + text + newline + data[position:]


def _cut_lines(data: bytes, start: int, end: int) -> bytes:
    """The inverse of :func:`_insert_lines`: whole lines from ``start`` to ``end`` (line end not included)."""
    after = _eol_at(data, end)
    if after:
        return data[:start] + data[end + after :]
    if data[:start].endswith(b"\r\n"):
        return data[: start - 2] + data[end:]
    return data[: max(start - 1, 0)] + data[end:]


def _add_list(data: bytes, statements: list[Statement], devices: list[str], default: t.Sequence[str]) -> bytes:
    position = len(data)
    commented = _commented(data, statements)
    if commented is not None:
        position = commented[1] + _eol_at(data, commented[1])
    rows = [default[at : at + 3] for at in range(0, len(default), 3)] + [[device] for device in devices]
    lines = [_DEFAULT_MARK.format(devices=_quoted(devices)), "cgroup_device_acl = ["]
    lines += ["    " + _quoted(row) + "," for row in rows[:-1]] + ["    " + _quoted(rows[-1]), "]"]
    return _insert_lines(data, position, lines)


def _add_entries(data: bytes, active: Statement, value: Value, devices: list[str]) -> bytes:
    where = "to"
    if not value.items:
        position, text = value.start + 1, b" " + _quoted(devices).encode()
    else:
        last = value.items[-1]
        line_start = max(data.rfind(b"\n", 0, last.start), data.rfind(b"\r", 0, last.start)) + 1
        separator = b" "
        indent = re.compile(rb"[ \t]*").match(data, line_start)
        if value.start < line_start and indent is not None and data[indent.end() : indent.end() + 1] in (b'"', b"'"):
            line_end = data[line_start - 2 : line_start] if data[line_start - 2 :].startswith(b"\r\n") else None
            separator = (line_end or data[line_start - 1 : line_start]) + indent.group()
        position, text = last.end, b"".join(b"," + separator + f'"{device}"'.encode() for device in devices)
        if value.last_comma is not None:
            where = _AFTER_COMMA
            position, text = value.last_comma + 1, text[1:]
    mark = _ADDED_MARK.format(devices=_quoted(devices), where=where)
    edited = data[:position] + text + data[position:]
    line_start = max(data.rfind(b"\n", 0, active.start), data.rfind(b"\r", 0, active.start)) + 1
    first_on_line = not data[line_start : active.start].strip(_BLANK)
    return _insert_lines(edited, line_start if first_on_line else len(edited), [mark])


def _take_out(
    data: bytes, statements: list[Statement], index: int, mark: re.Match[bytes], default: t.Sequence[str]
) -> bytes:
    """Remove one mark and what it says is ours. Each removal is behind the mark or moves it by nothing."""
    devices = _mark_devices(mark)
    comment = statements[index]
    following = statements[index + 1] if index + 1 < len(statements) else None
    if following is not None and following.name != SETTING:
        following = None
    if mark.group("default") and following is not None and following.value is not None:
        rest = {_text(item) for item in following.value.items} - set(devices)
        commented = _commented(data, statements)
        defaults = [set(default), *({*entries} for _since, entries in BUILT_IN)]
        if commented is not None:
            defaults.append(set(commented[0]))
        alone = following.end == following.value.end and (
            following.end == len(data) or _eol_at(data, following.end) > 0
        )
        if alone and rest in defaults:
            return _cut_lines(data, comment.start, following.end)
    data_without = _cut_lines(data, comment.start, comment.end)
    shift = len(data) - len(data_without)
    target = following if following is not None else _active(data, statements)
    if target is None or target.value is None:
        return data_without
    start = target.start - shift if target.start > comment.start else target.start
    for device in reversed(devices):
        data_without = _remove_entry(data_without, start, device, mark.group("where") == _AFTER_COMMA.encode())
    return data_without


def _remove_entry(data: bytes, start: int, device: str, after_comma: bool) -> bytes:
    """Remove the last entry with this text from the list of the setting that begins at ``start``."""
    target = next((s for s in parse(data) if s.start == start), None)
    if target is None or target.value is None:
        return data
    items = target.value.items
    found = [number for number, item in enumerate(items) if _text(item) == device]
    if not found:
        return data
    number = found[-1]
    item = items[number]
    begin, end = item.start, item.end
    if number > 0:
        begin = items[number - 1].end
        if after_comma and number == len(items) - 1 and b"," in data[begin : item.start]:
            # The comma before the first of our entries is the list's own. Of our further entries it is ours, but a
            # comma too many disappears when the entry before it is removed the same way.
            comma = data.index(b",", begin)
            begin = comma + 1
            if target.value.last_comma is not None:
                end = target.value.last_comma + 1
    elif len(items) > 1:
        end = items[1].start
    else:
        if data[target.value.start + 1 : item.start] == b" ":
            begin = target.value.start + 1
        if target.value.last_comma is not None:
            end = target.value.last_comma + 1
    return data[:begin] + data[end:]
