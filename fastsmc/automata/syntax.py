"""Regular expressions as text: the parser, and the sets of characters that it finds.

A syntax tree is made of tuples: ("set", Chars), ("cat", [nodes]), ("alt", [nodes]), ("rep", node, least, most or None),
("start",) and ("end",).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple, NoReturn

MAX_DEPTH = 100
LAST = 0x10FFFF

_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_REFUSED_ESCAPES = {
    "b": "a word boundary",
    "B": "a word boundary",
    "G": "an anchor at the last match",
    "K": "a reset of the match",
    "k": "a back-reference",
    "g": "a back-reference",
    "R": "a class of line breaks",
    "X": "a class of grapheme clusters",
    "N": "a named character without a name in braces",
    "Q": "a quoted literal",
    "E": "a quoted literal",
}
_REFUSED_GROUPS = {
    "=": "look-ahead",
    "!": "look-ahead",
    "<=": "look-behind",
    "<!": "look-behind",
    ">": "an atomic group",
    "|": "a branch-reset group",
    "(": "a conditional group",
    "P=": "a back-reference",
    "P>": "a recursion of a group",
    "&": "a recursion of a group",
    "R": "a recursion of a group",
}


class Chars(NamedTuple):
    """Is a set of characters as it was written.

    Attributes:
        parts: ranges (first, last) of code points, and names of classes as `re` or `regex` write them.
        negated: bool, everything else.
        fold: bool, case does not matter (it does not for `parts`, before the negation).
        ascii: bool, classes hold ASCII only.
    """

    parts: tuple[tuple[int, int] | str, ...]
    negated: bool = False
    fold: bool = False
    ascii: bool = False


def parse(pattern: str) -> tuple:
    """Returns the syntax tree of a pattern.

    Raises:
        ValueError: it is no regular expression, or has what is not supported; says where and names what.
    """
    return _Parser(pattern).parse()


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.text, self.at = pattern, 0
        self.fold = self.dotall = self.ascii = False
        self.names: set[str] = set()

    # Messages hold no piece of the pattern, so that what follows the pattern in an error is about it and not of it.
    def refuse(self, what: str, at: int | None = None) -> NoReturn:
        raise ValueError(f"at character {self.at if at is None else at}: {what}")

    def unsupported(self, what: str, at: int) -> NoReturn:
        self.refuse(f"{what} is not supported", at)

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if found := self.peek(text):
            self.at += len(text)
        return found

    def match(self, expression: str) -> re.Match | None:
        found = re.compile(expression).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def parse(self) -> tuple:
        for i, c in enumerate(self.text):
            if "\ud800" <= c <= "\udfff":
                self.refuse("a surrogate is no character", i)
        tree = self.alternatives(0)
        if self.at < len(self.text):
            self.refuse("a closing parenthesis without a group")
        return tree

    def alternatives(self, depth: int) -> tuple:
        """Reads up to the end of the pattern or the parenthesis that closes the group."""
        if depth > MAX_DEPTH:
            self.refuse(f"groups are nested more than {MAX_DEPTH} deep")
        flags = self.fold, self.dotall, self.ascii
        branches = [self.sequence(depth)]
        while self.take("|"):
            branches.append(self.sequence(depth))
        self.fold, self.dotall, self.ascii = flags
        return branches[0] if len(branches) == 1 else ("alt", branches)

    def sequence(self, depth: int) -> tuple:
        nodes = []
        while self.at < len(self.text) and not self.peek("|") and not self.peek(")"):
            start = self.at
            node = self.atom(depth)
            if node is not None:
                nodes.append(self.repeated(node, start))
        return ("cat", nodes)

    def repeated(self, node: tuple, start: int) -> tuple:
        at = self.at
        least, most = self.repetition() or (None, None)
        if least is None:
            return node
        if node[0] in ("start", "end"):
            self.refuse("repetition of an anchor", at)
        if most is not None and most < least:
            self.refuse(f"repetition of at least {least} and at most {most}", at)
        if self.peek("+"):
            self.unsupported("a possessive repetition", at)
        self.take("?")  # lazy: the same language
        after = self.at
        if self.repetition() is not None:
            self.refuse("repetition of a repetition; put the inner one into a group", after)
        return ("rep", node, least, most)

    def repetition(self) -> tuple[int, int | None] | None:
        """Reads a repetition, (least, most or None), if one is here. A brace that starts none stands for itself, as in
        Python's `re`."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        found = self.match(r"\{([0-9]*)(,?)([0-9]*)\}")
        if found is None or found[0] == "{}":
            self.at -= 2 if found else 0
            return None
        if any(len(digits) > 9 for digits in found.groups()):
            self.refuse("repetition of more than 999999999 times", found.start())
        least = int(found[1] or 0)
        return least, (int(found[3]) if found[3] else None) if found[2] else least

    def atom(self, depth: int) -> tuple | None:
        """Reads the next node; None for what only sets flags, or is a comment."""
        start, c = self.at, self.text[self.at]
        self.at += 1
        if c == "(":
            return self.group(depth, start)
        if c == "[":
            return ("set", self.bracket(start))
        if c == ".":
            parts = ((0, LAST),) if self.dotall else ((0, 9), (11, LAST))
            return ("set", Chars(parts))
        if c == "^":
            return ("start",)
        if c == "$":
            return ("end",)
        if c in "*+?":
            self.refuse("a repetition of nothing, where there is nothing to repeat", start)
        if c == "{":
            self.at = start
            if self.repetition() is not None:
                self.refuse("a repetition of nothing, where there is nothing to repeat", start)
            self.at = start + 1
        if c == "\\":
            if self.take("A"):
                return ("start",)
            if self.take("z") or self.take("Z"):
                return ("end",)
            return ("set", Chars((self.escape(start),), False, self.fold, self.ascii))
        return ("set", Chars(((ord(c), ord(c)),), False, self.fold, self.ascii))

    def group(self, depth: int, start: int) -> tuple | None:
        if self.peek("*"):
            self.unsupported("a control verb", start)
        flags = self.fold, self.dotall, self.ascii
        if self.take("?"):
            for sign in sorted(_REFUSED_GROUPS, key=len, reverse=True):
                if self.peek(sign):
                    self.unsupported(_REFUSED_GROUPS[sign], start)
            if self.take("#"):
                end = self.text.find(")", self.at)
                if end < 0:
                    self.refuse("a comment is opened and never closed, as a group is", start)
                self.at = end + 1
                return None
            if self.take("P<") or self.take("<"):
                name = self.match(r"([^\W\d]\w*)>")
                if name is None:
                    self.refuse("a group's name is missing or is no identifier", start)
                if name[1] in self.names:
                    self.refuse("a group's name is given twice", start)
                self.names.add(name[1])
            elif not self.take(":"):
                if self.match(r"[0-9+-]+\)"):
                    self.unsupported("a recursion of a group", start)
                if self.flags(start):
                    return None  # up to the end of the group that holds them
        tree = self.alternatives(depth + 1)
        self.fold, self.dotall, self.ascii = flags
        if not self.take(")"):
            self.refuse("a group is opened and never closed", start)
        return tree

    def flags(self, start: int) -> bool:
        """Reads and sets flags; True if they stand alone, False if a group follows."""
        found = self.match(r"([a-zA-Z]*)(?:-([a-zA-Z]*))?([:)])")
        if found is None or not (found[1] or found[2]):
            self.refuse("a group of an unknown kind", start)
        for letters, on in ((found[1], True), (found[2] or "", False)):
            for letter in letters:
                if letter == "i":
                    self.fold = on
                elif letter == "s":
                    self.dotall = on
                elif letter == "a" and on:
                    self.ascii = True
                elif letter == "u" and on:
                    self.ascii = False
                else:
                    self.unsupported(f"flag {letter}{'' if on else ', switched off,'} of a group", start)
        return found[3] == ")"

    def escape(self, start: int) -> tuple[int, int] | str:
        """Reads what follows a backslash: a character, as a range, or the name of a class."""
        if self.at == len(self.text):
            self.refuse("an escape at the end of the pattern", start)
        c = self.text[self.at]
        self.at += 1
        if c in "dDwWsS":
            return "\\" + c
        if c in "pP":
            return self.property(c, start)
        if c in _SIMPLE:
            return (ord(_SIMPLE[c]),) * 2
        if c in "xuU":
            count = {"x": 2, "u": 4, "U": 8}[c]
            digits = self.match(r"\{([0-9a-fA-F]{1,8})\}") or self.match(f"([0-9a-fA-F]{{{count}}})")
            code = int(digits[1], 16) if digits else -1
            if not 0 <= code <= LAST or 0xD800 <= code <= 0xDFFF:
                self.refuse("a hexadecimal escape that is no character", start)
            return (code, code)
        if c == "N" and (name := self.match(r"\{([^}]*)\}")):
            try:
                return (ord(unicodedata.lookup(name[1])),) * 2
            except (KeyError, TypeError):
                self.refuse("a named character that Unicode does not have", start)
        if c == "0":
            self.unsupported("an octal escape", start)
        if c.isdigit() and c.isascii():
            self.unsupported("a back-reference", start)
        if c in _REFUSED_ESCAPES:
            self.unsupported(_REFUSED_ESCAPES[c], start)
        if c.isascii() and c.isalpha():
            self.refuse("an unknown escape of a letter", start)
        return (ord(c), ord(c))

    def property(self, c: str, start: int) -> str:
        name = self.match(r"\{(\^?[\w =:&.-]+)\}") or self.match(r"([A-Z])")
        if name is None:
            self.refuse("a Unicode property without a name", start)
        try:
            import regex  # comes with transformers and vLLM
        except ImportError:
            self.unsupported("a Unicode property without the package regex", start)
        try:
            regex.compile(f"\\{c}{{{name[1]}}}")
        except regex.error:
            self.refuse("an unknown Unicode property", start)
        return f"\\{c}{{{name[1]}}}"

    def bracket(self, start: int) -> Chars:
        """Reads a set in brackets, after the opening bracket."""
        negated = self.take("^")
        parts: list[tuple[int, int] | str] = []
        while True:
            if self.at >= len(self.text):
                self.refuse("a character class, or set in brackets, is opened and never closed", start)
            if parts and self.take("]"):
                return Chars(tuple(parts), negated, self.fold, self.ascii)
            at = self.at
            low = self.bracket_item(at)
            if self.peek("-") and not self.peek("-]") and self.at + 1 < len(self.text):
                self.at += 1
                if self.peek("-"):
                    self.unsupported("a difference of sets (escape a hyphen that stands for itself)", at)
                high = self.bracket_item(self.at)
                if isinstance(low, str) or isinstance(high, str):
                    self.refuse("a range in a set with a class at one end", at)
                if low[0] > high[0]:
                    self.refuse("a range in a set whose end is before its start", at)
                low = (low[0], high[0])
            parts.append(low)

    def bracket_item(self, at: int) -> tuple[int, int] | str:
        if self.at >= len(self.text):
            self.refuse("a character class, or set in brackets, is opened and never closed", at)
        for sign, what in (("[:", "a POSIX class"), ("[", "a set within a set"), ("&&", "an intersection of sets"),
                           ("~~", "a difference of sets"),
            ("--", "a difference of sets"), ("||", "a union of sets")):  # fmt: skip
            if self.peek(sign):
                self.unsupported(f"{what} (escape a character that stands for itself)", at)
        c = self.text[self.at]
        self.at += 1
        if c != "\\":
            return (ord(c), ord(c))
        if self.take("b"):
            return (8, 8)
        return self.escape(at)
