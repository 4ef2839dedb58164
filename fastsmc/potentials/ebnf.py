"""Grammars in the EBNF of llama.cpp, xgrammar and vLLM (GBNF), as context-free grammars in llguidance's Lark.

    root ::= "yes" | number ("," number)*       →       start: "y" "e" "s" | rule_1 ("," rule_1)*
    number ::= [0-9]+                                   rule_1: /[0-9]/+

Every terminal becomes a single character: llguidance, as Lark, lets a longer terminal take as much as it can, which
would be another language (`("a" | "ab") "b"` would lose "ab").
"""

from __future__ import annotations

import re

_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_TOKEN = re.compile(
    rf"""(?P<space>(?:\s|\#[^\n]*)+)
    | (?P<rule>{_NAME})\s*::= | (?P<name>{_NAME})
    | "(?P<text>(?:[^"\\\n]|\\.)*)"
    | \[(?P<set>\^?(?:[^\]\\\n]|\\.)*)\]
    | (?P<dot>\.)
    | (?P<sign>[()|*+?]|\{{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\}})""",
    re.VERBOSE,
)
_CHARACTER = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_PLAIN = r'"\\[]^-/.'  # what may be escaped, and then means itself


def to_lark(text: str) -> str:
    """Writes a grammar whose first rule is named `root` in llguidance's Lark.

    Raises:
        ValueError: what is no grammar, with its line; a rule that is missing, or there twice.
    """
    numbers: dict[str, int] = {}
    rules: list[tuple[str, list[str]]] = []
    used: dict[str, int] = {}
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"line {line}: {text[at : at + 20]!r} is no part of a rule")
        at, kind, what = found.end(), found.lastgroup, found[found.lastgroup or 0]
        if kind == "rule":
            if what in numbers:
                raise ValueError(f"line {line}: there are two rules {what!r}")
            numbers[what] = len(rules)
            rules.append((what, []))
        elif kind != "space":
            if not rules:
                raise ValueError(f"line {line}: {found[0]!r} stands before the first rule, NAME ::= …")
            if kind == "name":
                used.setdefault(what, line)
            rules[-1][1].append(_written(str(kind), what, line))
        line += found[0].count("\n")
    if "root" not in numbers:
        raise ValueError("has no rule 'root'")
    if missing := [name for name in used if name not in numbers]:
        raise ValueError(f"line {used[missing[0]]}: there is no rule {missing[0]!r}")

    def name_of(rule: str) -> str:
        return "start" if rule == "root" else f"rule_{numbers[rule]}"

    lines = []
    for rule, parts in rules:
        body = " ".join(name_of(part[1:]) if part.startswith("@") else part for part in parts)
        lines.append(f"{name_of(rule)}: {body or _EMPTY}")
    return "\n".join(lines) + "\n"


_EMPTY = '""'


def _written(kind: str, what: str, line: int) -> str:
    """Writes a part of a rule; "@NAME" stands for another rule."""
    if kind == "name":
        return "@" + what
    if kind == "text":
        return "(" + (" ".join(map(_terminal, _characters(what, line))) or _EMPTY) + ")"
    if kind == "set":
        return _set(what, line)
    return "/(?s:.)/" if kind == "dot" else re.sub(r"\s", "", what)


def _characters(text: str, line: int, plain: str = _PLAIN) -> list[str]:
    out = []
    for two, four, eight, escaped, itself in _CHARACTER.findall(text):
        if escaped and escaped not in _ESCAPES and escaped not in plain:
            raise ValueError(f"line {line}: there is no escape \\{escaped}")
        number = two or four or eight
        if number and (int(number, 16) > 0x10FFFF or 0xD800 <= int(number, 16) < 0xE000):
            raise ValueError(f"line {line}: \\{number} is no character")
        out.append(chr(int(number, 16)) if number else itself or _ESCAPES.get(escaped, escaped))
    return out


def _terminal(character: str) -> str:
    """Writes a set of a single character: a string would be a literal, with escapes of its own."""
    return f"/{_hex(character)}/"


def _hex(character: str) -> str:
    return f"\\x{{{ord(character):X}}}"


def _set(text: str, line: int) -> str:
    """Writes a set of characters and ranges, such as ^a-z0-9."""
    negated, text = text.startswith("^"), text.removeprefix("^")
    characters, raw = _characters(text, line), [found[0] for found in _CHARACTER.finditer(text)]
    out, at = [], 0
    while at < len(characters):
        if at + 2 < len(characters) and raw[at + 1] == "-":
            first, last = characters[at], characters[at + 2]
            if first > last:
                raise ValueError(f"line {line}: the range {first}-{last} ends before it begins")
            out.append(f"{_hex(first)}-{_hex(last)}")
            at += 3
        else:
            out.append(_hex(characters[at]))
            at += 1
    if not out:
        return "/(?s:.)/" if negated else "/[^\\s\\S]/"
    return f"/[{'^' * negated}{''.join(out)}]/"
