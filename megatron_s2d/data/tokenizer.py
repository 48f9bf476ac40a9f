"""Loads tokenizers (of the embedded task, a local directory or a hub name) and computes their fingerprints."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from megatron_s2d.artifacts.files import atomic_directory
from megatron_s2d.data.tasks import tokens_of
from megatron_s2d.errors import UserError

_TASK = "task:modular_arithmetic"
_DEFAULT_MODULUS = 17
_CONVERSATION = [{"role": "user", "content": "1 + 1 ="}]
_TEMPLATE_SECONDS = 10.0
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
        # Never its own code, and never a question about it on standard input.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # an edited tokenizer file fails in any way: KeyError, AttributeError, the Rust parser's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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


def template_fingerprint(tokenizer: Any, date: datetime.date) -> str:
    """Return the SHA-256 of the chat template and of a conversation that it renders on ``date``.

    The text catches what the template alone does not say: the date, and special tokens that the template names.
    """
    template = getattr(tokenizer, "chat_template", None)
    content = {"template": template, "text": template and render(_CONVERSATION, tokenizer, date)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def render(messages: list[dict[str, str]], tokenizer: Any, date: datetime.date) -> str:
    """Render the conversation with the tokenizer's chat template, thinking off; without a template, its one message.

    Templates that ask for today's date get ``date``. Raises ``UserError`` if the template rejects the conversation
    (some do not support system messages), fails or does not end, and for several messages without a template.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1:
            raise UserError("the tokenizer has no chat template: use one message per prompt and no system_prompt")
        return messages[-1]["content"]
    roles = ", ".join(message["role"] for message in messages)
    try:
        with time_limit(_TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
                strftime_now=datetime.datetime.combine(date, datetime.time()).strftime,
            )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template rejects a conversation of {roles}: {error}") from error
    except TimeoutError:
        raise UserError(
            f"the chat template did not end within {_TEMPLATE_SECONDS} s on a conversation of {roles}"
        ) from None
    except Exception as error:  # templates are programs: division by zero, missing attributes, recursion
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the chat template fails on a conversation of {roles} ({reason})") from error


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` inside the block after ``seconds``; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
