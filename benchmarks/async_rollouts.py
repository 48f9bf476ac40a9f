"""Steps per second at several values of max_staleness, with a stand-in engine and a stand-in trainer of known speed.

    python benchmarks/async_rollouts.py

The rollout buffer is the real one; generation and training sleep. A weight update waits for the group in flight, as
``async_mode: one_step_off`` does, and not for those that wait for their turn.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.buffer import BufferPolicy, RolloutBuffer
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_of
from megatron_s2d.rollout.response_table import Group
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker

STALENESS = (0, 1, 4)
GROUPS, GENERATIONS = 8, 2  # of a step


class SleepingEngine:
    """Answers one group after the other, each after ``seconds``, on a thread of its own.

    Like servers with room for one group: the others wait for their turn, and go with the weights that are current then.
    """

    def __init__(self, seconds: float):
        self.version, self.busy_seconds = 0, 0.0
        self._seconds = seconds
        self._changed = threading.Condition()
        self._waiting: dict[str, Sequence[Request]] = {}
        self._complete: dict[str, list[Sample]] = {}
        self._is_busy = self._is_paused = self._is_closed = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def generate(self, requests: Sequence[Request], progress=None) -> list[Sample]:
        """Answer now."""
        return [sample for group in itertools.batched(requests, GENERATIONS) for sample in self._answer(group)]

    def start(self, episodes: Mapping[str, Any], priority: int = 0) -> None:
        """See ``BackgroundRunner``; an episode is a group here. Steps ask in their order."""
        with self._changed:
            self._waiting |= episodes
            self._changed.notify_all()

    def wait(self, is_enough: Callable[[Set[str]], bool]) -> dict[str, list[Sample]]:
        """See ``BackgroundRunner``."""
        with self._changed:
            self._resume()
            self._changed.wait_for(lambda: is_enough(self._complete.keys()))
            complete, self._complete = self._complete, {}
        return complete

    def pause(self, *, interrupt: bool) -> None:
        """Wait for the group in flight."""
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: not self._is_busy)

    def cancel(self, names: Sequence[str]) -> None:
        """Do nothing: nothing starts again here."""

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Set the version, and continue."""
        with self._changed:
            self.version = version
            self._resume()

    def measurements(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _resume(self) -> None:
        self._is_paused = False
        self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or (self._waiting and not self._is_paused))
                if self._is_closed:
                    return
                name = next(iter(self._waiting))
                requests, self._is_busy = self._waiting.pop(name), True
            samples = self._answer(requests)
            with self._changed:
                self._complete[name], self._is_busy = samples, False
                self._changed.notify_all()

    def _answer(self, requests: Sequence[Request]) -> list[Sample]:
        version = self.version
        time.sleep(self._seconds)
        self.busy_seconds += self._seconds
        return [sample_of(request, np.array([1]), np.zeros(1, np.float32), "stop", version) for request in requests]


class Worker(RolloutWorker):
    """A worker whose groups are answered as a whole."""

    def group_episode(self, group: Group) -> Any:
        """Return the requests themselves."""
        return group.requests


def measure(max_staleness: int, steps: int, generation: float, training: float) -> tuple[float, float, float, int]:
    """Return (steps per second, shares of the time that producer and trainer wait, largest age in steps)."""
    engine = SleepingEngine(generation / GROUPS)
    layout = types.SimpleNamespace(
        dp_rank=0, dp_size=1, is_dp_leader=True, leader_in_replica=0, host_dp=HostGroup(), host_replica=HostGroup()
    )
    prompts = [Prompt(f"p{number}", np.array([number]), "", "math", None, None) for number in range(64)]
    worker = Worker(layout, engine, SamplingParams(4, (0,)), 7, None)
    policy = BufferPolicy(max_staleness, "one_step_off" if max_staleness else "sync")
    loader = PromptDataLoader(prompts, GROUPS, 5)
    buffer = RolloutBuffer(loader, worker, GROUPS, GENERATIONS, steps, policy)
    start, oldest, waiting = time.perf_counter(), 0, 0.0
    for step in range(1, steps + 1):
        before = time.perf_counter()
        samples = buffer.next_batch(step).samples
        waiting += time.perf_counter() - before
        oldest = max(oldest, *(engine.version - span.version for s in samples for span in s.weight_versions))
        time.sleep(training)
        buffer.update_weights([], step)
    seconds = time.perf_counter() - start
    engine.close()
    return steps / seconds, 1 - engine.busy_seconds / seconds, waiting / seconds, oldest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--generation", type=float, default=0.5, help="seconds of a step's responses")
    parser.add_argument("--training", type=float, default=0.5, help="seconds of a step's training")
    arguments = parser.parse_args()
    print("| max_staleness | steps/s | against 0 | producer waits | trainer waits | oldest response (steps) |")
    print("|---|---|---|---|---|---|")
    reference = 0.0
    for max_staleness in STALENESS:
        speed, producer, trainer, oldest = measure(
            max_staleness, arguments.steps, arguments.generation, arguments.training
        )
        reference = reference or speed
        print(
            f"| {max_staleness} | {speed:.2f} | {speed / reference:.2f} | {producer:.0%} | {trainer:.0%} | {oldest} |"
        )


if __name__ == "__main__":
    main()
