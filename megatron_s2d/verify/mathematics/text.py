"""Text of a mathematical answer to tokens: Unicode, LaTeX and plain writing become one alphabet.

Part of the grader of ``math_verifier.py``. Linear in the length of the text, and nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata

from megatron_s2d.verify.mathematics.words import (
    COMMAND_WORDS,
    FUNCTIONS,
    GREEK,
    KNOWN_WORDS,
    LETTER_UNITS,
    NUMBER_WORDS,
    ORDINALS,
    SYNONYMS,
)

MAX_DEPTH = 60  # of nested braces and brackets; deeper texts are not read


class UnreadableError(ValueError):
    """The text is not an answer that the grammar covers from its first to its last character."""


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One unit of an answer. ``kind``: ``number``, ``symbol`` (a letter), ``word``, ``command`` or ``mark``."""

    kind: str
    text: str
    spaced: bool = False  # white space before it


# ------------------------------------------------------------------------------------------------------------- Unicode
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₖᵢₓ", "0123456789+-nkix", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?)?")
_ROOT_COMMANDS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_UNICODE = {
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": r"\div ",
    "⁄": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "－": "-", "＋": "+", "≤": r"\le ",
    "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≃": r"\approx ", "≅": r"\cong ", "≡": r"\equiv ", "∈": r"\in ", "∉": r"\notin ", "∪": r"\cup ", "∩": r"\cap ",
    "∖": r"\setminus ", "∅": r"\emptyset ", "⌀": r"\emptyset ", "Ø": r"\emptyset ", "∞": r"\infty ", "±": r"\pm ",
    "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "∘": r"\circ ", "→": r"\to ", "⟶": r"\to ",
    "↦": r"\mapsto ", "⇒": r"\implies ", "⟹": r"\implies ", "⇔": r"\iff ", "∨": r"\lor ", "∧": r"\land ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "…": r"\ldots ", "⋯": r"\ldots ", "∠": r"\angle ", "△": r"\triangle ", "′": "'", "’": "'", "‘": "'", "“": "",
    "”": "", '"': "", "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ", "₹": r"\rupee ", "‰": r"\permille ",
    "∀": r"\forall ", "∣": r"\mid ", "∥": r"\parallel ", "⊥": r"\perp ", "⊂": r"\subset ", "⊆": r"\subseteq ",
    "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "\u200b": "", "\ufeff": "", "\u2060": "", "\u200d": "", "\u00ad": "",
    "\u2061": "", "\u2062": "", "\u2063": ",", "，": ",", "；": ";", "：": ":", "。": ".", "、": ",", "ϵ": r"\epsilon ",
    "ϕ": r"\phi ", "µ": r"\mu ",
    **{letter: f"\\{name} " for letter, name in GREEK.items()},
}  # fmt: skip


def _without_unicode(text: str) -> str:
    text = _RAISED.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[c] for c in match[0]) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[c] for c in match[0]) + "}", text)
    text = _VULGAR.sub(_fraction, text)
    text = _ROOT.sub(lambda match: _ROOT_COMMANDS[match[1]] + (f"{{{match[2]}}}" if match[2] else " "), text)
    text = "".join(_UNICODE.get(character, character) for character in text)
    return "".join(_UNICODE.get(character, character) for character in unicodedata.normalize("NFKC", text))


def _fraction(match: re.Match[str]) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


