"""Type of stage -> the function that runs it. A new method is a configuration class, a function, and a line here."""

from megatron_s2d.stages.forward_kl import run_forward_kl
from megatron_s2d.stages.grpo import run_grpo
from megatron_s2d.stages.opd import run_opd
from megatron_s2d.stages.sft import run_sft
from megatron_s2d.stages.teacher_cache import run_teacher_cache
from megatron_s2d.stages.weights import run_expo, run_load_checkpoint

STAGES = {
    "load_checkpoint": run_load_checkpoint,
    "sft": run_sft,
    "grpo": run_grpo,
    "teacher_cache": run_teacher_cache,
    "forward_kl": run_forward_kl,
    "opd": run_opd,
    "expo": run_expo,
}
