"""SGLang server and router processes on this machine: started, watched, ended with all their children.

Servers bind to the loopback interface, and so does the optional router in front of them. Their output goes to a
log file, which errors name.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from megatron_s2d.config.lora import LoraConfig, server_arguments
from megatron_s2d.config.training import SERVER_SPARE_POSITIONS, SglangConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.launcher_env import child_environment
from megatron_s2d.rollout.sglang.api_key import authorization, read_api_key
from megatron_s2d.rollout.sglang.memory_fraction import OPTION, ServerMemory

_HOST = "127.0.0.1"
_FOLDER = Path(__file__).parent
_WITH_API_KEY = _FOLDER / "with_api_key.py"
_STOP_SECONDS = 20.0
_ROUTER_SECONDS = 60.0
_HEALTH_SECONDS = 30.0  # the server itself waits for its token for 20 and says so then


class _Process:
    """A command that ends at ``close``, and also when this process ends in any way."""

    name = "process"

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str], python_path: Path | None = None):
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
                env=child_environment(environment, python_path),
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; a process that hangs does."""
        return self._process.poll() is None

    def is_ready(self) -> bool:
        """Return whether it answers."""
        raise NotImplementedError

    def wait(self, deadline: float) -> None:
        """Wait until it answers; ``UserError`` if it has ended or ``time.monotonic()`` is past ``deadline``."""
        while not self.is_ready():
            if not self.is_alive:
                raise UserError(f"the {self.name} ended while it started ({_last_error(self.log)}); see {self.log}")
            if "address already in use" in self._log_end():  # SGLang stays alive then
                raise UserError(f"another program took the port of the {self.name} while it started; run again")
            if time.monotonic() > deadline:
                raise UserError(
                    f"the {self.name} is not ready after rollout.sglang.startup_timeout_seconds; see {self.log}, or "
                    "allow more"
                )
            time.sleep(0.25)

    def _log_end(self) -> str:
        """Return the end of what this process has printed."""
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


class SglangServer(_Process):
    """One server."""

    name = "SGLang server"

    def __init__(
        self,
        settings: SglangConfig,
        model: Path,
        log: Path,
        key_file: Path,
        *,
        number: int,
        weight_version: str,
        max_positions: int,
        dtype: str,
        max_tokens: int,
        routed_experts: bool = False,
        memory: ServerMemory | None = None,
        lora: LoraConfig | None = None,
    ):
        """Start; ``wait`` returns when it is ready.

        model: Hugging Face directory. key_file: with the API key that requests must carry. number: index of the server,
        which decides its GPUs. weight_version: what the server reports until its first weight update. max_tokens: of
        keys and values, on a CPU. routed_experts: record the experts of tokens. memory: that it may take of its GPUs;
        None leaves that to SGLang. lora: of the adapters that will be loaded; None: the server loads none.
        """
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        self._headers = authorization(read_api_key(key_file))
        cuda = device.capabilities().cuda
        command = [
            settings.python or sys.executable, str(_WITH_API_KEY), str(key_file), "sglang.launch_server",
            "--model-path", str(model), "--host", _HOST, "--port", str(port),
            "--dtype", dtype, "--weight-version", weight_version,
            "--context-length", str(max_positions + SERVER_SPARE_POSITIONS),
            "--tensor-parallel-size", str(settings.tensor_parallel_size),
        ]  # fmt: skip
        environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
        if cuda:
            command += ["--base-gpu-id", str(settings.base_gpu_id + number * settings.tensor_parallel_size)]
            command += ["--enable-memory-saver"] if settings.enable_memory_saver else []
            if memory is not None:
                free = device.free_memory() if memory.beside else device.total_memory()
                command += [OPTION, str(memory.fraction(free))]
        else:
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule"]
            command.append("--sleep-on-idle")  # or it would take the cores from the trainer
            command += ["--max-total-tokens", str(max_tokens)]
        if settings.enable_deterministic_inference:
            command.append("--enable-deterministic-inference")
        if routed_experts:
            command.append("--enable-return-routed-experts")
        if lora is not None:
            command += server_arguments([lora])
            command += [] if cuda else ["--lora-backend", "torch_native"]
        command += settings.extra_args
        super().__init__(command, log, environment, None if cuda else _FOLDER / "cpu_stub")

    def is_ready(self) -> bool:
        """Return whether the server generates."""
        return is_healthy(self.url, self._headers)

    def wait(self, deadline: float) -> None:
        """See ``_Process.wait``."""
        super().wait(deadline)
        # On a CPU SGLang collects garbage whenever its caches are emptied, which is at every weight update: that takes
        # half a second for all that it has imported, unless those objects are frozen.
        try:
            options = {"headers": self._headers, "timeout": _HEALTH_SECONDS, "trust_env": False}
            httpx.post(f"{self.url}/freeze_gc", **options).raise_for_status()
        except httpx.HTTPError as error:
            print(f"{self.url}/freeze_gc: {error}; weight updates of this server may take longer", flush=True)