# --------------------------------------------------------------------------------------------------------------- LaTeX
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\{\s*,\s*\}|\\!\s*,|,\s*\\!|\\,\\!)\s*(?:\\!\s*)*(?=\d{3})")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")  # commands that were escaped twice, as in JSON
_SPACES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|"
    r"allowbreak|noindent|hfill|par|smallskip|medskip|bigskip|centering|large|Large|huge|Huge|bf|it|rm|tt)"
    r"(?![A-Za-z])\s*\.?(?=\s*(?:[^0-9.]|$))"
    r"|\\(?:left|right)(?![A-Za-z])"
    r"|(?<!\\)\\(?:[,;:>! \n]|quad(?![A-Za-z])|qquad(?![A-Za-z])|space(?![A-Za-z])|thinspace(?![A-Za-z]))|~"
)
_DROPPED = re.compile(r"\\(?:phantom|hphantom|vphantom|hspace|vspace|color|label|tag)\*?\s*\{[^{}]*\}")
_UNWRAPPED = re.compile(
    r"\\(?:boxed|fbox|underline|textcolor\s*\{[^{}]*\}|mathopen|mathclose|mathrel|mathbin|ensuremath)(?=\s*\{)"
)
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]|`")
_SPACED_DIGITS = re.compile(r"(?<![\d.,A-Za-z])\d{1,3}(?:\s+\d{3})+(?!\s*[\d/]|\s*\\frac)")
_TIGHT_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?!\s*\\?[_}]\d)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))(?!\s*\\dot)")
_DOTTED = re.compile(r"(\d*)\.(\d*)\s*\\dot\s*\{?(\d)\}?(\d*)\s*\\dot\s*\{?(\d)\}?")
_GOES_ON = re.compile(r"(\d*)\.(\d*?)((\d)\4\4+|(\d\d)\5\5+|(\d{3})\6\6+)\s*(?:\\[lc]?dots[a-z]?(?![A-Za-z])|\.\.\.)")
_BASE_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_\\.^])(?:\(\s*([0-9A-Za-z]+)\s*\)|([0-9][0-9A-Fa-f]*))\s*_\s*(?:\{\s*\(?\s*(?:\\(?:text|mathrm|mbox|rm)"
    r"\s*\{)?\s*(?:base[\s~-]*)?([A-Za-z]+|\d+)\s*\}?\s*\)?\s*\}|(\d+)|\\text\{\s*([a-z]+)\s*\})"
)


def _plain_latex(text: str) -> str:
    """Remove what does not change the meaning: sizes, spaces, delimiters of math, boxes, separators of thousands."""
    if "begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _THOUSANDS.sub("", text)
    text = _DROPPED.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = _UNWRAPPED.sub(" ", text)
    text = _DELIMITERS.sub(" ", text)
    text = _REPEATING.sub(_repeating, text)
    text = _DOTTED.sub(lambda m: f"\\repeating{{{m[1] or 0}}}{{{m[2]}}}{{{m[3]}{m[4]}{m[5]}}}", text)
    text = _GOES_ON.sub(lambda m: f"\\repeating{{{m[1] or 0}}}{{{m[2]}}}{{{m[4] or m[5] or m[6]}}}", text)
    text = _BASE_NUMBER.sub(_based, text.replace("{:}", ":"))
    text = _SPACED_DIGITS.sub(lambda match: re.sub(r"\s", "", match[0]), text)
    return _without_groups(text)


def _based(match: re.Match[str]) -> str:
    digits, base = match[1] or match[2], match[3] or match[4] or match[5]
    if not digits.isdigit() and not (base.isdigit() and int(base) > 10) and base != "sixteen":
        return match[0]  # 2a_1 is a product
    return f"\\based{{{digits}}}{{{base}}} "


def _repeating(match: re.Match[str]) -> str:
    return f"\\repeating{{{match[1] or 0}}}{{{match[2]}}}{{{match[3] or match[4]}}}"


def _without_groups(text: str) -> str:
    """Remove the commas of ``1,000, 2,000``.

    Between brackets ``(1,234)`` is a pair; there a comma separates thousands only beside commas that are none.
    """
    groups = list(_TIGHT_GROUPS.finditer(text))
    if not groups:
        return text
    spans, stack = [], []  # (start, end) of every bracket
    for index, character in enumerate(text):
        if character in "([{":
            stack.append(index)
        elif character in ")]}" and stack:
            spans.append((stack.pop(), index))
    parts, end = [], 0
    for group in groups:
        around = min(
            ((b - a, a, b) for a, b in spans if a < group.start() and group.end() <= b), default=(0, -1, len(text))
        )
        inside = text[around[1] + 1 : around[2]]
        if around[1] < 0 or "," in _TIGHT_GROUPS.sub("", inside):
            parts += [text[end : group.start()], group[0].replace(",", "")]
            end = group.end()
    return "".join([*parts, text[end:]])


# -------------------------------------------------------------------------------------------------------------- tokens
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+(?![\dA-Za-z.^]))?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\[^A-Za-z])|(?P<letters>[A-Za-z]+)|(?P<mark>\*\*|<=|>=|!=|\.\.\.+|=+|.)",
    re.DOTALL,
)
_TEXT = {"text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "mbox", "hbox", "emph", "textsc"}
_FONTS = {"mathrm", "mathbf", "mathit", "mathsf", "mathtt", "operatorname", "boldsymbol", "bm", "vec", "mathcal", "hat"}
_ESCAPES = {"\\{": "\\{", "\\}": "\\}", "\\%": "%", "\\&": "&", "\\#": "#", "\\_": "_", "\\|": "|", "\\\\": "\\\\"}
_HALF_DAYS = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_TITLE = re.compile(r"[A-Z][a-z]+")


def tokens(text: str) -> list[Token]:
    """Return the tokens of an answer. Raises ``UnreadableError`` for braces without a partner and at great depth."""
    text = _plain_latex(_without_unicode(text))
    text = text.strip().strip("*").strip()
    if len(text) > 2 and text[0] == text[-1] == "'":
        text = text[1:-1]
    result: list[Token] = []
    _scan(_HALF_DAYS.sub(r"\1m", text), False, 0, result)
    while result and result[-1].kind == "mark" and result[-1].text in (".", ",", ";"):
        result.pop()
    depth = 0
    for token in result:
        depth += (token.text == "{") - (token.text == "}")
        if depth < 0:
            break
    if depth:
        raise UnreadableError("a brace without its partner")
    return _number_words(result)


def _scan(text: str, in_words: bool, depth: int, result: list[Token]) -> None:
    if depth > MAX_DEPTH:
        raise UnreadableError("too deep")
    position, spaced = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        position, kind, value = match.end(), match.lastgroup, match[0]
        if kind == "space":
            spaced = True
            continue
        if kind == "command" and value[1:] in _TEXT | _FONTS:
            content, position = _braced(text, position)
            letters = content.strip()
            if letters in FUNCTIONS:
                result += _command(letters, spaced)
            elif value[1:] in _FONTS and len(letters.lstrip("\\")) == 1:
                is_unit = value == "\\mathrm" and letters in LETTER_UNITS
                result.append(Token("word" if is_unit else "symbol", letters, spaced))
            else:
                _scan(content, value[1:] not in ("vec", "hat"), depth + 1, result)
        elif kind == "command" and value == "\\mathbb":
            content, position = _braced(text, position)
            result.append(Token("command", "mathbb" + content.strip(), spaced))
        elif kind == "command":
            result += _command(value[1:], spaced)
        elif kind == "escaped":
            result += _escape(value, spaced)
        elif (
            kind == "letters" and result and result[-1].kind == "number" and _follows_number(value, result[-1], spaced)
        ):
            result.append(Token("word", value, spaced))
        elif kind == "letters":
            result += _letters(value, in_words, spaced)
        elif value != "*" or not in_words:
            result.append(Token(kind, {"**": "^", "==": "="}.get(value, value), spaced))
        spaced = False


def _braced(text: str, start: int) -> tuple[str, int]:
    """Return the argument of a command at ``start``, in braces or one character, and the position behind it."""
    while start < len(text) and text[start].isspace():
        start += 1
    if start >= len(text):
        raise UnreadableError("a command without its argument")
    if text[start] != "{":
        return text[start], start + 1
    depth, index = 0, start
    while index < len(text):
        if text[index] == "\\":
            index += 1
        elif text[index] in "{}":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start + 1 : index], index + 1
        index += 1
    raise UnreadableError("a brace without its partner")


def _command(name: str, spaced: bool) -> list[Token]:
    name = SYNONYMS.get(name, name)
    if name in COMMAND_WORDS:
        return [Token("word", COMMAND_WORDS[name], spaced)]
    if len(name) == 1 or name in ("<", ">", "|", "/", "*"):
        return [Token("mark", name, spaced)]
    return [Token("command", name, spaced)]


def _escape(value: str, spaced: bool) -> list[Token]:
    if value == "\\$":
        return [Token("command", "dollar", spaced)]
    if value not in _ESCAPES:
        raise UnreadableError(f"unknown command {value}")
    return [Token("mark", _ESCAPES[value], spaced)]


def _follows_number(letters: str, number: Token, spaced: bool) -> bool:
    """Return whether ``letters``, elsewhere symbols or a function, are a unit or the end of an ordinal here."""
    if letters in ORDINALS:
        return not spaced and (letters == "th" or number.text[-1] == {"st": "1", "nd": "2", "rd": "3"}[letters])
    return letters in ("min", "mins") or (spaced and letters in ("in", "ms", "mi", "rs", "rad", "yr", "hr", "pt"))


def _letters(letters: str, in_words: bool, spaced: bool) -> list[Token]:
    """Return a run of letters as one word, or outside of ``\\text`` as a function or a product of symbols."""
    lower = letters.lower()
    if len(letters) == 1:
        return [Token("word" if in_words and letters in LETTER_UNITS else "symbol", letters, spaced)]
    if not in_words and letters in FUNCTIONS:
        return [Token("command", SYNONYMS.get(letters, letters), spaced)]
    if in_words or lower in KNOWN_WORDS or len(letters) > 3 or _TITLE.fullmatch(letters):
        return [Token("word", letters if letters.isupper() and lower not in KNOWN_WORDS else lower, spaced)]
    if letters.isupper():
        return [Token("symbol", letters, spaced)]  # AB is a segment, CAB an order
    return [Token("symbol", letter, spaced and index == 0) for index, letter in enumerate(letters)]


def _number_words(given: list[Token]) -> list[Token]:
    """Replace ``twenty-five`` and ``two hundred and three`` by their digits."""
    result, index = [], 0
    while index < len(given):
        if given[index].kind != "word" or given[index].text not in NUMBER_WORDS:
            result.append(given[index])
            index += 1
            continue
        start, total, current, last = index, 0, 0, None
        while index < len(given):
            text, joined = given[index].text, index
            if last is not None and (text == "-" or (text == "and" and last >= 100)) and index + 1 < len(given):
                joined = index + 1
            value = NUMBER_WORDS.get(given[joined].text) if given[joined].kind == "word" else None
            if value is None:
                break
            if value >= 100:
                current = max(current, 1) * value
                total, current = (total + current, 0) if value >= 1000 else (total, current)
            elif last is None or last >= 100 or (last >= 20 and value < 10 and last % 10 == 0):
                current += value
            else:
                break
            last, index = value, joined + 1
        result.append(Token("number", str(total + current), given[start].spaced))
    return result
