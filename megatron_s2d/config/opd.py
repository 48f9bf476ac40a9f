"""Configuration of stage 2b: on-policy distillation, G-OPD, SG-OPD and GKD. No torch here."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.grpo import RolloutCorrectionConfig
from megatron_s2d.config.stage import LOSS_AGG, TRUNCATED, LossAggMode, TrainingStageConfig, Truncated
from megatron_s2d.config.training import SamplingConfig

StageByDomain = str | dict[str, str]


class SignGateConfig(Config):
    """The sign gate of SG-OPD and its stability weight (methods M5)."""

    lambda_high: float = Field(1.8, ge=0, description="reward scale of tokens on which verifier and teacher agree")
    lambda_base: float = Field(1.0, ge=0, description="reward scale of tokens without a verifier signal")
    conflict_fallback: Literal["interp", "preserve", "grpo", "mask"] = Field(
        "interp",
        description="advantage of tokens on which verifier and teacher disagree: interp (conflict_beta x OPD), "
        "preserve (OPD at lambda_base), grpo (the verifier's), mask (0)",
    )
    conflict_beta: float | None = Field(
        None, ge=0, le=1, description="for conflict_fallback: interp; 1 is OPD, 0 masks"
    )
    stability_clip: float | None = Field(
        None, gt=0, description="c of the stability weight, in nats; null: no stability weight"
    )

    @pydantic.model_validator(mode="after")
    def _check_conflict_beta(self) -> SignGateConfig:
        if (self.conflict_fallback == "interp") != (self.conflict_beta is not None):
            raise ValueError(
                f"conflict_beta goes with conflict_fallback: interp, and only with it; conflict_fallback is "
                f"{self.conflict_fallback}"
            )
        return self


class TeacherSamplingConfig(Config):
    """Phased teacher sampling: cross-entropy on verified teacher responses, with a decaying weight (methods M5)."""

    fraction: float = Field(gt=0, le=1, description="rho: share of a step's prompts that the teacher answers as well")
    num_generations: int = Field(1, ge=1, description="teacher responses per prompt")
    alpha_high: float = Field(1.0, ge=0, description="weight of the anchor in the first phase")
    alpha_end: float = Field(0.0, ge=0, description="weight at the end of the second phase")
    phase_1_end: float = Field(ge=0, le=1, description="p1, a fraction of the stage's steps")
    phase_2_end: float = Field(
        ge=0, le=1, description="p2, a fraction of the stage's steps; the teacher samples nothing afterwards"
    )
    only_correct: bool = Field(
        True, description="train on correct teacher responses only; false: on all (a control of the paper)"
    )

    @pydantic.model_validator(mode="after")
    def _check_ordered(self) -> TeacherSamplingConfig:
        if self.phase_1_end > self.phase_2_end or self.alpha_end > self.alpha_high:
            raise ValueError("teacher_sampling needs phase_1_end <= phase_2_end and alpha_end <= alpha_high")
        return self


class OpdConfig(TrainingStageConfig):
    """Stage 2b: on-policy distillation to frozen teachers (methods M3), G-OPD (M4), SG-OPD (M5), GKD."""

    type: Literal["opd"] = "opd"
    teacher: StageByDomain = Field(description="stage whose weights are the frozen teacher, or domain -> stage")
    teacher_engine: Literal["trainer", "sglang"] = Field(
        "trainer",
        description="where the teacher runs: in the trainer, or on SGLang servers (kl_estimator sampled_token, or "
        "top_k with top_k_source teacher)",
    )
    prompts: str | list[str] = Field(
        description="entries of `data`, or `entry/half`; labels are used by `sign_gate` and `teacher_sampling` only"
    )
    label_reuse: Literal["refuse", "allow"] = Field(
        "allow", description="refuse: an error if `sign_gate` or `teacher_sampling` would use labels a second time"
    )
    train_batch_size: int = Field(64, ge=1, description="prompts per step")
    num_generations: int = Field(8, ge=1, description="responses per prompt")
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per sampled batch")
    sampling: SamplingConfig = SamplingConfig()
    kl_estimator: Literal["full_vocab", "top_k", "sampled_token"] = Field(
        "full_vocab",
        description="full_vocab: exact divergence over the vocabulary; top_k: over `top_k` tokens per position; "
        "sampled_token: policy gradient with the log-ratio of the sampled token as advantage",
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: float | None = Field(None, gt=0, lt=1, description="mixing weight of jsd and the skew divergences")
    top_k: int = Field(
        64, ge=1, description="tokens per position for kl_estimator: top_k (up to twice as many for union)"
    )
    top_k_source: Literal["student", "teacher", "union"] = Field(
        "student", description="model whose most likely tokens are used for kl_estimator: top_k"
    )
    tail_mass: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket", description="treatment of the probability outside the `top_k` tokens (methods M2)"
    )
    reward_scale: float = Field(1.0, gt=0, description="lambda of G-OPD; 1 is OPD, above 1 extrapolates (ExOPD)")
    reference: StageByDomain | None = Field(
        None,
        description="stage whose weights are G-OPD's reference (the student's start, or the raw teacher), or domain -> "
        "stage",
    )
    sign_gate: SignGateConfig | None = Field(None, description="SG-OPD; needs labels and kl_estimator sampled_token")
    teacher_sampling: TeacherSamplingConfig | None = Field(None, description="SG-OPD's anchor; needs labels")
    on_policy_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of a step's responses that the student samples; the others come from `cache`",
    )
    cache: str | None = Field(
        None, description="teacher_cache stage with the responses that the student does not sample"
    )
    token_weighting: Literal["none", "entropy", "log_ratio", "position"] = Field(
        "none",
        description="loss weights of response tokens, with mean 1 over a step: by the student's entropy; by |log pi_T "
        "- log pi_S| of the sampled token; by 1 - position / max_response_length",
    )
    max_kl: float | None = Field(
        None, gt=0, description="stop with an error if the mean KL to the teacher, in nats per token, exceeds it"
    )
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="for kl_estimator: sampled_token, as in grpo")
    clip_ratio_high: float = Field(0.2, gt=0, description="for kl_estimator: sampled_token, as in grpo")
    loss_agg_mode: LossAggMode = Field("token_mean", description=LOSS_AGG)
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="after")
    def _check_divergence_fits(self) -> OpdConfig:
        needs_beta = self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        if needs_beta != (self.beta is not None):
            raise ValueError(
                f"beta goes with jsd and skew divergences, and only with them; divergence is {self.divergence}"
            )
        if self.kl_estimator == "sampled_token" and self.divergence != "reverse_kl":
            raise ValueError("kl_estimator: sampled_token needs divergence: reverse_kl; use kl_estimator: full_vocab")
        if self.kl_estimator == "top_k" and needs_beta:
            raise ValueError("kl_estimator: top_k needs divergence: reverse_kl or forward_kl; use full_vocab")
        if self.train_batch_size % self.num_mini_batches:
            raise ValueError("train_batch_size must be a multiple of num_mini_batches")
        return self

    @pydantic.model_validator(mode="after")
    def _check_served_teacher_fits(self) -> OpdConfig:
        if self.teacher_engine != "sglang":
            return self
        if self.kl_estimator == "full_vocab" or (self.kl_estimator == "top_k" and self.top_k_source != "teacher"):
            raise ValueError(
                "teacher_engine: sglang needs kl_estimator: sampled_token, or top_k with top_k_source: teacher; a "
                "server returns log-probabilities of requested tokens and of its own most likely tokens only"
            )
        if self.sampling.temperature != 1.0:
            raise ValueError(
                "teacher_engine: sglang needs sampling.temperature: 1, because servers score at temperature 1"
            )
        if self.teacher_sampling is not None:
            raise ValueError("teacher_engine: sglang does not support teacher_sampling; use teacher_engine: trainer")
        return self

    @pydantic.model_validator(mode="after")
    def _check_reference_fits(self) -> OpdConfig:
        if self.needs_reference and self.reference is None:
            raise ValueError("a reward scale other than 1 needs a `reference` stage (methods M4)")
        if self.reward_scale != 1.0 and (self.divergence != "reverse_kl" or self.kl_estimator == "top_k"):
            raise ValueError(
                "reward_scale other than 1 needs divergence: reverse_kl and kl_estimator: full_vocab or sampled_token"
            )
        if isinstance(self.reference, dict) and (
            not isinstance(self.teacher, dict) or set(self.reference) != set(self.teacher)
        ):
            raise ValueError("`reference` by domain needs `teacher` by the same domains")
        return self

    @pydantic.model_validator(mode="after")
    def _check_labels_fit(self) -> OpdConfig:
        if self.sign_gate is not None and (self.kl_estimator != "sampled_token" or self.num_generations < 2):
            raise ValueError("sign_gate needs kl_estimator: sampled_token and at least 2 num_generations")
        if self.sign_gate is not None and self.reward_scale != 1.0:
            raise ValueError(
                "with sign_gate, set sign_gate.lambda_high and sign_gate.lambda_base instead of reward_scale"
            )
        if self.teacher_sampling is not None and self.kl_estimator != "sampled_token":
            raise ValueError("teacher_sampling needs kl_estimator: sampled_token")
        if (self.on_policy_fraction < 1.0) != (self.cache is not None):
            raise ValueError("set `cache` if on_policy_fraction is below 1, and only then")
        if self.cache is not None and self.kl_estimator == "sampled_token":
            raise ValueError(
                "on_policy_fraction below 1 needs kl_estimator: full_vocab or top_k: cached tokens are off-policy"
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
        """Whether a reward scale is not 1, so that the loss uses the reference's log-probabilities."""
        gate = self.sign_gate
        scales = [self.reward_scale] if gate is None else [gate.lambda_high, gate.lambda_base]
        return any(scale != 1.0 for scale in scales)

    def inputs(self) -> dict[str, str]:
        inputs = super().inputs() | _by_domain("teacher", self.teacher)
        if self.reference is not None:
            inputs |= _by_domain("reference", self.reference)
        return inputs | ({"cache": self.cache} if self.cache else {})


def _by_domain(relation: str, stages: StageByDomain) -> dict[str, str]:
    if isinstance(stages, str):
        return {relation: stages}
    return {f"{relation}.{domain}": stage for domain, stage in stages.items()}
