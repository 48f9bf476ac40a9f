"""Which part of a response is its answer: after the reasoning, in a box, behind ``####`` or behind "the answer is".

Linear in the length of the response. The rules are in ``docs/data.md``.
"""

from __future__ import annotations

import collections
import re

MAX_ANSWER_LENGTH = 2000  # characters; longer expressions are not parsed
_MAX_BOXES = 64  # looked at, from the last one backwards
_REASONING = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
)  # fmt: skip
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
_BARE = re.compile(r"-?\d[^\s$]*|\\[A-Za-z]+[^\s$]*|[A-Za-z](?![A-Za-z])")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&*=]|\\[()\[\],;:! ]|\\\\|\\q?quad(?![A-Za-z])|\\approx(?![A-Za-z])"
    r"|\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))*"
)
_NOTHING = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mbox|phantom|[lc]?dots|q?quad|square|underline|hspace|cdots?|_+)(?![A-Za-z])"
    r"|\\[ ,;:!_]|[\s{}.?_…~$,;:*]|(?i:(?:your|the|final|my|answer|result|here|number|value)(?![A-Za-z])))*"
)
_PHRASE = re.compile(
    r"(?:answer|correct[ \t](?:option|choice))(?:[ \t]+to[ \t][^.\n:=]{0,80}?)?[ \t*_]*"
    r"(?:(?:is|are|was|should[ \t]be|must[ \t]be|would[ \t]be|equals)(?![A-Za-z])|[:=])[ \t*_:=]*"
    r"|(?:final[ \t]|\#[ \t])answer[ \t*_#:]*\n",
    re.IGNORECASE,
)
_JSON = re.compile(r'"(?:final_)?answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^",}\n]+))')
_SPECIAL_TOKENS = re.compile(r"<\|[^|<>\n]{1,40}\|>|</s>|<(?:end|start)_of_turn>|<eos>")
# A minus is a sign where no number or letter is before it: 7-5 ends with 5.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_REMARK = re.compile(
    r"[,;]?\s+(?:because|since|which|as|so|hence|thus|therefore|after|given that|by the)\s"
    r"|\.\s+(?=[A-Z\\$(])|\.?\s+I hope\b"
    r"|\s+\((?!\s*[-\d\\])(?=[^()]*[A-Za-z]{2})[^()]*\)\s*\.?\s*$|\s+(?:—|--)\s"
)
_MATH = re.compile(r"\$\$(?P<a>[^$]+)\$\$|\$(?P<b>(?:\\.|[^$\\])+)\$|\\\((?P<c>.+?)\\\)|\\\[(?P<d>.+?)\\\]", re.DOTALL)
_JOINED = re.compile(r"\s*(?:,|;|,?\s*(?:and|or)\b)\s*")
_QUIET = re.compile(r"[^$\\\d=+*/^<>]*")  # words behind an answer in dollars: no second answer


def after_reasoning(response: str, prompt: str = "") -> str:
    """Return what follows the reasoning of a response; "" if its reasoning does not end.

    ``prompt`` is the rendered prompt, because templates of reasoning models open the reasoning themselves.
    """
    text = response
    for opening, closing in _REASONING:
        _, ended, rest = text.rpartition(closing)
        if not ended and prompt[-80:].rstrip().endswith(opening):
            return ""
        text = rest.partition(opening)[0]
    return text


def extract_answer(response: str, prompt: str = "", *, last_number: bool = False) -> str | None:
    """Return the answer that a response to ``prompt`` commits to, else None or (``last_number``) its last number."""
    text = after_reasoning(response, prompt)
    answer = _committed(text)
    if answer is None and last_number:
        numbers = collections.deque(_NUMBER.finditer(text), maxlen=1)
        return numbers[0][0] if numbers else None
    return answer


