"""What a stage does: one class per method, chosen by ``type``. Defaults are the S2D paper's settings. No torch here.

A stage names what it consumes: ``init`` (stage whose weights it starts from; ``model`` instead where it starts from
scratch or from a checkpoint), ``teacher``, ``cache`` and ``reference`` are names of other stages.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.training import CheckpointConfig, MicroBatchConfig, OptimizerConfig, SamplingConfig

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
Truncated = Literal["keep", "mask"]
TRUNCATED = "mask: a response that ran into max_response_tokens gives no gradient (its reward still counts in its group)"


class StageConfig(Config):
    """Fields of every stage."""

    role: str = Field(description="what the stage is in its arm; arms are compared role by role")
    seed: int = Field(0, ge=0, description="added to the run's seed; arms that should share noise share it")
    micro_batch: MicroBatchConfig = MicroBatchConfig()

    def inputs(self) -> dict[str, str]:
        """Name of the relation -> stage that must be finished first."""
        return {}

    @property
    def entries(self) -> list[str]:
        """Entries of ``data`` (or ``entry/half``) that the stage reads."""
        return []

    @property
    def uses_labels(self) -> bool:
        """Whether the labels (answers or solutions) of ``entries`` are used."""
        return False


class ModelStageConfig(StageConfig):
    """A stage that leaves a model."""


class PretrainedConfig(ModelStageConfig):
    """The weights of a published checkpoint as they are: a raw teacher, a reference, an arm without any training."""

    type: Literal["pretrained"] = "pretrained"
    model: str = Field(description="entry of `models` that has a `path`")


class TrainingStageConfig(ModelStageConfig):
    """Fields of every stage that updates a model: it starts from ``model`` (fresh weights) or ``init`` (a stage)."""

    model: str | None = Field(None, description="entry of `models`, started from its own weights")
    init: str | None = Field(None, description="stage whose final weights are the start")
    steps: int = Field(ge=1, description="number of sampling rounds (or of batches of data)")
    optimizer: OptimizerConfig = OptimizerConfig()
    offload_optimizer: bool = Field(
        False, description="the optimizer's state waits in host memory, and gradients are given up, between updates"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> TrainingStageConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of `model` (fresh weights) and `init` (a stage to start from)")
        return self

    def inputs(self) -> dict[str, str]:
        return {"init": self.init} if self.init else {}


class SupervisedConfig(TrainingStageConfig):
    """Cross-entropy on given responses: base pre-training, SFT, and teacher-sample SFT / SeqKD (from a cache)."""

    type: Literal["supervised"] = "supervised"
    data: str | None = Field(None, description="entry of `data` with reference solutions")
    cache: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="teacher_cache stage whose responses are the data, or several"
    )
    batch_size: int = Field(64, ge=1, description="responses of one update")
    aggregation: Aggregation = "token_mean"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> SupervisedConfig:
        if (self.data is None) == (self.cache is None):
            raise ValueError("give exactly one of `data` and `cache`")
        return self

    def inputs(self) -> dict[str, str]:
        if isinstance(self.cache, list):
            return super().inputs() | {f"cache.{index}": name for index, name in enumerate(self.cache)}
        return super().inputs() | ({"cache": self.cache} if self.cache else {})

    @property
    def entries(self) -> list[str]:
        return [self.data] if self.data is not None else []

    @property
    def uses_labels(self) -> bool:
        return self.data is not None


class ImportanceConfig(Config):
    """Correction of the gap between the engine that sampled and the trainer (methods M1)."""

    mode: Literal["off", "truncate", "mask"] = "off"
    cap: float = Field(5.0, gt=0, description="largest weight; beyond it the weight is cut (truncate) or zero (mask)")


class OverlongConfig(Config):
    """Soft punishment of responses that come near the limit (DAPO)."""

    buffer_tokens: int = Field(ge=1, description="length of the zone before the limit in which the penalty grows")
    penalty: float = Field(1.0, ge=0, description="largest penalty, at the limit")


class GrpoConfig(TrainingStageConfig):
    """Group-relative policy optimisation with a verifier's reward (stages 1 and 3, direct baseline; methods M1)."""

    type: Literal["grpo"] = "grpo"
    prompts: str = Field(description="labelled prompts: an entry of `data`, or `entry/half`")
    label_reuse: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse: an error where an earlier stage of the arm has used the label of one of `prompts`",
    )
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(8, ge=2)
    updates_per_step: int = Field(1, ge=1, description="mini-batches that each sampling round is cut into")
    sampling: SamplingConfig = SamplingConfig()
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0, description="0.28 is DAPO's clip-higher")
    dual_clip: float | None = Field(None, gt=1, description="bound for negative advantages; off by default")
    kl_coefficient: float = Field(5e-4, ge=0, description="beta of the k3 penalty to the reference; 0: no reference")
    reference: str | None = Field(None, description="stage of the reference; by default the start of this stage")
    normalize_by_std: bool = Field(True, description="false: the Dr. GRPO advantage")
    aggregation: Aggregation = "token_mean"
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    dynamic_sampling_rounds: int = Field(
        0, ge=0, description="extra rounds that refill groups whose rewards are all equal (DAPO); 0 is off"
    )
    overlong: OverlongConfig | None = None
    importance: ImportanceConfig = ImportanceConfig()

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> GrpoConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of updates_per_step "
                f"{self.updates_per_step}: whole groups go to each mini-batch"
            )
        return self

    def inputs(self) -> dict[str, str]:
        return super().inputs() | ({"reference": self.reference} if self.reference else {})

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def uses_labels(self) -> bool:
        return True


