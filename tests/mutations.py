"""Applies the mutations of ``mutations.yaml`` one at a time to a copy of the tree, and reports which test fails.

    .venv/bin/python tests/mutations.py [--only NAME] [--list] [--jobs N]

The named tests run first, then the package's other unit tests; a mutation that all of them accept survives. Exit code 1
if one survives, if a text to be replaced is not in its file exactly once, or if the tests fail without a mutation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
UNIT = ROOT / "tests" / "unit"
LIMIT_SECONDS = 900  # of one run of pytest: a mutation may make a test wait for ever
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_NOT_RUN = (4, 5)  # exit codes of pytest: wrong arguments, no tests


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of the source that gives wrong results without an error; see ``mutations.yaml``."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = [Mutation(**fields) for fields in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests say about a mutation."""

    mutation: Mutation
    killed_by: str | None  # test or reason; None: it survived
    seconds: float


class Tree:
    """A copy of the repository's files, with one mutation at most."""

    def __init__(self, path: Path, threads: int):
        self._path, self._threads = path, threads
        for name in _files():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        # Otherwise the finder of an editable installation gives these two from the repository itself.
        for name in ("conversion", "launchers"):
            (path / "megatron_s2d" / name).symlink_to(path / name)

    def try_out(self, mutation: Mutation) -> Outcome:
        """Run the tests with ``mutation``, first those that it names."""
        started = time.monotonic()
        source = self._path / "megatron_s2d" / mutation.file
        original = source.read_text(encoding="utf-8")
        _write(source, mutated(original, mutation))
        try:
            named = mutation.tests.split()
            package = mutation.file.partition("/")[0]
            others = [package] if (UNIT / package).is_dir() and package not in named else []
            killed_by = self.first_failure(named) or (self.first_failure(others) if others else None)
        finally:
            _write(source, original)
        return Outcome(mutation, killed_by, time.monotonic() - started)

    def first_failure(self, tests: Sequence[str]) -> str | None:
        """Return the first test that fails, or a reason; None if all pass. tests: relative to tests/unit/."""
        paths = [f"tests/unit/{name}" for name in tests]
        options = ["-q", "-x", "--tb=no", "-rfE", "-m", "not slow", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *paths],
            cwd=self._path,
            env={**os.environ, "PYTHONPATH": str(self._path), "OMP_NUM_THREADS": str(self._threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the limit of {LIMIT_SECONDS} s ({' '.join(paths)})"
        finally:
            _kill_session(process)
        if process.returncode == 0:
            return None
        if process.returncode in _NOT_RUN:
            raise SystemExit(f"{' '.join(paths)}: no test was run: {output[-500:]}")
        match = _FAILED.search(output)
        return (
            match[1].removeprefix("tests/unit/")
            if match
            else f"pytest ended with code {process.returncode}: {output[-500:]}"
        )


def mutated(source: str, mutation: Mutation) -> str:
    """Return ``source`` with the mutation; raise ``SystemExit`` unless its text is there exactly once."""
    count = source.count(mutation.before)
    if count != 1:
        raise SystemExit(f"{mutation.name}: its text is {count} times in megatron_s2d/{mutation.file}, not once")
    return source.replace(mutation.before, mutation.after)


def _files() -> list[str]:
    """Return the files of the repository, with new ones, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    # Python compares size and seconds only, which a mutation may leave as they are.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _kill_session(process: subprocess.Popen) -> None:
    """End what a test has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def try_all(mutations: Sequence[Mutation], jobs: int) -> Iterator[Outcome]:
    """Yield the outcome of each mutation as it is known; the tests that they name must pass without any."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, ThreadPoolExecutor(jobs) as pool:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(jobs):
            trees.put(Tree(Path(folder) / str(number), threads))

        def with_tree(method: str, argument: object) -> Outcome | str | None:
            tree = trees.get()
            try:
                return getattr(tree, method)(argument)
            finally:
                trees.put(tree)

        named = sorted({test for mutation in mutations for test in mutation.tests.split()})
        parts = [named[number::jobs] for number in range(jobs) if named[number::jobs]]
        for failure in pool.map(lambda part: with_tree("first_failure", part), parts):
            if failure is not None:
                raise SystemExit(f"without a mutation: {failure} fails")
        futures = [pool.submit(with_tree, "try_out", mutation) for mutation in mutations]
        for future in as_completed(futures):
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="mutations whose name contains NAME")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of copies that are tested at once")
    arguments = parser.parse_args()
    wanted = arguments.only or [""]
    mutations = [mutation for mutation in MUTATIONS if any(name in mutation.name for name in wanted)]
    if not mutations:
        parser.error(f"no mutation's name contains {' or '.join(wanted)}")
    for mutation in mutations:
        mutated((ROOT / "megatron_s2d" / mutation.file).read_text(encoding="utf-8"), mutation)
        if arguments.list:
            print(f"{mutation.file}: {mutation.name}\n    {mutation.before.strip()}\n    {mutation.after.strip()}")
    if arguments.list:
        return
    outcomes = []
    for outcome in try_all(mutations, max(1, arguments.jobs)):
        outcomes.append(outcome)
        result = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVED"
        print(
            f"{len(outcomes):3}/{len(mutations)} {outcome.seconds:4.0f} s  {outcome.mutation.name}: {result}",
            flush=True,
        )
    survivors = [outcome.mutation for outcome in outcomes if outcome.killed_by is None]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutations were killed")
    for mutation in survivors:
        print(f"survived: {mutation.file}: {mutation.name}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
