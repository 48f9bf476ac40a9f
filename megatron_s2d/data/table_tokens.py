"""Tokens of rows whose table has their texts only, and how many they are at most. No torch here.

n: rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from megatron_s2d.data.text_tokens import TextTokens

if TYPE_CHECKING:
    import pyarrow

TEXT_OF = {"token_ids": "text", "solution_token_ids": "solution"}
"""Column of tokens -> the column with the texts of rows that have none."""


def with_tokens(rows: pyarrow.Table, tokens: TextTokens) -> pyarrow.Table:
    """Return rows with the tokens of every text."""
    import pyarrow

    for name, make in (("token_ids", tokens.prompts), ("solution_token_ids", tokens.solutions)):
        known, texts, unknown = _texts_without(rows, name)
        if unknown.any():
            made = make(texts.filter(pyarrow.array(unknown)))
            positions = np.where(unknown, len(known) + np.cumsum(unknown) - 1, np.arange(len(known)))
            column = pyarrow.concat_arrays([known, made.cast(known.type)]).take(pyarrow.array(positions))
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return rows


def token_lengths(rows: pyarrow.Table, tokens: TextTokens, name: str) -> np.ndarray:
    """Return the number of tokens of each row in column ``name``, int32 [n]; -1 for one that has none."""
    return _lengths(rows, name, tokens.prompt_lengths if name == "token_ids" else tokens.solution_lengths)


def most_lengths(rows: pyarrow.Table, tokens: TextTokens, name: str) -> np.ndarray:
    """Return at most how many tokens each row has in column ``name``; as ``token_lengths``."""
    return _lengths(rows, name, tokens.most_tokens if name == "token_ids" else tokens.most_solution_tokens)


def _lengths(rows: pyarrow.Table, name: str, of_texts: Callable[[pyarrow.StringArray], np.ndarray]) -> np.ndarray:
    import pyarrow
    import pyarrow.compute

    known, texts, unknown = _texts_without(rows, name)
    lengths = pyarrow.compute.list_value_length(known).fill_null(-1).to_numpy().astype(np.int32)
    if unknown.any():
        lengths[unknown] = of_texts(texts.filter(pyarrow.array(unknown)))
    return lengths


def _texts_without(rows: pyarrow.Table, name: str) -> tuple[pyarrow.ListArray, pyarrow.StringArray, np.ndarray]:
    """Return a column of tokens, that of its texts, and the mask [n] of the rows that have a text only."""
    known, texts = rows.column(name).combine_chunks(), rows.column(TEXT_OF[name]).combine_chunks()
    missing = known.is_null().to_numpy(zero_copy_only=False)
    return known, texts, missing & texts.is_valid().to_numpy(zero_copy_only=False)
