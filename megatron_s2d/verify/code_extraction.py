"""Finds the program in a response: which of its fenced blocks counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from megatron_s2d.verify.mathematics.extract import after_reasoning

_PYTHON = re.compile(r"[{.]*(?:python|py|pypy)[\d.]*\}?(?:[\s:,{}].*)?", re.IGNORECASE)
_FENCE = re.compile(r"(`{3,}|~{3,})([^`]*)")
_ONE_LINE = re.compile(r"```(?:(?:python|py)[\d.]*)?\s([^`]+)```", re.IGNORECASE)
_LATE_FENCE = re.compile(r"[^`]*[^`\s]\s*(```(?:python|py)[\d.]*)", re.IGNORECASE)  # after prose on the same line
_CLOSING_INDENT = 3  # beyond the opening fence; a fence that is indented more belongs to a docstring
# A line that only Python has, so that a response without a fence is a program and not prose.
_BARE_CODE = re.compile(
    r"^(?:import \w|from [\w.]+ import |(?:async )?def \w+ ?\(|class \w+ ?[(:]|print\(|\w[\w, ]* = \S)", re.MULTILINE
)
_SESSION = re.compile(r"\s*(?:>>>|\$ |In \[\d)")
_READS_INPUT = re.compile(r"\bstdin\b|\binput\b|\bopen\(0\b|\bos\.read\(0\b")
_PRINTS = re.compile(r"\bprint\b|\bstdout\b|\bos\.write\(1\b")


@dataclasses.dataclass(slots=True)
class _Block:
    language: str  # "python", "" without a tag, "other"
    fence: str = "```"
    indent: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        # Blocks in a list are indented with their fence.
        return "\n".join(line[min(self.indent, _num_spaces(line)) :] for line in self.lines).lstrip("\ufeff")

    def is_closed_by(self, line: str, max_indent: int) -> bool:
        mark = line.strip()
        return mark.startswith(self.fence) and not mark.strip(self.fence[0]) and _num_spaces(line) <= max_indent


def extract_program(response: str, label: dict[str, Any] | None = None, prompt: str = "") -> str | None:
    """Return the program in a response, or None.

    It is the last block that defines the function which ``label`` tests, one tagged as Python if there is any; else the
    last tagged block, for a script the last that reads input and prints; else the last block without a tag. The last
    block may lack its closing fence, and a response without any fence is a program if it looks like one. Reasoning does
    not count, and ``prompt`` (as rendered) may have begun it.
    """
    text = after_reasoning(response, prompt).replace("\r\n", "\n").lstrip("\ufeff")
    blocks = _blocks(text)
    if not blocks:
        return text if _BARE_CODE.search(text) else None
    fit = _fit(label or {})
    programs = [block for block in blocks if block.language != "other" and "".join(block.lines).strip()]
    keys = [(*fit(block.text, block.language == "python"), index) for index, block in enumerate(programs)]
    return programs[max(keys)[-1]].text if keys else None


def _fit(label: dict[str, Any]) -> Callable[[str, bool], tuple[int, ...]]:
    """Return the function that says how well a block fits the tests: larger is better."""
    name = label.get("entry_point")
    if name is not None:
        defines = re.compile(
            rf"^[ \t]*(?:(?:async )?def {re.escape(name)}\b|{re.escape(name)}[ \t]*(?::[^=\n]*)?=[^=])", re.MULTILINE
        )

        def fit_function(text: str, is_tagged: bool) -> tuple[int, ...]:
            is_code = not _SESSION.match(text)
            return bool(is_code and defines.search(text)), is_tagged, is_code

        return fit_function
    reads = any(label.get("inputs", ()))

    def fit_script(text: str, is_tagged: bool) -> tuple[int, ...]:
        is_code, prints = not _SESSION.match(text), bool(_PRINTS.search(text))
        return is_tagged, is_code, prints, bool(prints and reads and _READS_INPUT.search(text))

    return fit_script


def _blocks(text: str) -> list[_Block]:
    """Return the fenced blocks in order."""
    blocks: list[_Block] = []
    block = None  # the open one
    for line in text.split("\n"):
        mark = line.strip()
        if block is not None:
            opened = None if _LATE_FENCE.fullmatch(mark) else _opening(line)
            if block.is_closed_by(line, block.indent + _CLOSING_INDENT):
                block = None
            elif 0 < mark.find(block.fence) == len(mark) - len(block.fence) and not mark.startswith("#"):
                block.lines.append(line[: line.rindex(block.fence)])  # the fence follows the last line of code
                block = None
            elif opened is not None and opened.language == "python" and opened.indent <= block.indent:
                block = opened  # the fence of the block before was forgotten
                blocks.append(block)
            else:
                block.lines.append(line)
        elif one_line := _ONE_LINE.fullmatch(mark):
            blocks.append(_Block("python", lines=[one_line[1].strip()]))
        elif opened := _opening(line):
            block = opened
            blocks.append(block)
    if block is not None:  # without its closing fence, or with one that is indented too far
        for index, line in enumerate(block.lines):
            if block.is_closed_by(line, len(line)):
                del block.lines[index:]
                break
    return blocks


def _opening(line: str) -> _Block | None:
    mark = line.strip()
    if fence := _FENCE.fullmatch(mark):
        tag = fence[2].strip()
        language = "python" if _PYTHON.fullmatch(tag) else "other" if tag else ""
        return _Block(language, fence[1], _num_spaces(line))
    return _Block("python") if _LATE_FENCE.fullmatch(mark) else None


def _num_spaces(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
