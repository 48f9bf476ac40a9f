"""Checks of servers before the first step: that they match the model and can answer the requests of the stage.

Without them a difference would show hours later: another tokenizer once a stop string does not stop, a smaller context
with the longest responses only. A difference is a ``UserError`` of one line that names it. That weights have arrived is
proven elsewhere (``weight_checks.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import ServerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import all_gather_json, first_error
from megatron_s2d.records import Prompt, Sample, sample_from_json, sample_to_json
from megatron_s2d.rollout.engine import Request
from megatron_s2d.rollout.served import scoring
from megatron_s2d.rollout.served.backend import (
    NEEDS_KEY,
    UNAUTHORIZED,
    InvalidReply,
    ServerBackend,
    ServerRequirements,
    ServerUnreachable,
)
from megatron_s2d.rollout.served.replies import check_weight_version, checked_log_probs
from megatron_s2d.rollout.served.routes import checked_routes
from megatron_s2d.rollout.served.server_pool import Server, ServerPool

Score = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
_PROMPT_TOKENS, _NEW_TOKENS, _NUM_PROBES = 8, 16, 4


class StartupChecks:
    """Compares servers with the trainer's model, and sends test requests like those of the stage."""

    def __init__(
        self, backend: ServerBackend, spec: ModelSpec, requirements: ServerRequirements, settings: ServerConfig
    ):
        self._backend, self._spec, self._requirements, self._settings = backend, spec, requirements, settings
        self._compatible: set[str] = set()  # addresses that have passed

    def check_compatibility(self, servers: Sequence[Server]) -> list[Server]:
        """Return those of ``servers`` that answer and fit model and stage; collective.

        Raises ``UserError`` for a server that does not fit; one that does not answer has a problem.
        """
        new = [server.url for server in servers if server.url not in self._compatible]

        def check(url: str) -> str:
            try:
                self._backend.check_server(url)
            except ServerUnreachable as error:
                return str(error)
            return ""

        problems = {url: problem for url, problem in self._by_senders(new, check).items() if problem}
        self._compatible.update(url for url in new if url not in problems)
        for server in servers:
            server.problem = problems.get(server.url, server.problem)
        return [server for server in servers if server.url not in problems]

    def dry_run(self, servers: Sequence[Server], weight_version: str, score: Score, tolerance: float) -> None:
        """Send every healthy server test requests like those of the stage; raise ``UserError`` on failure; collective.

        score: the trainer's log-probabilities of samples, collective.
        """
        urls = [server.url for server in servers if not server.problem]

        def sample(url: str) -> list[str]:
            try:
                return list(map(sample_to_json, self.sample_probe(url, weight_version)))
            except ServerUnreachable as error:
                name = self._backend.name
                raise UserError(f"an {name} server does not sample before the first step: {error}") from None

        if self._requirements.params is not None:
            probes = {url: list(map(sample_from_json, lines)) for url, lines in self._by_senders(urls, sample).items()}
            samples = [sample for url in urls for sample in probes[url]]
            expected = score(samples)
            expected_at_one = score([dataclasses.replace(sample, temperature=1.0) for sample in samples])
            starts = dict(zip(urls, itertools.accumulate([len(probes[url]) for url in urls], initial=0), strict=False))

            def compare(url: str) -> None:
                part = slice(starts[url], starts[url] + len(probes[url]))
                self.compare_log_probs(url, samples[part], expected[part], expected_at_one[part], tolerance)

            self._by_senders(urls, compare)
        if self._requirements.top_k is not None:
            self._by_senders(urls, lambda url: self.score_max_length(url, weight_version))

    def _by_senders[Result](self, urls: Sequence[str], check: Callable[[str], Result]) -> dict[str, Result]:
        """Return address -> ``check`` of it, a JSON value, which the sender to that server has called; collective.

        A ``UserError`` of one is raised on all ranks.
        """
        if not urls:
            return {}
        results: dict[str, Result] = {}
        refusal = None
        try:
            for url in self._backend.senders.own(urls):
                results[url] = check(url)
        except UserError as error:
            refusal = str(error)
        if (message := first_error(refusal)) is not None:
            raise UserError(message)
        return {url: result for of_sender in all_gather_json(results) for url, result in of_sender.items()}

    def sample_probe(self, url: str, weight_version: str) -> list[Sample]:
        """Return a few short responses as the stage samples them, with the log-probabilities of the server."""
        spec, generator = self._spec, np.random.default_rng(1)
        length = min(_PROMPT_TOKENS, spec.max_position_embeddings // 2)
        limit = min(_NEW_TOKENS, spec.max_position_embeddings - length)
        params = dataclasses.replace(
            self._requirements.params, max_new_tokens=limit, stop_token_ids=(), stop_strings=()
        )
        samples = []
        for number in range(_NUM_PROBES):
            token_ids = generator.integers(0, spec.vocab_size, length)
            prompt = Prompt(f"draw{number}", token_ids, "", "probe", None, None)
            request = Request(f"draw{number}", prompt, prompt.id, number, params)
            call = self._backend.protocol.generate(request)
            headers, timeout = self._backend.protocol.headers, self._settings.request_timeout_seconds
            status, text = http_request("POST", url, call.path, call.body, headers=headers, timeout=timeout)
            if status != 200:
                raise UserError(f"{url} does not sample as the stage needs it (status {status}: {text[:200]})")
            samples.append(self._probe_sample(url, request, text, weight_version))
        return samples

    def compare_log_probs(
        self,
        url: str,
        samples: Sequence[Sample],
        expected: Sequence[np.ndarray],
        expected_at_one: Sequence[np.ndarray],
        tolerance: float,
    ) -> None:
        """Compare with the trainer's log-probabilities at the samples' temperature, and at 1; ``UserError``."""
        temperature = self._requirements.params.temperature
        masks = [sample.response_mask for sample in samples]
        reported, trainer, trainer_at_one = (
            np.concatenate([values[mask] for values, mask in zip(side, masks, strict=True)])
            for side in ([sample.rollout_log_probs for sample in samples], expected, expected_at_one)
        )
        difference, difference_at_one = np.abs(reported - trainer), np.abs(reported - trainer_at_one)
        # In bfloat16 the tolerance is wide; of the two the right temperature is the nearer one, if they are far apart.
        ignores_temperature = temperature not in (0.0, 1.0) and difference.mean() > 2 * difference_at_one.mean()
        allowed = tolerance / min(1.0, temperature or 1.0)  # the rounding of logits is divided by it too
        if ignores_temperature or not difference.max() <= allowed:
            hint = f": they are those of temperature 1; {self._backend.protocol.original_log_probs_hint}"
            raise UserError(
                f"{url} samples at temperature {temperature:g} with log-probabilities up to {difference.max():.1e} "
                f"nats from the trainer's (allowed: {allowed:.1e})" + (hint if ignores_temperature else "")
            )

    def score_max_length(self, url: str, weight_version: str) -> None:
        """Score the longest sequence, with as many top tokens as the stage will request."""
        requirements, spec = self._requirements, self._spec
        length = max(2, min(requirements.max_length, spec.max_position_embeddings))
        sequence = np.random.default_rng(2).integers(0, spec.vocab_size, length)
        pool, reasons = ServerPool([url], self._settings, self._backend.protocol), []
        try:
            if requirements.top_k:
                _, reasons = scoring.top_tokens(
                    pool, [sequence], [0], weight_version, spec.vocab_size, requirements.top_k
                )
            else:
                _, reasons = scoring.score(pool, [sequence], [0], weight_version)
        except UserError as error:
            reasons = [str(error)]
        if reasons:
            likeliest = f", with the {requirements.top_k} likeliest at each," if requirements.top_k else ""
            raise UserError(
                f"the teacher at {url} has to score sequences of {length} tokens{likeliest} and did not: {reasons[0]}"
            )

    def _probe_sample(self, url: str, request: Request, text: str, weight_version: str) -> Sample:
        try:
            reply = self._backend.protocol.parse_reply(text.encode())
            check_weight_version(reply, weight_version)
            if len(reply.output_ids) != request.params.max_new_tokens:
                raise InvalidReply(f"{len(reply.output_ids)} tokens instead of {request.params.max_new_tokens}")
            reported = checked_log_probs(reply.output_log_probs, reply.output_ids)
            num_tokens = len(request.prompt.token_ids) + len(reply.output_ids) - 1
            routes = checked_routes(reply, num_tokens, self._spec) if self._requirements.routed_experts else None
        except InvalidReply as error:
            raise UserError(f"{url} does not sample as the stage needs it ({error})") from None
        token_ids = np.concatenate([request.prompt.token_ids, np.array(reply.output_ids, dtype=np.int64)])
        mask = np.arange(len(token_ids)) >= len(request.prompt.token_ids)
        log_probs = np.zeros(len(token_ids), dtype=np.float32)
        log_probs[mask] = reported
        return Sample(
            id=request.id,
            prompt_id=request.prompt.id,
            group_id=request.group_id,
            domain="probe",
            seed=request.seed,
            token_ids=token_ids,
            response_mask=mask,
            temperature=request.params.temperature,
            finish_reason="length",
            rollout_log_probs=log_probs,
            routed_experts=routes,
        )


def http_request(
    method: str,
    url: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    headers: Mapping[str, str],
    timeout: float,
) -> tuple[int, str]:
    """Return status and text of a reply below 500; ``ServerUnreachable`` otherwise, ``UserError`` without its key."""
    try:
        reply = httpx.request(method, url + path, json=body, headers=dict(headers), timeout=timeout, trust_env=False)
    except httpx.HTTPError as error:
        raise ServerUnreachable(f"{path}: {type(error).__name__}") from None
    if reply.status_code >= 500:
        raise ServerUnreachable(f"{path}: status {reply.status_code}: {reply.text[:200]}")
    if reply.status_code in UNAUTHORIZED:
        raise UserError(f"{url} {NEEDS_KEY}")
    return reply.status_code, reply.text
