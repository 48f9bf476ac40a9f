"""Validation inside a stage: data sets, the best checkpoint, and when the stage ends. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveInt

from megatron_s2d.config.base import Config, Name
from megatron_s2d.config.training import SamplingConfig

# Metrics of one data set, as in ``validation.jsonl``.
METRICS = ("pass_rate", "reward", "response_length", "truncated_fraction")
Mode = Literal["max", "min"]
_METRIC = "NAME/METRIC: a name of `data` and pass_rate, reward, response_length or truncated_fraction"


class BestCheckpointConfig(Config):
    """Which weights a stage leaves: those of the best validation (load_best_model_at_end of Hugging Face)."""

    metric: str = Field(description=_METRIC)
    mode: Mode = Field("max", description="whether the largest or the smallest value is the best; of equals the first")


class UntilRule(Config):
    """What all rules share."""

    after_step: int = Field(0, ge=0, description="the rule does not end the stage before this step")


class PlateauRule(UntilRule):
    """Early stopping: end the stage when a metric has not improved for some validations."""

    rule: Literal["plateau"] = "plateau"
    metric: str = Field(description=_METRIC)
    mode: Mode = Field("max", description="whether larger or smaller values are better")
    patience: PositiveInt = Field(3, description="validations in a row without an improvement that end the stage")
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement: better than the best by more")


class PassRateRule(UntilRule):
    """End the stage when the share of correct responses reaches a limit."""

    rule: Literal["pass_rate"] = "pass_rate"
    data: str = Field(description="a name of `data`")
    threshold: float = Field(gt=0, le=1, description="pass rate, averaged over the problems")


class KlRule(UntilRule):
    """End the stage when the KL to the teacher is small."""

    rule: Literal["kl"] = "kl"
    threshold: float = Field(
        gt=0, description="nats a token: `kl` of metrics.jsonl, averaged over the steps since the last validation"
    )


Rule = Annotated[PlateauRule | PassRateRule | KlRule, Field(discriminator="rule")]


class ValidationConfig(Config):
    """Graded samples of the weights in training, every so many steps (docs/validation.md)."""

    interval_steps: int = Field(
        ge=1,
        description="training steps between two validations (eval_steps of TRL, test_freq of verl, val_check_interval "
        "of Lightning); one more follows the last step",
    )
    data: dict[Name, str] = Field(
        min_length=1, description="name of a curve -> labelled prompts: an entry of `data`, or `entry/half`"
    )
    before_training: bool = Field(False, description="validate the starting weights too, as step 0")
    num_prompts: PositiveInt | None = Field(None, description="the first so many prompts of each; null: all")
    samples_per_prompt: PositiveInt = Field(1, description="responses to each prompt, the same seeds at every step")
    sampling: SamplingConfig | None = Field(None, description="null: as `evaluation.sampling`")
    seed: int = Field(0, ge=0, description="of the responses, added to the run's seed")
    batch_size: int = Field(256, ge=1, description="prompts sampled together: what an interruption may lose")
    best: BestCheckpointConfig | None = Field(
        None, description="leave the weights of the best validation, not those of the last step; null: the last"
    )
    until: list[Rule] = Field(
        default_factory=list,
        description="rules that end the stage before `steps`: the first that holds; the next stage then starts from "
        "these weights (or from the best, see `best`)",
    )

    @property
    def entries(self) -> list[str]:
        """Entries of ``data`` of the workflow that are sampled from, each once."""
        return list(dict.fromkeys(self.data.values()))

    @property
    def selects(self) -> bool:
        """Whether the labels decide about the weights that the stage leaves."""
        return self.best is not None or any(not isinstance(rule, KlRule) for rule in self.until)

    @property
    def changes_weights(self) -> bool:
        """Whether the stage leaves other weights than without validation."""
        return self.best is not None or bool(self.until)

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> ValidationConfig:
        named = [("best.metric", self.best.metric)] if self.best is not None else []
        for index, rule in enumerate(self.until):
            if isinstance(rule, PlateauRule):
                named.append((f"until.{index}.metric", rule.metric))
            if isinstance(rule, PassRateRule) and rule.data not in self.data:
                raise ValueError(f"until.{index}.data: '{rule.data}' is not among its `data` ({', '.join(self.data)})")
        for where, metric in named:
            name, _, kind = metric.rpartition("/")
            if name not in self.data or kind not in METRICS:
                names = ", ".join(f"{known}/{METRICS[0]}" for known in self.data)
                raise ValueError(
                    f"{where}: '{metric}' is not NAME/METRIC, such as {names}; metrics: {', '.join(METRICS)}"
                )
        return self
