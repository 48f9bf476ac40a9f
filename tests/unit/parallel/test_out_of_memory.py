"""The traceback of an out-of-memory error says phase, layer and tensor."""

import functools
import types

import torch

from megatron_s2d.parallel.out_of_memory import MODEL_CODE, describe, line_of

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free. "
    "Of the allocated memory 70 GiB is allocated by PyTorch. If reserved but unallocated memory is large try setting"
)

# Of an environment in a checkout, as `make` installs it.
SITE_PACKAGES = "/home/user/megatron_s2d/.venv/lib/python3.12/site-packages"


def refuse() -> None:
    raise torch.OutOfMemoryError(MESSAGE)


def calls(*frames: tuple[str, str, dict]):
    """Return a function whose call passes functions of these (file, name, locals) before memory is refused."""
    function = refuse
    for path, name, values in reversed(frames):
        code = f"def {name}(inner, self=None):\n    inner()\n"
        namespace: dict = {}
        exec(compile(code, f"{SITE_PACKAGES}/{path}", "exec"), namespace)
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


def test_lines_of_other_packages_are_not_the_projects():
    """Not even in a directory of its name; its own are shown from a checkout as from an installed package."""
    backward = described(
        ("megatron_s2d/train/megatron_model.py", "forward_backward", {}), ("torch/nn/functional.py", "linear", {})
    )
    assert backward.line == "megatron_s2d/train/megatron_model.py:2 forward_backward"
    own = types.SimpleNamespace(f_code=describe.__code__, f_lineno=7, f_back=None)
    assert line_of(own) == "megatron_s2d/parallel/out_of_memory.py:7 describe"
    test = types.SimpleNamespace(f_code=refuse.__code__, f_lineno=7, f_back=None)
    assert line_of(test) == "PyTorch"
    code = describe.__code__.replace(co_filename=f"{SITE_PACKAGES}/torch/optim/adam.py")
    adam = types.SimpleNamespace(f_code=code, f_lineno=1, f_back=own)
    assert line_of(adam).startswith("torch/optim/adam.py:1") and line_of(adam, MODEL_CODE) == line_of(own)
