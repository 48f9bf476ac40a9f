"""Values of block-quantised weights, as transformers computes them when it dequantises a checkpoint."""

from __future__ import annotations

import torch

from megatron_s2d.arithmetic import ceil_div


def dequantize_blocks(
    quantized: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first_row: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of an FP8 matrix multiplied by the scales of their blocks: [rows, columns] in ``dtype``.

    quantized: [rows, columns] float8_e4m3fn, the rows from ``first_row`` of the matrix on. scales: of all blocks,
    [ceil(matrix rows / block rows), ceil(columns / block columns)]. The product is rounded once, from float32.
    """
    rows, columns = quantized.shape
    first_block = first_row // block[0]
    local = scales[first_block : ceil_div(first_row + rows, block[0])].float()
    row_blocks = torch.arange(first_row, first_row + rows) // block[0] - first_block
    column_blocks = torch.arange(columns) // block[1]
    return (quantized.float() * local[row_blocks][:, column_blocks]).to(dtype)
