"""The same text in the tokens of two tokenizers, cut where both have a boundary. No torch here.

A token that ends within a character (byte-level tokenizers split rare ones) is no boundary. Of two tokenizers that
agree every span is one token of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class AlignedText:
    """A text in the tokens of another tokenizer, and spans that are the same text in both."""

    token_ids: np.ndarray  # [n] int64, of the other tokenizer
    spans: tuple[tuple[int, int, int, int], ...]  # (start, stop) of the given tokens, (start, stop) of these


def token_ends(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """Return the text of ``token_ids``, and for each token where it ends in the text; -1 within a character.

    Each token is decoded behind a few before it, because some tokenizers write spaces between tokens.
    """
    parts: list[str] = []
    ends, length, first, read = [], 0, 0, 0
    for index in range(len(token_ids)):
        before = _decode(tokenizer, token_ids[first:read])
        text = _decode(tokenizer, token_ids[first : index + 1])
        if text.endswith(_INCOMPLETE) and index + 1 < len(token_ids):
            ends.append(-1)
            continue
        parts.append(text[len(before) :])
        length += len(parts[-1])
        ends.append(length)
        first, read = read, index + 1
    return "".join(parts), ends


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def align(token_ids: Sequence[int], tokenizer: Any, other: Any, *, end: tuple[int, int] | None = None) -> AlignedText:
    """Return the text of ``token_ids`` in the tokens of ``other``.

    end: ids of the token that ends a response in both; they are one span, whatever their texts.
    """
    ids = [int(index) for index in token_ids]
    ended = end is not None and bool(ids) and ids[-1] == end[0]
    text, own_ends = token_ends(tokenizer, ids[:-1] if ended else ids)
    encoded = other(text, add_special_tokens=False, return_offsets_mapping=True)
    other_ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    other_ends = [
        stop if index + 1 == len(offsets) or offsets[index + 1][0] >= stop else -1
        for index, (_, stop) in enumerate(offsets)
    ]
    spans = _spans(own_ends, other_ends)
    if ended and end is not None:
        spans.append((len(own_ends), len(own_ends) + 1, len(other_ids), len(other_ids) + 1))
        other_ids.append(end[1])
    return AlignedText(np.array(other_ids, dtype=np.int64), tuple(spans))


def _spans(own_ends: Sequence[int], other_ends: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Cut at the ends that both have, and at the end of both."""
    last_of = {end: index + 1 for index, end in enumerate(other_ends) if end >= 0}
    spans, own_start, other_start = [], 0, 0
    for index, end in enumerate(own_ends):
        stop, is_last = last_of.get(end), index + 1 == len(own_ends)
        if is_last:
            stop = len(other_ends)  # spaces that one of the two drops at the end
        if stop is None or (stop <= other_start and not is_last):
            continue
        spans.append((own_start, index + 1, other_start, stop))
        own_start, other_start = index + 1, stop
    return spans


def span_log_probs(
    log_probs: np.ndarray, student: np.ndarray, spans: Sequence[tuple[int, int, int, int]]
) -> np.ndarray:
    """Return a log-probability for each of the student's tokens, from a teacher's of the same text.

    log_probs: [n] of the teacher's tokens. student: [s] of its own tokens. A span is one action: each of its tokens has
    the student's value plus the span's log-ratio, log P_teacher(text) - log P_student(text), so that the difference of
    the two is the advantage of the action that the token is part of. Spans of one token have the teacher's value.
    """
    result = student.astype(np.float64)
    for own_start, own_stop, start, stop in spans:
        teacher = float(log_probs[start:stop].sum(dtype=np.float64))
        if own_stop - own_start == 1:
            result[own_start] = teacher
        else:
            result[own_start:own_stop] += teacher - float(student[own_start:own_stop].sum(dtype=np.float64))
    return result.astype(np.float32)
