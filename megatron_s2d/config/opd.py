"""Configuration of stage 2b: on-policy distillation, G-OPD, SG-OPD and GKD. No torch."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.grpo import RolloutCorrectionConfig
from megatron_s2d.config.stage import TRUNCATED, LossAggMode, TrainingStageConfig, Truncated
from megatron_s2d.config.training import SamplingConfig

StageByDomain = str | dict[str, str]


class SignGateConfig(Config):
    """The sign gate of SG-OPD and its stability weight (methods M5)."""

    lambda_high: float = Field(1.8, ge=0, description="reward scale of tokens on which verifier and teacher agree")
    lambda_base: float = Field(1.0, ge=0, description="reward scale of tokens without a verifier signal")
    conflict_fallback: Literal["interp", "preserve", "grpo", "mask"] = Field(
        "interp", description="what tokens get on which verifier and teacher disagree"
    )
    conflict_beta: float | None = Field(None, ge=0, le=1, description="for conflict_fallback interp: 1 is OPD, 0 masks")
    stability_clip: float | None = Field(None, gt=0, description="c of the stability weight, in nats; null: none")

    @pydantic.model_validator(mode="after")
    def _interp(self) -> SignGateConfig:
        if (self.conflict_fallback == "interp") != (self.conflict_beta is not None):
            raise ValueError(
                f"conflict_beta goes with conflict_fallback: interp, and only with it; conflict_fallback is "
                f"{self.conflict_fallback}"
            )
        return self


class TeacherSamplingConfig(Config):
    """Phased teacher sampling: verified teacher responses as a cross-entropy anchor that fades (methods M5)."""

    fraction: float = Field(gt=0, le=1, description="rho: share of a step's prompts that the teacher answers too")
    num_generations: int = Field(1, ge=1)
    alpha_high: float = Field(1.0, ge=0, description="weight of the anchor in the first phase")
    alpha_end: float = Field(0.0, ge=0, description="weight at the end of the second phase")
    phase_1_end: float = Field(ge=0, le=1, description="p1, a fraction of the stage's steps")
    phase_2_end: float = Field(ge=0, le=1, description="p2; nothing is sampled from the teacher afterwards")
    only_correct: bool = Field(True, description="false: wrong responses anchor too (a control of the paper)")

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> TeacherSamplingConfig:
        if self.phase_1_end > self.phase_2_end or self.alpha_end > self.alpha_high:
            raise ValueError("give phase_1_end <= phase_2_end and alpha_end <= alpha_high")
        return self


class OpdConfig(TrainingStageConfig):
    """Stage 2b: on-policy distillation to frozen teachers (methods M3), G-OPD (M4), SG-OPD (M5), GKD."""

    type: Literal["opd"] = "opd"
    teacher: StageByDomain = Field(description="stage whose weights are the frozen teacher, or domain -> stage")
    teacher_engine: Literal["trainer", "sglang"] = Field(
        "trainer",
        description="who scores with the teacher: the trainer, or SGLang servers (kl_estimator sampled_token, or "
        "top_k with top_k_source teacher)",
    )
    prompts: str | list[str] = Field(
        description="entries of `data`, or `entry/half`; labels are used with `sign_gate` only"
    )
    label_reuse: Literal["refuse", "allow"] = Field(
        "allow", description="refuse: an error where `sign_gate` or `teacher_sampling` would use labels a second time"
    )
    train_batch_size: int = Field(64, ge=1)
    num_generations: int = Field(8, ge=1)
    num_mini_batches: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    kl_estimator: Literal["full_vocab", "top_k", "sampled_token"] = Field(
        "full_vocab",
        description="full_vocab: exact divergence over the vocabulary; top_k: over a support of `top_k` tokens; "
        "sampled_token: log-ratio of the sampled token",
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: float | None = Field(None, gt=0, lt=1, description="mixing weight of jsd and the skew divergences")
    top_k: int = Field(64, ge=1, description="size of the top_k support (twice as many for union)")
    top_k_source: Literal["student", "teacher", "union"] = Field(
        "student", description="whose most likely tokens form the support of top_k"
    )
    tail_mass: Literal["bucket", "renormalise", "truncate"] = Field("bucket", description="mass beyond the support")
    reward_scale: float = Field(1.0, gt=0, description="lambda of G-OPD; 1 is OPD, above 1 extrapolates (ExOPD)")
    reference: StageByDomain | None = Field(
        None, description="stage of G-OPD's reference (the student's start, or the raw teacher), or domain -> stage"
    )
    sign_gate: SignGateConfig | None = Field(None, description="SG-OPD; needs labels and kl_estimator sampled_token")
    teacher_sampling: TeacherSamplingConfig | None = Field(None, description="SG-OPD's anchor; needs labels")
    on_policy_fraction: float = Field(
        1.0, ge=0, le=1, description="share of a step's responses that the student samples; the rest is from `cache`"
    )
    cache: str | None = Field(None, description="teacher_cache stage of the responses that the student does not sample")
    token_weighting: Literal["none", "entropy", "log_ratio", "position"] = Field(
        "none",
        description="weights of response tokens, mean 1 over a step: the student's entropy; |log pi_T - log pi_S| of "
        "the sampled token; 1 - position / max_response_length",
    )
    max_kl: float | None = Field(
        None, gt=0, description="stop with an error when the mean KL to the teacher exceeds it"
    )
    clip_ratio_low: float = Field(0.2, gt=0, lt=1)
    clip_ratio_high: float = Field(0.2, gt=0)
    loss_agg_mode: LossAggMode = "token_mean"
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="after")
    def _divergence_fits(self) -> OpdConfig:
        needs_beta = self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        if needs_beta != (self.beta is not None):
            raise ValueError(f"beta goes with jsd and skew divergences; divergence is {self.divergence}")
        if self.kl_estimator == "sampled_token" and self.divergence != "reverse_kl":
            raise ValueError("kl_estimator sampled_token is defined for reverse_kl; use kl_estimator: full_vocab")
        if self.kl_estimator == "top_k" and needs_beta:
            raise ValueError("kl_estimator top_k is defined for reverse_kl and forward_kl; use full_vocab")
        if self.train_batch_size % self.num_mini_batches:
            raise ValueError("train_batch_size must be a multiple of num_mini_batches")
        return self

    @pydantic.model_validator(mode="after")
    def _served_teacher_fits(self) -> OpdConfig:
        if self.teacher_engine != "sglang":
            return self
        if self.kl_estimator == "full_vocab" or (self.kl_estimator == "top_k" and self.top_k_source != "teacher"):
            raise ValueError(
                "teacher_engine: sglang needs kl_estimator: sampled_token, or top_k with top_k_source: teacher: a server "
                "returns the log-probabilities of given tokens and of its own most likely tokens, and no others"
            )
        if self.sampling.temperature != 1.0:
            raise ValueError("teacher_engine: sglang needs sampling.temperature 1, at which servers score given tokens")
        if self.teacher_sampling is not None:
            raise ValueError("teacher_engine: sglang does not go with teacher_sampling; let the trainer score")
        return self

    @pydantic.model_validator(mode="after")
    def _reference_fits(self) -> OpdConfig:
        if self.needs_reference and self.reference is None:
            raise ValueError("a reward scale other than 1 needs a `reference` stage (methods M4)")
        if self.reward_scale != 1.0 and (self.divergence != "reverse_kl" or self.kl_estimator == "top_k"):
            raise ValueError(
                "reward_scale other than 1 is defined for reverse_kl with kl_estimator full_vocab or sampled_token"
            )
        if isinstance(self.reference, dict) and (
            not isinstance(self.teacher, dict) or set(self.reference) != set(self.teacher)
        ):
            raise ValueError("a reference by domain needs a teacher for the same domains")
        return self

    @pydantic.model_validator(mode="after")
    def _labels_fit(self) -> OpdConfig:
        if self.sign_gate is not None and (self.kl_estimator != "sampled_token" or self.num_generations < 2):
            raise ValueError("sign_gate needs kl_estimator: sampled_token and num_generations of at least 2")
        if self.sign_gate is not None and self.reward_scale != 1.0:
            raise ValueError("with sign_gate, the reward scales are sign_gate.lambda_high and sign_gate.lambda_base")
        if self.teacher_sampling is not None and self.kl_estimator != "sampled_token":
            raise ValueError("teacher_sampling needs kl_estimator: sampled_token")
        if (self.on_policy_fraction < 1.0) != (self.cache is not None):
            raise ValueError("on_policy_fraction below 1 and `cache` go together")
        if self.cache is not None and self.kl_estimator == "sampled_token":
            raise ValueError(
                "on_policy_fraction below 1 needs kl_estimator full_vocab or top_k: cached tokens are off-policy"
            )
        return self

    @property
    def entries(self) -> list[str]:
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)

    @property
    def uses_labels(self) -> bool:
        return self.sign_gate is not None or self.teacher_sampling is not None

    @property
    def needs_reference(self) -> bool:
        """Whether a reward scale in use is not 1, so that the reference's log-probabilities enter the loss."""
        gate = self.sign_gate
        scales = [self.reward_scale] if gate is None else [gate.lambda_high, gate.lambda_base]
        return any(scale != 1.0 for scale in scales)

    def inputs(self) -> dict[str, str]:
        found = super().inputs() | _by_domain("teacher", self.teacher)
        if self.reference is not None:
            found |= _by_domain("reference", self.reference)
        return found | ({"cache": self.cache} if self.cache else {})


def _by_domain(relation: str, stages: StageByDomain) -> dict[str, str]:
    if isinstance(stages, str):
        return {relation: stages}
    return {f"{relation}.{domain}": stage for domain, stage in stages.items()}
