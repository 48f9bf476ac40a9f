"""Stop strings of responses: looked for in the decoded text behind each new token.

Shapes: n positions of a block, a active requests, s response positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.parallel import device
from megatron_s2d.rollout.engine import Decoder, Request
from megatron_s2d.rollout.megatron.batching import ActiveRows


class StopStrings:
    """Finds responses whose newest token completes a stop string."""

    def __init__(self, strings: list[tuple[str, ...]], decode: Any):
        self._strings = strings  # of each row of the batch
        self._decode = decode
        # A token has at least one byte, so a match that the newest token completes spans at most as many tokens as
        # the string has bytes; a few more, because decoders treat the start of a text differently.
        self._window = 4 + max(len(text.encode()) for texts in strings for text in texts)

    @classmethod
    def of(cls, requests: Sequence[Request], tokenizer: Decoder | None) -> StopStrings | None:
        """Return None if no request has stop strings."""
        strings = [request.params.stop_strings for request in requests]
        return cls(strings, tokenizer.decode) if any(strings) else None

    def completed(self, earlier: torch.Tensor, tokens: torch.Tensor, active: ActiveRows) -> torch.Tensor:
        """Return which of ``tokens`` [n, a] complete a stop string after the ``earlier`` ones [s, b]: [n, a] bool.

        Behind a token that ends a row nothing counts, and nothing is looked for in rows that have ended.
        """
        history = earlier[max(0, len(earlier) + 1 - self._window) :, active.rows]
        columns = torch.cat([history, tokens, active.rows[None], active.alive[None]]).T.tolist()
        num_positions = len(tokens)
        flags = np.zeros((num_positions, len(columns)), dtype=np.bool_)
        for column, (*window, row, alive) in enumerate(columns):
            if not (alive and self._strings[row]):
                continue
            for position in range(num_positions):
                stop = len(history) + position + 1
                flags[position, column] = self._contains(window[max(0, stop - self._window) : stop], self._strings[row])
                if flags[position, column]:
                    break
        return device.copy_to_device(torch.from_numpy(flags))

    def _contains(self, window: list[int], texts: tuple[str, ...]) -> bool:
        decoded = self._decode(window)
        return any(text in decoded for text in texts)
