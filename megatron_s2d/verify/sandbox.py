"""Confines the calling process before it runs untrusted code: resource limits, Landlock, seccomp.

Works without privileges and cannot be undone by the process itself. Seccomp allows only the system calls of a program
that computes and prints: no new processes, no sockets, no signals to others, no tracing, no file opened for writing,
created, renamed or removed. Landlock leaves only Python's own files readable; kernels before 5.13 lack it, and there a
program can read all files of its user. Not covered: namespaces (they need privileges in many clusters) and wall-clock
limits, which the waiting process enforces.

Not nsjail or bubblewrap: both are binaries that a cluster must install, and both need user namespaces or root, which
containers often deny. Standard library only, because the confined scripts import this file.

Run as a script it prints, as a JSON list, the layers that this machine supports.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2

# ------------------------------------------------------------------------------------------------------- system calls
# name: (number on x86_64, on aarch64); None where an architecture lacks the call
_CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None), "statx": (332, 291),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "dup": (32, 23), "dup3": (292, 24), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "exit": (60, 93), "exit_group": (231, 94),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getrandom": (318, 278), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179),
    "getrlimit": (97, 163), "set_tid_address": (218, 96), "restart_syscall": (219, 128), "membarrier": (324, 283),
    "arch_prctl": (158, None),
}  # fmt: skip
_CLONE, _CLONE3, _OPEN, _OPENAT = (56, 220), (435, 435), (2, None), (257, 56)
_IOCTL, _FCNTL, _PRLIMIT, _TGKILL = (16, 29), (72, 25), (302, 261), (234, 131)
_RECVMSG = (47, 212)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_CLONE_THREAD = 0x10000
# Access mode, O_CREAT, O_TRUNC, O_APPEND and the bit of O_TMPFILE; equal on both architectures.
_OPENS_FOR_WRITING = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000000
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x5451)  # TCGETS, TIOCGWINSZ, FIONBIO, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC: nothing that sends signals

# Instructions of classic BPF, and offsets in struct seccomp_data.
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NR, _ARCH = 0, 4
_KILL, _ALLOW, _EPERM, _ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026


def _argument(index: int, high: bool = False) -> int:
    return 16 + 8 * index + (4 if high else 0)


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _when(number: int | None, body: list[bytes]) -> list[bytes]:
    """Run ``body`` (which returns on every path) for the system call ``number`` only."""
    if number is None:
        return []
    return [_instruction(_LOAD, _NR), _instruction(_EQUAL, number, 0, len(body)), *body]


def _allow_if_no_bit(argument: int, mask: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _argument(argument)),
        _instruction(_ANY_BIT, mask, 0, 1),
        _instruction(_RETURN, _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]


def _allow_if_in(argument: int, values: tuple[int, ...]) -> list[bytes]:
    body = [_instruction(_LOAD, _argument(argument))]
    for index, value in enumerate(values):
        body.append(_instruction(_EQUAL, value, len(values) - index, 0))
    return [*body, _instruction(_RETURN, _EPERM), _instruction(_RETURN, _ALLOW)]


def _filter(column: int, architecture: int, receive_files: bool) -> bytes:
    """Return the BPF program that the kernel runs at every system call."""
    allow, refuse = _instruction(_RETURN, _ALLOW), _instruction(_RETURN, _EPERM)
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NR),
        _instruction(_AT_LEAST, 0x40000000, 0, 1),  # x32 numbers of x86_64 would bypass every test below
        _instruction(_RETURN, _KILL),
    ]
    for numbers in _CALLS.values():
        if numbers[column] is not None:
            program += [_instruction(_EQUAL, numbers[column], 0, 1), allow]
    if receive_files:
        program += _when(_RECVMSG[column], [allow])
    thread = [_instruction(_LOAD, _argument(0)), _instruction(_ANY_BIT, _CLONE_THREAD, 0, 1), allow, refuse]
    program += _when(_CLONE[column], thread)
    # Its flags are in memory, which a filter cannot read; the C library falls back to clone.
    program += _when(_CLONE3[column], [_instruction(_RETURN, _ENOSYS)])
    program += _when(_OPEN[column], _allow_if_no_bit(1, _OPENS_FOR_WRITING))
    program += _when(_OPENAT[column], _allow_if_no_bit(2, _OPENS_FOR_WRITING))
    program += _when(_IOCTL[column], _allow_if_in(1, _IOCTLS))
    program += _when(_FCNTL[column], _allow_if_in(1, _FCNTLS))
    program += _when(_TGKILL[column], _allow_if_in(0, (os.getpid(),)))
    reading_limits = [
        _instruction(_LOAD, _argument(2)), _instruction(_EQUAL, 0, 0, 3),
        _instruction(_LOAD, _argument(2, high=True)), _instruction(_EQUAL, 0, 0, 1),
        allow, refuse,
    ]  # fmt: skip
    program += _when(_PRLIMIT[column], reading_limits)
    return b"".join([*program, refuse])


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _check(result: int, action: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{action}: {os.strerror(error)}")
    return result


def _prctl(option: int, *arguments: object) -> None:
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc().prctl(option, *values), f"prctl {option}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _apply_seccomp(receive_files: bool) -> None:
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"no table of system calls for {platform.machine()}")
    code = _filter(*_ARCHITECTURES[platform.machine()], receive_files)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(code) // 8, code)))


# ----------------------------------------------------------------------------------------------------------- Landlock
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on both architectures
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


def _landlock_version() -> int:
    """Return the Landlock version of the kernel; 0 if it has none or disables it."""
    return max(0, _libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _apply_landlock(readable: Sequence[str]) -> None:
    version = _landlock_version()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", rights, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    libc = _libc()
    ruleset = _check(
        libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)), "landlock"
    )
    for path in readable:
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        rule = struct.pack("=Qi", allowed, descriptor)
        _check(libc.syscall(_LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0)), f"landlock {path}")
        os.close(descriptor)
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "landlock")
    os.close(ruleset)


@functools.cache
def python_files() -> tuple[str, ...]:
    """Return the paths a Python program reads: standard library, packages, shared libraries, time zones."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = [sysconfig.get_path(name) for name in names]
    paths += [sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix}) for name in names]
    library = sysconfig.get_config_var("LIBDIR")
    paths += [library] if library else []
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom"]
    return tuple(sorted(set(paths)))


# -------------------------------------------------------------------------------------------------------- entry points


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def confine(memory_bytes: int, cpu_seconds: int, file_bytes: int, receive_files: bool = False) -> list[str]:
    """Confine this process permanently and return the applied layers of ``limits``, ``landlock``, ``seccomp``.

    ``memory_bytes`` limits the address space, ``cpu_seconds`` the processor time, ``file_bytes`` the size of files that
    are already open; with ``receive_files`` it can receive open files over a socket that it has. The process dies with
    the thread that started it. Raises ``OSError`` if seccomp is missing or a
    layer that the machine supports cannot be applied.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    layers = ["limits"]
    os.chdir("/")
    die_with_parent()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if _landlock_version():
        _apply_landlock(python_files())
        layers.append("landlock")
    _apply_seccomp(receive_files)
    return [*layers, "seccomp"]


if __name__ == "__main__":
    print(json.dumps(confine(1 << 30, 10, 1 << 20)))
