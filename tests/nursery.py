"""A nursery of Python processes: tests start many programs, most of which take less time than importing torch.

One process imports the heavy libraries, but nothing of minillm, and forks a child for every program it is asked for.
`Nursery.python` is asked as one asks `python` (`-m MODULE`, `-c CODE`, `FILE` or `-`, and arguments). It hands these
and its folder, environment and standard streams to the nursery (nursery_client.py), then signals, and ends as the child
ends. Where a fork would not be the same it starts a true Python instead: with other options, with further open files,
where a variable differs that a library may have read when it was imported. Elsewhere than on Linux it always does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import marshal
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

HEAVY = (
    "torch", "torch._dynamo", "torch.distributed", "torch.utils.data", "torch.utils.checkpoint", "numpy", "jinja2",
    "jinja2.sandbox", "orjson", "rich.console", "safetensors.torch", "tokenizers", "yaml",
)  # fmt: skip
# Read when a program runs, never when one of these libraries is imported. All others must be as they are here.
READ_LATE = {
    "PATH", "PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES", "NO_COLOR", "PYTHONPATH", "WANDB_MODE", "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR", "CRC32C_SW_MODE",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
VARIABLES = dict(os.environ)  # before the imports, which add to them


class Request(NamedTuple):
    """What makes a process."""

    python: str  # by which it was asked for: children of the child ask here, too
    words: list[str]
    folder: str
    variables: dict[str, str]


class Nursery:
    """The process as its owner sees it. It ends, with all children, when the owner closes it or is no more: then the
    pipe that is its standard input ends."""

    def __init__(self, folder: Path, libraries: Sequence[str] = HEAVY) -> None:
        self.python = folder / "python"
        client, place = Path(__file__).with_name("nursery_client.py"), folder / "socket"
        words = [sys.executable, "-IS", str(client), str(place), sys.executable, str(self.python)]
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        self.python.chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux" or len(os.fsencode(place)) > 107:  # the longest name that a socket can have
            return
        with socket.socket(socket.AF_UNIX) as listener:  # made here, so that the first client need not wait for it
            listener.bind(str(place))
            listener.listen(64)
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), *libraries], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()], start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            )  # fmt: skip

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """What a client asks for, and its standard streams."""
    connection.settimeout(30)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        request = Request(*marshal.loads(file.read(int.from_bytes(size, "big"))))
    connection.settimeout(None)
    return request, streams


def can_serve(request: Request) -> bool:
    first = request.words[0] if request.words else "-i"
    understood = first == "-" or first[:1] != "-" or (first in ("-m", "-c") and len(request.words) > 1)
    names = {*request.variables, *VARIABLES} - READ_LATE
    differing = {name for name in names if request.variables.get(name) != VARIABLES.get(name)}
    return understood and all(name.startswith(("MINILLM_", "PYTEST_")) for name in differing)


def can_fork() -> bool:
    """A child has only the thread that forks, and cannot use CUDA if an import here has done so."""
    return len(os.listdir("/proc/self/task")) == 1 and "libcuda.so" not in Path("/proc/self/maps").read_text()


def answer(client: socket.socket, text: str) -> None:
    """Say the last word."""
    with client, contextlib.suppress(OSError):  # it may be no more
        client.sendall(text.encode())


class Child(NamedTuple):
    pid: int
    descriptor: int  # readable when it has ended
    client: socket.socket  # signals come from here; the end of the client is its end


def serve(listener: socket.socket) -> Request:
    """Fork a child for every request. Only a child comes back from here, with its request."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    children: list[Child] = []
    willing = can_fork()
    while True:
        key, _ = selector.select()[0]  # one at a time: what follows may close the others
        if key.fileobj is listener:
            client, _ = listener.accept()
            try:
                request, streams = receive(client)
            except (OSError, EOFError, ValueError):  # the client was killed
                client.close()
                continue
            pid = os.fork() if willing and can_serve(request) else None
            if pid == 0:
                os.setsid()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for descriptor in [*streams, *(child.descriptor for child in children)]:
                    os.close(descriptor)
                for each in [selector, listener, client, *(child.client for child in children)]:
                    each.close()
                return request
            for stream in streams:
                os.close(stream)
            if pid is None:
                answer(client, "no")
                continue
            child = Child(pid, os.pidfd_open(pid), client)
            children.append(child)
            selector.register(child.descriptor, selectors.EVENT_READ, child)
            selector.register(client, selectors.EVENT_READ, child)
        elif key.data is None:  # the owner closed this, or is no more
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
            os._exit(0)
        else:
            child = key.data
            if key.fileobj is child.client:
                numbers = b""
                with contextlib.suppress(OSError):
                    numbers = child.client.recv(64)
                for number in numbers or [signal.SIGKILL]:
                    os.kill(child.pid, number)
                if numbers:
                    continue
            children.remove(child)
            selector.unregister(child.client)
            selector.unregister(child.descriptor)
            os.close(child.descriptor)
            _, status = os.waitpid(child.pid, 0)
            answer(child.client, str(os.waitstatus_to_exitcode(status)))


def execute(words: list[str]) -> None:
    """What `python WORDS` does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] in ("-c", "-"):
        source, name = (words[1], "<string>") if words[0] == "-c" else (sys.stdin.read(), "<stdin>")
        sys.argv = [words[0], *words[2 if words[0] == "-c" else 1 :]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(source, name, "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def become(request: Request) -> NoReturn:
    """Be the process that was asked for. Its end skips the dismantling of the interpreter, as that of multiprocessing's
    forked processes does: it would copy all memory shared with the nursery."""
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.variables)
    sys.executable = request.python
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[attr-defined]
    here = {"-m": request.folder, "-c": "", "-": ""}.get(request.words[0])
    first = os.path.dirname(os.path.realpath(request.words[0])) if here is None else here
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [first, *map(os.path.abspath, paths)]
    if "torch" in sys.modules:
        sys.modules["torch"].seed()  # importing it chose a seed, for all children the same
    status = 0
    try:
        execute(request.words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    os._exit(status & 0xFF)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of the tests
    for name in sys.argv[2:]:
        import_module(name)
    gc.freeze()  # the collections of a child leave alone, and so do not copy, what it shares
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
