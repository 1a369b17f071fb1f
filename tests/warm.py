"""Process starts that cost a fork: the tests start hundreds, and importing PyTorch takes seconds.

One process imports what ours import, and then only forks. ``python -m voxelscale...``, ``python -m
torch.distributed.run`` and ``python script.py``, which `subprocess` would start, are forked from it, and so
are the processes that those start in turn. All else is real: pid, parent, session, pipes, environment,
signals, command line, exit code. Everything else is started as ever: ``python -c`` among it, by which tests
look at imports. Tests that must see a real start take the fixture `cold_starts`; the slow tests have no
other (VOXELSCALE_COLD_STARTS in their environment).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

FOR_POOLS = (
    *("voxelscale.store.prepare", "voxelscale.store.inspect", "voxelscale.phantom.dataset"),
    "voxelscale.train.memory",  # and with it PyTorch, for tests of ranks
)
PRELOADED = (
    *("torch._dynamo", "torch.distributed.run", "torch.nn.parallel", "scipy.ndimage", "scipy.optimize"),
    *("monai.losses", "monai.networks.nets", "monai.inferers"),  # examples and benchmarks
    *("SimpleITK", "nibabel", "blosc2"),
    *("optuna", "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql"),
    *("voxelscale.train.loop", "voxelscale.train.launch", "voxelscale.predict.predict", "voxelscale.cli"),
    *("voxelscale.search.process", "voxelscale.scale.measure", "voxelscale.evaluate.evaluate"),
    *FOR_POOLS,
)
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): orphans below become this process's children."""
FDS = 3
WARNINGS = ["-W", "default"]
TITLE = 2048
"""Bytes of command line that a process has to be called by."""
REAL = subprocess._fork_exec  # type: ignore[attr-defined]


def run_words(arguments: Sequence[str]) -> list[str] | None:
    """What python is to run: ``-m MODULE ...`` or ``SCRIPT ...``; None where it is started as ever."""
    words = list(arguments[1:])
    if not words or arguments[0] != sys.executable:
        return None
    words = words[words[0] == "-u" :]
    words = words[2 * (words[:2] == WARNINGS) :]
    module = words[1] if words[:1] == ["-m"] and len(words) > 1 else ""
    ours = module.partition(".")[0] == "voxelscale" or module == "torch.distributed.run"
    return words if ours or words[0].endswith(".py") else None


class Starter:
    """Asks the process at the other end of a socket to fork, in place of `subprocess`'s own start."""

    def __init__(self, end: socket.socket | None = None) -> None:
        self._there, self._lock = end, threading.Lock()

    @property
    def _end(self) -> socket.socket:
        if self._there is None:
            self._there = _begin()
        return self._there

    def fork_exec(self, arguments: Any, executables: Any, close_fds: bool, keep: Any, *rest: Any) -> int:
        """Of the signature of `_posixsubprocess.fork_exec` (Python 3.11 to 3.13)."""
        cwd, env, stdin, _, _, stdout, _, stderr, _, errpipe, _, session, group, *as_whom = rest
        typed = [os.fsdecode(word) for word in arguments]
        words = run_words(typed)
        plain = close_fds and tuple(keep) == (errpipe,) and group == -1
        plain = plain and as_whom[:5] == [None, None, None, -1, None]
        if words is None or not plain:
            return int(REAL(arguments, executables, close_fds, keep, *rest))
        pairs = os.environb.items() if env is None else (word.split(b"=", 1) for word in env)
        request = {
            "arguments": typed,
            "words": words,
            "cwd": os.getcwd() if cwd is None else os.fsdecode(cwd),
            "env": {os.fsdecode(key): os.fsdecode(value) for key, value in pairs},
            "session": bool(session),
            "warnings": typed[1:3] == WARNINGS,
        }
        fds = [own if fd == -1 else fd for own, fd in enumerate((stdin, stdout, stderr))]
        with self._lock, _reaping():
            message = json.dumps(request).encode()
            socket.send_fds(self._end, [len(message).to_bytes(8, "big")], fds)
            self._end.sendall(message)
            return int.from_bytes(_exactly(self._end, 8), "big")