class TeacherCacheConfig(StageConfig):
    """Teacher rollouts with the teacher's distribution at every response position (methods M2)."""

    type: Literal["teacher_cache"] = "teacher_cache"
    teacher: str = Field(description="stage whose weights sample and score")
    prompts: str = Field(description="prompts: an entry of `data`, or `entry/half`; labels are not used")
    responses_per_prompt: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    kind: Literal["sampled", "topk", "hidden", "full"] = Field(
        "hidden", description="what is stored per position; hidden and full are exact, topk keeps `top_k` entries"
    )
    top_k: int = Field(256, ge=1, description="entries per position of kind topk")
    prompts_per_round: int = Field(256, ge=1, description="prompts generated between two progress reports")
    verified_only: bool = Field(False, description="keep only responses that the verifier accepts; this uses labels")

    def inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def uses_labels(self) -> bool:
        return self.verified_only


class ForwardKlConfig(TrainingStageConfig):
    """Stage 2a: forward KL to the cached teacher distributions (methods M2)."""

    type: Literal["forward_kl"] = "forward_kl"
    cache: str = Field(description="teacher_cache stage")
    batch_size: int = Field(64, ge=1, description="responses of one update")
    temperature: float = Field(1.0, gt=0, description="tau of both sides")
    tail: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket", description="what a topk cache's remaining mass becomes"
    )
    aggregation: Aggregation = "token_mean"

    def inputs(self) -> dict[str, str]:
        return super().inputs() | {"cache": self.cache}


class GateConfig(Config):
    """The sign gate of SG-OPD and its stability weight (methods M5)."""

    lambda_high: float = Field(1.8, ge=0, description="reward scale of tokens on which verifier and teacher agree")
    lambda_base: float = Field(1.0, ge=0, description="reward scale of tokens without a verifier signal")
    fallback: Literal["interp", "preserve", "grpo", "mask"] = Field(
        "interp", description="what tokens get on which verifier and teacher disagree"
    )
    interp_beta: float | None = Field(None, ge=0, le=1, description="of fallback interp: 1 is OPD, 0 masks")
    stability_clip: float | None = Field(None, gt=0, description="c of the stability weight, in nats; null: none")

    @pydantic.model_validator(mode="after")
    def _interp(self) -> GateConfig:
        if (self.fallback == "interp") != (self.interp_beta is not None):
            raise ValueError(f"interp_beta goes with fallback interp, and only with it; fallback is {self.fallback}")
        return self


