"""The teachers of on-policy distillation: frozen models in the trainer, SGLang servers, or a teacher service.

``opd.py`` has what is done with them, ``grpo.py`` what GRPO does with a teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_s2d.artifacts.files import atomic_write_json, read_json_object
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.teacher_service import service_key, services_by_domain, services_of
from megatron_s2d.data.aligned_spans import AlignedText, align
from megatron_s2d.data.model_tokenizers import parse_tokenizer, vocabulary_difference
from megatron_s2d.data.tokenizer import tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import all_gather_json, broadcast_from_rank0, first_error
from megatron_s2d.records import AnySample, Sample
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.stages.context import StageContext
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.served import ServedTeachers, ServedTopK
from megatron_s2d.teachers.service.client import Identity, TeacherClient
from megatron_s2d.teachers.service.teachers import ServiceTeachers, ServiceTopK, Wanted
from megatron_s2d.train.loop import Teacher
from megatron_s2d.train.megatron_model import MegatronModel

IDENTITY_NAME = "teacher_service.json"
"""File in the stage's directory with what the served teachers were when it began."""

AnyTeachers = TeacherRouter | ServedTeachers | ServiceTeachers


def load_teachers(context: StageContext, stage: OpdConfig, student: MegatronModel) -> TeacherRouter:
    """Load the frozen teachers; a student that teaches itself is its teacher, or has a copy that lags behind."""
    views = context.inputs.prompt_views(context.name, "teacher")
    if stage.teaches_itself and stage.teacher_renewal is None:
        return TeacherRouter({None: student}, views)
    if stage.teaches_itself:
        copy = context.models.start(trained=False)
        copy.freeze()
        return TeacherRouter({None: copy}, views)
    return TeacherRouter.load(stage.teacher, context.models.frozen, views)


def connect_services(context: StageContext, stage: OpdConfig | GrpoConfig, student: MegatronModel) -> ServiceTeachers:
    """Reach the served teachers, prove that they are those with which the stage began, and read output layers.

    Collective. Raises ``UserError`` for a server that cannot be reached or holds a teacher that does not fit.
    """
    path, failure = context.directory.path / IDENTITY_NAME, None
    clients = {
        domain: context.inputs.teacher_client(settings, service_key(context.name, stage, domain))
        for domain, settings in services_by_domain(services_of(stage)).items()
    }
    began = broadcast_from_rank0(lambda: read_json_object(path) if path.exists() else {})
    found: dict[str, dict] = {}
    if student.layout.is_pipeline_last_stage:
        try:
            for domain, client in clients.items():
                known = began.get(domain or "")
                client.connect(None if known is None else Identity.from_json(known))
                _check_fits(context, student, client)
                found[domain or ""] = dataclasses.asdict(client.identity)
        except UserError as error:
            failure = str(error)
    if (message := first_error(failure)) is not None:
        raise UserError(message)
    everyone = [identity for identity in all_gather_json(found) if identity]
    for domain in everyone[0]:
        if len({identity[domain]["weights"] for identity in everyone}) > 1:
            raise UserError(f"{service_key(context.name, stage, domain or None)}: its servers hold different weights")
    if dist.get_rank() == 0 and not began:
        atomic_write_json(path, everyone[0])
    views = context.inputs.prompt_views(context.name, "teacher")
    aligners = {
        domain: aligner_of(context, client) for domain, client in clients.items() if client.settings.cross_tokenizer
    }
    teachers = ServiceTeachers(clients, student, wanted_of(stage, student), views, aligners)
    context.rollouts.close_with(teachers)
    teachers.read_output_layers()
    return teachers


def announce(teachers: AnyTeachers, samples: Sequence[AnySample]) -> None:
    """Let a served teacher begin with the samples of a step."""
    if isinstance(teachers, ServiceTeachers):
        teachers.begin_step(samples)


def aligner_of(context: StageContext, client: TeacherClient) -> Callable[[Sample], AlignedText]:
    """Return the function that gives the text of a response in the tokens of a teacher's tokenizer."""
    own = context.inputs.tokenizer_of(context.models.name_of(context.name))
    other = context.inputs.named_tokenizer(client.settings.tokenizer)
    if other.eos_token_id is None:
        raise UserError(f"{client.settings.tokenizer}: the teacher's tokenizer has no end-of-sequence token")

    def aligned(sample: Sample) -> AlignedText:
        response = sample.token_ids[sample.prompt_length :]
        if len(response) != sample.response_length:
            raise UserError(f"sample {sample.id}: cross_tokenizer scores responses of one turn, without observations")
        return align(response, own, other, end=(own.eos_token_id, other.eos_token_id))

    return aligned


