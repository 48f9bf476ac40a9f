"""One rank of layouts with tensor and pipeline parallelism, up to 64 GPUs."""

from rank_checks import *  # noqa: F403

NAMES = [
    "opd_tp2_pp2_dp2_padded",
    "opd_tp2_pp2_dp2_packed",
    "opd_8b_tp8",
    "opd_70b_last_stage",
    "opd_states_travel",
    "opd_8b_virtual_stages",
    "grpo_llama_tp4_pp2",
]
