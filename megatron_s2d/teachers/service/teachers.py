"""Teachers that other machines serve, as the training loop sees them: scores, and exact or top-k distributions.

The data-parallel leader of each replica asks for the samples of its rank, a request for each group, and sends the reply
to the ranks of its replica. A request is the same whether it is sent early (``prefetch``, ``begin_step``) or when its
scores are needed, so overlapped and serial runs have the same bits. Samples that balancing moved to another rank are
asked for again by that one. Final hidden states travel for exact divergences; the output layer is read once, each rank
its rows, and the loss computes the teacher's distribution from both as it does for a teacher in the trainer.

Shapes: r response tokens of a sample, t positions of a micro-batch, k top-k entries, h hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.buffer_sizes import TOP_K_ROWS_PER_CHUNK
from megatron_s2d.data.aligned_spans import AlignedText, span_log_probs
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.kl.teachers import LazyHiddenStates, Projection, TeacherSource, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import first_error
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import OPTIONAL_ARRAYS, AnySample, Sample, own_samples
from megatron_s2d.teachers.cached import predicting_positions, scatter_rows
from megatron_s2d.teachers.frozen import overlap_metric
from megatron_s2d.teachers.hidden_state_transfer import OffloadedRows, offload_hidden_states
from megatron_s2d.teachers.routing import is_routed, teacher_of
from megatron_s2d.teachers.service.client import TeacherClient
from megatron_s2d.teachers.service.score_queue import Job, Reply, ScoreQueue
from megatron_s2d.teachers.service.scorer import from_wire
from megatron_s2d.teachers.service.wire import Payload, ScoreRequest, Source, decode, encode
from megatron_s2d.teachers.views import PromptViews
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Where a sample's scores will be: rows ``[start, stop)`` of a job's reply."""

    job: Job
    start: int
    stop: int
    left: int  # how often they will be read
    aligned: AlignedText | None = None  # for a teacher of another tokenizer, whose tokens the rows are of


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a stage reads of its teachers."""

    payload: Payload
    k: int = 0
    source: Source = "teacher"
    num_reads: int = 1  # of every sample's scores: passes over a batch

    @property
    def is_early(self) -> bool:
        """Whether the request is complete as soon as a response is: it needs nothing of the student's weights."""
        return self.source == "teacher"


