"""``s2d generate``: samples responses from the model of a finished stage, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from megatron_s2d.artifacts.files import read_json_object
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import parse
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.tokenizer import render
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import printable
from megatron_s2d.records import Prompt

if TYPE_CHECKING:
    from megatron_s2d.stages.inputs import StageInputs


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """Arguments of ``s2d generate``."""

    run_dir: Path
    stage: str  # or an arm
    prompts: tuple[str, ...]  # texts
    data: str | None  # entry to take prompts from, instead of texts
    limit: int
    num_samples: int
    temperature: float
    max_response_length: int | None
    seed: int
    raw: bool = False  # ``prompts`` are texts to continue, not messages of a user


def generate(request: GenerateRequest, console: Console) -> None:
    """Load the stage's weights, sample responses, grade those to labelled prompts, and print them."""
    config_path = request.run_dir / "config.json"
    if not config_path.exists():
        raise UserError(f"{request.run_dir}: not a run directory (no config.json)")
    config = parse(WorkflowConfig, read_json_object(config_path), str(config_path))
    stage = config.arms.get(request.stage, request.stage)
    if stage not in config.stages:
        raise UserError(f"{request.run_dir}: no stage or arm '{request.stage}' (stages: {', '.join(config.stages)})")
    directory = StageDirectory(request.run_dir / "stages" / stage)
    directory.finished()

    from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
    from megatron_s2d.rollout.sampler import RolloutWorker, response_text
    from megatron_s2d.stages.context import StageContext
    from megatron_s2d.verify import RewardManager

    initialize_distributed()
    layout = build_layout(ParallelConfig())
    context = StageContext.create(
        config,
        stage,
        directory=directory,
        inputs={stage: directory},
        layout=layout,
        tokenizer_cache=request.run_dir / "tokenizer",
    )
    policy = context.models.frozen(stage)
    prompts = _prompts(request, config, context.inputs)
    update = {"temperature": request.temperature}
    if request.max_response_length is not None:
        update["max_response_length"] = request.max_response_length
    params = context.rollouts.sampling_params(
        config.evaluation.sampling.model_copy(update=update), config.model_of(stage)
    )
    with RewardManager() as rewards, context:
        labelled = all(prompt.verifier is not None for prompt in prompts)
        worker = RolloutWorker(
            policy.layout,
            context.rollouts.engine(policy, config.model_of(stage), params),
            params,
            request.seed,
            context.inputs.tokenizer,
            rewards if labelled else None,
            context.rollouts.environments(config.model_of(stage), rewards if labelled else None),
        )
        samples = worker.sample(prompts, request.num_samples, 0)
    for index, prompt in enumerate(prompts):
        console.print(printable(prompt.text), style="bold", markup=False, highlight=False)
        for sample in samples[index * request.num_samples : (index + 1) * request.num_samples]:
            label = f"   [{sample.verifier_label}]" if sample.verifier_label else ""
            truncated = "" if sample.finish_reason == "stop" else " ..."
            text = printable(response_text(context.inputs.tokenizer, sample))
            console.print(f"  {text}{truncated}{label}", markup=False, highlight=False)
    shutdown_distributed()


def _prompts(request: GenerateRequest, config: WorkflowConfig, inputs: StageInputs) -> Sequence[Prompt]:
    if request.data is not None:
        if request.data.partition("/")[0] not in config.data:
            raise UserError(f"no entry '{request.data}' in the run's data ({', '.join(config.data)})")
        return inputs.prompts(request.data)[: request.limit]
    prompts = []
    for number, text in enumerate(request.prompts):
        rendered = text
        if not request.raw:
            rendered = render([{"role": "user", "content": text}], inputs.tokenizer, config.template_date)
        # A chat template writes the start token itself.
        special = request.raw or inputs.tokenizer.chat_template is None
        token_ids = np.asarray(inputs.tokenizer(rendered, add_special_tokens=special)["input_ids"], dtype=np.int64)
        prompts.append(Prompt(f"prompt/{number}", token_ids, rendered, "prompt", None, None))
    return prompts
