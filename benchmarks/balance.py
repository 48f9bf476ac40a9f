"""What tolerances of balancing cost: the load of the fullest data-parallel rank against the tokens that are sent.

python benchmarks/balance.py
"""

from __future__ import annotations

import math

import numpy as np

from megatron_s2d.data.balance import SCORING_SHARE, SCORING_TOLERANCE, SHARE, TOLERANCE, balanced_ranks

RESPONSES = 8  # a rank


def main() -> None:
    """Print, for tolerances of ``data/balance.py``, the load of the fullest rank and the largest bytes that one moves.

    Response lengths are lognormal (sigma 0.8, 16,384 tokens at most), eight responses a rank, the mean of 20 updates.
    Bytes are those of a rank's messages, as a fraction of the bytes of the samples that it had.
    """
    print(
        "| ranks | tolerance | largest share of own | tokens of the fullest rank, of the mean | sent, of own samples "
        "| received, of own |\n|---|---|---|---|---|---|"
    )
    for size in (32, 256, 1024):
        for tolerance, share in (
            (0.0, math.inf), (TOLERANCE, math.inf), (TOLERANCE, SHARE), (SCORING_TOLERANCE, math.inf),
            (SCORING_TOLERANCE, SCORING_SHARE), (math.inf, math.inf),
        ):  # fmt: skip
            rows = []
            for seed in range(20):
                draw = np.random.default_rng(seed).lognormal(np.log(4096), 0.8, size * RESPONSES)
                lengths = np.minimum(draw, 16384).astype(np.int64)
                ranks = np.repeat(np.arange(size), RESPONSES)
                moved_to = np.array(balanced_ranks(lengths.tolist(), ranks.tolist(), size, tolerance, share))
                own, after = (np.bincount(of, weights=lengths, minlength=size) for of in (ranks, moved_to))
                moves = ranks != moved_to
                sent = np.bincount(ranks[moves], weights=lengths[moves], minlength=size)
                received = np.bincount(moved_to[moves], weights=lengths[moves], minlength=size)
                rows.append((after.max() / after.mean(), (sent / own).max(), (received / own).max()))
            fullest, most_sent, most_received = np.mean(rows, axis=0)
            name = "nothing moves" if math.isinf(tolerance) else f"{100 * tolerance:.0f} %"
            limit = "none" if math.isinf(share) else f"{share:.2f}"
            print(
                f"| {size:,} | {name} | {limit} | {fullest:.2f} | {most_sent:.2f} | {most_received:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
