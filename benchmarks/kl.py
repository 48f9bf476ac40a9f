"""Divergences at an output layer: time and memory of ``linear_divergence`` compared with common alternatives.

    python benchmarks/kl.py --device cpu --json OUT
    python benchmarks/kl.py --device cuda --json OUT     (about a minute on an H200 by design; not run yet)

Three kinds of rows. ``variant``: seconds, peak_bytes beyond operands and gradients by number of tokens, and the
relative errors of both gradients against float64 (of 32 tokens, and of 64 vocabulary rows over all tokens). All
variants start from the same hidden states and weights and return the gradients of both; chunked variants run at every
``--chunk``. ``ratio``: the bars, each variant at its fastest chunk. ``accuracy``: float32 logits of confident models
against float64.

Times are minima over interleaved rounds: process CPU time with one thread on a CPU, time between CUDA events on a GPU.
Peak memory on a CPU is that of a process of its own. liger_kernel is not part of the environment: ``pip install
liger-kernel==0.8.5`` as well, on a GPU.

Shapes: t tokens, h hidden size, v vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence
from megatron_s2d.kl.reference import dense_outputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates, Logits

Gradients = tuple[torch.Tensor, torch.Tensor]  # of hidden [t, h] and weight [v, h]
_EXACT_TOKENS, _EXACT_ROWS = 32, 64  # gradients that are compared with float64


@dataclass
class Operands:
    """Hidden states [t, h] and output layers [v, h] of student and teacher, scaled to logits of variance 1."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor

    @classmethod
    def random(cls, tokens: int, vocab: int, sizes: tuple[int, int], device: str, dtype: torch.dtype) -> Operands:
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator, device=device).mul_(scale).to(dtype)

        student, teacher = sizes
        return cls(
            normal(tokens, student, 1.0), normal(vocab, student, student**-0.5), normal(tokens, teacher, 1.0),
            normal(vocab, teacher, teacher**-0.5),
        )  # fmt: skip

    def of_tokens(self, rows: slice) -> Operands:
        """Return the operands of some of the tokens."""
        return Operands(self.hidden[rows], self.weight, self.teacher_hidden[rows], self.teacher_weight)

    def leaves(self) -> Gradients:
        """Return the student's hidden states and weight as leaves that require gradients."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


def ours(operands: Operands, chunk: int, name: str = "forward_kl", backend: str = "auto") -> Gradients:
    """Run ``linear_divergence`` with chunks of ``chunk`` tokens; on a GPU with Triton unless ``backend`` is torch."""
    hidden, weight = operands.leaves()
    loss, _ = linear_divergence(
        hidden,
        weight,
        shard=VocabShard.unsharded(len(weight)),
        outputs=(name,),
        teacher=HiddenStates(operands.teacher_hidden, operands.teacher_weight),
        beta=0.5 if name == "jsd" else None,
        token_loss=lambda outputs, rows: getattr(outputs, name) / len(hidden),
        chunk_bytes=chunk * len(weight) * 8,
        backend=backend,
    )
    loss.backward()
    return hidden.grad, weight.grad


def naive(operands: Operands, chunk: int) -> Gradients:
    """Full float32 logits of both models, ``log_softmax`` and ``kl_div``."""
    hidden, weight = operands.leaves()
    student = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax((operands.teacher_hidden @ operands.teacher_weight.T).float(), -1)
    torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True).backward()
    return hidden.grad, weight.grad


def stored_logits(operands: Operands, chunk: int) -> Gradients:
    """Full logits of both models stored in the operands' dtype; float32 log-softmax by chunks in plain PyTorch.

    The backward pass recomputes the softmax. Its gradient overwrites the student's logits, which favours this variant:
    an autograd function would need another tensor.
    """
    student = operands.hidden @ operands.weight.T
    teacher = operands.teacher_hidden @ operands.teacher_weight.T
    loss = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        log_p = torch.log_softmax(student[rows].float(), -1)
        log_q = torch.log_softmax(teacher[rows].float(), -1)
        loss += (log_q.exp() * (log_q - log_p)).sum()
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)
        difference = torch.softmax(student[rows].float(), -1).sub_(torch.softmax(teacher[rows].float(), -1))
        student[rows] = difference.div_(len(student))
    return student @ operands.weight, student.T @ operands.hidden


def products(operands: Operands, chunk: int) -> Gradients:
    """The four matrix products alone, in the operands' dtype: the lower bound."""
    student = operands.hidden @ operands.weight.T
    teacher = operands.teacher_hidden @ operands.teacher_weight.T
    del teacher
    return student @ operands.weight, student.T @ operands.hidden


