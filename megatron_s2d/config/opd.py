"""Configuration of stage 2b: on-policy distillation, G-OPD, SG-OPD and GKD. No torch here."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.grpo import RolloutCorrectionConfig
from megatron_s2d.config.policy_loss import (
    CLIP_RATIO_HIGH,
    CLIP_RATIO_LOW,
    ENTROPY_COEFF,
    POLICY_LOSS,
    PolicyLoss,
    RewardAdvantageConfig,
    StageByDomain,
    check_policy_loss,
    stages_by_relation,
    with_policy_loss_defaults,
)
from megatron_s2d.config.stage import (
    LOSS_AGG,
    MAX_PROMPT_LENGTH,
    MINI_BATCHES,
    PPO_EPOCHS,
    PROMPT_FILTER,
    PROMPT_ORDER,
    TRUNCATED,
    LossAggMode,
    PromptFilterConfig,
    PromptOrder,
    TrainingStageConfig,
    Truncated,
)
from megatron_s2d.config.teacher_service import TeacherServices, services_by_domain
from megatron_s2d.config.teacher_view import TeacherViews, all_views, view_of
from megatron_s2d.config.training import SamplingConfig

SELF = "self"  # instead of a stage's name
_SAMPLED_TOKEN = "for kl_estimator: sampled_token"


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


class FixedAdvantageConfig(Config):
    """A control of OPD: the same negative advantage for the least likely sampled tokens (methods M3)."""

    value: float = Field(-0.5, lt=0, ge=-100, description="advantage of the selected tokens; 0 for all others")
    fraction: float = Field(
        0.2, gt=0, le=1, description="share of a step's response tokens that are selected, least likely first"
    )
    selected_by: Literal["student", "teacher"] = Field(
        "student",
        description="whose log-probabilities select the tokens; student: the teacher is only measured (metric "
        "teacher_kl), no update depends on it",
    )


class OpdConfig(TrainingStageConfig):
    """Stage 2b: on-policy distillation to frozen teachers (methods M3), G-OPD (M4), SG-OPD (M5), GKD."""

    type: Literal["opd"] = "opd"
    teacher: StageByDomain | None = Field(
        None,
        description="stage whose weights are the frozen teacher, or domain -> stage; self: the student as it is at "
        "each update, which reads more than its prompt (`teacher_view`); null: that of `teacher_service`",
    )
    teacher_service: TeacherServices | None = Field(
        None,
        description="a teacher on other machines that `s2d serve-teacher` serves, or domain -> that; the trainer loads "
        "no copy of it (docs/teachers.md)",
    )
    teacher_lag: int | None = Field(
        None,
        ge=1,
        description="for teacher: self; the teacher is the student as it was at the last multiple of so many steps, a "
        "second copy of its weights; null: as it is at each update, without a copy",
    )
    teacher_ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="for teacher: self; the copy is a moving average: decay * copy + (1 - decay) * student every "
        "`teacher_lag` steps (1 if null), in float32; null: it becomes the student",
    )
    teacher_view: TeacherViews | None = Field(
        None,
        description="the prompt as the teacher reads it, or domain -> that (docs/teachers.md); null: as the student "
        "reads it",
    )
    teacher_engine: Literal["trainer", "sglang"] = Field(
        "trainer",
        description="where the teacher runs: in the trainer, or on SGLang servers (kl_estimator sampled_token, or "
        "top_k with top_k_source teacher)",
    )
    prompts: str | list[str] = Field(
        description="entries of `data`, or `entry/half`; labels are used by `sign_gate`, `teacher_sampling`, "
        "`reward_advantage` and views with answers or solutions only"
    )
    max_prompt_length: int | None = Field(None, ge=1, description=MAX_PROMPT_LENGTH)
    prompt_filter: PromptFilterConfig | None = Field(None, description=PROMPT_FILTER)
    prompt_order: PromptOrder = Field("restart", description=PROMPT_ORDER)
    label_reuse: Literal["refuse", "allow"] = Field(
        "allow", description="refuse: an error if labels (see `prompts`) would be used a second time"
    )
    train_batch_size: int = Field(64, ge=1, description="prompts per step")
    num_generations: int = Field(8, ge=1, description="responses per prompt")
    num_mini_batches: int = Field(1, ge=1, description=MINI_BATCHES)
    ppo_epochs: int = Field(1, ge=1, description=PPO_EPOCHS)
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
    reference_view: TeacherViews | None = Field(None, description="the same as `teacher_view`, for `reference`")
    sign_gate: SignGateConfig | None = Field(None, description="SG-OPD; needs labels and kl_estimator sampled_token")
    fixed_advantage: FixedAdvantageConfig | None = Field(
        None,
        description="replace the teacher's advantages by a fixed one (a control); needs kl_estimator sampled_token",
    )
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
    reward_advantage: RewardAdvantageConfig | None = Field(
        None, description=f"{_SAMPLED_TOKEN}: add the verifier's term to the advantages; needs labels; null: none"
    )
    policy_loss: PolicyLoss = Field("grpo", description=f"{_SAMPLED_TOKEN}; {POLICY_LOSS}")
    entropy_coeff: float = Field(0.0, description=f"{_SAMPLED_TOKEN}; {ENTROPY_COEFF}")
    max_truncated_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="stop with an error if a larger share of a step's responses runs into max_response_length, as when "
        "the teacher ends its responses otherwise than the student",
    )
    clip_ratio_low: float = Field(0.2, gt=0, le=1, description=f"{_SAMPLED_TOKEN}; {CLIP_RATIO_LOW}")
    clip_ratio_high: float = Field(0.2, gt=0, description=f"{_SAMPLED_TOKEN}; {CLIP_RATIO_HIGH}")
    loss_agg_mode: LossAggMode = Field("token_mean", description=f"{LOSS_AGG}; gspo: always seq_mean_token_mean")
    domain_weights: Literal["equal"] | dict[str, float] | None = Field(
        None,
        description="share of each domain in the loss, normalised over the domains of a mini-batch: equal, or "
        "domain -> weight; loss_agg_mode averages within a domain. null: one average over all responses, in which "
        "domains count by their tokens (or responses)",
    )
    log_ratio_clip: float | None = Field(
        None,
        gt=0,
        description="for kl_estimator: sampled_token; largest |log pi_T - log pi_S| of a token in its advantage, in "
        "nats; null: no limit",
    )
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_defaults_of_policy_loss(cls, document: Any) -> Any:
        return with_policy_loss_defaults(document)

    @pydantic.model_validator(mode="after")
    def _check_policy_loss(self) -> OpdConfig:
        check_policy_loss(self.policy_loss, self.loss_agg_mode, self.clip_ratio_low)
        of_sampled_tokens = {
            f"policy_loss: {self.policy_loss}": self.policy_loss != "grpo",
            "entropy_coeff": self.entropy_coeff != 0,
            "reward_advantage": self.reward_advantage is not None,
        }
        for setting, is_set in of_sampled_tokens.items():
            if is_set and self.kl_estimator != "sampled_token":
                raise ValueError(
                    f"{setting} belongs to the policy loss: it needs kl_estimator: sampled_token, not "
                    f"{self.kl_estimator}"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_reward_advantage_fits(self) -> OpdConfig:
        if self.reward_advantage is None:
            return self
        if self.num_generations < 2:
            raise ValueError("reward_advantage compares responses to a prompt: it needs num_generations of 2 or more")
        others = {"sign_gate": self.sign_gate, "fixed_advantage": self.fixed_advantage}
        for setting, value in others.items():
            if value is not None:
                raise ValueError(f"reward_advantage and {setting} are two uses of the same advantages: remove one")
        return self

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
            raise ValueError("teacher_engine: sglang needs sampling.temperature: 1: servers score at temperature 1")
        if self.teacher_sampling is not None:
            raise ValueError("teacher_engine: sglang does not support teacher_sampling; use teacher_engine: trainer")
        return self

    @pydantic.model_validator(mode="after")
    def _check_one_teacher(self) -> OpdConfig:
        if (self.teacher is None) == (self.teacher_service is None):
            raise ValueError("set exactly one of `teacher` (a stage) and `teacher_service` (a server with a teacher)")
        if self.teacher_service is not None and (self.teacher_engine != "trainer" or self.teacher_sampling is not None):
            raise ValueError("teacher_service scores and samples nothing: remove teacher_engine and teacher_sampling")
        for domain, service in services_by_domain(self.teacher_service).items():
            view = view_of(self.teacher_view, domain)
            reads_own = view is not None and view.chat_template == "teacher"
            exact = self.kl_estimator != "sampled_token" or self.sampling.temperature != 1.0
            if service.cross_tokenizer and (exact or not reads_own):
                raise ValueError(
                    "cross_tokenizer scores texts at temperature 1: it needs kl_estimator: sampled_token, "
                    "sampling.temperature: 1 and a teacher_view with chat_template: teacher"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_reference_fits(self) -> OpdConfig:
        if self.needs_reference and self.reference is None:
            raise ValueError("a reward scale other than 1 needs a `reference` stage (methods M4)")
        if self.reward_scale != 1.0 and (self.divergence != "reverse_kl" or self.kl_estimator == "top_k"):
            raise ValueError(
                "reward_scale other than 1 needs divergence: reverse_kl and kl_estimator: full_vocab or sampled_token"
            )
        teachers = self.teacher or self.teacher_service
        if isinstance(self.reference, dict) and (
            not isinstance(teachers, dict) or set(self.reference) != set(teachers)
        ):
            raise ValueError("`reference` by domain needs `teacher` by the same domains")
        if self.reference_view is not None and self.reference is None:
            raise ValueError("reference_view is how `reference` reads prompts: set `reference`, or remove it")
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

    @pydantic.model_validator(mode="after")
    def _check_fixed_advantage_fits(self) -> OpdConfig:
        if self.fixed_advantage is None:
            return self
        if self.kl_estimator != "sampled_token":
            raise ValueError("fixed_advantage is an advantage of sampled tokens: it needs kl_estimator: sampled_token")
        from_teacher = {
            "sign_gate": self.sign_gate is not None,
            "teacher_sampling": self.teacher_sampling is not None,
            "reward_scale other than 1": self.reward_scale != 1.0,
            "token_weighting: log_ratio": self.token_weighting == "log_ratio",
        }
        for setting, is_set in from_teacher.items():
            if is_set:
                raise ValueError(
                    f"fixed_advantage replaces the teacher's advantages and {setting} uses them: remove one of the two"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_weights_fit(self) -> OpdConfig:
        if isinstance(self.domain_weights, dict) and (
            any(weight < 0 for weight in self.domain_weights.values()) or not any(self.domain_weights.values())
        ):
            raise ValueError("domain_weights must be 0 or more, and one of them more than 0")
        if self.log_ratio_clip is not None and self.kl_estimator != "sampled_token":
            raise ValueError("log_ratio_clip limits advantages of sampled tokens: it needs kl_estimator: sampled_token")
        return self

    @pydantic.model_validator(mode="after")
    def _check_self_fits(self) -> OpdConfig:
        if isinstance(self.teacher, dict) and SELF in self.teacher.values():
            raise ValueError("teacher: self is the teacher of all domains: write teacher: self, or name stages")
        if self.teacher_renewal is not None and (not self.teaches_itself or self.lora is not None):
            raise ValueError("teacher_lag and teacher_ema_decay go with teacher: self, and without lora")
        if not self.teaches_itself:
            return self
        if self.teacher_view is None:
            raise ValueError(
                "teacher: self needs a teacher_view: a student that reads its own prompt agrees with itself, and "
                "nothing is learned"
            )
        if self.teacher_engine != "trainer" or self.teacher_sampling is not None:
            raise ValueError(
                "teacher: self is in the trainer and samples nothing: remove teacher_engine and teacher_sampling"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_views_fit(self) -> OpdConfig:
        views = [*all_views(self.teacher_view), *all_views(self.reference_view)]
        if self.prompt_order == "continue" and any(view.max_prompt_length for view in views):
            raise ValueError(
                "max_prompt_length of a view leaves out prompts, and prompt_order: continue needs those of `init`: "
                "remove one of the two"
            )
        return self

    @property
    def teaches_itself(self) -> bool:
        """Whether the student is its own teacher, in another view."""
        return self.teacher == SELF

    @property
    def teacher_renewal(self) -> int | None:
        """Steps between two renewals of the copy of the student that teaches it; None without a copy."""
        return 1 if self.teacher_lag is None and self.teacher_ema_decay is not None else self.teacher_lag

    @property
    def num_updates(self) -> int:
        """Optimizer steps on one sampled batch."""
        return self.num_mini_batches * self.ppo_epochs

    @property
    def entries(self) -> list[str]:
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)

    @property
    def grades(self) -> bool:
        return any(item is not None for item in (self.sign_gate, self.teacher_sampling, self.reward_advantage))

    @property
    def uses_labels(self) -> bool:
        views = [*all_views(self.teacher_view), *all_views(self.reference_view)]
        return self.grades or any(view.uses_labels for view in views)

    @property
    def needs_reference(self) -> bool:
        """Whether a reward scale is not 1, so that the loss uses the reference's log-probabilities."""
        gate = self.sign_gate
        return {self.reward_scale} != {1} if gate is None else {gate.lambda_high, gate.lambda_base} != {1}

    def inputs(self) -> dict[str, str]:
        is_stage = self.teacher is not None and not self.teaches_itself
        teachers = stages_by_relation("teacher", self.teacher or {}) if is_stage else {}
        inputs = super().inputs() | teachers
        if self.reference is not None:
            inputs |= stages_by_relation("reference", self.reference)
        return inputs | ({"cache": self.cache} if self.cache else {})
