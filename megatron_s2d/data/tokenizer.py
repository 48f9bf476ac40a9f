"""Loads tokenizers (of the embedded task, a local directory or a hub name) and computes their fingerprints."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_s2d.artifacts.files import atomic_directory, read_json_object
from megatron_s2d.config.hf_config import published_files
from megatron_s2d.data.tasks import tokens_of
from megatron_s2d.errors import UserError

_TASK = "task:modular_arithmetic"
_DEFAULT_MODULUS = 17
_MODULI = {str(value): value for value in range(3, 998)}  # those that the task's data may have
_CONVERSATION = [{"role": "user", "content": "1 + 1 ="}]
_TEMPLATE_SECONDS = 10.0
_LARGEST_TEXT = 100_000_000  # more than any prompt; a template that multiplies texts would fill the memory further on
# Prompts of the task are plain text: the last message of a conversation.
_TASK_TEMPLATE = "{{ messages[-1]['content'] }}"


def load_tokenizer(name: str, cache_dir: Path) -> Any:
    """Load the Hugging Face tokenizer ``name``.

    ``task:modular_arithmetic`` (``/MODULUS`` for a modulus other than 17) is built and stored in ``cache_dir``;
    any other name is a directory or a hub name. Raises ``UserError`` if it cannot be loaded.
    """
    if name.startswith("task:"):
        return _task_tokenizer(name, cache_dir)
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # its warnings are about its own settings, such as the spaces that it does not remove
    try:
        # Never its own code, and never a question about it on standard input.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # an edited tokenizer file fails in any way: KeyError, AttributeError, the Rust parser's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer '{name}' cannot be loaded ({reason}); give a directory or a hub name") from error


def _task_tokenizer(name: str, cache_dir: Path) -> Any:
    task, _, modulus = name.partition("/")
    if task != _TASK or (modulus and modulus not in _MODULI):
        raise UserError(f"tokenizer '{name}': unknown task; use {_TASK} or {_TASK}/MODULUS, with a modulus of 3 to 997")
    from transformers import PreTrainedTokenizerFast

    directory = Path(cache_dir) / name.removeprefix("task:").replace("/", "_")
    if not directory.exists():
        with atomic_directory(directory) as partial:
            _build(_MODULI.get(modulus, _DEFAULT_MODULUS)).save_pretrained(partial)
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


def stop_token_ids(tokenizer: Any, model_path: Path | None) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's end of sequence, and those of a published model.

    A model has them in ``generation_config.json``, else in ``config.json``. Raises ``UserError`` for none, and for
    other values than ids.
    """
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if model_path is not None:
        folder = published_files(model_path)
        for path in (folder / "generation_config.json", folder / "config.json"):
            document = read_json_object(path) if path.exists() else {}
            if "eos_token_id" in document:
                ids.update(_ids(document["eos_token_id"], path))
                break
    if not ids:
        raise UserError("the tokenizer has no end-of-sequence token: responses could not end; use another tokenizer")
    return tuple(sorted(ids))


def _ids(value: Any, path: Path) -> list[int]:
    """Return the ids of a field that holds one, a list of them or null; some files write 2.0 for 2."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        is_number = isinstance(item, int | float) and not isinstance(item, bool)
        if not is_number or item != item // 1 or item < 0:
            raise UserError(f"{path}: eos_token_id {value!r} is neither a token id nor a list of them")
    return [int(item) for item in values]


def end_of_message(tokenizer: Any, date: datetime.date) -> int | None:
    """Return the id of the special token with which the chat template ends a message of the assistant.

    None without a template or such a token, and if the template does not take messages of the assistant.
    """
    if tokenizer.chat_template is None:
        return None
    answer = "The result is 2"
    messages = [*_CONVERSATION, {"role": "assistant", "content": answer}]
    try:
        text = render(messages, tokenizer, date, add_generation_prompt=False)
    except UserError:
        return None
    _, found, rest = text.rpartition(answer)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found and rest else []
    return next((index for index in ids if index in special), None)


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


def has_conversations(tokenizer: Any) -> bool:
    """Return whether a chat template renders several messages: not without one, and not that of the embedded task."""
    return tokenizer.chat_template not in (None, _TASK_TEMPLATE)


def render(
    messages: list[dict[str, str]],
    tokenizer: Any,
    date: datetime.date,
    *,
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Render the conversation with the tokenizer's chat template; without a template, its one message.

    enable_thinking: what templates that ask for it are told. tools: that the template offers to the model, as JSON
    schemas. Templates that ask for today's date get ``date``. Raises ``UserError`` if the template rejects the
    conversation (some do not support system messages), fails or does not end, and for several messages without a
    template.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1:
            raise UserError("the tokenizer has no chat template: use one message per prompt and no system_prompt")
        if tools:
            raise UserError("the tokenizer has no chat template, which tools need: use one of a chat model")
        return messages[-1]["content"]
    roles = ", ".join(message["role"] for message in messages)
    try:
        with time_limit(_TEMPLATE_SECONDS):
            text = _apply_template(
                messages,
                tokenizer,
                date,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                tools=tools,
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
    if len(text) > _LARGEST_TEXT:
        raise UserError(f"the chat template makes {len(text):,} characters of a conversation of {roles}")
    return text


def render_all(
    conversations: Sequence[list[dict[str, str]]],
    tokenizer: Any,
    date: datetime.date,
    *,
    enable_thinking: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> list[str]:
    """Render each conversation as ``render`` does; the call, its time limit and its variables are shared."""
    if tokenizer.chat_template is not None and conversations:
        try:
            with time_limit(_TEMPLATE_SECONDS):
                texts = _apply_template(
                    list(conversations),
                    tokenizer,
                    date,
                    add_generation_prompt=True,
                    enable_thinking=enable_thinking,
                    tools=tools,
                )
            if max(map(len, texts)) <= _LARGEST_TEXT:
                return texts
        except Exception:  # one of them is not rendered; ``render`` says why
            pass
    return [
        render(messages, tokenizer, date, enable_thinking=enable_thinking, tools=tools) for messages in conversations
    ]


def _apply_template(
    conversations: list[Any],
    tokenizer: Any,
    date: datetime.date,
    *,
    add_generation_prompt: bool,
    enable_thinking: bool,
    tools: list[dict[str, Any]] | None,
) -> Any:
    """Return the text of one conversation (a list of messages), or those of several."""
    return tokenizer.apply_chat_template(
        conversations,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
        **({} if tools is None else {"tools": tools}),
        strftime_now=datetime.datetime.combine(date, datetime.time()).strftime,
    )


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
