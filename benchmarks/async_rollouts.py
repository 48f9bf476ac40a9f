"""Steps per second at several values of max_staleness, with a stand-in engine and a stand-in trainer of known speed.

    python benchmarks/async_rollouts.py

The rollout buffer is the real one; generation and training sleep. A weight update waits for the responses in flight, as
``async_mode: one_step_off`` does.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import time
import types
from collections.abc import Sequence

import numpy as np

from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_of
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker

STALENESS = (0, 1, 4)


class SleepingEngine:
    """Answers one batch after the other, each after ``seconds``, on a thread of its own."""

    def __init__(self, seconds: float, *, ahead: bool):
        self.version = 0
        self.busy_seconds = 0.0
        self._seconds, self._ahead = seconds, ahead
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._running: dict[str, concurrent.futures.Future[list[Sample]]] = {}

    def submit(self, requests: Sequence[Request], num_groups: int | None = None) -> None:
        """Start, where responses may be of older weights."""
        if self._ahead:
            self._start(requests)

    def generate(self, requests: Sequence[Request], progress=None, *, num_groups: int | None = None) -> list[Sample]:
        """Wait for the responses."""
        if requests[0].id not in self._running:
            self._start(requests)
        return self._running.pop(requests[0].id).result()

    def update_weights(self, version: int) -> None:
        """Wait for what is in flight."""
        concurrent.futures.wait(self._running.values())
        self.version = version

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _start(self, requests: Sequence[Request]) -> None:
        self._running[requests[0].id] = self._thread.submit(self._answer, requests)

    def _answer(self, requests: Sequence[Request]) -> list[Sample]:
        version = self.version
        time.sleep(self._seconds)
        self.busy_seconds += self._seconds
        return [sample_of(request, np.array([1]), np.zeros(1, np.float32), "stop", version) for request in requests]


def measure(max_staleness: int, steps: int, generation: float, training: float) -> tuple[float, float, float, int]:
    """Return (steps per second, shares of the time that producer and trainer wait, largest age in steps)."""
    engine = SleepingEngine(generation, ahead=max_staleness > 0)
    layout = types.SimpleNamespace(
        dp_rank=0, dp_size=1, is_dp_leader=True, leader_in_replica=0, host_dp=HostGroup(), host_replica=HostGroup()
    )
    prompts = [Prompt(f"p{number}", np.array([number]), "", "math", None, None) for number in range(64)]
    worker = RolloutWorker(layout, engine, SamplingParams(4, (0,)), 7, None)
    buffer = RolloutBuffer(PromptDataLoader(prompts, 8, 5), worker, 8, 2, steps, max_staleness=max_staleness)
    start, oldest, waiting = time.perf_counter(), 0, 0.0
    for step in range(1, steps + 1):
        before = time.perf_counter()
        _, samples = buffer.next_batch(step)
        waiting += time.perf_counter() - before
        oldest = max(oldest, *(engine.version - span.version for s in samples for span in s.weight_versions))
        time.sleep(training)
        engine.update_weights(step)
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
