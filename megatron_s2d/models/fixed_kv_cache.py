"""KV cache whose buffers stay where they are, and whose device counts the columns: a step can be a CUDA graph.

Keys and values of a layer are [b, c, n_kv, d] with free columns at the end. The column of the next token and the number
of keys of each row are tensors, which every step increments. In half precision on a GPU attention is FlashAttention,
which takes the first key and the number of keys of each row from the device and reads no others; elsewhere, and in
layers with a sliding window or attention sinks, it runs over all columns of the buffers, with a mask.

Shapes: b rows, c columns of the buffers, n query heads, n_kv key/value heads, d head_dim.
"""

from __future__ import annotations

import torch

from megatron_s2d.models.kv_cache import KeyValueCache, _rotate
from megatron_s2d.models.layers import attend_token

_HALF = (torch.bfloat16, torch.float16)


class FixedKeyValueCache(KeyValueCache):
    """A ``KeyValueCache`` that decodes in buffers of fixed size; ``reserve``, ``select`` and ``join`` replace them."""

    columns_first = True  # as FlashAttention reads rows of unequal length
    stores_fused = False

    lengths: torch.Tensor  # [b] int32, keys of each row, with the token of the present step
    column: torch.Tensor  # [1] int64, of the token of the present step

    def reserve(self, num_columns: int) -> bool:
        """As the base class; also sets the counts on the device right after the prompts."""
        moved = super().reserve(num_columns)
        if moved:
            self._place()
        return moved

    def select(self, rows: torch.Tensor) -> None:
        """As the base class."""
        super().select(rows)
        self._place()

    def join(self, other: KeyValueCache, num_columns: int) -> None:
        """As the base class."""
        super().join(other, num_columns)
        self._place()

    def _place(self) -> None:
        """Count rows and columns of the present buffers, of which ``sequence_len_offset`` columns are filled."""
        rows, _, capacity, _ = next(iter(self._layers.values()))[0].shape
        where = next(iter(self._layers.values()))[0].device
        filled, pads = self.sequence_len_offset, self._pad_lengths
        self._pads = torch.zeros(rows, dtype=torch.int32, device=where) if pads is None else pads.int()
        self.lengths = filled - self._pads
        self.column = torch.full((1,), filled - 1, dtype=torch.int64, device=where)
        self._row_starts = torch.arange(rows + 1, dtype=torch.int32, device=where)
        self._key_starts = self._row_starts * capacity
        self._key_starts[:rows] += self._pads

    def begin_token(self) -> None:
        """Count the token of the step that begins."""
        self.lengths += 1
        self.column += 1
        self._allowed, self._allowed_near, self._turns = None, {}, {}

    def buffers(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer, [b, c, n_kv, d]."""
        keys, values = self._layers[number]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def store(self, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Append the rotated key and the value of the token, [1, b, n_kv, d]; return the rotated query [1, b, n, d]."""
        second = self._kinds[number].second_rope
        if second not in self._turns:
            positions = self.lengths - 1
            self._turns[second] = tuple(
                table.index_select(0, positions)[None, :, None] for table in self.cos_sin(number)
            )
        keys, values = self.buffers(number)
        keys.index_copy_(1, self.column, _rotate(key, *self._turns[second]).transpose(0, 1))
        values.index_copy_(1, self.column, value.transpose(0, 1))
        return _rotate(query, *self._turns[second])

    def attend(
        self, number: int, query: torch.Tensor, scale: float | None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the attention of ``query`` [1, b, n, d] over the keys of its row as [1, b, n * d]."""
        keys, values = self.buffers(number)
        rows, capacity, num_groups, dim = keys.shape
        window = self._kinds[number].window
        if query.is_cuda and query.dtype in _HALF and window is None and sinks is None:
            output, *_ = torch.ops.aten._flash_attention_forward(
                query[0],
                keys.view(rows * capacity, num_groups, dim),
                values.view(rows * capacity, num_groups, dim),
                self._row_starts,
                self._key_starts,
                1,
                capacity,
                0.0,
                False,
                False,
                scale=scale,
                seqused_k=self.lengths,
            )
        else:
            queries = query.view(rows, num_groups, -1, dim)
            allowed = self._allowed_columns(capacity, window)
            output = attend_token(queries, keys.transpose(1, 2), values.transpose(1, 2), allowed, scale, sinks)
        return output.reshape(1, rows, -1)

    def _allowed_columns(self, capacity: int, window: int | None) -> torch.Tensor:
        """Return where the token may look, [b, 1, 1, c] bool; computed once for the layers of a window."""
        if self._allowed is None:
            columns = torch.arange(capacity, device=self.column.device)
            allowed = (columns >= self._pads[:, None]) & (columns <= self.column)
            self._allowed = allowed[:, None, None, :]
        if window is None:
            return self._allowed
        if window not in self._allowed_near:
            columns = torch.arange(capacity, device=self.column.device)
            self._allowed_near[window] = self._allowed & (columns > self.column - window)
        return self._allowed_near[window]
