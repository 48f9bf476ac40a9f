"""One episode: the model's turns and the environment's observations, as one ``Sample``. No torch here.

    prompt | turn 1 | observation 1 | turn 2 | ... | last turn
    mask 0 |   1    |       0       |   1    |     |    1

Observations have no log-probability, no loss weight and no place in a normaliser. ``SamplingParams.max_new_tokens`` of
the request limits what follows the prompt, turns and observations together, so that a sample is never longer than one
of a single turn. An observation that leaves no room for another turn is left out, and the episode is truncated.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from megatron_s2d.config.environment import EnvironmentLimits
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample, WeightVersionSpan
from megatron_s2d.rollout.engine import Request
from megatron_s2d.rollout.environments.environment import Environment, Step, Turn
from megatron_s2d.rollout.sampling_client import Completion, SamplingClient, shift_spans

SINGLE_TURN_LIMITS = EnvironmentLimits(max_turns=1)


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of turn ``turn`` (from 0) of the episode with ``seed``: its own for the first turn."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}\x1f{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def run_episode(
    client: SamplingClient, request: Request, environment: Environment, limits: EnvironmentLimits, tokenizer: Any
) -> Sample:
    """Return the episode of ``request``.

    Its ``finish_reason`` is "stop" if the environment ended it, and "length" if a limit on tokens or turns did. Its
    reward is that of the environment's verdict, if there is one, without the rewards of turns (``turn_rewards``).
    Raises ``UserError`` for an environment that answers what it may not, or takes more than ``max_seconds``.
    """
    episode = _Episode(request)
    clock = _Clock(request, limits.max_seconds)
    await clock.run(environment.reset(request.prompt, request.seed))
    verdict, reason = None, "length"
    for number in range(limits.max_turns):
        params = dataclasses.replace(
            request.params,
            max_new_tokens=min(episode.num_left, limits.max_turn_tokens or episode.num_left),
            stop_token_ids=(*request.params.stop_token_ids, *environment.stop_token_ids),
        )
        completion = await client.sample(
            episode.token_ids,
            params,
            seed=turn_seed(request.seed, number),
            request_id=request.id if number == 0 else f"{request.id}/{number}",
        )
        episode.add_turn(completion)
        if completion.finish_reason != "stop":
            reason = completion.finish_reason
            break
        text = tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        step = await clock.run(environment.step(Turn(completion.token_ids, text)))
        _check(step, request, len(tokenizer))
        episode.turn_rewards.append(float(step.reward))
        if step.observation is None:
            verdict, reason = step.verdict, "stop"
            break
        if number + 1 == limits.max_turns or not episode.add_observation(step.observation):
            break
    return episode.sample(reason) if verdict is None else _graded(episode.sample(reason), verdict)


def _graded(sample: Sample, verdict: Any) -> Sample:
    return dataclasses.replace(
        sample, reward=verdict.reward, verifier_label=verdict.label, verifier_detail=verdict.detail
    )


class _Episode:
    """The tokens of an episode as far as it has come."""

    def __init__(self, request: Request):
        self._request = request
        self.token_ids = np.asarray(request.prompt.token_ids, dtype=np.int64)
        self._mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        self._log_probs = np.zeros(len(self.token_ids), dtype=np.float32)
        self._spans: tuple[WeightVersionSpan, ...] = ()
        self._routes: list[np.ndarray] = []
        self._has_routes = True
        self.turn_rewards: list[float] = []

    @property
    def num_left(self) -> int:
        """Tokens that turns and observations may still have."""
        return self._request.params.max_new_tokens - (len(self.token_ids) - len(self._request.prompt.token_ids))

    def add_turn(self, completion: Completion) -> None:
        """Append what the model sampled after ``token_ids``."""
        self._spans += shift_spans(completion.weight_versions, len(self.token_ids))
        if completion.routed_experts is None:
            self._has_routes = False
        else:  # rows of earlier turns: with the weights that sampled those
            self._routes.append(completion.routed_experts[sum(map(len, self._routes)) :])
        self._append(completion.token_ids, completion.log_probs, is_turn=True)

    def add_observation(self, observation: np.ndarray) -> bool:
        """Append the environment's tokens, unless they would leave no room for a turn; return whether."""
        if len(observation) >= self.num_left:
            return False
        self._append(observation, np.zeros(len(observation), dtype=np.float32), is_turn=False)
        return True

    def _append(self, token_ids: np.ndarray, log_probs: np.ndarray, *, is_turn: bool) -> None:
        self.token_ids = np.concatenate([self.token_ids, np.asarray(token_ids, dtype=np.int64)])
        self._mask = np.concatenate([self._mask, np.full(len(token_ids), is_turn)])
        self._log_probs = np.concatenate([self._log_probs, np.asarray(log_probs, dtype=np.float32)])

    def sample(self, finish_reason: str) -> Sample:
        """Return the record of the episode."""
        request = self._request
        return Sample(
            id=request.id,
            prompt_id=request.prompt.id,
            group_id=request.group_id,
            domain=request.prompt.domain,
            seed=request.seed,
            token_ids=self.token_ids,
            response_mask=self._mask,
            temperature=request.params.temperature,
            finish_reason=finish_reason,
            rollout_log_probs=self._log_probs,
            weight_versions=self._spans,
            routed_experts=np.concatenate(self._routes) if self._has_routes else None,
            turn_rewards=tuple(self.turn_rewards) if any(self.turn_rewards) else None,
        )


class _Clock:
    """The time that an episode spends in its environment."""

    def __init__(self, request: Request, seconds: float):
        self._request, self._seconds, self._left = request, seconds, seconds

    async def run(self, call: Any) -> Any:
        """Return the result of ``call``; ``UserError`` if the environment has used up its time, or fails."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self._left):
                return await call
        except TimeoutError:
            raise UserError(
                f"prompt {self._request.prompt.id}: its environment took more than max_seconds {self._seconds:g} in an "
                "episode; the step is repeated when the run is started again: raise max_seconds, or correct the "
                "environment"
            ) from None
        except UserError:
            raise
        except Exception as error:  # code of the user
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"prompt {self._request.prompt.id}: its environment failed ({reason})") from error
        finally:
            self._left = max(0.0, self._left - (loop.time() - start))


def _check(step: Step, request: Request, vocab_size: int) -> None:
    """Raise ``UserError`` for an answer that would spoil the sample."""
    where = f"prompt {request.prompt.id}: its environment answered"
    if not isinstance(step, Step) or not math.isfinite(step.reward):
        raise UserError(f"{where} {step!r:.100}, which is no Step with a finite reward")
    if step.observation is None:
        return
    observation = np.asarray(step.observation)
    if observation.ndim != 1 or not len(observation) or observation.dtype.kind not in "iu":
        raise UserError(f"{where} an observation of {observation.dtype} {observation.shape}: it must be token ids [o]")
    if observation.min() < 0 or observation.max() >= vocab_size:
        raise UserError(f"{where} token ids outside of the vocabulary of {vocab_size}")
