"""Collectives of JSON values on three ranks, and the shortcuts of a single rank."""

import json
import subprocess
import sys

import pytest

RANKS = """
import json, multiprocessing, sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.parallel import collectives

def refuse():
    raise UserError("rank 0 refuses")

def results(rank):
    try:
        collectives.broadcast_from_rank0(refuse)
    except UserError as error:
        refused = str(error)
    return {
        "broadcast_from_rank0": collectives.broadcast_from_rank0(lambda: f"result of {rank}"),
        "refused": refused,
        "broadcast_flag": collectives.broadcast_flag(rank == 0),
        "long": collectives.broadcast_from_rank0(lambda: ["é" * 1000, {"rank": rank}, 0.1, None]),
        "all_gather_json": collectives.all_gather_json(["x" * rank, rank * 2]),
        "gather_json_on_rank0": collectives.gather_json_on_rank0(["y" * rank]) or [["y" * other] for other in range(3)],
        "first_error": collectives.first_error(None if rank == 0 else f"error of {rank}"),
        "no_error": collectives.first_error(None),
        "any_rank": [collectives.any_rank(rank == 1), collectives.any_rank(False)],
        "max_over_ranks": collectives.max_over_ranks(rank - 9),
        "sum_over_ranks": [
            collectives.sum_over_ranks(np.array([[rank, 0.5]])).tolist(),
            collectives.sum_over_ranks(np.array([2**62 if rank == 0 else 0])).tolist(),
        ],
        "is_same": [collectives.is_same_on_all_ranks(2**62), collectives.is_same_on_all_ranks(rank)],
    }

def main(rank, size, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    (directory / f"{rank}.json").write_text(json.dumps(results(rank)))
    dist.barrier()
    dist.destroy_process_group()

directory, size = Path(sys.argv[1]), int(sys.argv[2])
context = multiprocessing.get_context("fork")
ranks = [context.Process(target=main, args=(rank, size, directory)) for rank in range(size)]
for process in ranks:
    process.start()
for process in ranks:
    process.join()
"""


def run(directory, size: int) -> list[dict]:
    subprocess.run([sys.executable, "-c", RANKS, str(directory), str(size)], check=True, timeout=100)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_gets_the_same_values(tmp_path, size):
    first, *others = run(tmp_path, size)
    assert all(values == first for values in others)
    assert first == {
        "broadcast_from_rank0": "result of 0",
        "refused": "rank 0 refuses",
        "broadcast_flag": True,
        "long": ["é" * 1000, {"rank": 0}, 0.1, None],
        "all_gather_json": [["x" * rank, 2 * rank] for rank in range(size)],
        "gather_json_on_rank0": [["y" * rank] for rank in range(size)],
        "first_error": "error of 1" if size > 1 else None,
        "no_error": None,
        "any_rank": [size > 1, False],
        "max_over_ranks": size - 10,
        "sum_over_ranks": [[[size * (size - 1) / 2, size * 0.5]], [2**62]],
        "is_same": [True, size == 1],
    }