def liger_jsd(operands: Operands, chunk: int, accum_dtype: torch.dtype | None = torch.float32) -> Gradients:
    """Liger-Kernel's fused linear JSD, beta 0.5; it selects its chunk size. accum_dtype: of the weight gradient."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    hidden, weight = operands.leaves()
    divergence = LigerFusedLinearJSD(jsd_beta=0.5, accum_dtype=accum_dtype)
    divergence(hidden, weight, operands.teacher_hidden, operands.teacher_weight, None).backward()
    return hidden.grad, weight.grad


@dataclass(frozen=True)
class Variant:
    """A method to compute the gradients of a divergence (None: of no divergence)."""

    run: Callable[[Operands, int], Gradients]
    divergence: str | None = "forward_kl"
    in_chunks: bool = True
    cpu_default: bool = True  # also a default on a CPU


VARIANTS = {
    "linear_divergence": Variant(ours),
    "linear_divergence_torch": Variant(lambda *inputs: ours(*inputs, backend="torch"), cpu_default=False),
    "linear_divergence_jsd": Variant(lambda *inputs: ours(*inputs, name="jsd"), "jsd"),
    "naive": Variant(naive, in_chunks=False),
    "stored_logits_chunked": Variant(stored_logits),
    "matrix_products": Variant(products, None, in_chunks=False),
    "liger_fused_linear_jsd": Variant(liger_jsd, "jsd", in_chunks=False, cpu_default=False),
    "liger_fused_linear_jsd_default": Variant(
        lambda *inputs: liger_jsd(*inputs, accum_dtype=None), "jsd", in_chunks=False, cpu_default=False
    ),
}

# device -> (ours, the other, field, largest ratio)
BARS = {
    "cpu": [
        ("linear_divergence", "naive", "seconds", 0.85),
        ("linear_divergence", "naive", "peak_bytes", 1 / 24),
        ("linear_divergence", "stored_logits_chunked", "seconds", 0.9),
    ],
    "cuda": [
        ("linear_divergence", "matrix_products", "seconds", 1.25),
        ("linear_divergence_jsd", "liger_fused_linear_jsd", "seconds", 0.8),
        ("linear_divergence_jsd", "liger_fused_linear_jsd", "hidden_gradient_error", 1.0),
        ("linear_divergence_jsd", "liger_fused_linear_jsd", "weight_gradient_error", 1.0),
        ("linear_divergence", "stored_logits_chunked", "seconds", 0.7),
        ("linear_divergence", "stored_logits_chunked", "peak_bytes", 0.25),
    ],
}  # fmt: skip


def exact_gradients(operands: Operands, name: str) -> Gradients:
    """Return float64 gradients: of the first hidden states [32, h] and of the first rows of the weight [64, h].

    The loss is the mean over all tokens.
    """
    tokens = len(operands.hidden)
    weight, teacher_weight = operands.weight.double(), operands.teacher_weight.double()
    rows = torch.zeros_like(weight[:_EXACT_ROWS])
    hidden = None
    for start in range(0, tokens, 256):
        part = operands.of_tokens(slice(start, start + 256))
        z = (part.hidden.double() @ weight.T).requires_grad_()
        y = part.teacher_hidden.double() @ teacher_weight.T
        outputs = dense_outputs(z, y, (name,), beta=0.5 if name == "jsd" else None)
        (slope,) = torch.autograd.grad(getattr(outputs, name).sum() / tokens, z)
        if hidden is None:
            hidden = slope[:_EXACT_TOKENS] @ weight
        rows += slope[:, :_EXACT_ROWS].T @ part.hidden.double()
    return hidden, rows


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``expected``."""
    return float((actual.double() - expected).norm() / expected.norm())


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return process CPU seconds, or seconds between CUDA events."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved_minima(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Return the minimum seconds of each run over ``repeats`` interleaved rounds, after one warm-up round."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(repeats + 1):
        for name, run in runs.items():
            seconds = seconds_of(run, device)
            if number:
                best[name] = min(best[name], seconds)
    return best


