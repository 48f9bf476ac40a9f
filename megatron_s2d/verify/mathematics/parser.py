"""Tokens of a mathematical answer to a tree; only a tree that covers the whole text is returned.

A recursive-descent parser in the order of its methods: clauses, lists, relations, sets, ratios; then ``expressions.py``
(quantities, sums, products, powers) and ``atoms.py``. Nothing is evaluated, so a text of n characters takes time
proportional to n. The kinds of nodes are in ``nodes.py``.
"""

from __future__ import annotations

import functools

from megatron_s2d.verify.mathematics.expressions import ExpressionParser
from megatron_s2d.verify.mathematics.nodes import Node
from megatron_s2d.verify.mathematics.reader import END
from megatron_s2d.verify.mathematics.text import UnreadableError, tokens
from megatron_s2d.verify.mathematics.words import (
    ALL_REALS_PHRASES,
    ANSWER_WORDS,
    CLAUSES,
    EMPTY_PHRASES,
    FILLERS,
    SEPARATORS,
    SYMBOL_COMMANDS,
    UNDEFINED_PHRASES,
)

_RELATIONS = {"=", "<", ">", "<=", ">=", "!="}
_RELATION_COMMANDS = {
    "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "in": "in", "notin": "notin", "equiv": "equiv", "to": "to",
    "mapsto": "mapsto", "implies": "implies", "iff": "iff", "cong": "cong", "sim": "sim", "subset": "subset",
    "subseteq": "subseteq", "parallel": "parallel", "perp": "perp", "propto": "propto",
}  # fmt: skip
_NAME_COMMANDS = {
    "angle",
    "overline",
    "triangle",
    "overrightarrow",
    "widehat",
    "widetilde",
    "mathbbP",
    *SYMBOL_COMMANDS,
}


@functools.lru_cache(maxsize=64)  # asked whether it is quick, then compared
def parse(text: str) -> Node:
    """Return the tree of an answer. Raises ``UnreadableError`` unless the grammar covers all of ``text``."""
    given = tokens(text)
    if not given:
        raise UnreadableError("empty")
    try:
        return _Parser(given).answer()
    except RecursionError:
        raise UnreadableError("too deep") from None


def plain_text(text: str) -> str:
    """Return the tokens of ``text`` in one spelling, for comparing answers that are no expressions.

    Raises ``UnreadableError`` for braces without a partner.
    """
    parts: list[str] = []
    for token in tokens(text):
        parts.append(token.text.lower() if token.kind == "word" else token.text)
        if parts[-1] == "}" and len(parts) > 2 and parts[-3] == "{":
            parts[-3:] = [parts[-2]]
    return " ".join(parts)


