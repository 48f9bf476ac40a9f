"""Loads tokenizers (of the embedded task, a local directory or a hub name) and computes their fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import atomic_directory
from megatron_s2d.data.tasks import tokens_of
from megatron_s2d.errors import UserError

_TASK = "task:modular_arithmetic"
_DEFAULT_MODULUS = 17
# Prompts of the task are plain text: the last message of a conversation.
_TASK_TEMPLATE = "{{ messages[-1]['content'] }}"


def load_tokenizer(name: str, cache_dir: Path) -> Any:
    """Load the Hugging Face tokenizer ``name``.

    ``task:modular_arithmetic`` (``/MODULUS`` for a modulus other than 17) is built and stored in ``cache_dir``;
    any other name is a directory or a hub name. Raises ``UserError`` if it cannot be loaded.
    """
    if name.startswith("task:"):
        return _task_tokenizer(name, cache_dir)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer '{name}' cannot be loaded ({reason}); give a directory or a hub name") from error


def _task_tokenizer(name: str, cache_dir: Path) -> Any:
    task, _, modulus = name.partition("/")
    if task != _TASK or (modulus and not modulus.isdigit()):
        raise UserError(f"tokenizer '{name}': unknown task; use {_TASK} or {_TASK}/MODULUS")
    from transformers import PreTrainedTokenizerFast

    directory = Path(cache_dir) / name.removeprefix("task:").replace("/", "_")
    if not directory.exists():
        with atomic_directory(directory) as partial:
            _build(int(modulus or _DEFAULT_MODULUS)).save_pretrained(partial)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _build(modulus: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(tokens_of(modulus))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=_TASK_TEMPLATE
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of vocabulary, merges, normaliser, pre-tokenizer and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(core, dict):
        core.pop("truncation", None)  # state of the last call
        core.pop("padding", None)
    content = {"core": core, "special": sorted(map(str, tokenizer.all_special_tokens)), "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of the chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