def _committed(text: str) -> str | None:
    boxes = collections.deque(_BOX.finditer(text), maxlen=_MAX_BOXES)
    answer, found = _last_boxes(text, list(boxes))
    if found:
        return answer
    if boxes:
        bare = _BARE.match(text[boxes[-1].end() : boxes[-1].end() + MAX_ANSWER_LENGTH].lstrip())
        if bare:
            return _clean(bare[0])
    tagged, end, _ = text.rpartition("</answer>")
    if end and "<answer>" in tagged:
        return _clean(tagged.rpartition("<answer>")[2])
    if "####" in text:
        return _stated(text.rpartition("####")[2])
    fields = collections.deque(_JSON.finditer(text), maxlen=1)
    if fields:
        return _clean(fields[0][1] or fields[0][2] or "")
    phrases = collections.deque(_PHRASE.finditer(text), maxlen=1)
    return _stated(text[phrases[0].end() :]) if phrases else None


def boxed_content(text: str) -> str | None:
    """Return the content of the last box of ``text`` that has one; None without a box, "" if all are empty."""
    boxes = list(collections.deque(_BOX.finditer(text), maxlen=_MAX_BOXES))
    if not boxes:
        return None
    return _last_boxes(text, boxes)[0] or ""


# --------------------------------------------------------------------------------------------------------------- boxes
def _last_boxes(text: str, boxes: list[re.Match[str]]) -> tuple[str | None, bool]:
    """Return (answer, whether a box in braces was found): the last one with content, and those joined with it."""
    contents: list[str] = []
    start = 0
    for box in reversed(boxes):
        begin, remaining = box.end(), text[box.end() : box.end() + 2 * MAX_ANSWER_LENGTH + 2]
        stripped = remaining.lstrip()
        if not stripped.startswith("{"):
            continue
        begin += len(remaining) - len(stripped)
        end = closing_brace(stripped)
        if end is None:
            if contents:
                break
            too_long = len(remaining) > 2 * MAX_ANSWER_LENGTH
            return (stripped[1:] if too_long else None), True
        content = without_full_stop(stripped[1:end].strip())
        if _NOTHING.fullmatch(content):
            if contents:
                break
            continue
        if contents and begin + end < start:
            between = text[begin + end + 1 : start]
            if len(between) > 60 or not _BETWEEN_BOXES.fullmatch(between):
                break
            if content == contents[0]:
                start = box.start()
                continue
            sign = " =" if "=" in between or "approx" in between else ","
            contents[0] = f"{content}{sign} {contents[0]}"
            start = box.start()
            continue
        contents, start = [content], box.start()
    return (contents[0], True) if contents else (None, False)


def closing_brace(text: str) -> int | None:
    """Return the index that closes the brace at the start of ``text``; escaped braces do not count."""
    depth, index = 0, 0
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return index
        index += 1
    return None


# --------------------------------------------------------------------------------------------------------------- prose
def _stated(text: str) -> str | None:
    """Return the answer at the start of ``text``: to the end of its line or sentence, without a remark behind it."""
    line = text[: 8 * MAX_ANSWER_LENGTH].lstrip(" \t\n*_")
    line = line if line.startswith(("\\[", "$$")) else line.partition("\n")[0]
    line = _SPECIAL_TOKENS.sub("", line)[: 2 * MAX_ANSWER_LENGTH]
    parts, position = [], 0
    while match := _MATH.match(line, position):
        parts.append(next(part for part in match.groups() if part))
        joined = _JOINED.match(line, match.end())
        position = match.end()
        if joined is None or not _MATH.match(line, joined.end()):
            break
        position = joined.end()
    if parts:
        remark = _REMARK.match(line, position)
        rest = line[position : position + (0 if remark else len(line))]
        if _QUIET.fullmatch(rest):
            return _clean(", ".join(parts))
    remark = _REMARK.search(line)
    return _clean(line[: remark.start()] if remark and remark.start() > 0 else line)


def _clean(answer: str) -> str | None:
    """Strip emphasis, math delimiters and the full stop from around an answer; None for unbalanced braces."""
    answer, before = answer[: 2 * MAX_ANSWER_LENGTH], None
    while answer != before:
        before = answer
        answer = without_full_stop(answer.strip().strip("*`"))
        for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(answer) > len(opening) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : len(answer) - len(closing)]
    if len(answer) <= MAX_ANSWER_LENGTH and closing_brace(f"{{{answer}}}") != len(answer) + 1:
        return None
    return answer or None


def without_full_stop(answer: str) -> str:
    """Return ``answer`` without the full stop at its end."""
    return answer if answer.endswith(("\\right.", "\\left.", "..")) else answer.removesuffix(".")
