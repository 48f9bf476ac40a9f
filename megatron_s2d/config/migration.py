"""Renamed configuration keys and values: a file that uses a previous one raises an error with the new one.

Version 1.0 will remove this module. Patterns are dotted paths in the file; ``*`` stands for one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_s2d.errors import UserError

_STAGE_KEYS = {
    "like": "extends",
    "batch_size": "global_batch_size",
    "clip_low": "clip_ratio_low",
    "clip_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "kl_coefficient": "kl_loss_coef",
    "importance": "rollout_correction",
    "normalize_by_std": "norm_adv_by_std",
    "aggregation": "loss_agg_mode",
    "responses_per_prompt": "num_generations",
    "prompts_per_step": "train_batch_size",
    "updates_per_step": "num_mini_batches",
    "dynamic_sampling_rounds": "filter_groups.max_num_gen_batches (the first batch counts: one more than before)",
    "overlong": "overlong_buffer (buffer_tokens is now len, penalty is penalty_factor)",
    "granularity": "kl_estimator (full, topk, sampled are now full_vocab, top_k, sampled_token)",
    "kind": "representation (full, topk, hidden, sampled are now full_vocab, top_k, hidden_states, sampled_token)",
    "tail": "tail_mass",
    "support": "top_k_source",
    "gate": "sign_gate",
    "prompts_per_round": "generation_batch_size",
    "verified_only": "only_correct",
    "checkpoint.keep": "keep_last_n",
    "checkpoint.in_background": "async_save",
    "micro_batch.max_tokens": "max_tokens_per_gpu",
    "micro_batch.packed": "sequence_packing",
    "sampling.max_response_tokens": "max_response_length",
    "gate.fallback": "sign_gate.conflict_fallback",
    "gate.interp_beta": "sign_gate.conflict_beta",
    "sign_gate.fallback": "conflict_fallback",
    "sign_gate.interp_beta": "conflict_beta",
    "teacher_sampling.responses_per_prompt": "num_generations",
    "teacher_sampling.verified_only": "only_correct",
}
_SGLANG_KEYS = {
    "replicas": "num_servers",
    "first_gpu": "base_gpu_id",
    "arguments": "extra_args",
    "deterministic": "enable_deterministic_inference",
    "release_memory": "enable_memory_saver",
    "sync": "weight_sync",
    "start_seconds": "startup_timeout_seconds",
    "ahead": "rollout.async_mode (off, wait, continue are now sync, one_step_off, partial_rollout)",
    "oversampling": "rollout.over_sampling_ratio",
    "concurrency": "rollout.server.max_concurrent_requests",
    "attempts": "rollout.server.max_attempts",
    "recoveries": "rollout.server.max_restarts",
    "request_seconds": "rollout.server.request_timeout_seconds",
    "probe_tolerance": "rollout.server.weight_check_tolerance",
}

WORKFLOW_KEYS = {
    "base": "defaults",
    "gates": "pass_rate_checks",
    "num_workers": "max_parallel_stages",
    "tensorboard": "tracking: [tensorboard] (or nothing)",
    "hang_seconds": "watchdog_timeout_seconds",
    "lengths.max_prompt_tokens": "max_prompt_length",
    "fp8.frozen_models": "frozen",
    "data.*.at_least": "min_values",
    "evaluation.problems_per_round": "eval_batch_size",
    "evaluation.sampling.max_response_tokens": "max_response_length",
    "rollout.max_kl": "max_mismatch_kl",
    **{f"rollout.sglang.{old}": new for old, new in _SGLANG_KEYS.items()},
    **{f"stages.*.{old}": new for old, new in _STAGE_KEYS.items()},
}
SWEEP_KEYS = {"base": "workflow"}
SIMULATION_KEYS = {"prompts_per_step": "train_batch_size", "responses_per_prompt": "num_generations"}
WORKFLOW_VALUES = {
    ("stages.*.type", "supervised"): "sft",
    ("stages.*.type", "pretrained"): "load_checkpoint",
    ("stages.*.rollout_correction.mode", "truncate"): "tis",
    ("stages.*.kl_estimator", "full"): "full_vocab",
    ("stages.*.kl_estimator", "topk"): "top_k",
    ("stages.*.kl_estimator", "sampled"): "sampled_token",
}


def refuse_renamed(
    document: Mapping[str, Any],
    source: str,
    keys: Mapping[str, str],
    values: Mapping[tuple[str, str], str] | None = None,
) -> None:
    """Raise a ``UserError`` with the new key (or value) for the first previous one in ``document``."""
    renamed, changed = (
        _by_end(keys.items()),
        _by_end((pattern, (old, new)) for (pattern, old), new in (values or {}).items()),
    )
    for path, value in _leaves_and_nodes(document, ()):
        end = len(path), path[-1]
        for parts, new in renamed.get(end, ()):
            if _matches(path, parts):
                raise UserError(f"{source}: {'.'.join(path)}: this key was renamed: write {new}")
        for parts, (old, new) in changed.get(end, ()):
            if value == old and _matches(path, parts):
                raise UserError(f"{source}: {'.'.join(path)}: the value {old} was renamed: write {new}")


def _by_end[Value](patterns: Iterable[tuple[str, Value]]) -> dict[tuple[int, str], list[tuple[list[str], Value]]]:
    """Return patterns with their values by number of parts and last part, which is a name: few fit a key."""
    by_end: dict[tuple[int, str], list[tuple[list[str], Value]]] = {}
    for pattern, value in patterns:
        parts = pattern.split(".")
        assert parts[-1] != "*", pattern
        by_end.setdefault((len(parts), parts[-1]), []).append((parts, value))
    return by_end


def _leaves_and_nodes(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        yield (*path, str(key)), value
        yield from _leaves_and_nodes(value, (*path, str(key)))


def _matches(path: tuple[str, ...], parts: list[str]) -> bool:
    return all(part in ("*", name) for part, name in zip(parts, path, strict=True))