def peak_resident_bytes() -> int:
    """Return the peak memory of this process (``ru_maxrss`` would include the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def extra_bytes(run: Callable[[], Gradients], operands: Operands, device: str) -> int:
    """Return the peak memory of one run beyond the operands and the two gradients."""
    gradients = operands.hidden.nbytes + operands.weight.nbytes
    if device == "cpu":
        before = peak_resident_bytes()
        run()
        return peak_resident_bytes() - before - gradients
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before - gradients


def extra_bytes_in_subprocess(arguments: argparse.Namespace, variant: str, chunk: int, tokens: int) -> int:
    """Run ``extra_bytes`` on a CPU in a new process, because the peak of a process never decreases."""
    command = [sys.executable, __file__, "--device", "cpu", "--peak-of", variant, "--tokens", str(tokens)]
    sizes = {"--vocab": [arguments.vocab], "--hidden": arguments.hidden, "--chunk": [chunk]}
    command += [str(word) for option, values in sizes.items() for word in (option, *values)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def gathers_per_chunk(operands: Operands, chunk: int, variant: str) -> float:
    """Return the number of gathers between shards per chunk; with one shard they are local (tests count real ones)."""
    calls = mock.Mock(side_effect=VocabShard.gather)
    with mock.patch.object(VocabShard, "gather", lambda shard, values: calls(shard, values)):
        VARIANTS[variant].run(operands, chunk)
    return calls.call_count / -(-len(operands.hidden) // chunk)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of the variants at one vocabulary; variants that run out of memory have no row or no peak."""
    device, dtype = arguments.device, torch.float32 if arguments.device == "cpu" else torch.bfloat16
    sizes = (arguments.vocab, tuple(arguments.hidden), device, dtype)
    operands = Operands.random(arguments.tokens, *sizes)
    exact = {name: exact_gradients(operands, name) for name in ("forward_kl", "jsd")}
    runs, errors = {}, {}
    for name in arguments.variants:
        variant = VARIANTS[name]
        for chunk in arguments.chunk if variant.in_chunks else [None]:
            run = functools.partial(variant.run, operands, chunk)
            try:
                hidden, weight = run()
            except torch.OutOfMemoryError:
                print(f"{name} at {arguments.vocab} columns does not fit into memory", file=sys.stderr)
                continue
            row = {"hidden_gradient_error": None, "weight_gradient_error": None}
            if variant.divergence is not None:
                for field, value, expected in zip(row, (hidden, weight), exact[variant.divergence], strict=True):
                    row[field] = relative_error(value[: len(expected)], expected)
            if name.startswith("linear_divergence"):
                row["gathers_per_chunk"] = gathers_per_chunk(operands, chunk, name)
            runs[name, chunk], errors[name, chunk] = run, row
            del hidden, weight
    best = interleaved_minima(runs, device, arguments.repeats)
    rows = []
    for (name, chunk), row in errors.items():
        peaks = {}
        for tokens in arguments.peak_tokens:
            if device == "cpu":
                peaks[tokens] = extra_bytes_in_subprocess(arguments, name, chunk or arguments.chunk[0], tokens)
                continue
            many = Operands.random(tokens, *sizes)
            try:
                peaks[tokens] = extra_bytes(functools.partial(VARIANTS[name].run, many, chunk), many, device)
            except torch.OutOfMemoryError:
                print(f"{name} with {tokens} tokens does not fit into memory", file=sys.stderr)
            del many
        rows.append(
            {
                "row": "variant", "name": name, "device": device, "vocab": arguments.vocab, "tokens": arguments.tokens,
                "hidden": arguments.hidden[0], "teacher_hidden": arguments.hidden[1], "chunk": chunk,
                "seconds": best[name, chunk], "peak_bytes": peaks, **row,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def ratios(rows: Sequence[dict], device: str) -> list[dict[str, object]]:
    """Return the ratios of the bars whose variants were both measured, each at its fastest chunk."""
    results = []
    for vocab, (name, other, field, bar) in itertools.product(sorted({row["vocab"] for row in rows}), BARS[device]):
        fastest = {
            variant: min(
                (row for row in rows if row["vocab"] == vocab and row["name"] == variant),
                key=lambda row: row["seconds"], default=None,
            )
            for variant in (name, other)
        }  # fmt: skip
        if None in fastest.values():
            continue
        pairs = {None: (fastest[name][field], fastest[other][field])}
        if field == "peak_bytes":
            common = fastest[name][field].keys() & fastest[other][field].keys()
            pairs = {tokens: (fastest[name][field][tokens], fastest[other][field][tokens]) for tokens in sorted(common)}
        for tokens, (value, other_value) in pairs.items():
            results.append(
                {
                    "row": "ratio", "vocab": vocab, "name": name, "to": other, "of": field, "tokens": tokens,
                    "ratio": value / other_value, "bar": bar, "met": value / other_value <= bar,
                    "chunk": fastest[name]["chunk"], "chunk_of_other": fastest[other]["chunk"],
                }
            )  # fmt: skip
    return results


def accuracy(vocab: int, device: str) -> list[dict[str, object]]:
    """Return errors of value and gradient from float32 logits of two close, increasingly confident models; bar 1e-5."""
    rows = []
    for lead, name in itertools.product((3.0, 15.0, 19.0, 24.0), ("forward_kl", "reverse_kl", "jsd")):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(1, vocab, generator=generator)
        y = z + 0.2 * torch.randn(1, vocab, generator=generator)
        z[0, 77], y[0, 77] = lead, lead + 0.37
        z, y, beta = z.to(device), y.to(device), 0.3 if name == "jsd" else None
        results = []
        for dtype in (torch.float64, torch.float32):
            leaf, other = z.to(dtype, copy=True).requires_grad_(), y.to(dtype)
            if dtype == torch.float64:
                outputs = dense_outputs(leaf, other, (name,), beta=beta)
            else:
                outputs = vocab_parallel_divergence(
                    leaf, Logits(other), VocabShard.unsharded(vocab), (name,), beta=beta
                )
            getattr(outputs, name).sum().backward()
            results.append((getattr(outputs, name).detach(), leaf.grad))
        errors = [relative_error(value, expected) for expected, value in zip(*results, strict=True)]
        rows.append(
            {
                "row": "accuracy", "device": device, "vocab": vocab, "name": name,
                "p_max": float(torch.softmax(z.double(), -1).max()), "value_error": errors[0],
                "gradient_error": errors[1], "bar": 1e-5, "met": max(errors) <= 1e-5,
            }
        )  # fmt: skip
    return rows


def default_variants(device: str) -> list[str]:
    """Return the variants that the device and the installed packages can run."""
    if device == "cpu":
        return [name for name, variant in VARIANTS.items() if variant.cpu_default]
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not installed: skipping its rows", file=sys.stderr)
        return [name for name in VARIANTS if "liger" not in name]
    return list(VARIANTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256, 151_936])
    parser.add_argument("--tokens", type=int, help="default: 512 on a CPU, 8192 on a GPU")
    parser.add_argument("--hidden", type=int, nargs=2, help="student and teacher; default 256 512, on a GPU 4096 8192")
    parser.add_argument("--chunk", type=int, nargs="+", help="tokens; default 256 on a CPU, 512 to 4096 on a GPU")
    parser.add_argument(
        "--peak-tokens", type=int, nargs="+", help="of the peak memory; default 4096 on a CPU, 8192 and 32768 on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all that the device can run")
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    torch.set_num_threads(1 if on_cpu else torch.get_num_threads())
    arguments.tokens = arguments.tokens or (512 if on_cpu else 8192)
    arguments.hidden = arguments.hidden or ([256, 512] if on_cpu else [4096, 8192])
    arguments.chunk = arguments.chunk or ([256] if on_cpu else [512, 1024, 2048, 4096])
    arguments.peak_tokens = arguments.peak_tokens or ([4096] if on_cpu else [8192, 32768])
    vocabularies, arguments.vocab = arguments.vocab, arguments.vocab[0]
    if arguments.peak_of:
        operands = Operands.random(arguments.tokens, arguments.vocab, tuple(arguments.hidden), "cpu", torch.float32)
        run = VARIANTS[arguments.peak_of].run
        print(extra_bytes(functools.partial(run, operands, arguments.chunk[0]), operands, "cpu"))
        return
    arguments.variants = arguments.variants or default_variants(arguments.device)
    rows = []
    for arguments.vocab in vocabularies:
        rows += measure(arguments)
    others = ratios(rows, arguments.device)
    for arguments.vocab in vocabularies:
        others += accuracy(arguments.vocab, arguments.device)
    for row in others:
        print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows + others, indent=1) + "\n")


if __name__ == "__main__":
    main()
