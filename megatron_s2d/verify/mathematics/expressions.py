"""Parses expressions: quantities with units, sums, products, powers."""

from __future__ import annotations

from megatron_s2d.verify.mathematics.atoms import ATOM_COMMANDS, AtomParser, based
from megatron_s2d.verify.mathematics.nodes import Node, numeral
from megatron_s2d.verify.mathematics.reader import END
from megatron_s2d.verify.mathematics.text import Token, UnreadableError
from megatron_s2d.verify.mathematics.words import BARE, LETTER_UNITS, ORDINALS, is_unit_word

_CURRENCIES = {"dollar": "dollar", "euro": "euro", "pound": "sterling", "yen": "yen", "rupee": "rupee"}


class ExpressionParser(AtomParser):
    """Parses an expression with its unit."""

    def _quantity(self) -> Node:
        currency = _CURRENCIES.get(self._peek().text) if self._peek().kind == "command" else None
        negative = self._at("-") and self._peek(1).kind == "command" and self._peek(1).text in _CURRENCIES
        if currency is None and not negative:
            return self._unit(self._sum())
        self._position += 1 + negative
        currency = _CURRENCIES[self._peek(-1).text]
        value = self._sum()
        self._unit(value)  # "\$5 per hour": the thing counted is not compared
        return Node("quantity", (Node("negative", (value,)) if negative else value, currency))

    def _unit(self, value: Node) -> Node:
        """Read the unit behind a value, if there is one."""
        if self._at_word(*ORDINALS):
            self._next()
            return value
        if self._at("^") and self._exponent_word() in ORDINALS:
            return value
        if self._at("dollar", "euro", "pound", "yen", "rupee"):
            return Node("quantity", (value, _CURRENCIES[self._next().text]))
        if value.kind == "number" and value.args[1] is None and (base := self._base()) is not None:
            return based(str(value.args[0]), base)
        words = []
        if self._at_letter_unit():
            unit = " ".join(token.text for token in self._letter_unit())
            self._position += len(self._letter_unit())
            return Node("quantity", (value, unit + BARE))
        while True:
            token = self._peek()
            after = bool(words) and (self._at("/", ".", "-", "cdot") or words[-1] in ("/", "per", "cdot"))
            if token.kind == "word":
                if not is_unit_word(token.text):
                    break
                words.append(self._next().text)
            elif after and (token.kind == "symbol" or token.text in ("/", ".", "-", "cdot")):
                words.append(self._next().text)
            elif words and self._at("^"):
                self._next()
                braces = self._accept("{")
                sign = "-" if self._accept("-") else ""
                exponent = self._next()
                if not exponent.text.isdecimal() or len(exponent.text) > 1:
                    raise UnreadableError("exponent of a unit")
                words += ["^", sign + exponent.text]
                if braces:
                    self._expect("}")
            else:
                break
        while words and words[-1] in ("/", ".", "-", "cdot"):
            words.pop()
        return Node("quantity", (value, " ".join(words))) if words else value

    def _base(self) -> str | None:
        """Read ``base 2``, ``in base 2``, ``(base 2)``."""
        start, bracket = self._position, self._accept("(")
        if self._at_word("in"):
            self._next()
        if self._at_word("base"):
            self._next()
            base = self._next().text
            if not bracket or self._accept(")"):
                return base
        self._position = start
        return None

    def _letter_unit(self) -> list[Token]:
        """Return the tokens of ``m``, ``m^2`` or ``m/s`` here."""
        count = 3 if self._at("^", "/", ahead=1) else 1
        return self._tokens[self._position : self._position + count]

    def _at_letter_unit(self) -> bool:
        """Return whether a letter after a number and a space is a unit: nothing else follows."""
        token = self._peek()
        if token.kind != "symbol" or token.text not in LETTER_UNITS or not token.spaced:
            return False
        unit = self._letter_unit()
        if not self._ends_item(len(unit)):
            return False
        return len(unit) == 1 or (unit[1].text == "/" and unit[2].text in LETTER_UNITS) or unit[2].text in ("2", "3")

    def _ends_item(self, ahead: int) -> bool:
        return self._peek(ahead) is END or self._at(",", ";", ahead=ahead) or self._at_word("and", "or", ahead=ahead)

    def _exponent_word(self) -> str | None:
        """Pass the exponent ``^{\\text{th}}`` or ``^{st}`` and return its letters; stay where it is none."""
        start = self._position
        self._next()
        braces, letters = self._accept("{"), ""
        while self._peek().kind in ("word", "symbol"):
            letters += self._next().text
        if letters in ORDINALS and (not braces or self._accept("}")):
            return letters
        self._position = start
        return None

    # --------------------------------------------------------------------------------------------------- expressions
    def _sum(self) -> Node:
        self._descend()
        terms = []
        if not self._at("pm", "mp"):
            terms.append(self._signed())
        while self._at("+", "-", "pm", "mp"):
            sign = self._next().text
            term = self._signed() if sign in "+-" else self._product()
            if sign in ("pm", "mp"):
                term = Node("choice", (term, 1 if sign == "pm" else -1))
            terms.append(Node("negative", (term,)) if sign == "-" else term)
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signed(self) -> Node:
        if self._accept("+"):
            return self._signed() if self._at("-") else self._product()
        if self._accept("-"):
            if self._at("-"):
                raise UnreadableError("two signs")
            return Node("negative", (self._product(),))
        return self._product()

    def _product(self) -> Node:
        factors = [self._run()]
        while True:
            if self._accept("*", "cdot", "times"):
                factors.append(Node("negative", (self._run(),)) if self._accept("-") else self._run())
            elif self._at("/", "div") and self._peek(1).kind != "word":
                self._next()
                negative = self._accept("-")
                is_coefficient = self._peek().kind == "number" and factors[-1].kind == "number"  # 2/3x is (2/3)x
                inverse = Node("inverse", (self._power() if is_coefficient else self._run(),))
                factors.append(Node("negative", (inverse,)) if negative else inverse)
                if is_coefficient and self._starts_factor():
                    factors.append(self._run())
            else:
                break
        return factors[0] if len(factors) == 1 else Node("product", tuple(factors))

    def _run(self) -> Node:
        """Read factors without a sign between them; they bind more tightly than a slash: x/2y is x/(2y)."""
        factors = [self._power()]
        while self._starts_factor():
            if self._peek().kind == "number" or (self._peek(-1).kind == "number" and self._at("repeating", "based")):
                raise UnreadableError("a number after a factor")
            factors.append(self._power())
        return factors[0] if len(factors) == 1 else Node("product", tuple(factors))

    def _starts_factor(self) -> bool:
        token = self._peek()
        if token.kind == "symbol":
            return not (self._peek(-1).kind == "number" and self._at_letter_unit())
        if token.kind == "number":
            return True
        if token.kind == "command":
            return token.text in ATOM_COMMANDS
        if self._at("(") and (self._at_modulus() or self._at_word("base", "in", ahead=1)):
            return False
        return token.kind == "mark" and (token.text in ("(", "[", "{") or (token.text == "|" and self._bars == 0))

    def _power(self) -> Node:
        base = self._atom()
        while True:
            if self._at("!") and not self._at("=", ahead=1):
                self._next()
                base = Node("factorial", (base,))
            elif self._accept("%"):
                base = Node("quantity", (base, "percent"))
            elif self._at("degree") or self._at_word("degree"):
                self._next()
                base = self._degrees(base)
            elif self._at("^"):
                if self._exponent_is_circle():
                    base = self._degrees(base)
                elif self._exponent_word() is None:
                    self._next()
                    base = Node("power", (base, self._exponent()))
                else:
                    break
            elif self._at("'") and base.kind == "symbol":
                self._next()
                base = Node("symbol", (base.args[0] + "'",))
            else:
                return base
        return base

    def _degrees(self, value: Node) -> Node:
        token = self._peek()
        if token.text in ("C", "F") and token.kind in ("symbol", "word"):
            self._next()
            return Node("quantity", (value, "celsius" if token.text == "C" else "fahrenheit"))
        return Node("quantity", (value, "degree"))

    def _exponent_is_circle(self) -> bool:
        braces = self._at("{", ahead=1)
        if self._at("circ", "degree", ahead=1 + braces) and (not braces or self._at("}", ahead=3)):
            self._position += 2 + 2 * braces
            return True
        return False

    def _exponent(self) -> Node:
        if self._accept("-"):
            return Node("negative", (self._exponent(),))
        if self._accept("+"):
            return self._exponent()
        if self._peek().kind == "number":
            return numeral(self._next().text)
        return self._atom() if self._at("{", "(") else self._power()
