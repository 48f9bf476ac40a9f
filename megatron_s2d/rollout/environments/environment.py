"""The interface of environments. No torch here.

Token in, token out: an environment gets the ids that the model sampled and answers with ids. An episode's tokens are
those, one after the other, and are never tokenized again; what an environment tokenizes is its own observation only.

Shapes: n tokens of a turn, o tokens of an observation.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from megatron_s2d.records import Prompt
from megatron_s2d.verify import Verdict


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What the model said in one turn, which ended with a stop token or a stop string."""

    token_ids: np.ndarray  # [n] int64, as sampled, with the stop token
    text: str  # decoded, without special tokens


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The environment's answer to a turn."""

    observation: np.ndarray | None  # [o] int64, o >= 1, what the model reads before its next turn; None: the end
    reward: float = 0.0  # of this turn; rewards of turns are added to the reward of the episode
    # Of an episode that ends here; None: the prompt's verifier grades the text of the last turn.
    verdict: Verdict | None = None


class Environment(Protocol):
    """The environment of one episode; created for it, and used by it alone."""

    stop_token_ids: tuple[int, ...]  # end a turn, beside those of the model

    async def reset(self, prompt: Prompt, seed: int) -> None:
        """Begin the episode of ``prompt``. seed: 0 <= seed < 2**63, for what the environment draws.

        Everything that the environment does must be a function of prompt, seed and turns: a resumed run repeats it.
        """
        ...

    async def step(self, turn: Turn) -> Step:
        """Return the answer to the model's turn. Must not block the event loop: other episodes wait for it."""
        ...


class SingleTurn:
    """The environment of prompts without one: the first turn is the last, and the prompt's verifier grades it."""

    stop_token_ids: tuple[int, ...] = ()

    async def reset(self, prompt: Prompt, seed: int) -> None:
        """Do nothing."""

    async def step(self, turn: Turn) -> Step:
        """End the episode."""
        return Step(None)
