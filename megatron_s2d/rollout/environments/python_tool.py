"""Programs of the model in the sandbox of the code verifier (``verify/sandbox.py``), several at a time.

A program has ``cpu_seconds`` of processor time, which do not depend on the load of the machine, and as a backstop for
one that sleeps ``_WALL_PER_CPU_SECOND`` times as much time by the clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

from megatron_s2d.records import Prompt
from megatron_s2d.rollout.environments.chat import ChatObservations
from megatron_s2d.rollout.environments.environment import Step, Turn
from megatron_s2d.rollout.environments.tool_calls import TOOL_PARSERS, ToolCall
from megatron_s2d.verify.code_pool import ForkServers, memory_file, read_all

_MAX_WORKERS = 8
_OUTPUT_BYTES = 1 << 20
_WALL_PER_CPU_SECOND = 20
# Prints what the program raises, without the names of this machine's files.
_WRAPPER = """\
import sys, traceback
try:
    exec(compile(CODE, "<tool>", "exec"), {"__name__": "__main__"})
except SystemExit:
    pass
except BaseException as error:
    sys.stdout.write("".join(traceback.format_exception_only(error)))
"""


class PythonRunner:
    """Runs programs in confined processes, one per thread."""

    def __init__(self, num_workers: int | None = None) -> None:
        num_workers = num_workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="python-tool")
        self._servers = ForkServers(num_workers)

    async def run(self, code: str, *, cpu_seconds: int, memory_mb: int) -> str:
        """Return what the program prints, or what went wrong."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._run, code, cpu_seconds, memory_mb)

    def close(self) -> None:
        """Wait for the programs, each of which has a time limit, and stop the processes."""
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _run(self, code: str, cpu_seconds: int, memory_mb: int) -> str:
        limits = {"memory_bytes": memory_mb << 20, "cpu_seconds": cpu_seconds, "file_bytes": _OUTPUT_BYTES}
        wall_seconds = cpu_seconds * _WALL_PER_CPU_SECOND
        request = {"mode": "script", "modules": [], "limits": limits}
        request |= {"case_seconds": wall_seconds, "total_seconds": wall_seconds}
        program = f"CODE = {code!r}\n{_WRAPPER}"
        sources = json.dumps({"setup": "", "program": program}).encode(errors="replace")
        with (
            self._servers.borrow() as server,
            memory_file(sources) as program_file,
            memory_file() as input_file,
            memory_file() as output_file,
        ):
            reply = server.run(request, [program_file, input_file, output_file])
            output = read_all(output_file, _OUTPUT_BYTES).decode(errors="replace")
        if reply is None:
            return "error: the program ended its process"
        (exit_code,) = reply["exits"]
        if reply["timed_out"] or exit_code == -signal.SIGXCPU:
            return f"{output}error: the program took more than {cpu_seconds} s"
        if exit_code:
            return f"{output}error: the program ended with code {exit_code}"
        return output or "(no output)"


class PythonTool:
    """Answers the calls of the tool ``python``; a turn without a call is the last one."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(
        self,
        runner: PythonRunner,
        observations: ChatObservations,
        tokenizer,
        *,
        tool_parser: str,
        cpu_seconds: int,
        memory_mb: int,
    ) -> None:
        self._runner, self._observations, self._tokenizer = runner, observations, tokenizer
        self._calls = TOOL_PARSERS[tool_parser]
        self._limits = {"cpu_seconds": cpu_seconds, "memory_mb": memory_mb}

    async def reset(self, prompt: Prompt, seed: int) -> None:
        """Do nothing: programs do not depend on each other."""

    async def step(self, turn: Turn) -> Step:
        """Run the turn's calls, in order."""
        # With special tokens: a tag of a call may be one.
        calls = self._calls(self._tokenizer.decode(turn.token_ids.tolist()))
        if not calls:
            return Step(None)
        results = [await self._result(call) for call in calls]
        return Step(self._observations.render("\n".join(results)))

    async def _result(self, call: ToolCall) -> str:
        if call.error is not None:
            return f"error: {call.error}"
        if call.name != "python":
            return f"error: there is no tool '{call.name[:50]}', only python"
        code = call.arguments.get("code")
        if not isinstance(code, str):
            return "error: python needs the argument code, a text"
        return await self._runner.run(code, **self._limits)