@contextlib.contextmanager
def _reaping() -> Iterator[None]:
    """Within it what the other end leaves as an orphan becomes this process's child."""
    libc = ctypes.CDLL(None)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(SUBREAPER, 0, 0, 0, 0)


def _exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := end.recv(count - len(data))):
            raise EOFError("the process that forks is gone")
        data += more
    return data


def _begin() -> socket.socket:
    """A new process that forks; it ends with this one."""
    ours, theirs = socket.socketpair()
    # Padding: a process can be called by no more than what its first command line took.
    command = [sys.executable, __file__, str(theirs.fileno()), "x" * TITLE]
    nothing = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(theirs.fileno(), True)
    os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nothing, 0)])
    os.close(nothing)
    theirs.close()
    return ours


def install(starter: Starter) -> None:
    """Let `subprocess` start processes by it."""
    subprocess._fork_exec = starter.fork_exec  # type: ignore[attr-defined]
    subprocess._USE_POSIX_SPAWN = False  # type: ignore[misc]


def _serve(end: socket.socket) -> None:
    """Fork what is asked for until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(end, 8, FDS)
        if not head:
            os._exit(0)
        request = json.loads(_exactly(end, int.from_bytes(head, "big")))
        pids = os.pipe()
        middle = os.fork()
        if middle == 0:
            between = os.getpid()
            if pid := os.fork():
                os.write(pids[1], pid.to_bytes(8, "big"))
                os._exit(0)
            while os.getppid() == between:  # ours end with their parent, and look who it is
                time.sleep(0.001)
            _become(request, fds)
        os.waitpid(middle, 0)
        end.sendall(os.read(pids[0], 8))
        for fd in (*fds, *pids):
            os.close(fd)


def _become(request: dict[str, Any], fds: Sequence[int]) -> None:
    """Be the process that was asked for; it does not return."""
    for own, fd in enumerate(fds):
        os.dup2(fd, own)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) >= FDS:
                os.close(int(name))
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # The one of before takes the null device's place in the file for that of a pipe.
    sys.stdout = os.fdopen(1, "w", encoding=os.environ.get("PYTHONIOENCODING"), closefd=False)
    _forks_too()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _call_it(request["arguments"])
    _set_threads()
    if request["warnings"]:
        warnings.resetwarnings()
    os._exit(_run(request["words"]))


def _forks_too() -> None:
    """A process that forks for this one, as it is before it has done anything: threads do not survive."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for own in range(FDS):
            os.dup2(nothing, own)
        _call_it(["forks"])
        _serve(theirs)
    theirs.close()
    install(Starter(ours))


def _call_it(arguments: Sequence[str]) -> None:
    """Overwrite this process's command line (proc_pid_stat(5), fields 48 and 49)."""
    with open("/proc/self/stat", encoding="latin-1") as handle:
        fields = handle.read().rpartition(")")[2].split()
    first, last = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, arguments))[: last - first - 1]
    ctypes.memmove(first, text.ljust(last - first, b"\0"), last - first)


def _set_threads() -> None:
    """What PyTorch reads from the environment when it is loaded."""
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _name_methods_soon() -> None:
    """torchrun's engine asks `inspect.stack`, which looks through all modules: a second at every start."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def _run(words: Sequence[str]) -> int:
    """Run a module or script as python does; its exit code."""
    code: Any = 0
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [place for place in places if place and place not in sys.path]
    try:
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ImportError):
            importlib.import_module("sitecustomize")
        if words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            sys.path[0] = os.getcwd()
            if not hasattr(sys.modules.get(words[1]), "__path__"):
                sys.modules.pop(words[1], None)  # or runpy warns that it is there already
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return int(code)


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    _name_methods_soon()
    gc.freeze()  # or each process's garbage collection would copy all that they share
    _serve(socket.socket(fileno=int(sys.argv[1])))
