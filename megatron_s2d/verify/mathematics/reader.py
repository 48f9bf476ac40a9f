"""Reads tokens one after the other; the base of the parsers."""

from __future__ import annotations

from megatron_s2d.verify.mathematics.text import MAX_DEPTH, Token, UnreadableError

END = Token("end", "")


class Reader:
    """A position in the tokens of an answer."""

    def __init__(self, given: list[Token]) -> None:
        self._tokens, self._position, self._depth, self._bars = given, 0, 0, 0

    def _peek(self, ahead: int = 0) -> Token:
        index = self._position + ahead
        return self._tokens[index] if index < len(self._tokens) else END

    def _next(self) -> Token:
        token = self._peek()
        self._position += 1
        return token

    def _at(self, *texts: str, ahead: int = 0) -> bool:
        token = self._peek(ahead)
        return token.kind in ("mark", "command") and token.text in texts

    def _at_word(self, *words: str, ahead: int = 0) -> bool:
        token = self._peek(ahead)
        return token.kind == "word" and token.text.lower() in words

    def _accept(self, *texts: str) -> bool:
        found = self._at(*texts)
        self._position += found
        return found

    def _expect(self, *texts: str) -> None:
        if not self._accept(*texts):
            raise UnreadableError(f"expected {texts[0]}, not {self._peek().text or 'the end'}")

    def _at_modulus(self) -> bool:
        bracket = self._at("(")
        return self._at("pmod", "mod", ahead=bracket) or self._at_word("mod", ahead=bracket)

    def _rest(self) -> str:
        rest, self._position = self._tokens[self._position :], len(self._tokens)
        return " ".join(token.text.lower() if token.kind == "word" else token.text for token in rest)

    def _descend(self) -> None:
        """Count a level of nesting; the caller counts it back. Raises ``UnreadableError`` at great depth."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("too deep")
