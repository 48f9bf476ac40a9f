"""What a server must be before it gets weights, and must be able to do before a stage begins.

Token ids are what travels, so a server of another tokenizer would go unnoticed until a stop string does not stop; one
of another vocabulary ends itself when weights arrive; one with less room cuts the longest responses only. A difference
is a ``UserError`` of one line that says which. That weights have arrived is proven elsewhere (``probes.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import SERVER_SPARE_POSITIONS, ServerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.served import scoring
from megatron_s2d.rollout.served.server_pool import Server, ServerPool
from megatron_s2d.rollout.served.weight_checks import named_ids
from megatron_s2d.rollout.sglang.protocol import (
    InvalidReply,
    checked_log_probs,
    generate_body,
    parse_replies,
    parse_reply,
    score_body,
)

Score = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
# Digits, runs of blanks, letters beyond ASCII and marks that tokenizers often have tokens for.
_TEXTS = (
    "Let x = 3.14159; then 2*x + 27 = 33.28318.",
    "def f(x):\n    return  x ** 2\t# \\boxed{42}\n\n",
    "Zażółć gęślą jaźń, 東京, Привет, 🙂",
    "<|im_start|>user\n<think>\n</think>",
)
_MESSAGES = [{"role": "user", "content": "What is 2 + 3 ?"}]
# What every request says itself; other sampling parameters that a server prefers would be used unasked.
_SAID = {"max_new_tokens", "temperature", "top_p", "top_k", "sampling_seed", "skip_special_tokens", "no_stop_trim"}
_DTYPES = {"half": "float16", "float": "float32"}  # other names of SGLang
_PROMPT_TOKENS, _NEW_TOKENS, _DRAWS = 8, 16, 4


@dataclasses.dataclass(frozen=True)
class ServerRequirements:
    """What a stage will ask of its servers; the default is nothing."""

    max_length: int = 0  # tokens of its longest sequence, prompt and response
    params: SamplingParams | None = None  # how responses are sampled; None: none are
    top_k: int | None = None  # given tokens are scored, with so many likeliest ones at each (0: none); None: nothing is


class Unreachable(Exception):
    """The server does not answer now."""


class ServerChecks:
    """``dtype``: the trainer's. ``attached``: the server was started by somebody else."""

    def __init__(
        self,
        spec: ModelSpec,
        needs: ServerRequirements,
        settings: ServerConfig,
        *,
        dtype: str,
        tokenizer: Any,
        attached: bool,
    ):
        self._spec, self._needs, self._settings = spec, needs, settings
        self._dtype, self._tokenizer, self._attached = dtype, tokenizer, attached
        self._compared: set[str] = set()  # servers that are what the trainer takes them for

    def check_compatibility(self, servers: Sequence[Server]) -> list[Server]:
        """Those of ``servers`` that are what the trainer takes them for; collective.

        ``UserError`` for one that is not; one that does not answer has a problem.
        """
        new = [server.url for server in servers if server.url not in self._compared]

        def compare() -> dict[str, str]:
            problems = {}
            for url in new:
                try:
                    self.compare(url)
                except Unreachable as error:
                    problems[url] = str(error)
            return problems

        problems = broadcast_from_rank0(compare) if new else {}
        self._compared.update(url for url in new if url not in problems)
        for server in servers:
            server.problem = problems.get(server.url, server.problem)
        return [server for server in servers if server.url not in problems]

    def dry_run(self, servers: Sequence[Server], label: str, score: Score, tolerance: float) -> None:
        """Have every server without a problem do once what the stage needs, or raise ``UserError``; collective.

        score: the trainer's log-probabilities of samples, collective.
        """
        urls = [server.url for server in servers if not server.problem]

        def draw() -> list[list[Sample]]:
            try:
                return [self.sample_probe(url, label) for url in urls]
            except Unreachable as error:
                raise UserError(f"an SGLang server does not sample before the first step: {error}") from None

        for url, samples in zip(urls, [] if self._needs.params is None else broadcast_from_rank0(draw), strict=False):
            here, at_one = score(samples), score([dataclasses.replace(sample, temperature=1.0) for sample in samples])
            broadcast_from_rank0(functools.partial(self.compare_log_probs, url, samples, here, at_one, tolerance))
        if self._needs.top_k is not None:
            broadcast_from_rank0(lambda: [self.score_max_length(url, label) for url in urls])

    # ------------------------------------------------------------------ before weights

    def compare(self, url: str) -> None:
        """Whether the server is one for this model and stage; ``UserError``, or ``Unreachable``."""
        model, info = self._json("GET", url, "/model_info"), self._json("GET", url, "/server_info")
        if model.get("is_generation") is False:
            raise UserError(f"{url} serves embeddings; start it without --is-embedding")
        found, ours = model.get("architectures"), hf_config_from_spec(self._spec, self._dtype)["architectures"]
        if found is not None and found != ours:
            raise UserError(f"{url} serves a {' '.join(found)}, and the model is a {' '.join(ours)}; start it with a "
                            "checkpoint of this model")  # fmt: skip
        if unasked := set(model.get("preferred_sampling_params") or {}) - _SAID:
            raise UserError(
                f"{url} adds sampling parameters of its own to every request ({', '.join(sorted(unasked))}); start it "
                "without --preferred-sampling-params"
            )
        self._compare_context_length(url, info)
        self._compare_vocabulary(url)
        if self._attached and self._settings.weight_check_tolerance is None:
            self._compare_precision(url, info)
        if info.get("skip_tokenizer_init"):
            if self._needs.params is not None and self._needs.params.stop_strings:
                raise UserError(f"{url} has no tokenizer, which stop strings need; start it without "
                                "--skip-tokenizer-init")  # fmt: skip
        elif self._tokenizer is not None:
            self._compare_tokenizer(url)
            if self._attached:
                self._compare_template(url)

    def _compare_context_length(self, url: str, info: dict[str, Any]) -> None:
        """A prompt may have one token less than max_req_input_len, which is 6 less than the whole (SGLang 0.5.17)."""
        limit, needed = info.get("max_req_input_len"), self._needs.max_length
        room = None if limit is None else limit + 4
        if room is not None and room < needed:
            raise UserError(
                f"{url} has room for sequences of {room} tokens, and the stage has some of {needed}: start it with "
                f"--context-length {needed + SERVER_SPARE_POSITIONS} and as many tokens of keys and values"
            )

    def _compare_vocabulary(self, url: str) -> None:
        """The server checks the ids of log-probabilities that are asked for, and does nothing else with them."""
        size = self._spec.vocab_size
        for token, fits in ((size - 1, True), (size, False)):
            body = {
                "input_ids": [0],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "token_ids_logprob": [token],
            }
            status, text = self._ask("POST", url, "/generate", body)
            if (status == 200) != fits or status not in (200, 400):
                raise UserError(
                    f"{url} serves a vocabulary of another size than the model's {size} (status {status} for token "
                    f"{token}: {text[:200]}); start it with a checkpoint of this model"
                )

    def _compare_precision(self, url: str, info: dict[str, Any]) -> None:
        for name in ("dtype", "kv_cache_dtype", "quantization"):
            found = _DTYPES.get(info.get(name), info.get(name))
            if found not in (None, "auto", self._dtype):
                raise UserError(
                    f"{url} has {name} {found}, and the trainer computes in {self._dtype}: start it with --dtype "
                    f"{self._dtype}, or say in rollout.server.weight_check_tolerance how far they may be apart"
                )

    def _compare_tokenizer(self, url: str) -> None:
        """The ids of a few texts. (The endpoint /tokenize fails for tokenizers that name no longest length.)"""
        texts = [*_TEXTS, *map(str, self._tokenizer.all_special_tokens)]
        if self._needs.params is not None:
            texts += self._needs.params.stop_strings
        texts = [text for text in texts if self._tokenizer(text)["input_ids"]]
        body = {key: value for key, value in score_body([]).items() if key not in ("rid", "input_ids")}
        status, content = self._ask("POST", url, "/generate", body | {"text": texts})
        if status != 200:
            raise UserError(f"{url} does not tokenize texts (status {status}: {content[:200]})")
        try:
            replies = parse_replies(content.encode())
        except InvalidReply as error:
            raise UserError(f"{url} does not tokenize texts ({error})") from None
        for text, reply in zip(texts, replies, strict=False):
            ours = self._tokenizer(text)["input_ids"]
            theirs = [token for _, token, _ in reply.meta_info.input_token_logprobs]
            if theirs != named_ids(ours, self._spec.vocab_size):
                raise UserError(
                    f"{url} has another tokenizer than the trainer: {text!r} is {_shown(theirs)} there and "
                    f"{_shown(ours)} here; start it with the trainer's (--tokenizer-path)"
                )

    def _compare_template(self, url: str) -> None:
        if not getattr(self._tokenizer, "chat_template", None):
            return
        body = {"model": "default", "messages": _MESSAGES, "max_tokens": 1, "return_prompt_token_ids": True}
        status, text = self._ask("POST", url, "/v1/chat/completions", body)
        if status != 200:
            return  # the server renders no conversations
        rendered = self._tokenizer.apply_chat_template(_MESSAGES, add_generation_prompt=True, tokenize=False)
        ours = self._tokenizer.encode(rendered, add_special_tokens=False)
        theirs = _parsed(url, "/v1/chat/completions", text).get("choices", [{}])[0].get("prompt_token_ids")
        if theirs != ours:
            raise UserError(
                f"{url} has another chat template than the trainer's tokenizer: a question is {_shown(theirs)} there "
                f"and {_shown(ours)} here; start it with the trainer's tokenizer and without --chat-template"
            )

    # ------------------------------------------------------------------ with weights, before the first step

    def sample_probe(self, url: str, label: str) -> list[Sample]:
        """A few short responses as the stage samples them, with the log-probabilities that the server reports."""
        spec, generator = self._spec, np.random.default_rng(1)
        length = min(_PROMPT_TOKENS, spec.max_position_embeddings // 2)
        limit = min(_NEW_TOKENS, spec.max_position_embeddings - length)
        params = dataclasses.replace(self._needs.params, max_new_tokens=limit, stop_token_ids=(), stop_strings=())
        found = []
        for number in range(_DRAWS):
            token_ids = generator.integers(0, spec.vocab_size, length)
            prompt = Prompt(f"draw{number}", token_ids, "", "probe", None, None)
            request = Request(f"draw{number}", prompt, prompt.id, number, params)
            status, text = self._ask("POST", url, "/generate", generate_body(request))
            if status != 200:
                raise UserError(f"{url} does not sample as the stage needs it (status {status}: {text[:200]})")
            found.append(_drawn(url, request, text, label))
        return found

    def compare_log_probs(
        self, url: str, samples: Sequence[Sample], here: Sequence[np.ndarray], at_one: Sequence[np.ndarray],
        tolerance: float,
    ) -> None:  # fmt: skip
        """Compare with the trainer's log-probabilities at the temperature of the samples, and at 1; ``UserError``."""
        temperature = self._needs.params.temperature
        masks = [sample.response_mask for sample in samples]
        flat = [
            np.concatenate([values[mask] for values, mask in zip(side, masks, strict=True)])
            for side in ([sample.rollout_log_probs for sample in samples], here, at_one)
        ]
        gap, gap_at_one = (np.abs(flat[0] - side) for side in flat[1:])
        # In bfloat16 the tolerance is wide; of the two the right temperature is the nearer one, if they are far apart.
        is_of_one = temperature not in (0.0, 1.0) and gap.mean() > 2 * gap_at_one.mean()
        allowed = tolerance / min(1.0, temperature or 1.0)  # the logits' rounding is divided by it too
        if is_of_one or not gap.max() <= allowed:
            hint = ": they are those of temperature 1; is SGLANG_RETURN_ORIGINAL_LOGPROB set there?"
            raise UserError(
                f"{url} samples at temperature {temperature:g} with log-probabilities up to {gap.max():.1e} nats from "
                f"the trainer's (allowed: {allowed:.1e})" + (hint if is_of_one else "")
            )

    def score_max_length(self, url: str, label: str) -> None:
        """Have the longest sequence scored, with as many likeliest tokens as the stage will ask for."""
        needs, spec = self._needs, self._spec
        length = max(2, min(needs.max_length, spec.max_position_embeddings))
        sequence = np.random.default_rng(2).integers(0, spec.vocab_size, length)
        pool, reasons = ServerPool([url], self._settings), []
        try:
            if needs.top_k:
                _, reasons = scoring.top_tokens(pool, [sequence], label, spec.vocab_size, needs.top_k)
            else:
                _, reasons = scoring.score(pool, [sequence], label, spec.vocab_size)
        except UserError as error:
            reasons = [str(error)]
        if reasons:
            likeliest = f", with the {needs.top_k} likeliest at each," if needs.top_k else ""
            raise UserError(f"the teacher at {url} has to score sequences of {length} tokens{likeliest} and did not: "
                            f"{reasons[0]}")  # fmt: skip

    # ------------------------------------------------------------------ requests

    def _json(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, text = self._ask(method, url, path, body)
        if status != 200:
            raise UserError(f"{url}{path}: status {status}: {text[:200]}; is this an SGLang 0.5.17 server?")
        return _parsed(url, path, text)

    def _ask(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        try:
            reply = httpx.request(
                method, url + path, json=body, timeout=self._settings.request_timeout_seconds, trust_env=False
            )
        except httpx.HTTPError as error:
            raise Unreachable(f"{path}: {type(error).__name__}") from None
        if reply.status_code >= 500:
            raise Unreachable(f"{path}: status {reply.status_code}: {reply.text[:200]}")
        return reply.status_code, reply.text


def _drawn(url: str, request: Request, text: str, label: str) -> Sample:
    try:
        reply = parse_reply(text.encode())
        if reply.meta_info.weight_version != label:
            raise InvalidReply(f"weights '{reply.meta_info.weight_version}' instead of '{label}'")
        if len(reply.output_ids) != request.params.max_new_tokens:
            raise InvalidReply(f"{len(reply.output_ids)} tokens instead of {request.params.max_new_tokens}")
        reported = checked_log_probs(reply.meta_info.output_token_logprobs, reply.output_ids)
    except InvalidReply as error:
        raise UserError(f"{url} does not sample as the stage needs it ({error})") from None
    token_ids = np.concatenate([request.prompt.token_ids, np.array(reply.output_ids, dtype=np.int64)])
    mask = np.arange(len(token_ids)) >= len(request.prompt.token_ids)
    log_probs = np.zeros(len(token_ids), dtype=np.float32)
    log_probs[mask] = reported
    return Sample(
        id=request.id,
        prompt_id=request.id,
        group_id=request.group_id,
        domain="probe",
        seed=request.seed,
        token_ids=token_ids,
        response_mask=mask,
        temperature=request.params.temperature,
        finish_reason="length",
        rollout_log_probs=log_probs,
    )


def _parsed(url: str, path: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{url}{path} answers {text[:100]!r}; is this an SGLang 0.5.17 server?")
    return found


def _shown(token_ids: Any) -> str:
    return f"{token_ids[:8]}" + (" ..." if len(token_ids) > 8 else "") if isinstance(token_ids, list) else "nothing"
