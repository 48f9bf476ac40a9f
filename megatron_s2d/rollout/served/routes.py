"""The routes in a server's reply: the experts that each token passed through, checked against the model.

A server that is asked for them reports the experts of all layers for every token from a given one on, except for the
last, which passed through none. Shapes: l layers, k experts of a token.
"""

from __future__ import annotations

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.rollout.served.backend import InvalidReply, ServerReply


def checked_routes(reply: ServerReply, num_tokens: int, spec: ModelSpec) -> np.ndarray:
    """Return the reply's routes of ``num_tokens`` tokens, [num_tokens, l, k] as in ``Sample``; ``InvalidReply``."""
    if reply.routed_experts is None:
        raise InvalidReply("no routed experts, which the request asked for")
    layers, top_k = spec.num_layers, spec.num_experts_per_tok
    if reply.routed_experts.size != num_tokens * layers * top_k:
        raise InvalidReply(
            f"{reply.routed_experts.size} routed experts instead of {num_tokens} tokens x {layers} layers x {top_k}"
        )
    routes = reply.routed_experts.reshape(num_tokens, layers, top_k)
    if problem := route_problem(routes, spec):
        raise InvalidReply(problem)
    return routes.astype(spec.expert_index_dtype)


def route_problem(routes: np.ndarray, spec: ModelSpec) -> str:
    """Return why ``routes`` [tokens, l, k] are not those of a token of the model; "" if they can be."""
    if not routes.size:
        return ""
    if routes.min() < 0 or routes.max() >= spec.num_experts:
        return f"routed experts from {routes.min()} to {routes.max()} of a model with {spec.num_experts}"
    in_order = np.sort(routes, axis=2)
    if (in_order[:, :, 1:] == in_order[:, :, :-1]).any():
        return "a token that was routed to the same expert twice: this server does not record the routes of its kernels"
    return ""
