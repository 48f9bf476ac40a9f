"""SGLang server processes on this machine: started, watched, killed with everything they started.

Servers bind to the loopback interface, and so does the router that can stand in front of them. Their output goes to a
log file; an error names it. Left out: weights after the start (``senders.py``), requests (``client.py``).
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from megatron_s2d.config.training import SERVER_SPARE_POSITIONS, SglangConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.launcher_env import child_environment

_HOST = "127.0.0.1"
_FOLDER = Path(__file__).parent
_STOP_SECONDS = 20.0
_ROUTER_SECONDS = 60.0
_HEALTH_SECONDS = 30.0  # the server itself waits for its token for 20 and says so then


class _Process:
    """A command; it ends at ``close``, and also when this process ends in whatever way."""

    name = "process"

    def __init__(self, command: Sequence[str], log: Path, added: dict[str, str], path: Path | None = None):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(_FOLDER / "parent_watchdog.py"), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=child_environment(added, path),
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; one that hangs does."""
        return self._process.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers."""
        raise NotImplementedError

    def wait(self, deadline: float) -> None:
        """Until it answers; ``UserError`` when it has ended or ``time.monotonic()`` is past ``deadline``."""
        while not self.is_ready():
            if not self.is_alive:
                raise UserError(f"the {self.name} ended while it started ({_last_words(self.log)}); see {self.log}")
            if "address already in use" in self._said():  # SGLang stays alive then
                raise UserError(f"another program took the port of the {self.name} while it started; run again")
            if time.monotonic() > deadline:
                raise UserError(
                    f"the {self.name} is not ready after rollout.sglang.startup_timeout_seconds; see {self.log}, or allow more"
                )
            time.sleep(0.25)

    def _said(self) -> str:
        """The end of what this process has printed."""
        with open(self.log, "rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - 4096))
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """End it and its children."""
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ServerProcess(_Process):
    """One server."""

    name = "SGLang server"

    def __init__(
        self,
        settings: SglangConfig,
        model: Path,
        log: Path,
        *,
        number: int,
        weight_version: str,
        positions: int,
        dtype: str,
        max_tokens: int,
    ):
        """Start (``wait`` says when it is ready).

        model: Hugging Face directory. number: of the replica, which decides its GPUs. weight_version: what the server
        reports until weights are pushed. positions: of the model. max_tokens: keys and values held, on a CPU.
        """
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        cuda = device.capabilities().cuda
        command = [
            settings.python or sys.executable, "-m", "sglang.launch_server",
            "--model-path", str(model), "--host", _HOST, "--port", str(port),
            "--dtype", dtype, "--weight-version", weight_version,
            "--context-length", str(positions + SERVER_SPARE_POSITIONS),
            "--tensor-parallel-size", str(settings.tensor_parallel_size),
        ]  # fmt: skip
        added = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
        if cuda:
            command += ["--base-gpu-id", str(settings.base_gpu_id + number * settings.tensor_parallel_size)]
            command += ["--enable-memory-saver"] if settings.enable_memory_saver else []
        else:
            added["SGLANG_USE_CPU_ENGINE"] = "1"
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule"]
            command.append("--sleep-on-idle")  # or it would take the cores from the trainer
            command += ["--max-total-tokens", str(max_tokens)]
        if settings.enable_deterministic_inference:
            command.append("--enable-deterministic-inference")
        command += settings.extra_args
        super().__init__(command, log, added, None if cuda else _FOLDER / "cpu_stub")

    def is_ready(self) -> bool:
        """Whether the server generates."""
        return is_healthy(self.url)

    def wait(self, deadline: float) -> None:
        """See ``_Process.wait``."""
        super().wait(deadline)
        # On a CPU SGLang collects garbage whenever its caches are emptied, which is at every push: half a second to
        # look through all that it has imported, unless that is set aside.
        try:
            httpx.post(f"{self.url}/freeze_gc", timeout=_HEALTH_SECONDS, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            print(f"{self.url}/freeze_gc: {error}; pushes to this server may take longer", flush=True)


class Router(_Process):
    """sglang-router in front of servers; it sends requests to the ``workers`` that it was given and to no others."""

    name = "sglang-router"

    def __init__(self, settings: SglangConfig, request_timeout_seconds: float, log: Path):
        """Start without servers (``wait`` says when it is ready); the client's timeout comes before the router's."""
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        # Retries, health and circuits are looked after here, where every reply is checked.
        command = [
            settings.python or sys.executable, "-m", "sglang_router.launch_router",
            "--host", _HOST, "--port", str(port),
            "--prometheus-host", _HOST, "--prometheus-port", str(_free_port()),
            "--policy", "cache_aware", "--request-timeout-secs", str(int(request_timeout_seconds) + 60),
            "--disable-retries", "--disable-circuit-breaker", "--disable-health-check", "--log-level", "warn",
        ]  # fmt: skip
        super().__init__(command, log, {})

    def is_ready(self) -> bool:
        """Whether the router can be told of servers."""
        try:
            return httpx.get(f"{self.url}/workers", timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def serve(self, urls: Sequence[str]) -> str:
        """Send requests to the servers at ``urls`` only; returns why that is not so, if it is not."""
        deadline, asked = time.monotonic() + _ROUTER_SECONDS, set()
        try:
            with httpx.Client(base_url=self.url, timeout=30.0, trust_env=False) as client:
                while True:
                    workers = {worker["url"]: worker["id"] for worker in client.get("/workers").json()["workers"]}
                    if workers.keys() == set(urls):
                        return ""
                    if time.monotonic() > deadline:
                        return f"the router serves {sorted(workers)} instead of {sorted(urls)}"
                    # Both are carried out later; each is asked for once.
                    for url in set(urls) - workers.keys() - asked:
                        client.post("/workers", json={"url": url})
                    for url in workers.keys() - set(urls) - asked:
                        client.delete(f"/workers/{workers[url]}")
                    asked |= workers.keys() ^ set(urls)
                    time.sleep(0.1)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"the router does not answer as expected ({type(error).__name__})"


def is_healthy(url: str, *, checks: int = 1) -> bool:
    """Whether the server at ``url`` is started and generates; a check is one token.

    checks: how often a server is asked that takes connections and does not answer well, because it hangs or because
    it (or its machine) is loaded; starting another one would make the latter worse.
    """
    for _ in range(checks):
        try:
            if httpx.get(f"{url}/health_generate", timeout=_HEALTH_SECONDS, trust_env=False).status_code == 200:
                return True
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:
            pass
    return False


def _free_port() -> int:
    """A port that nobody listens at.

    A server listens minutes after this. Ports that the system gives to outgoing connections may be taken by then, so it
    is none of those (32768 and up).
    """
    for port in random.SystemRandom().sample(range(15_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise UserError("no free port between 15000 and 32000 on this machine")


def _last_words(log: Path) -> str:
    """The last line of the log that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]