class TeacherSamplingConfig(Config):
    """Phased teacher sampling: verified teacher responses as a cross-entropy anchor that fades (methods M5)."""

    fraction: float = Field(gt=0, le=1, description="rho: share of a step's prompts that the teacher answers too")
    responses_per_prompt: int = Field(1, ge=1)
    alpha_high: float = Field(1.0, ge=0, description="weight of the anchor in the first phase")
    alpha_end: float = Field(0.0, ge=0, description="weight at the end of the second phase")
    phase_1_end: float = Field(ge=0, le=1, description="p1, a fraction of the stage's steps")
    phase_2_end: float = Field(ge=0, le=1, description="p2; nothing is sampled from the teacher afterwards")
    verified_only: bool = Field(True, description="false: wrong responses anchor too (a control of the paper)")

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> TeacherSamplingConfig:
        if self.phase_1_end > self.phase_2_end or self.alpha_end > self.alpha_high:
            raise ValueError("give phase_1_end <= phase_2_end and alpha_end <= alpha_high")
        return self


ByDomain = str | dict[str, str]


class OpdConfig(TrainingStageConfig):
    """Stage 2b: on-policy distillation to frozen teachers (methods M3), G-OPD (M4), SG-OPD (M5), GKD."""

    type: Literal["opd"] = "opd"
    teacher: ByDomain = Field(description="stage whose weights are the frozen teacher, or domain -> stage")
    teacher_engine: Literal["trainer", "sglang"] = Field(
        "trainer",
        description="who scores with the teacher: the trainer, or SGLang servers (granularity sampled, or topk with "
        "support teacher)",
    )
    prompts: str | list[str] = Field(description="entries of `data`, or `entry/half`; labels are used with `gate` only")
    label_reuse: Literal["refuse", "allow"] = Field(
        "allow", description="refuse: an error where `gate` or `teacher_sampling` would use labels a second time"
    )
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(8, ge=1)
    updates_per_step: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    granularity: Literal["full", "topk", "sampled"] = Field(
        "full",
        description="full: exact divergence over the vocabulary; topk: on a support of `top_k` tokens; sampled: "
        "log-ratio of the sampled token",
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: float | None = Field(None, gt=0, lt=1, description="mixing weight of jsd and the skew divergences")
    top_k: int = Field(64, ge=1, description="tokens of a topk support (twice as many for union)")
    support: Literal["student", "teacher", "union"] = Field("student", description="whose likeliest tokens: topk only")
    tail: Literal["bucket", "renormalise", "truncate"] = Field("bucket", description="mass beyond the support")
    reward_scale: float = Field(1.0, gt=0, description="lambda of G-OPD; 1 is OPD, above 1 extrapolates (ExOPD)")
    reference: ByDomain | None = Field(
        None, description="stage of G-OPD's reference (the student's start, or the raw teacher), or domain -> stage"
    )
    gate: GateConfig | None = Field(None, description="SG-OPD; needs labels and granularity sampled")
    teacher_sampling: TeacherSamplingConfig | None = Field(None, description="SG-OPD's anchor; needs labels")
    on_policy_fraction: float = Field(
        1.0, ge=0, le=1, description="share of a step's responses that the student samples; the rest is from `cache`"
    )
    cache: str | None = Field(None, description="teacher_cache stage of the responses that the student does not sample")
    token_weighting: Literal["none", "entropy", "log_ratio", "position"] = Field(
        "none",
        description="weights of response tokens, mean 1 over a step: the student's entropy; |log pi_T - log pi_S| of "
        "the sampled token; 1 - place / max_response_tokens",
    )
    max_kl: float | None = Field(
        None, gt=0, description="stop with an error when the mean KL to the teacher exceeds it"
    )
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    aggregation: Aggregation = "token_mean"
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    importance: ImportanceConfig = ImportanceConfig()

    @pydantic.model_validator(mode="after")
    def _divergence_fits(self) -> OpdConfig:
        needs_beta = self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        if needs_beta != (self.beta is not None):
            raise ValueError(f"beta goes with jsd and skew divergences; divergence is {self.divergence}")
        if self.granularity == "sampled" and self.divergence != "reverse_kl":
            raise ValueError("granularity sampled is defined for reverse_kl; use granularity: full")
        if self.granularity == "topk" and needs_beta:
            raise ValueError("granularity topk is defined for reverse_kl and forward_kl; use granularity: full")
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError("prompts_per_step must be a multiple of updates_per_step")
        return self

    @pydantic.model_validator(mode="after")
    def _served_teacher_fits(self) -> OpdConfig:
        if self.teacher_engine != "sglang":
            return self
        if self.granularity == "full" or (self.granularity == "topk" and self.support != "teacher"):
            raise ValueError(
                "teacher_engine: sglang needs granularity: sampled, or topk with support: teacher: a server gives the "
                "log-probabilities of the given tokens and of its own likeliest ones, and no others"
            )
        if self.sampling.temperature != 1.0:
            raise ValueError("teacher_engine: sglang needs sampling.temperature 1, at which servers score given tokens")
        if self.teacher_sampling is not None:
            raise ValueError("teacher_engine: sglang does not go with teacher_sampling; let the trainer score")
        return self

    @pydantic.model_validator(mode="after")
    def _reference_fits(self) -> OpdConfig:
        scales = [self.reward_scale] if self.gate is None else [self.gate.lambda_high, self.gate.lambda_base]
        if any(scale != 1.0 for scale in scales) and self.reference is None:
            raise ValueError("a reward scale other than 1 needs a `reference` stage (methods M4)")
        if self.reward_scale != 1.0 and (self.divergence != "reverse_kl" or self.granularity == "topk"):
            raise ValueError("reward_scale other than 1 is defined for reverse_kl, full or sampled")
        if isinstance(self.reference, dict) and (
            not isinstance(self.teacher, dict) or set(self.reference) != set(self.teacher)
        ):
            raise ValueError("a reference by domain needs a teacher for the same domains")
        return self

    @pydantic.model_validator(mode="after")
    def _labels_fit(self) -> OpdConfig:
        if self.gate is not None and (self.granularity != "sampled" or self.responses_per_prompt < 2):
            raise ValueError("gate needs granularity: sampled and responses_per_prompt of at least 2")
        if self.gate is not None and self.reward_scale != 1.0:
            raise ValueError("with a gate, reward scales are gate.lambda_high and gate.lambda_base")
        if self.teacher_sampling is not None and self.granularity != "sampled":
            raise ValueError("teacher_sampling needs granularity: sampled")
        if (self.on_policy_fraction < 1.0) != (self.cache is not None):
            raise ValueError("on_policy_fraction below 1 and `cache` go together")
        if self.cache is not None and self.granularity == "sampled":
            raise ValueError("on_policy_fraction below 1 needs granularity full or topk: cached tokens are off-policy")
        return self

    @property
    def entries(self) -> list[str]:
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)

    @property
    def uses_labels(self) -> bool:
        return self.gate is not None or self.teacher_sampling is not None

    def inputs(self) -> dict[str, str]:
        found = super().inputs() | _by_domain("teacher", self.teacher)
        if self.reference is not None:
            found |= _by_domain("reference", self.reference)
        return found | ({"cache": self.cache} if self.cache else {})


class ExpoConfig(ModelStageConfig):
    """Weight extrapolation without training: theta_1 + alpha (theta_1 - theta_0), theta_1 the mean of ``tuned``."""

    type: Literal["expo"] = "expo"
    tuned: list[str] = Field(min_length=1, description="stages whose weights are averaged")
    base: str = Field(description="stage to extrapolate away from")
    alpha: float = Field(0.5, description="how far; 0 is the plain average")

    def inputs(self) -> dict[str, str]:
        return {f"tuned.{index}": name for index, name in enumerate(self.tuned)} | {"base": self.base}


def _by_domain(relation: str, stages: ByDomain) -> dict[str, str]:
    if isinstance(stages, str):
        return {relation: stages}
    return {f"{relation}.{domain}": stage for domain, stage in stages.items()}


Stage = Annotated[
    PretrainedConfig | SupervisedConfig | GrpoConfig | TeacherCacheConfig | ForwardKlConfig | OpdConfig | ExpoConfig,
    Field(discriminator="type"),
]