class _Parser(ExpressionParser):
    # ------------------------------------------------------------------------------------------------------- clauses
    def answer(self) -> Node:
        self._skip_introduction()
        option = self._option()
        if option is not None:
            return option
        node = self._list()
        if node.kind == "list" and len(node.args) > 1:
            last = node.args[-1]
            if last.kind == "relation" and last.args[1] == "in" and all(x.kind != "relation" for x in node.args[:-1]):
                items = node.args[:-1]
                body = items[0] if len(items) == 1 else Node("list", items)
                node = Node("clause", (body, f"for {_first(last.args[0])} in {_first(last.args[2])}"))
        if self._peek() is END:
            return node
        if self._at("(", ",") and self._at_word(*CLAUSES, ahead=1):
            self._next()
        if self._at_word(*CLAUSES):
            return Node("clause", (node, self._rest().rstrip(" )")))
        raise UnreadableError(f"text after the answer: {self._peek().text}")

    def _skip_introduction(self) -> None:
        """Pass ``the answer is``, ``approximately`` and their like; a sign of approximation changes nothing either."""
        start = self._position
        while self._at_word("the", "final", "correct", "is", *ANSWER_WORDS):
            self._next()
        introduced = any(token.text in ANSWER_WORDS for token in self._tokens[start : self._position])
        if introduced:
            self._accept(":", "=")
        else:
            self._position = start
        while self._at_word(*FILLERS) and self._peek(1) is not END and self._words_end_here():
            self._next()
        self._accept("approx", "=", ":")

    def _words_end_here(self) -> bool:
        """Return whether an expression follows the filling words, and not a longer text."""
        ahead = 0
        while self._at_word(*FILLERS, ahead=ahead):
            ahead += 1
        return self._peek(ahead).kind != "word"

    def _option(self) -> Node | None:
        """Read the letter of a multiple choice: ``B``, ``(B)``, ``B. 12``, ``(B) 12``."""
        start, bracket = self._position, self._accept("(")
        letter = self._next()
        is_letter = letter.kind in ("symbol", "word") and letter.text in tuple("ABCDEFGHIJ")
        if is_letter and (not bracket or self._accept(")")):
            if self._peek() is END:
                return Node("option", (letter.text, None))
            if self._at(",", ";") or self._at_word(*SEPARATORS):
                self._position = start
                return None
            closed = bracket or (self._at(".", ")") or (self._at(":") and self._peek(1).spaced))
            if closed and not (bracket and self._at("=", ":", "^", "+", "-", "in")):
                if not bracket or self._at(".", ":"):
                    self._next()
                if self._peek() is not END:
                    try:
                        return Node("option", (letter.text, self.answer()))
                    except UnreadableError:
                        if bracket:
                            raise
                        return Node("option", (letter.text, Node("text", (self._rest(),))))
                return Node("option", (letter.text, None))
        self._position = start
        return None

    # --------------------------------------------------------------------------------------------------------- lists
    def _list(self) -> Node:
        start = self._position
        items = self._items()
        if len(items) == 1:
            return items[0]
        kind = "list"
        if all(item.kind == "relation" and item.args[1] != "=" for item in items):
            joined = {token.text for token in self._tokens[start : self._position] if token.kind == "word"}
            kind = "union" if "or" in joined else "intersection" if "and" in joined else "list"
        return Node(kind, tuple(items))

    def _items(self) -> list[Node]:
        self._descend()
        items = [self._item()]
        while True:
            start, found = self._position, False
            while self._accept(",", ";") or self._at_word(*SEPARATORS):
                found, comma = True, not self._at_word(*SEPARATORS)
                self._position += not comma
            if not found:
                break
            if self._at_word(*CLAUSES):
                self._position = start
                break
            items.append(self._item())
        self._depth -= 1
        return items

    def _item(self) -> Node:
        if self._at("ldots", "...", "....", "....."):
            self._next()
            return Node("ellipsis")
        name = self._name()
        if name is not None:
            return self._assignment(name)
        if self._peek().kind == "word" or (self._peek().text in ("a", "A") and self._peek(1).kind == "word"):
            return self._words()
        first = self._union()
        parts = [first]
        while (operator := self._relation()) is not None:
            parts += [operator, self._union()]
        if len(parts) == 1:
            return self._congruence(None, first) if self._at_modulus() else first
        if parts[1] == "equiv":
            if len(parts) != 3 or not self._at_modulus():
                raise UnreadableError("a congruence without a modulus")
            return self._congruence(first, parts[2])
        if len(parts) == 3 and parts[1] == "=" and parts[2].kind == "symbol" and first.kind != "symbol":
            return Node("assign", (parts[2].args[0], first))  # 5 = x
        return Node("relation", tuple(parts))

    def _relation(self) -> str | None:
        token = self._peek()
        name = _RELATION_COMMANDS.get(token.text) if token.kind == "command" else None
        if name is None and token.kind == "mark" and token.text in _RELATIONS:
            name = token.text
            if token.text in "<>" and self._at("=", ahead=1):
                self._next()
                name += "="
        if name is None or (name == "in" and token.kind != "command"):
            return None
        self._next()
        return name

    def _congruence(self, left: Node | None, residue: Node) -> Node:
        bracket = self._accept("(")
        self._next()
        modulus = self._argument() if not bracket and self._at("{") else self._product()
        if bracket:
            self._expect(")")
        return Node("congruence", (left, residue, modulus))

    def _name(self) -> str | None:
        """Read the name before an equals sign: ``x``, ``a_n``, ``f(x)``, ``AB``, ``\\angle A``, ``Area``, ``(x,y)``."""
        start, parts, depth = self._position, [], 0
        while not (depth == 0 and self._at("=", "approx")):
            token = self._next()
            mark = token.kind == "mark" and token.text in ("(", ")", "_", "{", "}", "'", ",", "|")
            depth += (token.text in ("(", "{")) - (token.text in (")", "}")) if mark else 0
            number = token.kind == "number" and bool(parts) and (parts[-1] == "_" or depth > 0)
            joins = token.kind == "word" and token.text.lower() in CLAUSES | SEPARATORS
            letter = (token.kind in ("symbol", "word") and not joins) or (
                token.kind == "command" and token.text in _NAME_COMMANDS
            )
            if not (letter or number or mark) or depth < 0 or (token.text == "," and depth == 0) or len(parts) > 12:
                self._position = start
                return None
            parts.append(token.text)
        name = "".join(part for part in parts if part not in "{}")
        letters = [part for part in parts if part.isalpha()]
        product = len(letters) > 1 and all(len(part) == 1 and part.islower() for part in parts) and "_" not in parts
        if "|" in parts and not all(part.isupper() for part in letters):
            product = True  # |x| = 5 is an equation, |AB| = 5 and P(A|B) = 1/2 are names
        if not letters or product or (parts[0] == "(" and "," not in parts):
            self._position = start
            return None
        self._next()
        return name

    def _assignment(self, name: str) -> Node:
        inner = self._name()
        if inner is not None:
            return Node("assign", (name, self._assignment(inner)))
        parts = [self._words() if self._peek().kind == "word" else self._union()]
        while (operator := self._relation()) is not None:
            if operator not in ("=", "~"):
                raise UnreadableError(f"{operator} after an equals sign")
            parts += [operator, self._union()]
        return Node("assign", (name, parts[0] if len(parts) == 1 else Node("relation", tuple(parts))))

    def _words(self) -> Node:
        """Read an answer in words, with hyphens and single letters between them."""
        words = []
        while self._peek().kind in ("word", "symbol") or (words and self._at("-", "'")):
            if words and self._at_word(*SEPARATORS, *(CLAUSES if words else ())):
                break
            words.append(self._next().text)
        text = "".join(words).lower()
        if text in EMPTY_PHRASES:
            return Node("empty")
        if text in UNDEFINED_PHRASES:
            return Node("undefined")
        if text in ALL_REALS_PHRASES:
            return Node("reals")
        if text in ("infinity", "positiveinfinity"):
            return Node("constant", ("infinity",))
        if text == "negativeinfinity":
            return Node("negative", (Node("constant", ("infinity",)),))
        if not words or words[0].lower() in CLAUSES | SEPARATORS:
            raise UnreadableError("words")
        return Node("text", (" ".join(word.lower() for word in words),))

    # ------------------------------------------------------------------------------------------------ sets and ratios
    def _union(self) -> Node:
        node = self._ratio()
        while self._at("cup", "cap", "setminus"):
            kind = {"cup": "union", "cap": "intersection", "setminus": "difference"}[self._next().text]
            node = Node(kind, (node, self._ratio()))
        return node

    def _ratio(self) -> Node:
        parts = [self._quantity()]
        while self._at(":") or self._at_word("to"):
            self._next()
            parts.append(self._sum())
        return self._unit(Node("ratio", tuple(parts))) if len(parts) > 1 else parts[0]


def _first(node: Node) -> str:
    return str(node.args[0]) if node.args else node.kind
