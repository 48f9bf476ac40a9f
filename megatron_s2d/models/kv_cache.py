"""KV cache for decoding with Megatron models: a static inference context that stores keys after rotary embedding.

Megatron's own static context stores keys unrotated and rotates the full history again in every step; its self-attention
adds keys and values to the context in one method, which ``CachedSelfAttention`` overrides. Sequences of a
batch end at the same column: shorter prompts are padded on the left, and the padding is masked. Positions are counted
without the padding, so rotations are those of the unpadded sequence; they are computed once per step, not once per
layer.

Layers with a sliding window keep all keys and values, and attend to the last columns only.

Not supported: paged caches, context parallelism, partial and interleaved rotary embedding.

Shapes: b rows (sequences), w columns of the current forward pass (the window), c cached columns, n query heads, n_kv
key/value heads, d head_dim.
"""

from __future__ import annotations

import dataclasses

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_s2d.models.layer_config import LayerConfig, window_of_layer
from megatron_s2d.models.layers import attend_token

_MIN_FREE_COLUMNS = 256  # that a buffer gets when it grows; a longer one doubles


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What decoding knows of a layer's attention."""

    window: int | None  # positions that a token attends to, its own included; None: all
    second_rope: bool  # whether it rotates by the second columns of the rotary table
    attention_factor: float  # of rotated queries and keys


