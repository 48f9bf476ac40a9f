"""One rank of layouts of one kind of parallelism, or none."""

from rank_checks import *  # noqa: F403

NAMES = [
    "sft",
    "grpo_offload",
    "grpo_lora",
    "sft_saves_and_loads",
    "sft_cp2",
    "moe_ep8",
    "opd_moe_tp2_cp2_ep4",
    "sft_14b_middle_stage",
]
