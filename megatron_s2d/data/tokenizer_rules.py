"""What the pipeline of a tokenizer proves of every text: at most how many tokens, and which texts have the same ones.

A pipeline (normalizer, pre-tokenizer, model, added tokens, as ``tokenizer.json`` has them) is recognized as a whole or
not at all; of any other one nothing is claimed, and its texts are tokenized. No torch here.

n: texts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.data.text_columns import byte_lengths, with_bytes, with_parts

if TYPE_CHECKING:
    import pyarrow

_NFC_GROWTH = 3  # of UTF-8, at most (Unicode's FAQ on normalization)
_UNKNOWN_GROWTH = 2  # tokens of a byte whose character, of two bytes, falls back to bytes
_UTF8_BYTES = np.r_[0x00:0xC0, 0xC2:0xF5]  # those that occur in UTF-8
_ASCII_END = 0x80


@dataclasses.dataclass(frozen=True)
class WordRules:
    """Texts are split at white space, and each word is a token: ``word_ids`` of ``data/text_tokens.py``."""

    vocabulary: Mapping[str, int]
    unknown: int | None  # the token of every other word
    added: frozenset[str]  # that are found in a text before it is split


@dataclasses.dataclass(frozen=True)
class ByteRules:
    """Byte-level BPE: the tokens of a text are pieces of its UTF-8, one after the other.

    So it has at most as many tokens as bytes, and no other text has the same tokens, unless it is not ``plain``.
    """

    composes: bool  # NFC before anything else
    missing: np.ndarray  # [256] mask of bytes without a token
    stripping: frozenset[str]  # added tokens that take the white space beside them

    def most_tokens(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return how many tokens each text has at most, special ones aside, int64 [n]."""
        most = byte_lengths(texts)
        if self.composes:
            most = np.where(self._beyond_ascii(texts), most * _NFC_GROWTH, most)
        return np.where(with_bytes(texts, self.missing), most * _UNKNOWN_GROWTH, most)

    def plain(self, texts: pyarrow.StringArray) -> np.ndarray:
        """Return the mask [n] of the texts whose tokens are those of no other text, as ``normal`` writes them."""
        return ~(with_bytes(texts, self.missing) | with_parts(texts, self.stripping))

    def normal(self, texts: pyarrow.StringArray) -> pyarrow.StringArray:
        """Return the texts as the model reads them."""
        import pyarrow.compute

        if not self.composes or not self._beyond_ascii(texts).any():
            return texts
        return pyarrow.compute.utf8_normalize(texts, form="NFC")

    def _beyond_ascii(self, texts: pyarrow.StringArray) -> np.ndarray:
        return with_bytes(texts, np.arange(256) >= _ASCII_END)


def rules_of(backend: Any) -> WordRules | ByteRules | None:
    """Return what holds of a tokenizer of the library ``tokenizers``; None for a pipeline that is not known here."""
    core = json.loads(backend.to_str())
    model, added = core["model"], core["added_tokens"]
    if model.get("type") == "WordLevel":
        if core["normalizer"] is not None or (core["pre_tokenizer"] or {}).get("type") != "WhitespaceSplit":
            return None
        vocabulary = model["vocab"]
        return WordRules(vocabulary, vocabulary.get(model["unk_token"]), frozenset(token["content"] for token in added))
    if model.get("type") != "BPE" or not _splits_bytes(core["pre_tokenizer"]):
        return None
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    normalizers = _steps(core["normalizer"], "normalizers")
    if any(step != {"type": "NFC"} for step in normalizers):
        return None
    characters = _characters_of_bytes()
    missing = np.zeros(256, dtype=bool)
    missing[_UTF8_BYTES] = [characters[byte] not in model["vocab"] for byte in _UTF8_BYTES]
    stripping = frozenset(token["content"] for token in added if token["lstrip"] or token["rstrip"])
    return ByteRules(bool(normalizers), missing, stripping)


def _steps(settings: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return the steps of a sequence, or the one that is not a sequence."""
    if settings is None:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    return [step for part in settings[name] for step in _steps(part, name)]


def _splits_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Return whether a pre-tokenizer splits texts, loses nothing, and writes bytes as characters at the end."""
    *before, last = _steps(pre_tokenizer, "pretokenizers") or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    return all(
        step["type"] == "Digits" or (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed")
        for step in before
    )


def _characters_of_bytes() -> dict[int, str]:
    """Return the character that stands for each byte: itself if it is printed, else one beyond 255, in turn."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + position) for position, byte in enumerate(others)}
