"""Parses the atoms of expressions: numbers, symbols, brackets, fractions, roots, functions, matrices."""

from __future__ import annotations

from fractions import Fraction

from megatron_s2d.verify.mathematics.nodes import Node, exact, numeral
from megatron_s2d.verify.mathematics.reader import END, Reader
from megatron_s2d.verify.mathematics.text import Token, UnreadableError
from megatron_s2d.verify.mathematics.words import NUMBER_WORDS, SYMBOL_COMMANDS

_CALLS = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ln", "log",
          "log10", "exp", "gcd", "lcm", "max", "min"}  # fmt: skip
_BASE_WORDS = {word: value for word, value in NUMBER_WORDS.items() if 2 <= value <= 16}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "smallmatrix", "array", "cases", "Vmatrix"}


class AtomParser(Reader):
    """Parses what has no operator outside of brackets; expressions inside are parsed by the classes derived from it."""

    def _items(self) -> list[Node]:
        raise NotImplementedError

    def _list(self) -> Node:
        raise NotImplementedError

    def _union(self) -> Node:
        raise NotImplementedError

    def _sum(self) -> Node:
        raise NotImplementedError

    def _power(self) -> Node:
        raise NotImplementedError

    def _exponent(self) -> Node:
        raise NotImplementedError

    def _starts_factor(self) -> bool:
        raise NotImplementedError

    def _atom(self) -> Node:
        token = self._next()
        if token.kind == "number":
            return self._mixed(numeral(token.text))
        if token.kind == "symbol":
            return self._symbol(token.text)
        if token.kind == "mark" and token.text in ("(", "[", "{", "\\{"):
            return self._bracket(token.text)
        if token.kind == "mark" and token.text == "|":
            self._bars += 1
            inside = self._sum()
            self._expect("|")
            self._bars -= 1
            return Node("absolute", (inside,))
        if token.kind == "command":
            return self._command(token.text)
        raise UnreadableError(f"{token.text or 'the end'} is no expression")

    def _mixed(self, number: Node) -> Node:
        """Read ``5\\frac{3}{4}`` or ``5 3/4`` as one number."""
        if number.args[1] is not None:
            return number
        whole, fraction = number.args[0], None
        if self._at("frac"):
            start = self._position
            self._next()
            parts = self._fraction_arguments()
            if all(part.kind == "number" and part.args[1] is None for part in parts):
                fraction = [part.args[0] for part in parts]
            else:
                self._position = start
        elif (
            self._peek().kind == "number"
            and self._peek().spaced
            and self._at("/", ahead=1)
            and self._peek(2).kind == "number"
        ):
            fraction = [Fraction(self._next().text), Fraction((self._next(), self._next())[1].text)]
        if fraction is None:
            return number
        numerator, denominator = fraction
        if denominator == 0 or not 0 < numerator < denominator:
            raise UnreadableError("a number before an improper fraction: a product or a sum")
        return exact(whole + numerator / denominator)

    def _symbol(self, name: str) -> Node:
        if self._at("_"):
            self._next()
            name += "_" + self._subscript()
        elif name in ("e", "i"):
            return Node("constant", (name,))
        return Node("symbol", (name,))

    def _subscript(self) -> str:
        if not self._accept("{"):
            return self._next().text
        parts, depth = [], 1
        while depth:
            token = self._next()
            if token is END:
                raise UnreadableError("subscript")
            depth += (token.text == "{") - (token.text == "}")
            parts.append(token.text)
        return "".join(parts[:-1])

    def _bracket(self, opening: str) -> Node:
        bars, self._bars = self._bars, 0
        if opening == "\\{":
            node = self._set()
        else:
            closing = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",)}[opening]
            items = self._items()
            end = self._next()
            if end.kind != "mark" or end.text not in closing:
                raise UnreadableError(f"no bracket that closes {opening}")
            if len(items) == 1 and end.text == closing[0]:
                node = items[0]
            elif opening == "{":
                node = Node("set", tuple(items))
            elif len(items) == 1:
                raise UnreadableError("brackets of two kinds")
            else:
                node = Node("bracket", (opening, end.text, tuple(items)))
        self._bars = bars
        return node

    def _set(self) -> Node:
        if self._accept("\\}"):
            return Node("empty")
        of_reals = 2 * (self._at("in", ahead=1) and self._at("mathbbR", ahead=2))
        if self._peek().kind == "symbol" and self._at("mid", "|", ":", ahead=1 + of_reals):
            self._position += 2 + of_reals
            condition = self._list()
            self._expect("\\}")
            return condition  # {x | x > 3} is read as x > 3
        items = self._items()
        self._expect("\\}")
        return Node("set", tuple(items))

    def _argument(self) -> Node:
        """Read the argument of a command: in braces, or one symbol, or a number of one digit."""
        if self._at("{"):
            return self._atom()
        token = self._peek()
        if token.kind == "number" and len(token.text) != 1:
            raise UnreadableError("an argument of several digits without braces")
        return numeral(self._next().text) if token.kind == "number" else self._atom()

    def _fraction_arguments(self) -> tuple[Node, Node]:
        token = self._peek()
        if token.kind == "number" and len(token.text) == 2 and token.text.isdigit():
            self._next()
            return exact(int(token.text[0])), exact(int(token.text[1]))
        return self._argument(), self._argument()

    def _command(self, name: str) -> Node:
        if name in _CALLS:
            return self._call(name)
        method = _COMMANDS.get(name)
        if method is not None:
            return method(self)
        if name in SYMBOL_COMMANDS:
            return self._symbol(name)
        if name.startswith("mathbb") and name != "mathbbP":
            return (
                Node("reals") if name == "mathbbR" and not self._at("^") else Node("domain", (name[6:] + self._sign(),))
            )
        raise UnreadableError(f"unknown command {name}")

    def _sign(self) -> str:
        """Read the ``^+`` of a set of numbers."""
        if not self._accept("^"):
            return ""
        return self._subscript() if self._at("{") else self._next().text

    def _frac(self) -> Node:
        numerator, denominator = self._fraction_arguments()
        return Node("product", (numerator, Node("inverse", (denominator,))))

    def _sqrt(self) -> Node:
        degree = exact(2)
        if self._at("[") and not self._at("(", ahead=1):
            self._next()
            degree = self._sum()
            self._expect("]")
        return Node("root", (self._argument(), degree))

    def _binom(self) -> Node:
        return Node("binomial", self._fraction_arguments())

    def _call(self, name: str) -> Node:
        base = power = None
        while self._at("_", "^"):
            if self._next().text == "_":
                base = self._argument() if self._at("{") else self._atom()
            else:
                power = self._exponent()
        if name == "log" and base is not None:
            name = "log_base"
        if self._at("(", "{", "[", "\\{"):
            self._next()
            items = self._items()
            self._next()
            if self._peek(-1).text not in (")", "}", "]", "\\}"):
                raise UnreadableError(f"argument of {name}")
        else:
            items = [self._function_operand()]
        inverse = Node("negative", (exact(1),))
        if power == inverse and name in ("sin", "cos", "tan"):
            name, power = "a" + name, None
        node = Node("call", (name, *items, *([base] if base is not None else [])))
        return node if power is None else Node("power", (node, power))

    def _function_operand(self) -> Node:
        factors = [self._power()]
        while self._starts_factor() and not (self._peek().kind == "command" and self._peek().text in _CALLS):
            if self._peek().kind == "number" or self._at("(", "["):
                break
            factors.append(self._power())
        return factors[0] if len(factors) == 1 else Node("product", tuple(factors))

    def _angle_bracket(self) -> Node:
        items = self._items()
        self._expect("rangle")
        return Node("bracket", ("(", ")", tuple(items)))

    def _rounded(self, kind: str, closing: str) -> Node:
        inside = self._sum()
        self._expect(closing)
        return Node(kind, (inside,))

    def _repeating(self) -> Node:
        whole, fixed, period = self._raw(), self._raw(), self._raw()
        scale = 10 ** len(fixed)
        value = Fraction(int(whole + fixed)) / scale + Fraction(int(period), scale * (10 ** len(period) - 1))
        return exact(value)

    def _raw(self) -> str:
        self._expect("{")
        text = ""
        while not self._accept("}"):
            if self._peek() is END:
                raise UnreadableError("braces")
            text += self._next().text
        return text

    def _based_number(self) -> Node:
        return based(self._raw(), self._raw())

    def _environment(self) -> Node:
        name = self._raw()
        if name not in _MATRICES:
            raise UnreadableError(f"environment {name}")
        if name == "array" and self._at("{"):
            self._raw()
        rows, row, cell = [], [], []
        while not self._at("end"):
            token = self._next()
            if token is END:
                raise UnreadableError("an environment without an end")
            if token.kind == "mark" and token.text in ("&", "\\\\"):
                row, cell = [*row, tuple(cell)], []
                if token.text == "\\\\":
                    rows, row = [*rows, tuple(row)], []
            else:
                cell.append(token)
        self._next()
        if self._raw() != name:
            raise UnreadableError("an environment with another end")
        if row or cell:
            rows.append((*row, tuple(cell)))
        if name == "cases":
            texts = sorted(" & ".join(" ".join(t.text for t in cell).rstrip(" ,.;") for cell in row) for row in rows)
            return Node("text", ("cases " + " ; ".join(texts),))
        return Node("matrix", tuple(tuple(self._cell(cell) for cell in row) for row in rows))

    def _cell(self, cell: tuple[Token, ...]) -> Node:
        parser = type(self)(list(cell))
        parser._depth = self._depth + 1
        node = parser._union()
        if parser._peek() is not END:
            raise UnreadableError("entry of a matrix")
        return node


