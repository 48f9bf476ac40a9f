"""Settings of the policy loss and of its advantages that GRPO and OPD share. No torch here."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.teacher_service import TeacherServices, services_by_domain

PolicyLoss = Literal["grpo", "gspo", "cispo"]
StageByDomain = str | dict[str, str]
POLICY_LOSS = (
    "grpo: the ratio of every token is clipped; gspo: that of the response, the geometric mean of its tokens' (arXiv "
    "2507.18071); cispo: a clipped ratio that is a constant weight of log pi (arXiv 2506.13585)"
)
CLIP_RATIO_LOW = "ratios below 1 - clip_ratio_low are clipped; 3e-4 by default with gspo, 1 (no lower bound) with cispo"
CLIP_RATIO_HIGH = (
    "ratios above 1 + clip_ratio_high are clipped; 0.28 is DAPO's clip-higher; 4e-4 by default with gspo, 4 with cispo "
    "(ratios up to 5, arXiv 2510.13786)"
)
ENTROPY_COEFF = "factor of the entropy bonus (below 0: a penalty), in nats of the whole vocabulary; 0: none"

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "loss_agg_mode": "seq_mean_token_mean"},
    "cispo": {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0},
}


class AdvantageTermConfig(Config):
    """A second summand of the advantages, whose factor may change over the stage (methods M3)."""

    weight: float = Field(1.0, ge=0, description="factor of the term in the first step")
    final_weight: float | None = Field(
        None, ge=0, description="factor in the last step, linear in the steps between; null: `weight` in all steps"
    )

    @pydantic.model_validator(mode="after")
    def _check_used(self) -> AdvantageTermConfig:
        if self.weight == 0 and not self.final_weight:
            raise ValueError("the weight is 0 in all steps: remove the term, or set weight or final_weight")
        return self

    def weight_at(self, step: int, steps: int) -> float:
        """Return the factor in ``step`` (counted from 1) of ``steps``."""
        if self.final_weight is None or steps == 1:
            return self.weight
        return self.weight + (self.final_weight - self.weight) * (step - 1) / (steps - 1)


class TeacherAdvantageConfig(AdvantageTermConfig):
    """A teacher's term in the advantages of GRPO: log pi_T - log pi_old of every sampled token."""

    teacher: StageByDomain | None = Field(
        None,
        description="stage whose weights are the frozen teacher, or domain -> stage; null: that of `teacher_service`",
    )
    teacher_service: TeacherServices | None = Field(
        None,
        description="a teacher on other machines that `s2d serve-teacher` serves, or domain -> that; the trainer loads "
        "no copy of it (docs/teachers.md)",
    )

    @pydantic.model_validator(mode="after")
    def _check_one_teacher(self) -> TeacherAdvantageConfig:
        if (self.teacher is None) == (self.teacher_service is None):
            raise ValueError("set exactly one of `teacher` (a stage) and `teacher_service` (a server with a teacher)")
        if any(service.cross_tokenizer for service in services_by_domain(self.teacher_service).values()):
            raise ValueError(
                "cross_tokenizer needs the teacher's own prompt, which GRPO has no view for: use an opd stage with "
                "kl_estimator: sampled_token, teacher_view and reward_advantage"
            )
        return self

    def inputs(self) -> dict[str, str]:
        """Return relation -> stage of the teachers."""
        return {} if self.teacher is None else stages_by_relation("teacher", self.teacher)


class RewardAdvantageConfig(AdvantageTermConfig):
    """The verifier's term in the advantages of OPD: GRPO's group-relative advantage of the response."""

    norm_adv_by_std: bool = Field(True, description="divide by the group's standard deviation; false: Dr. GRPO")


def stages_by_relation(relation: str, stages: StageByDomain) -> dict[str, str]:
    """Return relation, or ``relation.domain``, -> stage."""
    if isinstance(stages, str):
        return {relation: stages}
    return {f"{relation}.{domain}": stage for domain, stage in stages.items()}


def with_policy_loss_defaults(document: Any) -> Any:
    """Return ``document`` with the defaults of its ``policy_loss`` for the keys that it does not set."""
    if not isinstance(document, dict):
        return document
    return _DEFAULTS.get(str(document.get("policy_loss")), {}) | document


def check_policy_loss(policy_loss: PolicyLoss, loss_agg_mode: str, clip_ratio_low: float) -> None:
    """Raise ``ValueError`` for settings that do not fit ``policy_loss``."""
    if policy_loss == "gspo" and loss_agg_mode != "seq_mean_token_mean":
        raise ValueError(
            f"policy_loss gspo is a mean over responses: remove loss_agg_mode {loss_agg_mode}, or set "
            "seq_mean_token_mean"
        )
    if policy_loss != "cispo" and clip_ratio_low == 1:
        raise ValueError(f"clip_ratio_low 1 sets no bound: choose less than 1 for policy_loss {policy_loss}")
