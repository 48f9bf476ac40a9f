"""Sources on several data-parallel ranks: each has its own samples, and all that is computed is as on one rank.

Ranks are processes over gloo; models and engine are the stand-ins of the benchmark of the control plane. No step
may pickle anything.
"""

import json
import multiprocessing
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import control_plane
import stand_ins

from megatron_s2d.data.stored_samples import ListedSamples, OfflineSamples
from megatron_s2d.objectives.policy import grpo_objective
from megatron_s2d.parallel import device
from megatron_s2d.records import OPTIONAL_ARRAYS, Sample, own_samples
from megatron_s2d.stages.opd import DivergenceOpdSource
from megatron_s2d.stages.policy_loss import surrogate_of
from megatron_s2d.stages.sft import OfflineSource
from megatron_s2d.train.loop import policy_lag, with_old_log_probs

GROUPS, LENGTH, STEPS = 8, 24, 2
GATE = {"lambda_high": 1.8, "conflict_fallback": "interp", "conflict_beta": 0.5, "stability_clip": 0.3}


def offline(layout):
    """Samples that every rank can read."""
    worker = stand_ins.worker_of(stand_ins.stand_in_layout(0, 1), LENGTH)
    samples = worker.sample(stand_ins.buffer_of(layout, GROUPS, LENGTH).loader.prompts, 2, 0)
    return OfflineSamples(ListedSamples(samples.__getitem__), lambda start, count: range(start, start + count))


