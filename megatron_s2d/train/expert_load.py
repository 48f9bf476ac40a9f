"""Load of the experts of a mixture-of-experts model during an update: balance, dropped tokens, auxiliary loss.

Everything stays on the device during the forward passes; ``MegatronModel`` reduces ``totals`` together with the metrics
of the objective, and copies them to the host once an update.

Shapes: t tokens that a router sees on this rank, e experts, l layers of the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.routing_replay import RoutingReplay
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.train.replay_metrics import replay_metrics

_AUX_LOSS = "load_balancing_loss"  # Megatron's name; it records the loss without its coefficient


class ExpertLoad:
    """Counts of the routers of one trainable model; padding does not count, replayed choices count as they are."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        layout: Layout,
        replay: RoutingReplay | None = None,
    ):
        """replay: of the model, if choices of experts are replayed."""
        self._replay = replay
        self._topk, self._num_layers = spec.num_experts_per_tok, spec.num_layers
        self._aux_loss_shares = layout.tp_size * layout.cp_size  # ranks whose losses sum to that of a micro-batch
        # Assignments to each expert, and in the last column those that its capacity dropped: [l, e + 1].
        self._counts = torch.zeros(spec.num_layers, spec.num_experts + 1, dtype=torch.int64, device=device.device())
        self._is_recording = False
        routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        for router in routers:
            router.register_forward_hook(self._count)
        self._num_aux_losses = sum(router.is_aux_loss_enabled() for router in routers)  # of a micro-batch

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Count the passes inside the block, starting from zero."""
        self._counts.zero_()
        destroy_moe_metrics_tracker()  # it has the number of layers of the model that it saw first
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def _count(self, router: TopKRouter, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Forward hook; inputs: hidden states and padding mask [s, b] (True at padding); output: -, routing map."""
        # Recomputation runs the first pass without gradients and counts in the second one.
        if not (self._is_recording and torch.is_grad_enabled()):
            return
        padding_mask, routing_map = inputs[1], output[1].bool()
        if padding_mask is None:
            num_tokens: torch.Tensor | int = len(routing_map)
        else:
            present = ~padding_mask.reshape(-1)
            routing_map, num_tokens = routing_map & present[:, None], present.sum()
        counts, row = routing_map.sum(0), self._counts[router.layer_number - 1]
        row[:-1] += counts
        row[-1] += num_tokens * self._topk - counts.sum()

    @property
    def num_totals(self) -> int:
        """Length of ``totals``."""
        return self._counts.numel() + 2 + (2 * self._num_layers if self._replay is not None else 0)

    def totals(self, num_micro_batches: int) -> torch.Tensor:
        """Return this rank's numbers, to be summed over all ranks: float64 on the device.

        num_micro_batches: of this data-parallel rank that are not empty.
        """
        entry = get_moe_metrics_tracker().metrics.get(_AUX_LOSS)
        aux_loss = self._counts.new_zeros((), dtype=torch.float64) if entry is None else entry.values.double().sum()
        count = num_micro_batches * self._num_aux_losses
        aux_losses = torch.stack([aux_loss, torch.full_like(aux_loss, count / self._aux_loss_shares)])
        # Every token is counted on one rank: experts with tensor parallelism need sequence parallelism.
        replayed = [] if self._replay is None else [self._replay.counts().flatten()]
        return torch.cat([self._counts.double().flatten(), aux_losses, *replayed])

    def metrics(self, totals: torch.Tensor) -> dict[str, Metric]:
        """Return the metrics of ``totals`` summed over all ranks, a tensor on the host.

        ``moe/load_max_over_mean``: assignments to the busiest expert of a layer over the mean of its experts, in the
        least balanced layer. ``moe/dropped_tokens``: assignments beyond the capacity of an expert, over all layers.
        ``moe/aux_loss``, where a loss is trained: before its coefficient, the mean over layers and micro-batches.
        """
        counts, totals = totals[: self._counts.numel()].reshape(self._num_layers, -1), totals[self._counts.numel() :]
        aux_loss, num_aux_losses = totals[:2]
        loads, one = counts[:, :-1], torch.ones((), dtype=torch.float64)
        metrics = {
            "moe/load_max_over_mean": Metric((loads.amax(1) / loads.mean(1)).amax(), one, "max"),
            "moe/dropped_tokens": Metric(counts[:, -1].sum(), one, "sum"),
        }
        if num_aux_losses:
            metrics["moe/aux_loss"] = Metric(aux_loss, num_aux_losses, "mean")
        if self._replay is not None:
            metrics |= replay_metrics(totals[2:].reshape(2, -1))
        return metrics
