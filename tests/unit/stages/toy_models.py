"""Stages on toy models: a bigram policy with the interface of ``MegatronModel``, and an engine that samples from it.

A toy's next token depends on the last one alone: the logits after token u are ``head @ embedding[u]``. Samples,
packing, objectives, divergences and the training loop are the real ones, so a test can compare a stage's loss and
gradient with a formula for the two tables, written out in float64. Updates are gradient descent, with ten
times the learning rate of the stage.

Shapes: v vocabulary, h width of the toy, t positions of a micro-batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_s2d.artifacts.files import tree_digest
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.packing import pack
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.objectives.policy import SEQUENCE_LOG_RATIOS
from megatron_s2d.objectives.terms import merge_metrics
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import sample_of
from megatron_s2d.stages.context import StageContext, derive_seed
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.stages.registry import STAGES
from megatron_s2d.stages.rollout_factory import RolloutFactory
from megatron_s2d.train.sequence_ratios import with_sequence_log_ratios

VOCAB, WIDTH = 27, 5  # the vocabulary of the embedded task
LAYOUT = types.SimpleNamespace(
    dp_rank=0, dp_size=1, cp_rank=0, cp_size=1, tp_rank=0, tp_size=1, is_dp_leader=True, is_pipeline_last_stage=True,
    is_output_rank=True, is_replica_root=True, leader_in_replica=0, host_dp=HostGroup(), host_replica=HostGroup(),
    config=types.SimpleNamespace(sequence_parallel=False),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Update:
    """What the training loop asked of a model in one optimizer step."""

    embedding: torch.Tensor  # [v, h] before the step
    head: torch.Tensor  # [v, h]
    loss: float
    embedding_gradient: torch.Tensor
    head_gradient: torch.Tensor
    metrics: dict[str, float]


class ToyModel:
    """Two tables [v, h]; ``updates`` has what was asked of a trained model."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def table() -> torch.nn.Parameter:
            return torch.nn.Parameter(
                (0.7 * torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)).to(dtype)
            )

        self.embedding, self.head = table(), table()
        self.chunks = [torch.nn.ParameterList([self.embedding, self.head])]
        self.layout, self.shard = LAYOUT, VocabShard.unsharded(VOCAB)
        self.spec = types.SimpleNamespace(vocab_size=VOCAB, hidden_size=WIDTH, max_position_embeddings=64)
        self.packs_by_domain, self.beta, self.is_frozen = False, None, False
        self.adapter = None
        self.updates: list[Update] = []
        self.saved: list[torch.Tensor] | None = None

    def move_towards(self, other: ToyModel, share: float) -> None:
        """Replace the tables by (1 - share) times theirs plus share times those of ``other``."""
        for mine, theirs in zip(self.chunks[0], other.chunks[0], strict=True):
            mine.data.lerp_(theirs.data.to(mine.dtype), share)

    def parameters(self):
        yield from self.chunks[0]

    @property
    def output_weight(self) -> torch.Tensor:
        return self.head

    def prepare_training(self, optimizer, total_updates, *, offload=False):
        self.trainable, self.total_updates = types.SimpleNamespace(learning_rate=optimizer.lr), total_updates

    def freeze(self):
        self.is_frozen = True

    def offload(self):
        pass

    @contextlib.contextmanager
    def on_device(self, *, release):
        yield

    def pack(self, samples, loss_weights):
        return pack(samples, loss_weights=loss_weights, max_tokens=40, by_domain=self.packs_by_domain)

    def balance(self, mini_batch):
        return mini_batch, 0

    def score(self, samples, output="log_probs", *, holders=None):
        scores = []
        for sample in samples:
            full = log_probs_of(self.embedding, self.head, sample.token_ids, sample.temperature).detach()
            values = (
                full.gather(1, torch.from_numpy(sample.token_ids[1:, None])).squeeze(1)
                if output == "log_probs"
                else -(full.exp() * full).sum(1)
            )
            scores.append(np.where(sample.response_mask, np.append(0.0, values), 0.0).astype(np.float32))
        return scores

    def hidden_states(self, batches, extract=lambda index, hidden: hidden):
        return [extract(index, self._hidden(batch).detach()) for index, batch in enumerate(batches)]

    def gather_sequence_parallel(self, hidden):
        return hidden

    def gather_context_parallel(self, batch, values):
        return values

    def _hidden(self, batch):
        return self.embedding[batch.token_ids.t().reshape(-1)]

    def forward_backward(self, batches, objective, teachers=None, *, num_tokens, observe=None):
        assert not self.is_frozen and num_tokens == sum(batch.num_tokens for batch in batches)
        self.embedding.grad = self.head.grad = None
        parts = []
        for batch, teacher in zip(batches, teachers or [None] * len(batches), strict=True):
            if SEQUENCE_LOG_RATIOS in objective.columns:
                flat = {"target_ids": batch.labels, "temperature": batch.temperature, "outputs": ("log_probs",)}
                now = linear_divergence(self._hidden(batch), self.head, shard=self.shard, **flat)[1].log_probs
                batch = with_sequence_log_ratios(batch, now, None)
            columns = batch.columns
            loss, outputs = linear_divergence(
                self._hidden(batch), self.head, shard=self.shard, outputs=tuple(sorted(objective.needs)),
                teacher=teacher, beta=self.beta, temperature=batch.temperature, target_ids=batch.labels,
                token_loss=lambda outputs, rows, columns=columns: objective.token_loss(outputs, columns.select(rows)),
                response_mask=batch.response_mask,
            )  # fmt: skip
            loss.backward()
            if observe is not None:
                observe(batch, outputs)
            parts.append(objective.metrics(outputs, columns))
        merged = merge_metrics(parts)
        self.updates.append(
            Update(
                self.embedding.detach().clone(), self.head.detach().clone(), merged["loss"].value(),
                self.embedding.grad.clone(), self.head.grad.clone(),
                {name: metric.value() for name, metric in merged.items()},
            )
        )  # fmt: skip
        return merged

    def optim_step(self):
        norm = 0.0
        for table in self.chunks[0]:
            table.data -= 10 * self.trainable.learning_rate * table.grad
            norm += float(table.grad.square().sum())
        return norm**0.5

    def start_saving(self, path, trainer_state, *, with_optimizer, async_save=False):
        def finish():
            path.mkdir(parents=True)
            np.savez(path / "tables.npz", *(table.detach().numpy() for table in self.chunks[0]))
            (path / "state.json").write_text(json.dumps(trainer_state))

        return types.SimpleNamespace(is_written=lambda: True, finish=finish)

    def load(self, path, *, with_optimizer=False):
        with np.load(path / "tables.npz") as tables:
            for mine, name in zip(self.chunks[0], tables.files, strict=True):
                mine.data.copy_(torch.from_numpy(tables[name]))
        return json.loads((path / "state.json").read_text())

    def save(self, directory, trainer_state, *, with_optimizer):
        self.saved = [table.detach().clone() for table in self.chunks[0]]