def wanted_of(stage: OpdConfig | GrpoConfig, student: MegatronModel) -> Wanted:
    """Return what travels: log-probabilities, top-k entries or hidden states, as ``kl_estimator`` needs it."""
    if isinstance(stage, GrpoConfig) or stage.kl_estimator == "sampled_token":
        return Wanted("sampled")
    if stage.kl_estimator == "full_vocab":
        return Wanted("hidden", num_reads=stage.ppo_epochs)
    # The student's tokens are those of its weights before each update.
    reads = stage.ppo_epochs if stage.top_k_source == "teacher" else 1
    return Wanted("top_k", min(stage.top_k, student.spec.vocab_size), stage.top_k_source, reads)


def _check_fits(context: StageContext, student: MegatronModel, client: TeacherClient) -> None:
    """Raise ``UserError`` unless token ids mean what the stage takes them for, and the teacher's positions suffice."""
    info, url, stage = client.info, client.settings.urls[0], context.stage
    if not client.settings.cross_tokenizer and info.vocab_size != student.spec.vocab_size:
        raise UserError(
            f"{url}: the teacher has a vocabulary of {info.vocab_size} tokens and the student of "
            f"{student.spec.vocab_size}: they must be equal"
        )
    own, whose = context.inputs.tokenizer_of(context.models.name_of(context.name)), "the student"
    if client.settings.cross_tokenizer:
        own, whose = context.inputs.named_tokenizer(client.settings.tokenizer), "teacher_service.tokenizer"
    if tokenizer_fingerprint(own) != info.tokenizer_fingerprint:
        difference = vocabulary_difference(own, parse_tokenizer(client.tokenizer_json(), url))
        if difference is not None:
            raise UserError(f"{url}: the teacher has other token ids than {whose}: {difference}")
    views = context.inputs.prompt_views(context.name, "teacher")
    # In the teacher's tokens a response may be longer: the server refuses the ones that are too long.
    limit = info.max_positions - stage.sampling.max_response_length
    longest = context.inputs.longest_beyond(context.name, limit) if views is None else views.longest_beyond(limit)
    if longest > max(0, limit):
        raise UserError(
            f"{url}: a prompt of {longest} tokens and sampling.max_response_length "
            f"{stage.sampling.max_response_length} exceed the {info.max_positions} positions of the teacher"
        )


def load_references(context: StageContext, stage: OpdConfig) -> TeacherRouter | None:
    """Load what a reward scale needs; None without one."""
    if not stage.needs_reference:
        return None
    views = context.inputs.prompt_views(context.name, "reference")
    return TeacherRouter.load(stage.reference, context.models.frozen, views)


def serve_teachers(
    context: StageContext, stage: OpdConfig, teachers: TeacherRouter, params: SamplingParams
) -> ServedTeachers:
    """Start servers with the teachers' weights, checked against the teachers themselves, which are then offloaded."""
    names = {None: stage.teacher} if isinstance(stage.teacher, str) else stage.teacher
    engines: dict[str, ServedEngine] = {}
    for domain, name in names.items():
        if name not in engines:
            teacher = teachers.models[domain]
            top_k = min(stage.top_k, teacher.spec.vocab_size) if stage.kl_estimator == "top_k" else 0
            longest = 0 if teachers.views is None else teachers.views.longest
            engines[name] = context.rollouts.served_teacher(
                teacher, context.models.name_of(name), params, top_k, longest_prompt=longest
            )
    return ServedTeachers({domain: engines[name] for domain, name in names.items()}, teachers.views)


def distribution_teacher(
    stage: OpdConfig, student: MegatronModel, teachers: AnyTeachers, references: TeacherRouter | None
) -> Teacher:
    """Return the teacher that gives the loss whole or top-k distributions."""
    k = min(stage.top_k, student.spec.vocab_size)
    if isinstance(teachers, ServedTeachers):
        return ServedTopK(student, teachers, k, stage.tail_mass)
    if isinstance(teachers, ServiceTeachers) and stage.kl_estimator == "top_k":
        return ServiceTopK(student, teachers, stage.tail_mass)
    if stage.kl_estimator == "top_k":
        return TopKTeacher(student, teachers, k, stage.top_k_source, stage.tail_mass)
    return FullTeacher(student, teachers, references, stage.reward_scale)
