"""The traceback of an out-of-memory error says phase, layer and tensor."""

import functools
import types

import torch

from megatron_s2d.parallel.out_of_memory import describe

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free. "
    "Of the allocated memory 70 GiB is allocated by PyTorch. If reserved but unallocated memory is large try setting"
)


def refuse() -> None:
    raise torch.OutOfMemoryError(MESSAGE)


def calls(*frames: tuple[str, str, dict]):
    """Return a function whose call passes functions of these (file, name, locals) before memory is refused."""
    function = refuse
    for path, name, values in reversed(frames):
        code = f"def {name}(inner, self=None):\n    inner()\n"
        namespace: dict = {}
        exec(compile(code, f"/site-packages/{path}", "exec"), namespace)
        function = functools.partial(namespace[name], function, **values)
    return function


def described(*frames):
    try:
        calls(*frames)()
    except torch.OutOfMemoryError as error:
        return describe(error)


def test_activations_name_their_layer():
    layer = types.SimpleNamespace(layer_number=12)
    found = described(
        ("megatron_s2d/train/megatron_model.py", "forward_backward", {}),
        ("megatron/core/transformer/transformer_layer.py", "forward", {"self": layer}),
        ("megatron/core/tensor_parallel/layers.py", "forward", {}),
    )
    assert (found.phase, found.tensor) == ("train", "activations of layer 12")
    assert found.line == "megatron/core/tensor_parallel/layers.py:2 forward"
    assert found.message.endswith("1 GiB is free.") and "Tried to allocate 2.00 GiB" in found.message


def test_logits_and_optimizer_are_named():
    logits = described(
        ("megatron_s2d/train/megatron_model.py", "score", {}), ("megatron_s2d/kl/fused.py", "chunks", {})
    )
    assert (logits.phase, logits.tensor) == ("score", "logits of a chunk")
    state = described(
        ("megatron_s2d/train/megatron_model.py", "optim_step", {}), ("torch/optim/adam.py", "_init_group", {})
    )
    assert (state.phase, state.tensor) == ("update", "Adam's state")
    assert "out of GPU memory in update, for Adam's state, at torch/optim/adam.py:2 _init_group: CUDA" in state.sentence


def test_the_backward_pass_and_unknown_places():
    backward = described(
        ("megatron_s2d/train/megatron_model.py", "forward_backward", {}), ("torch/_tensor.py", "backward", {})
    )
    assert (backward.phase, backward.tensor) == ("train", "gradients in the backward pass")
    assert described(("somewhere/else.py", "f", {})).phase == ""


def test_attention_in_training_is_an_activation_and_not_the_cache_of_decoding():
    layer = (
        "megatron/core/transformer/transformer_layer.py",
        "forward",
        {"self": types.SimpleNamespace(layer_number=3)},
    )
    attention = ("megatron_s2d/models/kv_cache.py", "forward", {})
    assert described(layer, attention).tensor == "activations of layer 3"
    stored = ("megatron_s2d/models/kv_cache.py", "_adjust_key_value_for_inference", {})
    assert described(layer, attention, stored).tensor == "keys and values"