class SglangRouter(_Process):
    """sglang-router in front of servers; it sends requests to those of the last ``serve`` only."""

    name = "sglang-router"

    def __init__(self, settings: SglangConfig, request_timeout_seconds: float, log: Path, key_file: Path | None):
        """Start without servers; ``wait`` returns when it is ready. The client's timeout comes before the router's.

        key_file: with the API key of the servers, which requests to the router must carry, too.
        """
        port = _free_port()
        self._api_key = read_api_key(key_file) if key_file else ""
        self._headers = authorization(self._api_key)
        run = ["-m"] if key_file is None else [str(_WITH_API_KEY), str(key_file)]
        self.url = f"http://{_HOST}:{port}"
        # The client retries and watches health, because it checks every reply.
        command = [
            settings.python or sys.executable, *run, "sglang_router.launch_router",
            "--host", _HOST, "--port", str(port),
            "--prometheus-host", _HOST, "--prometheus-port", str(_free_port()),
            "--policy", "cache_aware", "--request-timeout-secs", str(int(request_timeout_seconds) + 60),
            "--disable-retries", "--disable-circuit-breaker", "--disable-health-check", "--log-level", "warn",
        ]  # fmt: skip
        super().__init__(command, log, {})

    def is_ready(self) -> bool:
        """Return whether the router accepts servers."""
        try:
            options = {"headers": self._headers, "timeout": 5.0, "trust_env": False}
            return httpx.get(f"{self.url}/workers", **options).status_code == 200
        except httpx.HTTPError:
            return False

    def serve(self, urls: Sequence[str]) -> str:
        """Send requests to the servers at ``urls`` only; returns the problem if that fails."""
        deadline, requested = time.monotonic() + _ROUTER_SECONDS, set()
        try:
            options = {"headers": self._headers, "timeout": 30.0, "trust_env": False}
            with httpx.Client(base_url=self.url, **options) as client:
                while True:
                    workers = {worker["url"]: worker["id"] for worker in client.get("/workers").json()["workers"]}
                    if workers.keys() == set(urls):
                        return ""
                    if time.monotonic() > deadline:
                        return f"the router serves {sorted(workers)} instead of {sorted(urls)}"
                    # The router does both asynchronously; each is requested once.
                    for url in set(urls) - workers.keys() - requested:
                        client.post(
                            "/workers", json={"url": url} | ({"api_key": self._api_key} if self._api_key else {})
                        )
                    for url in workers.keys() - set(urls) - requested:
                        client.delete(f"/workers/{workers[url]}")
                    requested |= workers.keys() ^ set(urls)
                    time.sleep(0.1)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"the router does not answer as expected ({type(error).__name__})"


def is_healthy(url: str, headers: Mapping[str, str], *, checks: int = 1) -> bool:
    """Return whether the server at ``url`` is started and generates; a check is one token.

    headers: of the request. checks: attempts for a server that accepts connections and does not answer well, because it
    hangs or because it (or its machine) is overloaded; starting another one would make the latter worse.
    """
    for _ in range(checks):
        try:
            options = {"headers": dict(headers), "timeout": _HEALTH_SECONDS, "trust_env": False}
            if httpx.get(f"{url}/health_generate", **options).status_code == 200:
                return True
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:
            pass
    return False


def _free_port() -> int:
    """Return an unused port.

    A server listens minutes after this. Ports of outgoing connections (32768 and up) may be taken by then, so it is
    below those.
    """
    for port in random.SystemRandom().sample(range(15_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise UserError("no free port between 15000 and 32000 on this machine")


def _last_error(log: Path) -> str:
    """Return the last line of the log that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]
