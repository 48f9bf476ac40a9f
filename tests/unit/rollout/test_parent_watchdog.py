"""A server ends with its watchdog, however the watchdog ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatron_s2d.rollout.sglang

WATCHDOG = Path(megatron_s2d.rollout.sglang.__file__).with_name("parent_watchdog.py")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, "close"])
def test_the_command_ends_with_the_watchdog(tmp_path, end):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    watchdog = subprocess.Popen([sys.executable, WATCHDOG, sys.executable, "-c", code], stdin=subprocess.PIPE)
    while not (pid_file.exists() and pid_file.read_text()):
        assert watchdog.poll() is None
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    if end == "close":
        watchdog.stdin.close()
    else:
        os.kill(watchdog.pid, end)
    watchdog.wait()
    deadline = time.monotonic() + 300
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        assert not is_running(pid)
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
