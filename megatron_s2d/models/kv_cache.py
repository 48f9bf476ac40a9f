"""KV cache for decoding with Megatron models: a static inference context that stores keys after rotary embedding.

Megatron's own static context stores keys unrotated and rotates the full history again in every step; its self-attention
adds keys and values to the context in one method, which ``CachedSelfAttention`` overrides. Sequences of a
batch end at the same column: shorter prompts are padded on the left, and the padding is masked. Positions are counted
without the padding, so rotations are those of the unpadded sequence; they are computed once per step, not once per
layer.

Not supported: paged caches, replacing finished rows, context parallelism, partial and interleaved rotary embedding.

Shapes: b rows (sequences), w columns of the current forward pass (the window), c cached columns, n query heads, n_kv
key/value heads, d head_dim.
"""

from __future__ import annotations

import torch

from megatron_s2d.parallel import device

device.patch_megatron_for_cpu()

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

_MIN_FREE_COLUMNS = 256  # that a buffer gets when it grows; a longer one doubles


class KeyValueCache(StaticInferenceContext):
    """Keys and values of all layers of this rank, each [b, n_kv, c, d].

    Use: one forward over the prompts, ``advance``, then ``select`` to repeat prompts or drop rows, and one forward per
    token, each followed by ``advance``.
    """

    def __init__(self, pad_lengths: torch.Tensor | None, prompt_length: int, max_sequence_length: int):
        """Create an empty cache. ``pad_lengths``: [b] int64 columns of left padding; None if no row has any."""
        rows = 1 if pad_lengths is None else len(pad_lengths)
        super().__init__(max_batch_size=rows, max_sequence_length=max_sequence_length)
        self._pad_lengths = pad_lengths
        self._window = prompt_length  # columns that the next forward pass adds
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None  # of every position, [positions, d]
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # of the window

    @property
    def mask_type(self) -> AttnMaskType:
        """Mask type of the next forward pass; ``arbitrary`` means that ``attention_mask`` decides."""
        if self._pad_lengths is not None:
            return AttnMaskType.arbitrary
        return AttnMaskType.causal if self.sequence_len_offset == 0 else AttnMaskType.no_mask

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """Mask of the next forward pass, True where a key is hidden: [b, 1, w, c] bool; None: no padding.

        Without padding the mask is causal over the prompts and empty afterwards. A padded query sees itself, because a
        row that sees nothing has no softmax.
        """
        if self._pad_lengths is None:
            return None
        start, stop = self.sequence_len_offset, self.sequence_len_offset + self._window
        columns = torch.arange(stop, device=self._pad_lengths.device)
        hidden = (columns < self._pad_lengths[:, None])[:, None, None, :]
        if self._window == 1:
            return hidden
        queries = columns[start:, None]
        return (hidden & (columns != queries)) | (columns > queries)

    def advance(self) -> None:
        """End a forward pass; the next one adds one token."""
        self.sequence_len_offset += self._window
        self._window = 1
        self._rotation = None
        self.enable_decode_mode()

    def select(self, rows: torch.Tensor) -> None:
        """Keep only ``rows`` ([new b] int64; a row may be repeated), in this order."""
        self.max_batch_size = len(rows)
        if self._pad_lengths is not None:
            self._pad_lengths = self._pad_lengths[rows]
        for number, pair in self._layers.items():
            self._layers[number] = self._with_free_columns(pair, rows)

    def extend(
        self, layer_number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate the window's ``query`` and ``key``, and append key and value to the layer's cache.

        query: [w, b, n, d]. key, value: [w, b, n_kv, d]. angles: Megatron's table [positions, 1, 1, d]. Returns the
        rotated query and the keys and values of all columns so far, [c, b, n_kv, d].
        """
        cos, sin = self._window_rotation(angles, query.dtype)
        keys, values = self._append(layer_number, _rotate(key, cos, sin), value)
        return _rotate(query, cos, sin), keys, values

    def _append(self, number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = self.sequence_len_offset, self.sequence_len_offset + self._window
        keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if start == 0:
            self._layers[number] = (keys, values)
            return key, value
        if stop > self._layers[number][0].shape[2]:
            self._layers[number] = self._with_free_columns(self._layers[number], None)
        all_keys, all_values = self._layers[number]
        all_keys[:, :, start:stop] = keys
        all_values[:, :, start:stop] = values
        return all_keys[:, :, :stop].permute(2, 0, 1, 3), all_values[:, :, :stop].permute(2, 0, 1, 3)

    def _with_free_columns(
        self, buffers: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy ``rows`` (None: all) of keys and values into buffers with free columns after the filled ones."""
        num_filled = self.sequence_len_offset
        num_columns = min(self.max_sequence_length, num_filled + max(num_filled, _MIN_FREE_COLUMNS))

        def enlarge(buffer: torch.Tensor) -> torch.Tensor:
            filled = buffer[:, :, :num_filled]
            filled = filled if rows is None else filled.index_select(0, rows)
            larger = filled.new_empty(filled.shape[0], filled.shape[1], num_columns, filled.shape[3])
            larger[:, :, :num_filled] = filled
            return larger

        keys, values = buffers
        return enlarge(keys), enlarge(values)

    def _window_rotation(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and signed sine of the window's positions, computed once for all layers: [w, b or 1, 1, d]."""
        if self._rotation is None:
            if self._cos_sin is None:
                sin = torch.sin(angles[:, 0, 0])
                sin[:, : sin.shape[1] // 2].neg_()
                self._cos_sin = (torch.cos(angles[:, 0, 0]).to(dtype), sin.to(dtype))
            cos, sin = self._cos_sin
            start, stop = self.sequence_len_offset, self.sequence_len_offset + self._window
            if self._pad_lengths is None:
                self._rotation = cos[start:stop, None, None, :], sin[start:stop, None, None, :]
            else:
                columns = torch.arange(start, stop, device=angles.device)
                positions = (columns[:, None] - self._pad_lengths).clamp_(min=0)
                self._rotation = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
        return self._rotation


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention with keys and values in a ``KeyValueCache``; without one it is unchanged."""

    def _adjust_key_value_for_inference(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        if inference_context is None:
            return super()._adjust_key_value_for_inference(None, query, key, value, rotary_pos_emb, *args, **kwargs)
        if not isinstance(inference_context, KeyValueCache):
            raise TypeError(f"this model decodes with a KeyValueCache, not with a {type(inference_context).__name__}")
        mask_type = inference_context.mask_type
        angles = rotary_pos_emb[0]
        assert angles.shape[-1] == query.shape[-1], "build.py rotates whole heads"
        query, key, value = inference_context.extend(self.layer_number, query, key, value, angles)
        return query, key, value, None, mask_type, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves: x cos + (-x2, x1) sin, the sign of the first half being in ``signed_sin``."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
