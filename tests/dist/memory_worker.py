"""Starts benchmarks/memory.py on several ranks; arguments are those of the benchmark."""

import runpy
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"

if __name__ == "__main__":
    sys.argv[0] = str(BENCHMARK)
    sys.path.insert(0, str(BENCHMARK.parent))  # as python does for a script
    runpy.run_path(str(BENCHMARK), run_name="__main__")
