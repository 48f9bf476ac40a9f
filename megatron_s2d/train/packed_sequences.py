"""The boundaries of packed sequences in Megatron's form."""

from __future__ import annotations

import dataclasses

import megatron_s2d.parallel.plain_functions  # noqa: F401

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_s2d.data.packing import MicroBatch


@dataclasses.dataclass
class PackedSequences(PackedSeqParams):
    """With the boundaries on the host, too: whoever reads them from the device waits for it in every layer."""

    cu_seqlens_on_host: tuple[int, ...] = ()


def packed_seq_params(batch: MicroBatch) -> PackedSequences | None:
    """Return the sequence boundaries of a packed micro-batch in Megatron's form; None for a padded one."""
    if batch.cu_seqlens is None:
        return None
    return PackedSequences(
        cu_seqlens_on_host=tuple(batch.plan.cu_seqlens),
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        # Padding belongs to its sequence and is masked by causality, so these are the same.
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        max_seqlen_q=batch.plan.max_seqlen,
        max_seqlen_kv=batch.plan.max_seqlen,
        pad_between_seqs=False,
    )
