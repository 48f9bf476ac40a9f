"""Token ids of prompts and solutions: of lists of texts, of columns of them, and what is known of them before.

A tokenizer's own call takes some microseconds for a short text and a hundred for a long one. So the words of tokenizers
that have one token for each are looked up as columns, and of byte-level tokenizers (``data/tokenizer_rules.py``) nobody
has to know the tokens of a prompt before it is read. No torch here.

n: texts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.data.text_columns import (
    byte_lengths,
    list_array,
    list_content,
    mix64,
    sequence_digests,
    text_digests,
    with_bytes,
    with_parts,
)
from megatron_s2d.data.tokenizer_rules import ByteRules, WordRules, rules_of
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_TEXTS_AT_ONCE, _BYTES_AT_ONCE = 512, 1 << 18  # that a tokenizer gets together: a token takes a hundred bytes there
_OF_TEXT = np.uint64(0x5851F42D4C957F2D)  # any number


def token_keys(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a digest of the tokens of each prompt, uint64 [n]. ``values``: one after the other; lengths: [n]."""
    return sequence_digests(values, lengths)


class TextTokens:
    """The tokens of one tokenizer's prompts, which its chat template has rendered, and of solutions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A chat template writes the start token itself; plain text needs the tokenizer's special tokens.
        self._special = tokenizer.chat_template is None

    @functools.cached_property
    def _rules(self) -> WordRules | ByteRules | None:
        backend = _plain_backend(self._tokenizer)
        rules = None if backend is None else rules_of(backend)
        return None if isinstance(rules, WordRules) and self._num_special else rules

    @functools.cached_property
    def _num_special(self) -> int:
        """Number of tokens that a prompt gets beside those of its text, at most."""
        return _plain_backend(self._tokenizer).num_special_tokens_to_add(False) if self._special else 0

    @functools.cached_property
    def _key_of_special(self) -> np.uint64:
        """What sets keys of texts apart from those of tokens, and of texts with other special tokens."""
        special = np.array(self.prompt_ids([""])[0], dtype=np.int64)
        return mix64(token_keys(special, np.array([len(special)])) + _OF_TEXT)[0]

    @property
    def bounded(self) -> bool:
        """Whether a prompt's number of tokens has a bound that needs no tokens, and its text stands for them."""
        return isinstance(self._rules, ByteRules)

    # ------------------------------------------------------------------------------- prompts

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each prompt; empty for one without any."""
        tokens = encode(self._tokenizer, texts, add_special_tokens=self._special)
        end = self._tokenizer.eos_token_id
        for text, row in zip(texts, tokens, strict=True):
            if row and row[-1] == end != _last_id(text, self._tokenizer):
                row.pop()  # some tokenizers end every text, and a prompt does not end
        return tokens

    def prompts(self, texts: pyarrow.StringArray) -> pyarrow.ListArray:
        """Return the ids of each prompt, lists of int32 [n]; empty for one without any."""
        if isinstance(self._rules, WordRules):
            return self._by_word(self._rules, texts, self.prompt_ids)
        return _in_parts(self.prompt_ids, texts)

    def prompt_lengths(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return the number of tokens of each prompt, int32 [n]."""
        return self.prompts(texts).value_lengths().to_numpy()

    def first_empty(self, texts: pyarrow.StringArray) -> int | None:
        """Return the index of the first prompt without any token; of a tokenizer that is ``bounded``."""
        assert isinstance(self._rules, ByteRules)
        empty = byte_lengths(texts) == 0
        others = np.flatnonzero(~self._rules.plain(texts))
        if len(others):
            empty[others] = self.prompt_lengths(texts.take(others)) == 0
        return int(empty.argmax()) if empty.any() and not self._num_special else None

    def keys(self, texts: pyarrow.StringArray, tokens: pyarrow.ListArray | None = None) -> np.ndarray:
        """Return a digest of what a model reads of each prompt, uint64 [n]: equal for equal tokens.

        Where tokens are those of one text (``bounded``), it is the text's, which is the same for prompts whose tokens
        are known and others. tokens: of all texts, if they are known.
        """
        rules = self._rules
        if not isinstance(rules, ByteRules):
            return token_keys(*list_content(self.prompts(texts) if tokens is None else tokens))
        keys = text_digests(rules.normal(texts)) ^ self._key_of_special
        others = np.flatnonzero(~rules.plain(texts))
        if len(others):
            keys[others] = token_keys(*list_content(_in_parts(self.prompt_ids, texts.take(others))))
        return keys

    def most_tokens(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return how many tokens each prompt has at most, int32 [n]; of a tokenizer that is ``bounded``."""
        assert isinstance(self._rules, ByteRules)
        return _int32(self._rules.most_tokens(texts) + self._num_special)

    # ------------------------------------------------------------------------------- solutions

    def solution_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of solutions with one end token, which a text may have already, with blanks after it."""
        end = self._end_token
        texts = [_without_end(text, end) if end in text else text for text in texts]
        return [
            [*row, self._tokenizer.eos_token_id] for row in encode(self._tokenizer, texts, add_special_tokens=False)
        ]

    def solutions(self, texts: pyarrow.StringArray) -> pyarrow.ListArray:
        """Return ``solution_ids`` as lists of int32 [n]; null for null."""
        if texts.null_count == len(texts):
            return list_array(np.zeros(0, np.int32), np.full(len(texts), -1))
        if texts.null_count or not isinstance(self._rules, WordRules):
            return _in_parts(self.solution_ids, texts)
        values, lengths = list_content(self._by_word(self._rules, texts, self._without_last))
        ends = np.cumsum(lengths)
        return list_array(np.insert(values, ends, self._tokenizer.eos_token_id), lengths + 1)

    def solution_lengths(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return the number of tokens of each solution, int32 [n]."""
        return self.solutions(texts).value_lengths().to_numpy()

    def most_solution_tokens(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return how many tokens each solution has at most, int32 [n]. As ``most_tokens``."""
        assert isinstance(self._rules, ByteRules)
        return _int32(self._rules.most_tokens(texts) + 1)

    def check_solutions(self) -> None:
        """Raise ``UserError`` if the tokenizer cannot end solutions."""
        self._end_token  # noqa: B018

    @property
    def _end_token(self) -> str:
        end = self._tokenizer.eos_token
        if end is None:
            raise UserError("the tokenizer has no end-of-sequence token to end solutions with; use another tokenizer")
        return str(end)

    def _without_last(self, texts: list[str]) -> list[list[int]]:
        return [row[:-1] for row in self.solution_ids(texts)]

    def _by_word(
        self, rules: WordRules, texts: pyarrow.StringArray, encode_all: Callable[[list[str]], list[list[int]]]
    ) -> pyarrow.ListArray:
        """Return the ids of texts [n] by looking words up; texts that have more than words go to ``encode_all``."""
        import pyarrow

        beyond = with_bytes(texts, np.arange(256) >= 0x80)  # where white space is another matter
        parts = rules.added | {self._tokenizer.eos_token or ""} - {""}
        ids = None if beyond.all() else word_ids(rules, texts)
        if ids is None:
            return _in_parts(encode_all, texts)
        first = encode_all(texts[:1].to_pylist())
        others = np.flatnonzero(beyond | with_parts(texts, parts))
        if len(others):
            positions = np.arange(len(texts))
            positions[others] = len(texts) + np.arange(len(others))
            ids = pyarrow.concat_arrays([ids, _in_parts(encode_all, texts.take(others))]).take(positions)
        assert ids[:1].to_pylist() == first, "the tokenizer's call and its words differ"
        return ids


def word_ids(rules: WordRules, texts: pyarrow.StringArray) -> pyarrow.ListArray | None:
    """Return the id of each word of each text [n], of ASCII; None if a word has none, or a text has no word."""
    import pyarrow
    import pyarrow.compute

    trimmed = pyarrow.compute.ascii_trim_whitespace(texts)
    if pyarrow.compute.any(pyarrow.compute.equal(pyarrow.compute.binary_length(trimmed), 0)).as_py():
        return None
    words = pyarrow.compute.ascii_split_whitespace(trimmed)
    known = pyarrow.array(list(rules.vocabulary), pyarrow.string())
    of_known = np.fromiter(rules.vocabulary.values(), np.int32, len(rules.vocabulary))
    positions = pyarrow.compute.index_in(words.flatten(), value_set=known)
    if positions.null_count and rules.unknown is None:
        return None
    ids = np.append(of_known, rules.unknown or 0)[positions.fill_null(len(of_known)).to_numpy()]
    return list_array(ids, np.diff(words.offsets.to_numpy()).astype(np.int64))


def _in_parts(encode_all: Callable[[list[str]], list[list[int]]], texts: pyarrow.StringArray) -> pyarrow.ListArray:
    """Return ``encode_all`` of the texts [n], some at once; null for null."""
    tokens = Tokens()
    ends, start = np.cumsum(byte_lengths(texts)), 0
    while start < len(texts):
        most = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + _BYTES_AT_ONCE))
        stop = min(start + _TEXTS_AT_ONCE, max(start + 1, most))
        part: list[str | None] = texts[start:stop].to_pylist()
        start = stop
        rows = iter(encode_all([text for text in part if text is not None]))
        tokens.extend([None if text is None else next(rows) for text in part])
    return list_array(tokens.values, tokens.lengths)