def based(digits: str, base: str) -> Node:
    """Return the node of a numeral. Raises ``UnreadableError`` for digits that the base does not have."""
    number = _BASE_WORDS.get(base.lower()) or (int(base) if base.isdigit() and len(base) < 3 else 0)
    if not 2 <= number <= 36 or not all(c.isalnum() and c.isascii() and int(c, 36) < number for c in digits):
        raise UnreadableError("a numeral that its base does not have")
    return Node("based", (digits.upper().lstrip("0") or "0", number))


_COMMANDS = {
    "frac": AtomParser._frac,
    "sqrt": AtomParser._sqrt,
    "binom": AtomParser._binom,
    "pi": lambda parser: Node("constant", ("pi",)),
    "infty": lambda parser: Node("constant", ("infinity",)),
    "emptyset": lambda parser: Node("empty"),
    "imath": lambda parser: Node("constant", ("i",)),
    "lfloor": lambda parser: parser._rounded("floor", "rfloor"),
    "lceil": lambda parser: parser._rounded("ceiling", "rceil"),
    "langle": AtomParser._angle_bracket,
    "repeating": AtomParser._repeating,
    "based": AtomParser._based_number,
    "begin": AtomParser._environment,
}
ATOM_COMMANDS = set(_COMMANDS) | _CALLS | SYMBOL_COMMANDS
