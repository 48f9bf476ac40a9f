"""Configuration of ``s2d sweep``: a workflow, a grid over its keys, seeds, and how to evaluate the results.

    workflow: ../quickstart.yaml
    grid:
      prompts: {key: data.pool.num_prompts, values: [256, 512, 1024]}
      layout: {values: {one: {}, two: {parallel.data_parallel_size: 2}}}
    seeds: [1, 2]

No torch here.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name, parse
from megatron_s2d.config.migration import SWEEP_KEYS, refuse_renamed
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.errors import UserError

_LABEL = re.compile(r"[A-Za-z0-9.+]+")


class AxisConfig(Config):
    """One dimension of the grid: a key and its values, or labels that each set several keys."""

    key: str | None = Field(None, description="dotted key of the workflow, as in --set")
    values: list[Any] | dict[str, dict[str, Any]] = Field(
        min_length=1, description="values of `key`, or label -> {dotted key: value}"
    )

    @pydantic.model_validator(mode="after")
    def _check_one_form(self) -> AxisConfig:
        if (self.key is None) == isinstance(self.values, list):
            raise ValueError("give `key` with a list of values, or a mapping of labels without `key`")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"two of the values {', '.join(self.labels)} are equal")
        for label in self.labels:
            if not _LABEL.fullmatch(label):
                raise ValueError(f"'{label}' cannot be part of a directory name: use letters and digits")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the values, in order."""
        return [str(value) for value in self.values]

    def settings(self, label: str) -> dict[str, Any]:
        """Return dotted key -> value of a label."""
        if isinstance(self.values, dict):
            return self.values[label]
        assert self.key is not None
        return {self.key: self.values[self.labels.index(label)]}


class SweepContrastConfig(Config):
    """A comparison of two values of an axis (or of several), with equal other settings and seed."""

    a: dict[str, str | int | float] = Field(min_length=1, description="axis -> value")
    b: dict[str, str | int | float] = Field(min_length=1)
    arm: str


class FitConfig(Config):
    """A power law y = scale * x ** exponent through the points of one arm, for fixed values of the other axes."""

    x: str = Field(description="an axis with numbers for values, or `parameters`: the size of the arm's model")
    y: Literal["accuracy", "error", "loss"] = Field(
        "error", description="avg@k, one minus it, or the mean loss over the last tenth of the arm's last stage"
    )
    arm: str


class EfficiencyConfig(Config):
    """Tokens per second and rank along an axis of layouts, relative to the value with the fewest ranks."""

    axis: str
    stage: str = Field(description="the stage whose steps are timed; its first step is left out")


class SweepConfig(Config):
    """A grid of runs."""

    name: Name
    description: str = ""
    workflow: Path = Field(description="workflow file, relative to this one")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key -> value, for every point")
    grid: dict[str, AxisConfig] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [1], min_length=1)
    contrasts: list[SweepContrastConfig] = Field(default_factory=list)
    fits: list[FitConfig] = Field(default_factory=list)
    efficiency: list[EfficiencyConfig] = Field(default_factory=list)
    gpu: str | None = Field(None, description="GPU of the runs, to compute MFU: h200, h100, ...; null: no MFU")

    @pydantic.model_validator(mode="after")
    def _check_refers_to_axes(self) -> SweepConfig:
        for name in self.grid:
            if not _LABEL.fullmatch(name) or name == "seed":
                raise ValueError(
                    f"grid: '{name}' is not a valid name of an axis: use letters and digits, and not 'seed'"
                )
        for index, contrast in enumerate(self.contrasts):
            for side in (contrast.a, contrast.b):
                for axis, value in side.items():
                    if axis not in self.grid or str(value) not in self.grid[axis].labels:
                        raise ValueError(f"contrasts.{index}: the grid has no {axis}: {value}")
            if set(contrast.a) != set(contrast.b):
                raise ValueError(f"contrasts.{index}: a and b must name the same axes")
        for index, fit in enumerate(self.fits):
            self._need_numbers(f"fits.{index}.x", fit.x)
        for index, item in enumerate(self.efficiency):
            if item.axis not in self.grid:
                raise ValueError(f"efficiency.{index}.axis: the grid has no '{item.axis}' ({', '.join(self.grid)})")
        return self

    def _need_numbers(self, where: str, axis: str) -> None:
        if axis == "parameters":
            return
        if axis not in self.grid:
            raise ValueError(f"{where}: '{axis}' is neither an axis ({', '.join(self.grid)}) nor `parameters`")
        try:
            positive = all(float(label) > 0 for label in self.grid[axis].labels)
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"{where}: the values of '{axis}' are not all positive numbers")

    def choices(self) -> list[dict[str, str]]:
        """Return axis -> label of every point of the grid, without seeds."""
        axes = [[(name, label) for label in axis.labels] for name, axis in self.grid.items()]
        return [dict(choice) for choice in itertools.product(*axes)]


def load_sweep(path: Path) -> SweepConfig:
    """Read and validate a sweep file, resolving ``workflow`` in its folder; raise ``UserError`` for any problem."""
    document = load_yaml(path)
    refuse_renamed(document, str(path), SWEEP_KEYS)
    sweep = parse(SweepConfig, document, str(path))
    workflow = path.parent / sweep.workflow
    if not workflow.is_file():
        raise UserError(f"{path}: workflow: {workflow}: no such file")
    return sweep.model_copy(update={"workflow": workflow})