class Tokens:
    """Lists of ids, one after the other."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._lengths: list[int] = []  # -1: null

    def extend(self, rows: Sequence[list[int] | None]) -> None:
        """Append rows; None is null."""
        present = [row for row in rows if row is not None]
        self._lengths += [-1 if row is None else len(row) for row in rows]
        self._parts.append(np.fromiter(itertools.chain.from_iterable(present), np.int32, sum(map(len, present))))

    @property
    def values(self) -> np.ndarray:
        """All ids, int32."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids of each row, int64 [n]; -1: null."""
        return np.array(self._lengths, dtype=np.int64)


def encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the ids of each text [n], as ``tokenizer(texts)`` does.

    Its own call takes most of its time for what nobody asked for here (offsets, masks, word ids), so after the first
    text, whose call also sets what a tokenizer's file says of truncation and padding, the Rust library is asked itself,
    if it is that library's tokenizer.
    """
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    backend = _plain_backend(tokenizer)
    own: list[list[int]]
    if not texts:
        return []
    if backend is None or len(texts) < 2:
        own = tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return [list(row) for row in own]
    own = tokenizer(texts[:1], add_special_tokens=add_special_tokens, **options)["input_ids"]
    distinct = list(dict.fromkeys(texts))  # many solutions are one number
    encodings = backend.encode_batch_fast(distinct, add_special_tokens=add_special_tokens)
    assert encodings[0].ids == own[0], "the tokenizer's call and its library differ"
    tokens = dict(zip(distinct, encodings, strict=True))
    return [tokens[text].ids for text in texts]  # a list of its own for each


def _plain_backend(tokenizer: Any) -> Any:
    """Return the tokenizer of the Rust library if the call of ``tokenizer`` is no other than transformers' own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    own = issubclass(kind, PreTrainedTokenizerFast) and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    if not own or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    return tokenizer.backend_tokenizer


def _last_id(text: str, tokenizer: Any) -> int | None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def _without_end(text: str, end: str) -> str:
    shorter = text.rstrip().removesuffix(end)
    return _without_end(shorter, end) if shorter != text.rstrip() else text


def _int32(values: np.ndarray) -> np.ndarray:
    return np.minimum(values, np.iinfo(np.int32).max).astype(np.int32)
