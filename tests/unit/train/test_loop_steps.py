"""The training loop with a stand-in for the model: what it scores, in which order it updates, how it resumes."""

import dataclasses
import json
import types

import numpy as np
import pytest

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.train.loop import LoopSettings, StepData, Stopped, train


def sample(name: str) -> Sample:
    return Sample(
        id=name, prompt_id=name, group_id=name, domain="math", seed=0, token_ids=np.array([1, 2, 3]),
        response_mask=np.array([False, True, True]), temperature=1.0, finish_reason="stop",
        rollout_log_probs=np.full(3, -9.0, np.float32),
    )  # fmt: skip


class Model:
    """Counts its updates; scores are the number of updates so far. A checkpoint is its trainer state as JSON."""

    def __init__(self):
        self.chunks, self.num_updates, self.events = [], 0, []
        self.trainable = types.SimpleNamespace(learning_rate=0.1)
        self.layout = types.SimpleNamespace(dp_size=1, host_dp=HostGroup())

    def score(self, samples, output="log_probs"):
        return [np.full(3, self.num_updates, np.float32) for _ in samples]

    def balance(self, mini_batch):
        return mini_batch, 0

    def pack(self, samples, loss_weights):
        self.events.append([(s.id, None if s.old_log_probs is None else float(s.old_log_probs[1])) for s in samples])
        return []

    def forward_backward(self, batches, objective, teachers=None, *, num_tokens, observe=None):
        return {"loss": Metric.of(float(num_tokens))}

    def optim_step(self):
        self.num_updates += 1
        return 1.0

    def start_saving(self, path, trainer_state, *, with_optimizer, async_save):
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps(trainer_state))
        return types.SimpleNamespace(is_written=lambda: True, finish=lambda: None)

    def load(self, path, *, with_optimizer):
        state = json.loads((path / "state.json").read_text())
        self.num_updates = state["updates"]
        return state


class Source:
    """Two mini-batches a step; what it carries over is the number of the step times ten."""

    def __init__(self):
        self.resumed_with, self.steps = None, []

    def resume(self, state):
        self.resumed_with = dict(state)

    def step(self, step):
        self.steps.append(step)
        parts = [MiniBatch([sample(f"{step}{part}")], {}) for part in "ab"]
        return StepData(parts, {"reward": step / 4}, state={"carried": [step * 10]})


class Engine:
    def __init__(self):
        self.versions = []

    def update_weights(self, chunks, version):
        self.versions.append(version)

    def sleep(self):
        pass

    def metrics(self):
        return {}


@dataclasses.dataclass
class Run:
    model: Model
    source: Source
    engine: Engine


def run(directory, objective=None, stop_at=None, **settings) -> Run:
    initialize_distributed()
    parts = Run(Model(), Source(), Engine())
    settings = {"steps": 3, "checkpoint": CheckpointConfig()} | settings
    stop = (lambda: False) if stop_at is None else lambda: parts.source.steps[-1] == stop_at
    objective = objective or grpo_objective(Surrogate(), kl_loss_coef=0)
    train(parts.model, parts.source, objective, directory, LoopSettings(stop=stop, **settings), rollouts=parts.engine)
    return parts


@pytest.fixture
def directory(tmp_path):
    return StageDirectory(tmp_path)


def test_old_log_probs_are_of_the_weights_before_the_step(directory):
    """Two updates a step: the second mini-batch of a step is compared with the weights of the first."""
    parts = run(directory)
    assert parts.model.events == [[(f"{step}{part}", 2.0 * (step - 1))] for step in (1, 2, 3) for part in "ab"]
    assert parts.engine.versions == [0, 2, 4, 6]  # before the first step and after each


def test_objectives_without_old_log_probs_are_not_scored(directory):
    parts = run(directory, sft_objective())
    assert all(old is None for event in parts.model.events for _, old in event)


def test_a_resumed_run_goes_on_with_the_step_after_its_checkpoint(directory):
    with pytest.raises(Stopped, match="after step 2 of 3"):
        run(directory, stop_at=2)
    resumed = run(directory)
    assert resumed.source.resumed_with == {"carried": [20], "step": 2, "updates": 4}
    assert resumed.source.steps == [3] and resumed.engine.versions == [4, 6]
    assert resumed.model.events == [[("3a", 4.0)], [("3b", 4.0)]]
    rows = directory.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["reward"] for row in rows] == [0.25, 0.5, 0.75]


def test_steps_beyond_the_last_checkpoint_are_done_again(directory):
    """As after a kill: rows of steps without a checkpoint are replaced."""
    with pytest.raises(Stopped):
        run(directory, stop_at=2)
    (directory.checkpoint_path(2) / "state.json").rename(directory.path / "kept.json")
    directory.checkpoint_path(2).rmdir()
    again = run(directory)
    assert again.source.resumed_with == {"step": 0, "updates": 0} and again.source.steps == [1, 2, 3]
    assert [row["step"] for row in directory.metrics()] == [1, 2, 3]


def test_checkpoints_are_written_at_the_interval_and_the_oldest_deleted(directory):
    run(directory, steps=7, checkpoint=CheckpointConfig(interval_steps=2, keep_last_n=2))
    # None after the last step: the stage writes the final weights, without optimizer state.
    assert [path.name[-1] for path in directory.checkpoints()] == ["4", "6"]
    run(directory, steps=8, checkpoint=CheckpointConfig(interval_steps=4))
    assert directory.checkpoint_path(8) not in directory.checkpoints()
