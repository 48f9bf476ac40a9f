"""The order in which the stages of a workflow can run. No torch here."""

from __future__ import annotations

import graphlib
import heapq
from collections.abc import Mapping

from megatron_s2d.config.stages import Stage


def sorted_stages(stages: Mapping[str, Stage]) -> dict[str, int]:
    """Return stage -> position, each after its inputs and otherwise in the order of the file."""
    names = list(stages)
    positions = {name: position for position, name in enumerate(names)}
    sorter = graphlib.TopologicalSorter({name: stage.inputs().values() for name, stage in stages.items()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise ValueError(f"stages form a cycle (each is an input of the next): {cycle}") from None
    order: dict[str, int] = {}
    ready: list[int] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, positions[name])
        name = names[heapq.heappop(ready)]
        order[name] = len(order)
        sorter.done(name)
    return order
