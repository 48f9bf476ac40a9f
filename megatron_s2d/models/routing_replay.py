"""Routing replay (R3): record the experts that a mixture-of-experts model chose, and replay them in another pass.

Engine and trainer compute the same hidden states with other kernels, shapes and layouts. A rounding difference can
exchange experts that are nearly tied, and then the token passes through other weights, so that log-probabilities
differ far more than those of a dense model. With replay the trainer's passes send every token to the experts that it
had when it was sampled. Only the choice is replayed: the router computes the probabilities of these experts again, with
gradients.

``LayerRoutes`` is Megatron-Core's ``RouterReplay`` of one layer, extended in three ways: tokens of samples without a
record get the router's own choice, a pass in the backward (recomputation) is recognised as such, so that schedules
which mix forward and backward passes need no switch, and where a pass has no other tokens its numbers of tokens are
known on the host (``replayed_dispatch.py``).

Shapes: t tokens that a router sees on this rank, l layers with experts on this rank, k experts of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.data.packing import RoutedLayers, Routes
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import layers_of_pp_rank
from megatron_s2d.models.replayed_dispatch import CountedReplay, ReplayedDispatcher, tokens_of_experts
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout

_TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class LayerRoutes(CountedReplay):
    """Records or replays the choices of one router."""

    def __init__(self, dtype: torch.dtype):
        """dtype: in which choices are stored for the recomputation."""
        super().__init__()
        # Megatron drives all routers of a process together; here each model is driven by itself.
        RouterReplay.global_router_replay_instances.remove(self)
        self._dtype = dtype
        self._is_recorded: torch.Tensor | None = None  # [t] bool
        self._is_given: torch.Tensor | None = None  # [t] bool; None: all are
        self._counts: torch.Tensor | None = None  # of the next pass, see ``tokens_of_experts``
        self._counts_for_backward: list[torch.Tensor | None] = []
        self._keeps_for_backward = False
        self.num_agreeing: torch.Tensor | None = None  # [] int64, summed over passes while it is not None

    def start(self, action: RouterReplayAction, *, keeps_for_backward: bool = False) -> None:
        """Record or replay from the next pass on. keeps_for_backward: passes without gradients are recomputed later."""
        self.clear_indices()
        self.set_router_replay_action(action)
        self._keeps_for_backward = keeps_for_backward

    def stop(self) -> None:
        """Let the router choose, and drop all records."""
        self.clear_indices()
        self.clear_router_replay_action()
        self._is_recorded = self._is_given = self._counts = self.tokens_of_experts = self.num_agreeing = None
        self._counts_for_backward = []

    def set_routes(
        self,
        experts: torch.Tensor,
        is_recorded: torch.Tensor,
        is_given: torch.Tensor | None,
        counts: torch.Tensor | None,
    ) -> None:
        """Replay ``experts`` [t, k] in the next pass where ``is_given`` [t] (None: everywhere).

        is_recorded: [t], those that the sampling engine recorded. counts: ``tokens_of_experts`` of the pass.
        """
        self.target_topk_idx, self._is_recorded, self._is_given, self._counts = experts, is_recorded, is_given, counts

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: _TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RouterReplay``: return scores and experts [t, k] of the action; scores: [t, number of experts]."""
        action = self.router_replay_action
        self.tokens_of_experts = None
        if action == RouterReplayAction.REPLAY_FORWARD:
            if torch._C._current_graph_task_id() == -1:
                self._complete_target(scores, default_compute_topk(scores, topk, num_groups, group_topk))
                self.tokens_of_experts = self._counts
            else:  # the backward pass computes the layer again
                self.router_replay_action = RouterReplayAction.REPLAY_BACKWARD
                self.replay_backward_list[0] = self.replay_backward_list[0].long()
                self.tokens_of_experts = self._counts_for_backward.pop(0)
        try:
            return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)
        finally:
            self.router_replay_action = action

    def _complete_target(self, scores: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Fill the rows that are not given with the router's ``own`` choice, and count how far recorded ones agree."""
        own_scores, own_experts = own
        target = self.target_topk_idx.long()
        if self._is_given is not None:
            target = torch.where(self._is_given[:, None], target, own_experts)
        if self.num_agreeing is not None:
            # Not below the own choice's last: equal scores may be in either order.
            agrees = scores.detach().gather(1, target) >= own_scores.detach().amin(1, keepdim=True)
            self.num_agreeing += (agrees & self._is_recorded[:, None]).sum()
        self.target_topk_idx = target
        if self._keeps_for_backward and not torch.is_grad_enabled():
            self.replay_backward_list.append(target.to(self._dtype))
            self._counts_for_backward.append(self._counts)


class RoutingReplay:
    """The routers of one model: records while it generates, replays while it is trained or scores.

    Outside of ``recording`` and ``replaying`` they choose as ever.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], spec: ModelSpec, layout: Layout):
        """Attach to the routers of this rank; ``UserError`` for a dense model."""
        if not spec.num_experts:
            raise UserError("routing replay needs a mixture of experts, and the model is dense: leave it out")
        self.spec, self._layout = spec, layout
        self._num_chunks = layout.vp_size
        layers = [
            layer
            for stage in range(layout.vp_size)
            for layer in layers_of_pp_rank(spec, layout.pp_rank, layout.pp_size, stage, layout.vp_size)
        ]
        self.routed_layers = RoutedLayers(
            tuple(layers),
            spec.num_experts,
            spec.num_experts_per_tok,
            spec.expert_index_dtype,
            # It predicts nothing, but in later layers it takes part in a load-balancing loss.
            gives_last=chunks[0].config.moe_router_load_balancing_type == "none",
        )
        self._dtype: torch.dtype = getattr(torch, spec.expert_index_dtype)
        self._layers: list[LayerRoutes] = []
        self._layer_indices = torch.tensor(layers, device=device.device())
        self._num_replayed = 0  # tokens of the last training pass that had a record
        self._counts = torch.zeros(2, spec.num_layers, dtype=torch.float64, device=device.device())
        # By the identity of a micro-batch's routes: tokens of experts in each layer [l, r, e], None where unknown.
        self._tokens_of_experts: dict[int, torch.Tensor | None] = {}
        for chunk in chunks:
            for moe in (module for module in chunk.modules() if isinstance(module, MoELayer)):
                self._attach(moe)

    def _attach(self, moe: MoELayer) -> None:
        router = moe.router
        router.config.moe_router_fusion = False  # Transformer Engine's fused router replays nothing
        router.router_replay = LayerRoutes(self._dtype)
        router.router_replay.layer_number = router.layer_number
        self._layers.append(router.router_replay)
        if isinstance(moe.token_dispatcher, MoEAlltoAllTokenDispatcher):
            moe.token_dispatcher = ReplayedDispatcher(
                router.router_replay,
                moe.num_local_experts,
                moe.local_expert_indices,
                config=moe.config,
                pg_collection=self._layout.groups,
            )

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the choices of the passes inside the block."""
        for layer in self._layers:
            layer.start(RouterReplayAction.RECORD)
        try:
            yield
        finally:
            self._stop()

    def recorded(self) -> torch.Tensor:
        """Return the choices of the last pass on the device: [t, l, k]."""
        return torch.stack([layer.get_recorded_indices() for layer in self._layers], dim=1).to(self._dtype)

    @contextlib.contextmanager
    def replaying(self, routes: Sequence[Routes], *, trains: bool) -> Iterator[None]:
        """Replay ``routes`` in the passes inside the block, each preceded by ``load``. Collective.

        routes: of each micro-batch. trains: passes are followed by a backward pass, and ``counts`` is of them.
        """
        self._num_replayed = 0
        experts = [item.experts[self._rows(len(item.experts))] for item in routes]
        counts = tokens_of_experts(
            experts, [item.is_complete for item in routes], self.spec.num_experts, self._layout.host_ep
        )
        self._tokens_of_experts = {id(item): count for item, count in zip(routes, counts, strict=True)}
        for layer in self._layers:
            layer.start(RouterReplayAction.REPLAY_FORWARD, keeps_for_backward=trains)
            layer.num_agreeing = torch.zeros((), dtype=torch.int64, device=device.device()) if trains else None
        try:
            yield
        finally:
            if trains:
                self._count()
            self._stop()

    def load(self, routes: Routes) -> None:
        """Replay ``routes``, of all positions of a micro-batch, in the next pass; copies without waiting."""
        rows, target = self._rows(len(routes.experts)), device.device()
        self._num_replayed += int(routes.is_recorded[rows].sum())  # in host memory
        experts, is_recorded = (
            values[rows].to(target, non_blocking=True) for values in (routes.experts, routes.is_recorded)
        )
        is_given = None if routes.is_complete else routes.is_given[rows].to(target, non_blocking=True)
        counts = self._tokens_of_experts[id(routes)]
        for index, layer in enumerate(self._layers):
            layer.set_routes(experts[:, index], is_recorded, is_given, None if counts is None else counts[index])

    def counts(self) -> torch.Tensor:
        """Return choices of this rank in the last training passes, by layer of the whole model: [2, layers] float64.

        Row 0: that were replayed. Row 1: that were replayed and are among the router's own.
        """
        return self._counts

    def _rows(self, num_positions: int) -> slice:
        """Return the positions that the routers of this rank see: with sequence parallelism a slice."""
        if not self._layout.config.sequence_parallel:
            return slice(0, num_positions)
        size = num_positions // self._layout.tp_size
        return slice(size * self._layout.tp_rank, size * (self._layout.tp_rank + 1))

    def _count(self) -> None:
        self._counts.zero_()
        # A micro-batch is loaded once for each virtual pipeline stage of this rank.
        num_choices = self._num_replayed // self._num_chunks * self.spec.num_experts_per_tok
        self._counts[0].index_fill_(0, self._layer_indices, num_choices)
        agreeing = torch.stack([layer.num_agreeing for layer in self._layers]).double()
        self._counts[1].index_copy_(0, self._layer_indices, agreeing)

    def _stop(self) -> None:
        self._tokens_of_experts = {}
        for layer in self._layers:
            layer.stop()


def replaying(
    replay: RoutingReplay | None, routes: Sequence[Routes | None], *, trains: bool
) -> contextlib.AbstractContextManager:
    """Return ``replay.replaying``, or a context that does nothing."""
    return contextlib.nullcontext() if replay is None else replay.replaying(routes, trains=trains)
