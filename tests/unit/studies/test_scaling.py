"""Power laws, efficiencies and predictions against known laws and numbers calculated by hand."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_s2d.cli import main
from megatron_s2d.config.simulation import KlTime, MatmulTime, MeasuredConfig
from megatron_s2d.errors import UserError
from megatron_s2d.studies.control_plane import MEASURED, HostCost, growth, host_seconds
from megatron_s2d.studies.scaling import Efficiency, Observations, efficiencies, fit_power_law, scaling_kind
from megatron_s2d.studies.simulate import load_simulation, machine_from_config, predict

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
SIMULATION = Path(__file__).resolve().parents[3] / "configs" / "simulations" / "llama_70b_to_8b.yaml"


# ---------------------------------------------------------------- power laws


def test_exact_law_is_recovered():
    observed = [Observations(x, np.array([3.0 * x**-0.4])) for x in (10, 30, 100, 1000)]
    law = fit_power_law(observed)
    assert law.exponent == pytest.approx(-0.4) and law.scale == pytest.approx(3.0)
    assert law.r_squared == pytest.approx(1.0)
    assert law.interval is None  # one seed and no problems: nothing to resample
    assert law(50) == pytest.approx(3.0 * 50**-0.4)


def test_complement_fits_errors_of_accuracies():
    observed = [Observations(x, np.array([1 - 2.0 / x])) for x in (4, 8, 16)]
    assert fit_power_law(observed, complement=True).exponent == pytest.approx(-1.0)


def test_interval_covers_the_law_at_its_nominal_rate():
    """Accuracies of 400 problems around a known law: 95 % intervals rarely miss it, and are narrow."""
    covered, widths = 0, []
    for trial in range(10):
        generator = np.random.default_rng(trial)
        observed = []
        for x in (8, 32, 128, 512):
            chance = 1 - 0.9 * x**-0.3
            observed.append(Observations(x, generator.binomial(4, chance, (2, 400)) / 4))
        low, high = fit_power_law(observed, complement=True, seed=trial).interval
        covered += low <= -0.3 <= high
        widths.append(high - low)
    assert covered >= 8
    assert 0.01 < np.mean(widths) < 0.2


def test_points_without_a_law_raise():
    with pytest.raises(UserError, match="needs three different x; there are 2"):
        fit_power_law([Observations(x, np.array([1.0])) for x in (1, 2)])
    with pytest.raises(UserError, match="needs positive values; at x = 3 it is 0"):
        fit_power_law([Observations(x, np.array([1.0 if x < 3 else 0.0])) for x in (1, 2, 3)])


def test_law_with_zeros_in_some_resamples_has_no_interval():
    values = np.zeros((1, 50))
    values[0, 0] = 1.0  # a third of the resamples miss the one problem that is solved
    law = fit_power_law([Observations(x, values) for x in (1, 2, 4)])
    assert law.interval is None and law.dropped > 200


# ---------------------------------------------------------------- efficiency


def test_efficiency_is_throughput_per_rank():
    rows = efficiencies({"four": (4, 1000.0, 300.0), "one": (1, 1000.0, 100.0)})
    assert [row.label for row in rows] == ["one", "four"]
    assert rows[1].efficiency == pytest.approx(0.75)
    assert scaling_kind(rows) == "strong"


@pytest.mark.parametrize(("tokens", "kind"), [((100, 200), "weak"), ((100, 100), "strong"), ((100, 150), "mixed")])
def test_kind_of_scaling_follows_the_tokens_per_step(tokens, kind):
    rows = [Efficiency(str(n), n, count, 1.0, 1.0) for n, count in zip((1, 2), tokens, strict=True)]
    assert scaling_kind(rows) == kind


# ---------------------------------------------------------------- simulation


@pytest.fixture(scope="module")
def simulation():
    return load_simulation(SIMULATION)


def test_phases_by_hand(simulation):
    """On 64 GPUs: GEMMs and all-reduces of teacher and student, up to the share of attention."""
    prediction = predict(simulation)[0]
    tokens = 512 * 8 * (512 + 4096)
    layers = 70_553_706_496 - 2 * 128256 * 8192
    gemms = 2 * tokens * layers / (64 * 0.5 * 989e12)
    # Sequence parallelism: four gathers or scatters per layer of 8192 channels in bfloat16, 7/8 of each is sent.
    traffic = tokens / 8 * 8192 * 2 * 7 / 8 * (4 * 80 + 1) / (0.7 * 450e9)
    assert prediction.seconds["teacher forward"] == pytest.approx(gemms + traffic, rel=0.08)
    student = 3 * 2 * tokens * (8_030_261_248 - 2 * 128256 * 4096) / (64 * 0.5 * 989e12)
    traffic = tokens / 8 * 4096 * 2 * 7 / 8 * (10 * 32 + 3) / (0.7 * 450e9)
    assert prediction.seconds["student passes"] == pytest.approx(student + traffic, rel=0.12)
    assert prediction.seconds["weight sync"] == 0  # sampling uses the trainer's weights
    assert prediction.tokens == tokens


def test_strong_scaling_is_limited_by_the_longest_response(simulation):
    predictions = predict(simulation)
    assert [item.num_gpus for item in predictions] == [64, 128, 256, 512, 1024]
    rates = [item.rate / item.num_gpus for item in predictions]
    assert all(a > b for a, b in itertools.pairwise(rates))
    floor = 8192 * 2 * (8_030_261_248 - 128256 * 4096) / 8 / (0.7 * 4.8e12)  # weights read for every token
    assert all(item.seconds["decode"] > floor for item in predictions)


def test_weak_scaling_has_a_constant_rate_per_gpu(simulation):
    predictions = predict(simulation.model_copy(update={"scaling": "weak"}))
    rates = [item.tokens / (item.total - item.seconds["host"]) / item.num_gpus for item in predictions]
    assert rates[-1] == pytest.approx(rates[0], rel=0.02)
    assert predictions[-1].seconds["host"] > predictions[0].seconds["host"]  # grows with data-parallel ranks
    assert predictions[-1].tokens == 16 * predictions[0].tokens


def test_measured_rates_replace_assumed_ones(simulation):
    measured = MeasuredConfig(
        matmuls=[MatmulTime(m=1000, n=1000, k=1000, seconds=2e9 / 800e12)],
        kl=KlTime(tokens=1000, vocab=128256, hidden=4096, teacher_hidden=8192, seconds=0.01),
        memory_bandwidth=4e12, node_bandwidth=300e9, network_bandwidth=40e9, latency=5e-6,
    )  # fmt: skip
    config = simulation.model_copy(update={"measured": measured})
    machine = machine_from_config(config)
    assert machine.flops == pytest.approx(800e12)
    assert machine.memory_rate == pytest.approx(4e12)
    assert machine.link_rate(8) == pytest.approx(300e9) and machine.link_rate(16) == pytest.approx(40e9)
    prediction = predict(config)[0]
    # Eight data ranks of eight tensor ranks, each with an eighth of the vocabulary: 1e-5 s per token on one GPU.
    assert prediction.seconds["KL"] == pytest.approx(512 * 8 * 4096 / 8 * 1e-5 / 8, rel=0.02)


def test_impossible_measurements_and_layouts_raise_one_line(simulation):
    fast = MeasuredConfig(memory_bandwidth=9e12)
    with pytest.raises(UserError, match=r"memory_bandwidth: 9e[+]12 bytes/s is above the data sheet's 4.8e[+]12"):
        predict(simulation.model_copy(update={"measured": fast}))
    with pytest.raises(UserError, match="1024 GPUs have 128 data-parallel ranks but only 64 responses"):
        predict(simulation.model_copy(update={"train_batch_size": 8}))
    other = simulation.student.model_copy(update={"preset": "qwen3-8b"})
    with pytest.raises(UserError, match="must share one vocabulary"):
        predict(simulation.model_copy(update={"student": other}))


def test_servers_need_weight_updates_and_memory(simulation):
    in_process = predict(simulation)[0]
    served = predict(simulation.model_copy(update={"engine_tensor_parallel_size": 2}))[0]
    # Gathered over eight tensor ranks of a node, then all of it to every rank of a server, between nodes.
    size = 2 * 8_030_261_248
    assert served.seconds["weight sync"] == pytest.approx(size * 7 / 8 / (0.7 * 450e9) + size / (0.7 * 50e9), rel=0.01)
    assert served.memory > in_process.memory


def test_command_prints_its_basis_and_writes_a_page(capsys, tmp_path):
    assert main(["simulate", str(SIMULATION), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for expected in ("predicted, not measured", "measured, from the file: nothing", "ASSUMED", "strong scaling"):
        assert expected in text, expected
    page = (tmp_path / "simulation.html").read_text()
    assert "<script" not in page and page.count("data:image/png") == 2
    assert (tmp_path / "plots" / "phases.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "simulation.csv").read_text().startswith("GPUs,prefill,decode")


def test_host_seconds_follow_the_measured_rows():
    rows = [HostCost(ranks, 0.01 * ranks**0.5, 1000) for ranks in (2, 4, 8)]
    assert growth(rows) == pytest.approx(0.5)
    assert host_seconds(64, 3000, rows) == pytest.approx(3 * 0.01 * 8)
    rows = [
        HostCost(ranks, (0.02 + tokens / 1e6) * ranks**0.5, tokens) for ranks in (2, 4, 8) for tokens in (100, 9000)
    ]
    assert growth(rows) == pytest.approx(0.5)
    assert host_seconds(64, 5000, rows) == pytest.approx((0.02 + 0.005) * 8)
    assert host_seconds(4, 0, rows) == pytest.approx(0.02 * 2)  # a step costs that with any samples
    assert 0.1 < growth() < 0.6 and host_seconds(8, MEASURED[2].tokens) == pytest.approx(MEASURED[2].seconds, rel=0.25)


def test_the_page_has_the_stored_rows_and_their_exponent():
    page = PAGE.read_text()
    columns = {tokens: number for number, tokens in enumerate(dict.fromkeys(row.tokens for row in MEASURED))}
    assert len(columns) == 2
    for row in MEASURED:
        (line,) = re.findall(rf"^\| {row.ranks} \| {8 * row.ranks:,} \|.*$", page, re.M)
        assert line.split("|")[-3 + columns[row.tokens]].strip() == f"{row.seconds:.3f}", line
    assert f"seconds {growth():.2f}." in page and f"ranks^{growth():.2f}" in page
    assert len(re.findall(r"ranks\^0\.\d", page)) == 1


def test_constants_of_a_step_and_a_micro_batch_are_added(simulation):
    (plain, *_), work = predict(simulation), 512 * 8 * (512 + 4096) / 8  # tokens of a data-parallel rank
    measured = MeasuredConfig(step_seconds=0.5, micro_batch_seconds=0.25)
    (with_them, *_) = predict(simulation.model_copy(update={"measured": measured}))
    count = -(-work // simulation.micro_batch_tokens)
    assert with_them.seconds["host"] - plain.seconds["host"] == pytest.approx(0.5 + 0.25 * count, rel=0.02)
    assert with_them.total - plain.total == pytest.approx(0.5 + 0.25 * count, rel=0.02)


def test_prediction_has_the_host_and_checkpoints():
    simulation = load_simulation(SIMULATION)
    small, *_, large = predict(simulation)
    tokens = simulation.train_batch_size * 8 * (simulation.prompt_tokens + simulation.response_tokens)
    assert small.seconds["host"] == pytest.approx(host_seconds(8, tokens / 8)) and small.seconds["checkpoint"] == 0
    assert large.seconds["host"] == pytest.approx(host_seconds(128, tokens / 128))
    assert large.seconds["host"] < small.seconds["host"]
    saving = simulation.model_copy(update={"checkpoint_interval_steps": 20, "node_write_bandwidth": 1e9})
    few, *_, many = predict(saving)  # 8 nodes write 8 GB/s; 128 nodes no more than the file system's 50
    assert few.seconds["checkpoint"] == pytest.approx(14 * 8_030_261_248 / 8e9 / 20)
    assert many.seconds["checkpoint"] == pytest.approx(14 * 8_030_261_248 / 50e9 / 20)
    assert few.total == pytest.approx(small.total + few.seconds["checkpoint"])


def test_seconds_count_the_tokens_and_not_full_micro_batches(simulation):
    """Ranks with 1.25 and 1.5 micro-batches of tokens do not both take as long as with 2."""
    length = simulation.prompt_tokens + simulation.response_tokens
    few, more = (
        predict(simulation.model_copy(update={"train_batch_size": size, "micro_batch_tokens": 32 * length}))[0]
        for size in (40, 48)  # as many responses on each of 8 data-parallel ranks
    )
    assert more.seconds["student passes"] / few.seconds["student passes"] == pytest.approx(1.2, rel=0.02)
