"""A rank without a model, for clusters of many nodes on one machine: started like one, by the launcher's `python` key.

Ranks meet at MASTER_ADDR:MASTER_PORT and take steps together; rank 0 writes metrics and checkpoints, as a stage does,
and a lost rank ends all others. USR1 stops after the step with exit code 130. The standard library alone, so that a
rank costs milliseconds of processor time and not ten seconds.
"""

import json
import os
import pathlib
import signal
import socket
import sys
import time

STEPS, INTERVAL, SECONDS = 4000, 10, 0.2  # of a step
CONNECT_SECONDS = 600
LOST = 3  # exit code when another rank has gone


def main() -> int:
    arguments = sys.argv[3:]  # after `-m megatron_s2d.cli`
    assert arguments[0] == "run", arguments
    run_dir = pathlib.Path(arguments[arguments.index("--out") + 1])
    stop = []
    signal.signal(signal.SIGUSR1, lambda *_: stop.append(True))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    others = gather(address, size) if rank == 0 else [connect(address)]
    return lead(run_dir, others, size, stop) if rank == 0 else follow(others[0])


def gather(address, size):
    server = socket.create_server(address, backlog=size)
    return [server.accept()[0] for _ in range(size - 1)]


def connect(address):
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(address)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def lead(run_dir, others, size, stop):
    """Take steps from the last checkpoint; every rank answers every step."""
    checkpoint, log = run_dir / "checkpoint.json", run_dir / "metrics.jsonl"
    first = json.loads(checkpoint.read_text())["step"] + 1 if checkpoint.exists() else 1
    if log.exists():  # rows after the checkpoint come again
        rows = [row for row in log.read_text().splitlines() if json.loads(row)["step"] < first]
        log.write_text("".join(row + "\n" for row in rows))
    for step in range(first, STEPS + 1):
        for other in others:
            other.sendall(b"s")
        if any(other.recv(1) != b"d" for other in others):
            return LOST
        time.sleep(SECONDS)
        row = {"step": step, "ranks": size, "time": time.time(), "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % INTERVAL == 0 or stop:
            partial = checkpoint.with_suffix(".partial")
            partial.write_text(json.dumps({"step": step}))
            partial.rename(checkpoint)
        if stop or (run_dir / "enough").exists():
            for other in others:
                other.sendall(b"e")
            return 130 if stop else 0
    return 0


def follow(leader):
    while (word := leader.recv(1)) == b"s":
        leader.sendall(b"d")
    return 0 if word == b"e" else LOST


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        print(f"lost the other ranks: {error}", file=sys.stderr)
        sys.exit(LOST)