def log_probs_of(embedding, head, token_ids, temperature) -> torch.Tensor:
    """Return log pi of the whole vocabulary after each token but the last: [length - 1, v]."""
    logits = embedding[torch.from_numpy(token_ids[:-1])].double() @ head.double().t()
    return torch.log_softmax(logits / (temperature or 1.0), dim=1)


class ToyEngine:
    """Samples words from the toy, then an answer in brackets, right for some seeds; every fifth response is cut."""

    chance = staticmethod(lambda version: 0.5)  # of a right answer, by the version of the weights
    shift = 0.0  # added to the log-probabilities that it reports

    def __init__(self, model, tokenizer):
        self.model, self.version, self.samples, self._tokenizer = model, 0, [], tokenizer

    def generate(self, requests, progress=None):
        samples = [self._answer(request) for request in requests]
        self.samples.append(samples)
        return samples

    def _answer(self, request):
        rng = np.random.default_rng(request.seed)
        temperature = request.params.temperature
        prompt, response = request.prompt.token_ids, []
        words = self._tokenizer.convert_tokens_to_ids([str(digit) for digit in range(6)])
        for _ in range(rng.integers(1, 4)):
            last = np.array([[*prompt, *response][-1], 0])
            probabilities = log_probs_of(self.model.embedding, self.model.head, last, temperature).detach().exp()
            chosen = probabilities[0, words].numpy()
            response.append(int(rng.choice(words, p=chosen / chosen.sum())))
        is_cut = rng.random() < 0.2
        if not is_cut:
            answer = (
                request.prompt.answer
                if rng.random() < self.chance(self.version)
                else str((int(request.prompt.answer) + 1) % 6)
            )
            ids = self._tokenizer.convert_tokens_to_ids(["[", answer, "]"])
            response += [*ids, self._tokenizer.eos_token_id]
        token_ids = np.array([*prompt, *response])
        full = log_probs_of(self.model.embedding, self.model.head, token_ids, temperature).detach().numpy()
        log_probs = np.take_along_axis(full, token_ids[1:, None], 1)[len(prompt) - 1 :, 0] + self.shift
        reason = "length" if is_cut else "stop"
        return sample_of(request, np.array(response), log_probs.astype(np.float32), reason, self.version)

    def sleep(self):
        pass

    def update_weights(self, chunks, version):
        assert list(chunks[0]) == [self.model.embedding, self.model.head]
        self.version = version

    def metrics(self):
        return {}

    def close(self):
        pass