class KeyValueCache(StaticInferenceContext):
    """Keys and values of all layers of this rank, each [b, n_kv, c, d].

    Use: one forward over the prompts, ``advance``, then ``select`` to repeat prompts or drop rows, and one forward per
    token (``decoding.decode``), each after ``reserve`` and ``begin_token`` and followed by ``advance``.
    """

    columns_first = False  # in memory: [b, c, n_kv, d] rather than [b, n_kv, c, d]
    stores_fused = True  # whether ``store_fused`` can be used

    def __init__(self, pad_lengths: torch.Tensor | None, prompt_length: int, max_sequence_length: int):
        """Create an empty cache. ``pad_lengths``: [b] int64 columns of left padding; None if no row has any."""
        rows = 1 if pad_lengths is None else len(pad_lengths)
        super().__init__(max_batch_size=rows, max_sequence_length=max_sequence_length)
        self._pad_lengths = pad_lengths
        self._window = prompt_length  # columns that the next forward pass adds
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kinds: dict[int, LayerKind] = {}
        self._cos_sin: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}  # of every position, [positions, d]
        self._rotation: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}  # of the window; by second_rope, too
        self._allowed: torch.Tensor | None = None  # [b, 1, 1, c] bool, where the window's token may look; None: all

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
        self._rotation = {}
        self.enable_decode_mode()

    def begin_token(self) -> None:
        """Begin the forward pass of one token."""
        hidden = self.attention_mask
        self._allowed = None if hidden is None else hidden.logical_not()

    def reserve(self, num_columns: int) -> bool:
        """Make room for the next ``num_columns`` tokens; return whether keys and values moved to larger buffers."""
        needed = self.sequence_len_offset + num_columns
        if all(needed <= keys.shape[2] for keys, _ in self._layers.values()):
            return False
        for number, pair in self._layers.items():
            self._layers[number] = self._with_free_columns(pair, None)
        return True

    def select(self, rows: torch.Tensor) -> None:
        """Keep only ``rows`` ([new b] int64; a row may be repeated), in this order."""
        self.max_batch_size = len(rows)
        if self._pad_lengths is not None:
            self._pad_lengths = self._pad_lengths[rows]
        for number, pair in self._layers.items():
            self._layers[number] = self._with_free_columns(pair, rows)

    def join(self, other: KeyValueCache, num_columns: int) -> None:
        """Put the rows of ``other`` after those of this cache; both continue at one column, for ``num_columns`` tokens.

        Rows are moved to end at that column, which is that of the longest row: columns that are padding in all rows
        are dropped.
        """
        lengths = [cache._row_lengths() for cache in (self, other)]
        column = int(torch.cat(lengths).max())
        for number, pair in self._layers.items():
            rows = [
                self._moved(buffers, cache.sequence_len_offset, column, column + min(num_columns, _MIN_FREE_COLUMNS))
                for buffers, cache in ((pair, self), (other._layers[number], other))
            ]
            keys, values = (torch.cat(parts) for parts in zip(*rows, strict=True))
            if self.columns_first:
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            self._layers[number] = keys, values
        # Tables cover the positions of a cache's own rows.
        self._cos_sin = {
            second: max(tables, other._cos_sin[second], key=lambda pair: len(pair[0]))
            for second, tables in self._cos_sin.items()
        }
        pads = column - torch.cat(lengths)
        self._pad_lengths = pads if bool(pads.any()) else None
        self.sequence_len_offset, self.max_sequence_length = column, column + num_columns
        self.max_batch_size = len(pads)
        self._rotation, self._allowed = {}, None

    def _row_lengths(self) -> torch.Tensor:
        """Return the number of cached tokens of each row, [b] int64."""
        keys = next(iter(self._layers.values()))[0]
        pads = self._pad_lengths
        filled = torch.full((len(keys),), self.sequence_len_offset, dtype=torch.int64, device=keys.device)
        return filled if pads is None else filled - pads

    def _moved(
        self, buffers: tuple[torch.Tensor, torch.Tensor], filled: int, column: int, num_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the last of ``filled`` columns into ``num_columns``, so that they end at ``column``."""
        width = min(filled, column)

        def move(buffer: torch.Tensor) -> torch.Tensor:
            rows, heads, _, dim = buffer.shape
            # Zeros: a hidden column has weight 0, and 0 times what memory happens to hold may be NaN.
            shape = (rows, num_columns, heads, dim) if self.columns_first else (rows, heads, num_columns, dim)
            moved = buffer.new_zeros(shape)
            target = moved.transpose(1, 2) if self.columns_first else moved
            target[:, :, column - width : column] = buffer[:, :, filled - width : filled]
            return moved

        keys, values = buffers
        return move(keys), move(values)

    def cos_sin(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and signed sine of every position for a layer, [positions, d]; known after the prompts."""
        return self._cos_sin[self._kinds[number].second_rope]

    def extend(
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: torch.Tensor,
        kind: LayerKind,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate the prompts' ``query`` and ``key``, and keep key and value of the layer.

        query: [w, b, n, d]. key, value: [w, b, n_kv, d]. angles: Megatron's table [positions, 1, 1, d]. Returns the
        rotated query and the keys and values, [w, b, n_kv, d].
        """
        assert self.sequence_len_offset == 0, "tokens after the prompts are decoded one by one"
        self._kinds[layer_number] = kind
        if kind.second_rope not in self._cos_sin:
            sin = torch.sin(angles[:, 0, 0]) * kind.attention_factor
            sin[:, : sin.shape[1] // 2].neg_()
            cos = torch.cos(angles[:, 0, 0]) * kind.attention_factor
            self._cos_sin[kind.second_rope] = (cos.to(query.dtype), sin.to(query.dtype))
        cos, sin = self._window_rotation(layer_number)
        key = _rotate(key, cos, sin)
        # The values are a view of the layer's product, whose queries would stay in memory with them.
        self._layers[layer_number] = (key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3).clone())
        return _rotate(query, cos, sin), key, value

    def store(self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Append the rotated key and the value of one token, [1, b, n_kv, d]; return the rotated query [1, b, n, d]."""
        cos, sin = self._window_rotation(number)
        keys, values = self._layers[number]
        keys[:, :, self.sequence_len_offset] = _rotate(key, cos, sin)[0]
        values[:, :, self.sequence_len_offset] = value[0]
        return _rotate(query, cos, sin)

    def store_fused(self, number: int, heads: torch.Tensor) -> torch.Tensor:
        """As ``store`` for one token's [1, b, n_kv, n / n_kv + 2, d]: of each group its queries, its key, its value.

        Queries and keys are rotated together. Returns the queries, [1, b, n_kv, n / n_kv, d].
        """
        cos, sin = self._window_rotation(number)
        rotated = _rotate(heads[..., :-1, :], cos.unsqueeze(2), sin.unsqueeze(2))
        keys, values = self._layers[number]
        keys[:, :, self.sequence_len_offset] = rotated[0, :, :, -1]
        values[:, :, self.sequence_len_offset] = heads[0, :, :, -1]
        return rotated[..., :-1, :]

    def attend(
        self, number: int, query: torch.Tensor, scale: float | None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the attention of one token's ``query`` [1, b, n, d] over the keys of its row as [1, b, n * d].

        query: also in groups, as ``store_fused`` returns it. sinks: see ``layers.attend``.
        """
        stop, window = self.sequence_len_offset + 1, self._kinds[number].window
        columns = slice(0 if window is None else max(0, stop - window), stop)  # rows end at the same column
        keys, values = (buffer[:, :, columns] for buffer in self._layers[number])
        allowed = None if self._allowed is None else self._allowed[..., columns]
        # The queries of a group become the rows of one product: it reads keys and values once, with any kernel.
        queries = query.reshape(keys.shape[0], keys.shape[1], -1, keys.shape[3])
        output = attend_token(queries, keys, values, allowed, scale, sinks)
        return output.reshape(1, keys.shape[0], -1)

    def _with_free_columns(
        self, buffers: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy ``rows`` (None: all) of keys and values into buffers with free columns after the filled ones."""
        num_filled = self.sequence_len_offset
        num_columns = min(self.max_sequence_length, num_filled + max(num_filled, _MIN_FREE_COLUMNS))

        def enlarge(buffer: torch.Tensor) -> torch.Tensor:
            filled = buffer[:, :, :num_filled]
            filled = filled if rows is None else filled.index_select(0, rows)
            num_rows, num_heads, _, dim = filled.shape
            if self.columns_first:
                # Zeros: a hidden column has weight 0, and 0 times what memory happens to hold may be NaN.
                larger = filled.new_zeros(num_rows, num_columns, num_heads, dim).transpose(1, 2)
            else:
                larger = filled.new_empty(num_rows, num_heads, num_columns, dim)
            larger[:, :, :num_filled] = filled
            return larger

        keys, values = buffers
        return enlarge(keys), enlarge(values)

    def _window_rotation(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and signed sine of the window's positions, computed once for all layers: [w, b or 1, 1, d]."""
        second = self._kinds[number].second_rope
        if second not in self._rotation:
            cos, sin = self._cos_sin[second]
            start, stop = self.sequence_len_offset, self.sequence_len_offset + self._window
            if self._pad_lengths is None:
                self._rotation[second] = cos[start:stop, None, None, :], sin[start:stop, None, None, :]
            else:
                columns = torch.arange(start, stop, device=cos.device)
                positions = (columns[:, None] - self._pad_lengths).clamp_(min=0)
                self._rotation[second] = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
        return self._rotation[second]


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention with keys and values in a ``KeyValueCache``; without one it is unchanged.

    It selects the layer's columns of the rotary table, if layers with a sliding window have other ones.
    """

    def __init__(self, config: LayerConfig, *args, layer_number: int, **kwargs):
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        window = window_of_layer(config, layer_number)
        self.kind = LayerKind(window, config.sliding_rope and window is not None, config.rope_attention_factor)
        self._yarn_concentration_factor = config.rope_attention_factor

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs):
        """As the base class; rotary_pos_emb: the table [positions, 1, 1, d], twice as wide with ``sliding_rope``."""
        if self.config.sliding_rope and rotary_pos_emb is not None:
            # Each half of the columns belongs to a half of a head: first those of full layers, then of sliding ones.
            quarters = rotary_pos_emb.chunk(4, dim=-1)
            second = int(self.kind.second_rope)
            rotary_pos_emb = torch.cat((quarters[second], quarters[2 + second]), dim=-1)
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def _adjust_key_value_for_inference(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        if inference_context is None:
            return super()._adjust_key_value_for_inference(None, query, key, value, rotary_pos_emb, *args, **kwargs)
        if not isinstance(inference_context, KeyValueCache):
            raise TypeError(f"this model decodes with a KeyValueCache, not with a {type(inference_context).__name__}")
        mask_type = inference_context.mask_type
        angles = rotary_pos_emb[0]
        assert angles.shape[-1] == query.shape[-1], "build.py rotates whole heads"
        query, key, value = inference_context.extend(self.layer_number, query, key, value, angles, self.kind)
        return query, key, value, None, mask_type, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves: x cos + (-x2, x1) sin, the sign of the first half being in ``signed_sin``."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
