"""The gradient norm that is computed on the device."""

import torch
from megatron.core.optimizer import clip_grads

from megatron_s2d.parallel import device


def test_gradient_norm_against_float64():
    torch.manual_seed(0)
    gradients = [torch.randn(size) for size in (3, 1000, 17)] + [torch.zeros(5)]
    norm, _ = device.l2_norm(0, torch.zeros(1), [gradients], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32
    torch.testing.assert_close(norm.double().squeeze(), torch.cat(gradients).double().norm(), rtol=1e-6, atol=0)


def test_megatron_uses_it_where_it_has_no_kernel(monkeypatch):
    monkeypatch.setattr(clip_grads, "l2_norm_impl", clip_grads.local_multi_tensor_l2_norm, raising=False)
    device._compute_gradient_norms_on_the_device()
    assert clip_grads.l2_norm_impl is device.l2_norm
    kernel = object()
    monkeypatch.delattr(clip_grads, "local_multi_tensor_l2_norm")  # not defined beside a kernel
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    device._compute_gradient_norms_on_the_device()
    assert clip_grads.l2_norm_impl is kernel