class ToyRollouts(RolloutFactory):
    """The real factory with toy engines, which it keeps by the model that they sample from."""

    def engine(self, model, model_name, params, *, longest_prompt=0):
        self.engines = getattr(self, "engines", {})
        self.engines[model] = ToyEngine(model, self._inputs.tokenizer)
        return self.engines[model]

    def in_process_engine(self, model, model_name):
        return self.engine(model, model_name, None)


class ToyFactory:
    """Models of finished stages by name; the trained one is the stage's ``init``, its copy if frozen."""

    def __init__(self, stage, models: dict[str, ToyModel]):
        self._stage, self.models = stage, models
        self.trained: ToyModel | None = None

    def start(self, *, beta=None, trained=True):
        model = _copy(self.models[self._stage.init])
        model.beta = beta
        if trained:
            self.trained = model
        return model

    def fresh(self, model_name):
        return self.models[model_name]

    def frozen(self, stage_name):
        model = self.models[stage_name]
        model.freeze()
        return model

    def name_of(self, stage_name):
        return "toy"

    def close(self):
        pass


def _copy(model: ToyModel) -> ToyModel:
    twin = ToyModel(0, model.head.dtype)
    twin.move_towards(model, 1.0)
    return twin


class ToyWorkflow:
    """A workflow of finished stages (``teacher``, ``student``, ``reference``, ...) and one stage to run."""

    def __init__(self, folder, tokenizer_cache, models: dict[str, ToyModel], *, seed: int = 7):
        self.folder, self.tokenizer_cache, self.models, self.seed = folder, tokenizer_cache, models, seed
        self.stages: dict[str, dict] = {}  # those that were run
        self.data: dict[str, dict] = {}  # further entries
        self.rollout: dict[str, object] = {}  # settings of its section
        self.directories = {name: self._finished(name) for name in models}

    def _finished(self, name):
        directory = StageDirectory(self.folder / name)
        directory.begin({}, {}, {})
        directory.model_path.mkdir(parents=True)
        (directory.model_path / "weights").write_text(name)
        self._finish(directory)
        return directory

    def _finish(self, directory):
        outputs = {path.name: tree_digest(path) for path in (directory.model_path,) if path.exists()}
        directory.finish({"key": "key", "seconds": 1.0, "outputs": outputs, "peak_memory": 0})

    def context(self, name: str, stop=lambda: False, **stage) -> StageContext:
        """Return the context of the stage ``name``, whose earlier output is kept."""
        loads = {other: {"type": "load_checkpoint", "role": other, "model": "toy"} for other in self.models}
        self.stages[name] = {"role": name, **stage}
        document = {
            "name": "toy", "seed": self.seed, "tokenizer": "task:modular_arithmetic", "precision": "float32",
            "models": {"toy": {"preset": "tiny-student", "path": None}}, "lengths": {"max_prompt_length": 16},
            "data": {
                "pool": {"type": "task", "split": "pool", "num_operations": 2, "num_prompts": 12},
                "other": {"type": "task", "split": "eval", "num_operations": 1, "num_prompts": 4},
            } | self.data,
            "stages": loads | self.stages, "arms": {"arm": name if "init" in stage else "student"},
            "evaluation": {"prompts": "other"}, "rollout": self.rollout,
        }  # fmt: skip
        config = parse(WorkflowConfig, document, "toy")
        directory = StageDirectory(self.folder / name)
        directory.path.mkdir(exist_ok=True)
        inputs = StageInputs(config, self.directories, self.tokenizer_cache)
        settings = config.stages[name]
        return StageContext(
            name=name, stage=settings, seed=derive_seed(config, settings.seed), directory=directory, inputs=inputs,
            models=ToyFactory(settings, self.models), rollouts=ToyRollouts(config, name, directory.path, inputs),
            stop=stop, _config=config,
        )  # fmt: skip

    def run(self, name: str, **stage) -> StageContext:
        """Run the stage and return its context; later stages can use what it left."""
        context = self.context(name, **stage)
        if not (context.directory.config_path).exists():
            context.directory.begin({}, {}, {})
        STAGES[context.stage.type](context)
        self._finish(context.directory)
        self.directories[name] = context.directory
        return context