class ServiceTeachers:
    """Served teachers by domain, or one (under the key ``None``) for all; used by every rank of the student."""

    def __init__(
        self,
        clients: Mapping[str | None, TeacherClient],
        student: MegatronModel,
        wanted: Wanted,
        views: PromptViews | None = None,
        aligners: Mapping[str | None, Callable[[Sample], AlignedText]] | None = None,
    ):
        """clients: connected, on every rank of the last pipeline stage. views: as of ``ServedTeachers``. aligners: by
        domain, of teachers with another tokenizer; they give the text of a response in the teacher's tokens.
        """
        self.clients, self.student, self.wanted, self.views = clients, student, wanted, views
        self._aligners = dict(aligners or {})
        self._weights: dict[str | None, torch.Tensor] = {}
        self._asked: dict[str, _Asked] = {}  # by key, on leaders
        self._step_keys: set[str] = set()
        self._lock = threading.Lock()  # of ``_asked``: engines prefetch from a thread of their own
        settings = [client.settings for client in clients.values()]
        threads = sum(item.max_concurrent_requests for item in settings) if settings[0].overlap else 0
        self._overlaps = threads > 0
        requests = student.layout.is_dp_leader
        self._queue = ScoreQueue(threads if requests else 0, sum(item.queue_bytes for item in settings))

    @property
    def is_routed(self) -> bool:
        """Whether each domain has a teacher of its own."""
        return is_routed(self.clients)

    def close(self) -> None:
        """End requests that wait."""
        self._queue.close()
        for client in self.clients.values():
            client.close()

    # ------------------------------------------------------------------ asking early

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Ask for the scores of a complete group, which a step will train on; returns at once, not collective."""
        if self.student.layout.is_dp_leader and self._overlaps and self.wanted.is_early:
            self._ask(samples, self.wanted)

    def begin_step(self, samples: Sequence[AnySample]) -> None:
        """Ask for the scores of the samples of a step, as far as that has not happened; not collective."""
        if not self.student.layout.is_dp_leader or not self.wanted.is_early:
            return
        own = own_samples(samples)
        with self._lock:
            self._forget(self._step_keys)
        self._step_keys = {_key(sample, self.wanted) for sample in own}
        self._ask(own, self.wanted)

    def _ask(self, samples: Sequence[Sample], wanted: Wanted, ids: Mapping[str, np.ndarray] | None = None) -> None:
        """Submit a request for each group of ``samples`` with some that have not been asked for."""
        groups: dict[tuple[str, str], list[Sample]] = {}
        with self._lock:
            for sample in samples:
                if _key(sample, wanted) not in self._asked:
                    groups.setdefault((sample.domain, sample.group_id), []).append(sample)
            for (domain, _), of_group in groups.items():
                self._submit(domain, of_group, wanted, ids)

    def _submit(
        self, domain: str, samples: Sequence[Sample], wanted: Wanted, ids: Mapping[str, np.ndarray] | None
    ) -> None:
        read = list(samples) if self.views is None else self.views.read_own(samples)
        align = self._aligners.get(domain if self.is_routed else None)
        aligned = [None if align is None else align(sample) for sample in samples]
        read = [
            sample if text is None else _in_tokens_of(text, sample) for sample, text in zip(read, aligned, strict=True)
        ]
        request = ScoreRequest(
            wanted.payload,
            np.concatenate([sample.token_ids for sample in read]).astype(np.int32),
            np.array([sample.length for sample in read], dtype=np.int32),
            np.concatenate([sample.response_mask for sample in read]).astype(np.uint8),
            np.array([sample.temperature for sample in read], dtype=np.float32),
            wanted.k,
            wanted.source,
            None if ids is None else np.concatenate([ids[sample.id] for sample in samples]).astype(np.int32),
        )
        client = teacher_of(self.clients, domain)
        info = client.info
        num_bytes = request.reply_bytes(info.vocab_size, info.hidden_size, info.dtype)
        job = self._queue.submit(functools.partial(client.score, request), num_bytes)
        start = 0
        for sample, as_read, text in zip(samples, read, aligned, strict=True):
            stop = start + as_read.response_length
            self._asked[_key(sample, wanted)] = _Asked(job, start, stop, wanted.num_reads, text)
            start = stop

    def _take(self, sample: Sample, wanted: Wanted) -> Reply:
        """Return the rows of one sample, which was asked for."""
        key = _key(sample, wanted)
        asked = self._asked[key]
        reply = self._queue.wait(asked.job)
        with self._lock:
            if asked.left > 1:
                self._asked[key] = dataclasses.replace(asked, left=asked.left - 1)
            else:
                self._forget([key])
        rows = {name: values[asked.start : asked.stop] for name, values in reply.items()}
        if asked.aligned is None:
            return rows
        own = sample.require("old_log_probs", "the student's scores")[sample.response_mask]
        return {"log_probs": span_log_probs(rows["log_probs"], own, asked.aligned.spans)}

    def _forget(self, keys: Sequence[str] | set[str]) -> None:
        """Drop what was asked for and will not be read; a job goes with its last sample."""
        jobs = {self._asked.pop(key).job for key in keys if key in self._asked}
        for job in jobs - {asked.job for asked in self._asked.values()}:
            self._queue.drop(job)

    # ------------------------------------------------------------------ reading, collective

    def _read(
        self, samples: Sequence[Sample], wanted: Wanted, ids: Mapping[str, np.ndarray] | None = None
    ) -> list[Reply]:
        """Return the rows of each of this rank's samples, on every rank of its replica; collective over all ranks."""
        layout = self.student.layout
        replies: list[Reply] = []
        with _same_outcome():
            if layout.is_dp_leader:
                self._ask(samples, wanted, ids)
                replies = [self._take(sample, wanted) for sample in samples]
        if layout.host_replica.size == 1 or not samples:
            return replies
        return _broadcast(replies, len(samples), layout)

    def score(self, samples: Sequence[AnySample], *, holders: Layout) -> list[np.ndarray | None]:
        """See ``TeacherRouter.score``. holders: the student's layout."""
        wanted = self.wanted if self.wanted.payload == "sampled" else Wanted("sampled")
        rows = iter(self._read(own_samples(samples), wanted))
        scores: list[np.ndarray | None] = []
        for sample in samples:
            score = None
            if isinstance(sample, Sample):
                score = np.zeros(sample.length, dtype=np.float32)
                score[sample.response_mask] = next(rows)["log_probs"]
            scores.append(score)
        return scores

    def distributions(
        self, student: MegatronModel, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> list[LazyHiddenStates | None]:
        """See ``TeacherRouter.distributions``: each micro-batch's exact distribution, from hidden states."""
        sources: list[LazyHiddenStates | None] = [None] * len(micro_batches)
        with _same_outcome():
            if student.layout.is_dp_leader:  # at once: those that no step has announced, or that were moved here
                self._ask(own_samples(mini_batch.samples), self.wanted)
        for number, batch in enumerate(micro_batches):
            samples = own_samples([mini_batch.samples[index] for index in batch.indices])
            replies = self._read(samples, self.wanted)
            domain = batch.domain if self.is_routed else None
            if not student.layout.is_pipeline_last_stage:
                continue
            info = teacher_of(self.clients, domain if domain in self.clients else next(iter(self.clients))).info
            dtype = torch.bfloat16 if info.dtype == "bfloat16" else torch.float32
            hidden = [from_wire(reply["hidden"]) for reply in replies]
            rows = torch.cat(hidden) if hidden else torch.zeros(0, info.hidden_size, dtype=dtype)
            offloaded = OffloadedRows.cut(rows, predicting_positions(samples, batch), batch, student)
            weight = functools.partial(self._weight, domain)
            sources[number] = LazyHiddenStates(offloaded.read, weight, batch.temperature)
        return sources

    def _weight(self, domain: str | None) -> torch.Tensor:
        """Return the output layer's rows of the student's shard, read once; not collective."""
        key = domain if domain in self.clients else next(iter(self.clients))
        if key not in self._weights:
            shard = self.student.shard
            rows = from_wire(teacher_of(self.clients, key).output_rows(shard.start, shard.stop))
            # Of several teachers by domain all wait in host memory.
            self._weights[key] = rows.to(device.device()) if len(self.clients) == 1 else device.copy_to_host(rows)
        return self._weights[key].to(device.device(), non_blocking=True)

    def read_output_layers(self) -> None:
        """Read the output layers now, where the loss needs them: a failure is an error before the first step."""
        with _same_outcome():
            if self.wanted.payload == "hidden" and self.student.layout.is_pipeline_last_stage:
                for domain in self.clients:
                    self._weight(domain)

    def read_top_k(self, samples: Sequence[Sample], ids: Mapping[str, np.ndarray] | None) -> list[Reply]:
        """Return the top-k rows of each sample; see ``_read``. ids: sample id -> the student's [r, k], on leaders."""
        return self._read(samples, self.wanted, ids)


@dataclasses.dataclass(eq=False)
class ServiceTopK:
    """Distributions on top-k tokens of student, teacher, or both, with the teacher's scores from its service."""

    student: MegatronModel
    teachers: ServiceTeachers
    tail: str
    _num_shared: int = 0  # of the last call, as in ``TopKTeacher``
    _num_selected: int = 0

    def metrics(self) -> dict[str, Metric]:
        """See ``TopKTeacher.metrics``."""
        if self.teachers.wanted.source == "teacher":
            return {}
        return overlap_metric(self._num_shared, self._num_selected)

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        wanted, layout = self.teachers.wanted, self.student.layout
        self._num_shared = self._num_selected = 0
        by_batch = [own_samples([mini_batch.samples[index] for index in batch.indices]) for batch in micro_batches]
        ids: dict[str, np.ndarray] | None = None
        if wanted.source != "teacher":
            ids = {}
            states = offload_hidden_states(self.student, micro_batches)
            for samples, batch, rows in zip(by_batch, micro_batches, states, strict=True):
                if rows is not None:
                    ids |= self._student_ids(samples, batch, rows)
        all_samples = [sample for samples in by_batch for sample in samples]
        replies = iter(self.teachers.read_top_k(all_samples, ids))
        sources: list[TeacherSource | None] = []
        for samples, batch in zip(by_batch, micro_batches, strict=True):
            of_batch = [next(replies) for _ in samples]
            sources.append(self._source(samples, batch, of_batch) if layout.is_pipeline_last_stage else None)
        return sources

    @torch.no_grad()
    def _student_ids(
        self, samples: Sequence[Sample], batch: MicroBatch, states: OffloadedRows
    ) -> dict[str, np.ndarray]:
        """Return sample id -> the student's most likely tokens [r, k]; collective over TP and CP ranks."""
        shard, k = self.student.shard, self.teachers.wanted.k
        counted = batch.response_mask.nonzero().squeeze(1)
        temperature = batch.temperature[counted] if isinstance(batch.temperature, torch.Tensor) else batch.temperature
        weight = self.student.output_weight.detach()[: shard.columns]
        hidden = states.read()
        student = Projection(hidden, weight, 1.0, torch.float32)
        ids = torch.zeros(batch.labels.numel(), k, dtype=torch.int64, device=hidden.device)
        for start in range(0, len(counted), TOP_K_ROWS_PER_CHUNK):
            rows = slice(start, min(start + TOP_K_ROWS_PER_CHUNK, len(counted)))
            logits = student.logits(rows, torch.empty(rows.stop - start, shard.columns, device=hidden.device))
            of_rows = temperature[rows] if isinstance(temperature, torch.Tensor) else temperature
            ids[counted[rows]] = vocab_parallel_topk(logits, k, shard, of_rows)[0]
        found = self.student.gather_context_parallel(batch, ids)
        by_token = found[predicting_positions(samples, batch).to(found.device)].cpu().numpy()
        stops = np.cumsum([sample.response_length for sample in samples])
        return {
            sample.id: by_token[stop - sample.response_length : stop]
            for sample, stop in zip(samples, stops.tolist(), strict=True)
        }

    def _source(self, samples: Sequence[Sample], batch: MicroBatch, replies: Sequence[Reply]) -> TopK:
        """Place the entries of each token at the position that predicts it."""
        wanted = self.teachers.wanted
        width = wanted.k
        if wanted.source == "union":
            width = min(2 * width, self.student.spec.vocab_size)
        shapes = {"ids": (np.int32, (width,)), "log_probs": (np.float32, (width,)), "log_tail_mass": (np.float32, ())}
        positions = predicting_positions(samples, batch)
        columns = {}
        for name, (dtype, shape) in shapes.items():
            rows = np.concatenate([np.zeros((0, *shape), dtype=dtype), *(reply[name] for reply in replies)])
            columns[name] = scatter_rows(torch.from_numpy(rows), positions, batch)
        if wanted.source != "teacher" and self.student.layout.is_dp_leader:
            self._num_shared += sum(int(reply["num_shared"].sum()) for reply in replies)
            self._num_selected += wanted.k * sum(len(reply["num_shared"]) for reply in replies)
        # Positions that are not counted need distinct ids too.
        counted = batch.response_mask.unsqueeze(1)
        ids = torch.where(counted, columns["ids"], torch.arange(width, dtype=torch.int32, device=counted.device))
        return TopK(ids, columns["log_probs"], columns["log_tail_mass"], tail=self.tail, support=wanted.source)


def _in_tokens_of(text: AlignedText, sample: Sample) -> Sample:
    """Return the prompt of ``sample``, which is in the teacher's tokens, followed by the response in these."""
    prompt = sample.token_ids[: sample.prompt_length]
    mask = np.arange(len(prompt) + len(text.token_ids)) >= len(prompt)
    without: dict[str, Any] = dict.fromkeys(OPTIONAL_ARRAYS)
    return dataclasses.replace(
        sample, token_ids=np.concatenate([prompt, text.token_ids]), response_mask=mask, **without
    )


@contextlib.contextmanager
def _same_outcome() -> Iterator[None]:
    """Raise ``UserError`` on every rank of the job if the block raised one on any."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = str(error)
    if (message := first_error(failure)) is not None:
        raise UserError(message)


def _key(sample: Sample, wanted: Wanted) -> str:
    """Return the name of a sample's scores: a group that starts again has the ids of the one before."""
    tokens = hashlib.sha256(sample.token_ids.tobytes()).hexdigest()[:16]
    return f"{wanted.payload} {sample.id} {tokens}"


def _broadcast(replies: Sequence[Reply], count: int, layout: Layout) -> list[Reply]:
    """Return the leader's ``replies`` on all ranks of its replica."""
    data = None
    if layout.is_dp_leader:
        flat = {f"{index}/{name}": values for index, reply in enumerate(replies) for name, values in reply.items()}
        data = np.frombuffer(encode({}, flat), dtype=np.uint8).copy()
    _, tensors = decode(layout.host_replica.broadcast(data, layout.leader_in_replica).tobytes())
    result: list[Reply] = [{} for _ in range(count)]
    for name, values in tensors.items():
        index, _, field = name.partition("/")
        result[int(index)][field] = values
    return result