def gkd(layout):
    options = {"kl_estimator": "full_vocab", "divergence": "forward_kl", "on_policy_fraction": 0.5, "cache": "c"}
    options["token_weighting"] = "entropy"
    stage = stand_ins.opd_stage(GROUPS, LENGTH, **options, ppo_epochs=2)
    student, teacher = (stand_ins.StandInModel(layout, number, 4 * LENGTH) for number in (1.0, 2.0))
    buffer = stand_ins.buffer_of(layout, GROUPS // 2, LENGTH)
    teachers = stand_ins.StandInTeachers(teacher)
    return DivergenceOpdSource(stage, student, buffer, teachers, offline(layout), 1)


def sft(layout):
    return OfflineSource(offline(layout), 9, "seq_mean_token_mean", LENGTH, "supervised_weight", layout)


def grpo(**options):
    return lambda layout: stand_ins.grpo_source(layout, GROUPS, LENGTH, **options)


def opd(**options):
    return lambda layout: stand_ins.opd_source(layout, GROUPS, LENGTH, **options)


SOURCES = {
    "grpo": grpo(overlong_buffer={"len": 8}, truncated_responses="mask", ppo_epochs=2),
    "dapo": grpo(filter_groups={"max_num_gen_batches": 4}, loss_agg_mode="seq_mean_token_mean"),
    "opd": opd(token_weighting="log_ratio", num_mini_batches=2),
    "exopd": opd(reward_scale=1.25, reference="r", token_weighting="position"),
    "sg_opd": opd(reference="r", sign_gate=GATE, truncated_responses="mask"),
    "fixed": opd(fixed_advantage={"fraction": 0.2, "selected_by": "teacher"}, token_weighting="entropy"),
    "gkd": gkd,
    "sft": sft,
}


def steps_of(rank: int, size: int, directory: Path) -> None:
    """Write what a rank has after each step: its own samples' arrays and weights, and all metrics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), size), rank=rank, world_size=size)
    device.prepare()
    layout, results = stand_ins.stand_in_layout(rank, size), {}
    with control_plane.counted() as traffic:
        traffic.refuses_objects = True
        for name, make in SOURCES.items():
            source, model = make(layout), stand_ins.StandInModel(layout, 1.0, 4 * LENGTH)
            for step in range(1, STEPS + 1):
                results[f"{name}/{step}"] = step_of(source, step, model, layout)
        if size > 1:
            samples = own_samples(offline(layout).read(0, 4, stand_ins.stand_in_layout(0, 1)))
            with pytest.raises(ValueError, match="hold 12 samples of 4: each must be on one"):
                model.score(samples)  # the same list on every rank, which would wait for each other
    (directory / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def step_of(source, step, model, layout) -> dict:
    data = source.step(step)
    batches = data.mini_batches
    if not isinstance(source, OfflineSource):
        batches = with_old_log_probs(model, grpo_objective(surrogate_of(source.stage), kl_loss_coef=0), batches)
    values, trained = {}, []
    for number, batch in enumerate(batches):
        assert [sample.id for sample in batch.samples] == [sample.id for sample in data.mini_batches[number].samples]
        moved, _ = model.balance(batch)
        micro_batches = model.pack(moved.samples, moved.loss_weights)
        trained.append([len(micro_batches), sum(batch.num_tokens for batch in micro_batches), moved.num_tokens])
        for index, sample in enumerate(moved.samples):
            known = [name for name in OPTIONAL_ARRAYS if sample.has(name)]
            values[f"{number}/{index}"] = {
                "knows": [sample.id, sample.group_id, sample.length, sample.response_length, sample.finish_reason,
                          sample.reward, sample.verifier_label, known],
            }  # fmt: skip
            if isinstance(sample, Sample):
                arrays = {name: getattr(sample, name).tolist() for name in known}
                weights = {name: np.broadcast_to(column[index], sample.length).tolist()
                           for name, column in moved.loss_weights.items()}  # fmt: skip
                values[f"{number}/{index}"]["own"] = {"tokens": sample.token_ids.tolist()} | arrays | weights
    lag = policy_lag(batches, 3, layout)
    examples = list(data.examples) if data.shown is None else data.shown.lines()
    return {"values": values, "metrics": dict(data.metrics) | lag, "examples": examples, "trained": trained}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank of a job of 1 and of 3 has."""
    results = {}
    context = multiprocessing.get_context("forkserver")  # tests before this one may have made a process group
    context.set_forkserver_preload([steps_of.__module__])
    for size in (1, 3):
        directory = tmp_path_factory.mktemp(f"ranks{size}")
        processes = [context.Process(target=steps_of, args=(rank, size, directory)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
        assert not any(process.exitcode for process in processes)
        results[size] = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]
    return results


@pytest.mark.parametrize("name", SOURCES)
def test_every_rank_has_its_own_samples_and_the_results_of_one_rank(ranks, name):
    for step in range(1, STEPS + 1):
        key = f"{name}/{step}"
        (alone,), parts = ([rank[key] for rank in ranks[size]] for size in (1, 3))
        for part in parts:
            assert part["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
            assert {index: value["knows"] for index, value in part["values"].items()} == {
                index: value["knows"] for index, value in alone["values"].items()
            }
        for index, value in alone["values"].items():
            (own,) = [part["values"][index]["own"] for part in parts if "own" in part["values"][index]]  # on one rank
            assert own.keys() == value["own"].keys()
            for field, numbers in value["own"].items():
                np.testing.assert_allclose(own[field], numbers, rtol=1e-6, err_msg=field)
        for number, (_, tokens, total) in enumerate(alone["trained"]):
            of_ranks = [part["trained"][number] for part in parts]
            assert sum(tokens for _, tokens, _ in of_ranks) == tokens == total
            assert len({count for count, *_ in of_ranks}) == 1  # as pipelines need
            assert max(tokens for _, tokens, _ in of_ranks) < 2 * total / 3
        assert parts[0]["examples"] == alone["examples"]  # rank 0 writes them


def test_host_groups_of_one_rank_communicate_nothing():
    group = stand_ins.HostGroup()
    assert group.sum(np.array([2.0]))[0] == 2 and group.all_gather(np.arange(3))[0].size == 3
    assert types.SimpleNamespace(size=group.size, rank=group.rank) == types.SimpleNamespace(size=1, rank=0)
