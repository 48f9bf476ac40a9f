"""The tokenizers of a workflow's models: the common one, or one or a chat template of a model's own.

Token ids mean the same for all models of a workflow, since teachers score the ids that students generate;
``vocabulary_difference`` finds where two tokenizers disagree. Chat templates may differ.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import atomic_directory
from megatron_s2d.config.hf_config import published_files
from megatron_s2d.config.needed_stages import TokenizerChoice, prompt_choices, tokenizer_choice
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError

ASSETS_NAME = "hf"
"""Folder of a Megatron checkpoint with the files that belong beside Hugging Face weights."""

GENERATION_NAME = "generation_config.json"

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LARGEST_TEMPLATE = 2**20


class ModelTokenizers:
    """Loads each tokenizer of a workflow once."""

    def __init__(self, config: WorkflowConfig, cache_dir: Path):
        """cache_dir: see ``load_tokenizer``."""
        self._config, self._cache_dir = config, cache_dir
        self._loaded: dict[TokenizerChoice, Any] = {}

    @property
    def common(self) -> Any:
        """The workflow's tokenizer."""
        return self.load(TokenizerChoice(self._config.tokenizer, None))

    def of_model(self, model_name: str) -> Any:
        """Return the tokenizer of an entry of ``models``, with its chat template."""
        try:
            return self.load(tokenizer_choice(self._config, model_name))
        except UserError as error:
            raise UserError(f"models.{model_name}: {error}") from None

    def of_prompts(self) -> list[Any]:
        """Return the distinct tokenizers that render prompts somewhere in the workflow."""
        return [self.load(choice) for choice in prompt_choices(self._config)]

    def load(self, choice: TokenizerChoice) -> Any:
        """Return a tokenizer; raise ``UserError`` if it or its chat template cannot be loaded."""
        if choice not in self._loaded:
            tokenizer = load_tokenizer(choice.tokenizer, self._cache_dir)
            if choice.chat_template is not None:
                tokenizer.chat_template = read_template(choice.chat_template)
            self._loaded[choice] = tokenizer
        return self._loaded[choice]


def read_template(path: Path) -> str:
    """Return the text of a chat template's file; raise ``UserError`` if it cannot be read as text."""
    try:
        content = path.read_bytes()
        if len(content) > _LARGEST_TEMPLATE:
            raise UserError(f"{path}: {len(content)} bytes are too many for a chat template")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: the chat template cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the chat template is not UTF-8 text") from None


def write_assets(tokenizer: Any, source: Path | None, checkpoint: Path) -> None:
    """Write the tokenizer, with its chat template, and how a model ends, for exports; unless they are there.

    source: directory that the model started from, with its ``generation_config.json``.
    """
    directory = checkpoint / ASSETS_NAME
    if directory.exists():
        return
    with atomic_directory(directory) as partial:
        tokenizer.save_pretrained(partial)
        if source is not None and (published_files(source) / GENERATION_NAME).is_file():
            shutil.copyfile(published_files(source) / GENERATION_NAME, partial / GENERATION_NAME)


def parse_tokenizer(content: bytes, source: str) -> Any:
    """Return the tokenizer of a tokenizer.json; ``UserError`` that names ``source`` if it is none."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content.decode()))
    except Exception as error:  # the Rust parser's own, for any fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: its tokenizer cannot be read ({reason})") from None


def has_tokenizer(directory: Path) -> bool:
    """Return whether a model's directory has files of a tokenizer beside the weights."""
    return any((directory / name).exists() for name in _VOCABULARY_FILES)


def vocabulary_difference(left: Any, right: Any) -> str | None:
    """Return in words the first ids that stand for different tokens, or how else texts get other ids; None if nowhere.

    Tokens that only one of the two has are no difference: see ``extra_tokens``.
    """
    tokens_left, tokens_right = (_tokens_by_id(tokenizer) for tokenizer in (left, right))
    ids = sorted(tokens_left.keys() & tokens_right.keys())
    differing = [index for index in ids if tokens_left[index] != tokens_right[index]]
    if differing:
        examples = ", ".join(f"{i} is {tokens_left[i]!r} and {tokens_right[i]!r}" for i in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        return f"id {examples}{more}"
    parts_left, parts_right = (_parts(tokenizer) for tokenizer in (left, right))
    for name in parts_left.keys() & parts_right.keys():
        if parts_left[name] != parts_right[name]:
            return f"the same ids, but {name} {_first_difference(parts_left[name], parts_right[name])}"
    return None


def extra_tokens(left: Any, right: Any) -> list[int]:
    """Return the sorted ids that only one of two tokenizers has a token for."""
    return sorted(_tokens_by_id(left).keys() ^ _tokens_by_id(right).keys())


def _tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Return what turns a text into ids, beside the vocabulary; empty for a tokenizer without a Rust backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    core = json.loads(backend.to_str())
    model = {key: value or None for key, value in core["model"].items() if key not in ("vocab", "merges")}
    return {
        "merges": core["model"].get("merges") or [],
        "the normaliser": core.get("normalizer"),
        "the pre-tokenizer": _without_offsets(core.get("pre_tokenizer")),
        "the model": model,
    }


def _without_offsets(value: Any) -> Any:
    """Leave out a setting that changes only where in the text a token is."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value


def _first_difference(left: Any, right: Any) -> str:
    if isinstance(left, list) and isinstance(right, list):
        pairs = [*zip(left, right, strict=False), *((item, None) for item in left[len(right) :])]
        pairs += [(None, item) for item in right[len(left) :]]
        a, b = next(pair for pair in pairs if pair[0] != pair[1])
        return f"differ ({_short(a)} and {_short(b)})"
    return f"differs ({_short(left)} and {_short(right)})"


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
