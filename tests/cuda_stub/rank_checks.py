"""Tests of one rank: it runs, fits its estimate, multiplies in the right types, and waits little.

Files that import them choose the cases. There are two such files, so that two workers share the cases between them and
each is measured once.
"""

import pytest

from megatron_s2d.measure.comparison import compare_traffic

PLAN_ERROR = 0.05
TRAFFIC_ERROR = 0.05
SMALL_BLOCKS = 128 << 20  # of pinned memory: hidden states of the micro-batches, in powers of two


def test_the_stage_runs_to_its_end(case):
    measurement = case.measurement
    assert measurement.out_of_memory is None
    phases = {call.phase for call in measurement.calls}
    assert {"build", "train", "update"} <= phases
    assert sum(call.phase == "train" for call in measurement.calls) == 2 * case.shape.updates
    # ProcessGroupNCCL refuses tensors of the CPU, and the stub's NCCL any pageable memory.
    assert case.config.parallel.world_size == 1 or any(call.collectives for call in measurement.calls)


def test_products_of_the_output_layer_take_bfloat16_and_give_float32(case):
    columns = -(-case.spec.vocab_size // case.config.parallel.tensor_model_parallel_size)
    products = [item for item in case.measurement.call("train").products if columns in (item.m, item.n)]
    is_last = case.measurement.coordinates["pp"] == case.config.parallel.pipeline_model_parallel_size - 1
    assert bool(products) == is_last
    assert {(item.a, item.b, item.c, item.compute) for item in products} <= {("bf16", "bf16", "f32", "f32")}


def test_layers_multiply_in_bfloat16(case):
    products = case.measurement.call("train").products
    wide = sum(item.flops for item in products if "f32" in (item.a, item.b))
    assert wide < 0.01 * sum(item.flops for item in products)


@pytest.mark.parametrize("counted", ["launches", "waits"])
def test_launches_and_waits_stay_below_their_bars(case, counted):
    found, bars = {}, case.values.get(counted, {})
    assert {"train", "update"} <= bars.keys(), f"no bars of {counted}"
    for phase in bars:
        call = case.measurement.call(phase)
        per = call.micro_batches or (case.limits.decoded_tokens if phase == "decode" else 1)
        value = call.num_launches / case.num_layers if counted == "launches" else call.num_waits
        found[phase] = round(value / per, 2)
    above = {phase: value for phase, value in found.items() if value > bars[phase]}
    assert not above, f"{counted}: {found}, bars {bars}"


def test_memory_is_what_the_plan_estimates(case):
    errors = {item.phase: round(item.error, 3) for item in case.memory()}
    assert {"build", "train", "update"} <= errors.keys()
    wrong = [phase for phase, error in errors.items() if abs(error) > PLAN_ERROR]
    assert not wrong, errors


def test_the_peak_is_what_the_plan_estimates(case):
    phases = case.memory()  # files are saved and loaded in phases that are not estimated
    estimated, measured = (max(getattr(item, name) for item in phases) for name in ("estimated", "measured"))
    assert abs(estimated / measured - 1) <= PLAN_ERROR, phases


def test_pinned_memory_is_what_the_plan_estimates(case):
    measured = max(call.pinned_bytes for call in case.measurement.calls)
    estimated = sum(case.estimate.pinned.values())
    assert abs(measured - estimated) < PLAN_ERROR * estimated + SMALL_BLOCKS


def test_collectives_send_what_the_plan_counts(case):
    traffic = compare_traffic(case.config, case.specs, case.shape, case.measurement, case.limits)
    errors = {kind: measured / estimated - 1 for kind, (estimated, measured) in traffic.items()}
    allowed = case.values.get("traffic_error", {})  # with Transformer Engine only
    wrong = {kind: error for kind, error in errors.items() if abs(error) > allowed.get(kind, TRAFFIC_ERROR)}
    assert not wrong, f"{wrong} of {traffic}"