def assert_matches(update: Update, loss) -> None:
    """Compare an update with ``loss(embedding, head)``, by value and by gradient; float64 tables [v, h] in.

    The columns of a micro-batch (weights, advantages, scores) are float32, hence the tolerance.
    """
    embedding, head = (table.clone().double().requires_grad_() for table in (update.embedding, update.head))
    expected = loss(embedding, head)
    gradients = torch.autograd.grad(expected, (embedding, head))
    assert update.loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    for found, gradient in zip((update.embedding_gradient, update.head_gradient), gradients, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 1e-4, "a gradient of zero shows nothing"


def response_rows(embedding, head, sample: Sample) -> torch.Tensor:
    """Return log pi of the whole vocabulary at each response token: [r, v]."""
    return log_probs_of(embedding, head, sample.token_ids, sample.temperature)[sample.response_mask[1:]]


def response_log_probs(embedding, head, sample: Sample) -> torch.Tensor:
    """Return log pi of each response token: [r]."""
    tokens = torch.from_numpy(sample.token_ids[sample.response_mask])
    return response_rows(embedding, head, sample).gather(1, tokens.unsqueeze(1)).squeeze(1)


def model_log_probs(model: ToyModel | Update, sample: Sample) -> torch.Tensor:
    """Return log pi of each response token under a model, or one before an update, without gradients: [r]."""
    return response_log_probs(model.embedding, model.head, sample).detach()


def rewards_of(samples: Sequence[Sample], prompts: Sequence[Prompt], tokenizer) -> np.ndarray:
    """Return 1 for responses that ended with the prompt's answer in brackets, else 0."""
    answers = {prompt.id: tokenizer.convert_tokens_to_ids(["[", prompt.answer, "]"]) for prompt in prompts}
    right = [s.finish_reason == "stop" and s.token_ids[-4:-1].tolist() == answers[s.prompt_id] for s in samples]
    return np.array(right, dtype=np.float64)


def group_advantages(rewards: np.ndarray, size: int, *, by_std: bool = True) -> np.ndarray:
    """Return GRPO's advantages of consecutive groups of ``size``."""
    groups = rewards.reshape(-1, size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    scale = groups.std(axis=1, ddof=1, keepdims=True) + 1e-6 if by_std else 1.0
    return (centred / scale).reshape(-1)
