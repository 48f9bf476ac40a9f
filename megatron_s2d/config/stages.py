"""The union of all stage types, selected by the key ``type``. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_s2d.config.forward_kl import ForwardKlConfig, TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig

Stage = Annotated[
    LoadCheckpointConfig | SftConfig | GrpoConfig | TeacherCacheConfig | ForwardKlConfig | OpdConfig | ExpoConfig,
    Field(discriminator="type"),
]
