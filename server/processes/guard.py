"""Runs one command and leaves nothing of it behind: `python -I -S guard.py FD COMMAND…`.

The supervisor starts every child through this. FD is a socket to the supervisor, which gets the
command's pid on it. When that socket closes (the supervisor has died, `kill -9` included, or asks
for a hard end) or when the command ends, whatever the command had started is killed too: vLLM's
engine core outlives a killed API server otherwise. SIGTERM and SIGINT go to the command alone.
Standard library only; a few milliseconds and megabytes.

Orphans are found because this process is their reaper (`PR_SET_CHILD_SUBREAPER`, prctl(2)): a
descendant can leave its process group and session, but not this.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# Loaded before the fork: nothing but the call happens after it.
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _spawn(command: list[str], blocked: set[signal.Signals]) -> int:
    """Start `command` in a process group of its own; it is killed should this guard be killed."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in blocked:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        if os.getppid() == guard:
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot start {command[0]!r}: {error}\n".encode())
    os._exit(127)


def _children() -> list[int]:
    """Processes whose parent is this one, as /proc/PID/stat tells it (proc(5))."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry))
    return found


def _kill_all() -> None:
    """Kill and reap children until none is left: each death hands the next generation over."""
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _reap(command: int) -> int | None:
    """Collect what has ended; the command's exit status (128 + signal) once that is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == command:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    """Guard the command of the arguments; returns its exit status."""
    supervisor = socket.socket(fileno=int(sys.argv[1]))
    supervisor.set_inheritable(False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    handled = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    waker, wake = socket.socketpair()
    waker.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    for number in handled:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    command = _spawn(sys.argv[2:], handled)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    with selectors.DefaultSelector() as selector:
        selector.register(supervisor, selectors.EVENT_READ)
        selector.register(waker, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # a supervisor that is gone already is seen below
            supervisor.sendall(b"%d\n" % command)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if waker in ready:
                for byte in waker.recv(4096):
                    if byte != signal.SIGCHLD:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(command, signal.SIGTERM)
            if (code := _reap(command)) is not None:
                _kill_all()
                return code
            if supervisor in ready:
                _kill_all()
                return 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main())
