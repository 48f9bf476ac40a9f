"""One rank of layouts that need Transformer Engine; where it is installed the other cases use its layers, too."""

from rank_checks import *  # noqa: F403

NAMES = [
    "llama_padded",
    "fp8_tensorwise",
    "fp8_delayed_parameters",
    "fp8_blockwise_tp2",
    "fp8_moe",
    "opd_8b_tp_comm_overlap",
]
