"""Which function runs which type of stage. A new method is a configuration class, a function, and a line here."""

from collections.abc import Callable

from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.distill import run_forward_kl, run_opd
from megatron_s2d.stages.expo import run_expo
from megatron_s2d.stages.grpo import run_grpo
from megatron_s2d.stages.pretrained import run_load_checkpoint
from megatron_s2d.stages.sft import run_sft
from megatron_s2d.stages.teacher_cache import run_teacher_cache

STAGES: dict[str, Callable[[StageContext], None]] = {
    "load_checkpoint": run_load_checkpoint,
    "sft": run_sft,
    "grpo": run_grpo,
    "teacher_cache": run_teacher_cache,
    "forward_kl": run_forward_kl,
    "opd": run_opd,
    "expo": run_expo,
}
