"""Checks whether an SGLang server fits the trainer's model and the stage, before it receives weights.

Token ids are sent, so a server of another tokenizer would go unnoticed until a stop string does not stop; one of
another vocabulary ends itself when weights arrive; one with a smaller context truncates the longest responses only. A
difference is a ``UserError`` of one line that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.lora import LoraConfig, server_arguments
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import SERVER_SPARE_POSITIONS, ServerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.served.backend import InvalidReply, ServerRequirements
from megatron_s2d.rollout.served.startup_checks import http_request
from megatron_s2d.rollout.sglang.protocol import SPECIFIED_PARAMS, SglangProtocol, parse_replies, score_options

# Digits, runs of blanks, letters beyond ASCII and marks that tokenizers often have tokens for.
_TEXTS = (
    "Let x = 3.14159; then 2*x + 27 = 33.28318.",
    "def f(x):\n    return  x ** 2\t# \\boxed{42}\n\n",
    "Zażółć gęślą jaźń, 東京, Привет, 🙂",
    "<|im_start|>user\n<think>\n</think>",
)
_MESSAGES = [{"role": "user", "content": "What is 2 + 3 ?"}]
_DTYPES = {"half": "float16", "float": "float32"}  # other names of SGLang


class SglangCompatibility:
    """Compares servers with model, tokenizer and precision of the trainer."""

    def __init__(
        self,
        spec: ModelSpec,
        requirements: ServerRequirements,
        settings: ServerConfig,
        *,
        dtype: str,
        tokenizer: Any,
        attached: bool,
        headers: Mapping[str, str],
        lora: LoraConfig | None = None,
    ):
        """dtype: the trainer's. attached: the server was started by somebody else. headers: of every request.

        lora: of adapters that the server will load; None: it loads none.
        """
        self._headers, self._lora = headers, lora
        self._spec, self._requirements, self._settings = spec, requirements, settings
        self._dtype, self._tokenizer, self._attached = dtype, tokenizer, attached

    def check(self, url: str) -> None:
        """Raise ``UserError`` for a server that does not fit; ``ServerUnreachable``."""
        model, info = self._get_json(url, "/model_info"), self._get_json(url, "/server_info")
        if model.get("is_generation") is False:
            raise UserError(f"{url} serves embeddings; start it without --is-embedding")
        served, expected = model.get("architectures"), hf_config_from_spec(self._spec, self._dtype)["architectures"]
        if served is not None and served != expected:
            raise UserError(
                f"{url} serves a {' '.join(served)}, and the model is a {' '.join(expected)}; start it with a "
                "checkpoint of this model"
            )
        if unspecified := set(model.get("preferred_sampling_params") or {}) - SPECIFIED_PARAMS:
            raise UserError(
                f"{url} adds sampling parameters of its own to every request ({', '.join(sorted(unspecified))}); start "
                "it without --preferred-sampling-params"
            )
        if self._requirements.routed_experts and not info.get("enable_return_routed_experts"):
            raise UserError(
                f"{url} does not record the experts of tokens, which routing replay needs: start it with "
                "--enable-return-routed-experts, or set rollout.routing_replay to false"
            )
        self._check_lora(url, info)
        self._check_context_length(url, info)
        self._check_vocabulary(url)
        if self._attached and self._settings.weight_check_tolerance is None:
            self._check_precision(url, info)
        if info.get("skip_tokenizer_init"):
            if self._requirements.params is not None and self._requirements.params.stop_strings:
                raise UserError(
                    f"{url} has no tokenizer, which stop strings need; start it without --skip-tokenizer-init"
                )
        elif self._tokenizer is not None:
            self._check_tokenizer(url)
            if self._attached:
                self._check_template(url)
        if self._attached and self._headers:
            self._warn_if_open(url)

    def _check_lora(self, url: str, info: dict[str, Any]) -> None:
        """Refuse a server that cannot load adapters of this rank beside these matrices."""
        if self._lora is None:
            return
        targets = set(info.get("lora_target_modules") or ())
        fits = "all" in targets or targets >= set(self._lora.projections)
        if not info.get("enable_lora") or (info.get("max_lora_rank") or 0) < self._lora.rank or not fits:
            raise UserError(
                f"{url} loads no LoRA adapters of rank {self._lora.rank} of {', '.join(self._lora.projections)}: start "
                f"it with {' '.join(server_arguments([self._lora]))}, or set rollout.sglang.lora_sync to merged"
            )

    def _check_context_length(self, url: str, info: dict[str, Any]) -> None:
        """Compare the context; a prompt may have one token less than max_req_input_len, the context less 6 (0.5.17)."""
        limit, required = info.get("max_req_input_len"), self._requirements.max_length
        max_length = None if limit is None else limit + 4
        if max_length is not None and max_length < required:
            raise UserError(
                f"{url} serves sequences of at most {max_length} tokens, and the stage has some of {required}: start "
                f"it with --context-length {required + SERVER_SPARE_POSITIONS} and as many tokens of keys and values"
            )

    def _check_vocabulary(self, url: str) -> None:
        """Request a log-probability of the last token id, and of the one after it: the server checks ids only."""
        size = self._spec.vocab_size
        for token, exists in ((size - 1, True), (size, False)):
            body = {
                "input_ids": [0],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "token_ids_logprob": [token],
            }
            status, text = self._request("POST", url, "/generate", body)
            if (status == 200) != exists or status not in (200, 400):
                raise UserError(
                    f"{url} serves a vocabulary of another size than the model's {size} (status {status} for token "
                    f"{token}: {text[:200]}); start it with a checkpoint of this model"
                )

    def _check_precision(self, url: str, info: dict[str, Any]) -> None:
        for name in ("dtype", "kv_cache_dtype", "quantization"):
            value = _DTYPES.get(info.get(name), info.get(name))
            if value not in (None, "auto", self._dtype):
                raise UserError(
                    f"{url} has {name} {value}, and the trainer computes in {self._dtype}: start it with --dtype "
                    f"{self._dtype}, or allow a difference in rollout.server.weight_check_tolerance"
                )

    def _check_tokenizer(self, url: str) -> None:
        """Compare the ids of a few texts. (/tokenize fails for tokenizers without a maximum length.)"""
        texts = [*_TEXTS, *map(str, self._tokenizer.all_special_tokens)]
        if self._requirements.params is not None:
            texts += self._requirements.params.stop_strings
        texts = [text for text in texts if self._tokenizer(text)["input_ids"]]
        status, content = self._request("POST", url, "/generate", score_options() | {"text": texts})
        if status != 200:
            raise UserError(f"{url} does not tokenize texts (status {status}: {content[:200]})")
        try:
            replies = parse_replies(content.encode())
        except InvalidReply as error:
            raise UserError(f"{url} does not tokenize texts ({error})") from None
        protocol = SglangProtocol(self._spec.vocab_size)
        for text, reply in zip(texts, replies, strict=False):
            expected = self._tokenizer(text)["input_ids"]
            served = [token for _, token, _ in reply.input_log_probs]
            if served != protocol.reported_ids(expected):
                raise UserError(
                    f"{url} has another tokenizer than the trainer: {text!r} is {_shorten(served)} there and "
                    f"{_shorten(expected)} here; start it with the trainer's (--tokenizer-path)"
                )

    def _check_template(self, url: str) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            return
        body = {"model": "default", "messages": _MESSAGES, "max_tokens": 1, "return_prompt_token_ids": True}
        status, text = self._request("POST", url, "/v1/chat/completions", body)
        if status != 200:
            return  # the server renders no conversations
        rendered = self._tokenizer.apply_chat_template(_MESSAGES, add_generation_prompt=True, tokenize=False)
        expected = self._tokenizer.encode(rendered, add_special_tokens=False)
        served = _parse_json(url, "/v1/chat/completions", text).get("choices", [{}])[0].get("prompt_token_ids")
        if served != expected:
            raise UserError(
                f"{url} has another chat template than the trainer's tokenizer: a question is {_shorten(served)} there "
                f"and {_shorten(expected)} here; start it with the trainer's tokenizer and without --chat-template"
            )

    def _warn_if_open(self, url: str) -> None:
        """Print that a server answers without the key, too."""
        try:
            http_request("GET", url, "/model_info", headers={}, timeout=self._settings.request_timeout_seconds)
        except UserError:  # refused, as it should be
            return
        print(f"{url} also answers requests without the API key: start it with SGLang's --api-key", flush=True)

    def _get_json(self, url: str, path: str) -> dict[str, Any]:
        status, text = self._request("GET", url, path)
        if status != 200:
            raise UserError(f"{url}{path}: status {status}: {text[:200]}; is this an SGLang 0.5.17 server?")
        return _parse_json(url, path, text)

    def _request(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        return http_request(
            method, url, path, body, headers=self._headers, timeout=self._settings.request_timeout_seconds
        )


def _parse_json(url: str, path: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{url}{path} answers {text[:100]!r}; is this an SGLang 0.5.17 server?")
    return document


def _shorten(token_ids: Any) -> str:
    return f"{token_ids[:8]}" + (" ..." if len(token_ids) > 8 else "") if isinstance(token_ids, list) else "nothing"
