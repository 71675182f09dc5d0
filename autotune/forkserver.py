"""The process that forks workers, and what a worker does. :mod:`.workers` is the other end.

Importing PyTorch and Triton takes seconds; here it is done once, and a worker is a fork of this
process, ready in milliseconds. Nothing but imports happens before: no CUDA context and no second
thread, which would not survive a fork. This process also sees to it that nothing is left over: when
its parent is gone it kills every worker with the worker's whole process group, and a worker is
killed by the kernel when this process dies.

A worker holds one object, its *host*, and calls its methods: requests and replies are pickles, each
behind its length, on a private socket. Its standard output and error are a file that the parent
keeps for the reason of a failure, so stray prints disturb nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import os
import pickle
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from tritonconv.runtime.errors import bad_value

_LENGTH = struct.Struct("!Q")
_COMMAND_BYTES = 4096
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

PRELOADED = ("tritonconv.autotune.measure", "tritonconv.autotune.compiling")


class Channel:
    """Messages over a connected stream socket, each behind its length."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self.connection.fileno()

    def send(self, message: bytes, timeout: float | None = None) -> None:
        """Send one message.

        Raises:
            OSError: nobody is at the other end.
            TimeoutError: the other end does not read.
        """
        self.connection.settimeout(timeout)
        self.connection.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, deadline: float | None = None) -> bytearray:
        """Receive one message.

        Args:
            deadline: on the clock of ``time.monotonic``.

        Raises:
            EOFError: the other end is closed.
            TimeoutError: the message was not complete in time.
        """
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        return self._exactly(size, deadline)

    def close(self) -> None:
        """Close this end."""
        self.connection.close()

    def _exactly(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            try:
                count = self.connection.recv_into(view[done:])
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError("the other end of the channel is closed")
            done += count
        return data


class _Pickler(pickle.Pickler):
    """Refuses what the other process could not import, where a message can still say so."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType)) and obj.__module__ == "__main__":
            raise bad_value(
                "what goes to a worker",
                "classes and functions of importable modules (the main program is not run again "
                "in workers)",
                f"{obj.__qualname__} of __main__",
            )
        return NotImplemented


def dumps(value: Any) -> bytes:
    """Pickle a message.

    Raises:
        ArgumentValueError: it needs something of ``__main__``.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


@dataclass(frozen=True)
class Bootstrap:
    """What a worker is told first: the parent's surroundings, and the host to make."""

    environment: Mapping[str, str]
    directory: str
    path: tuple[str, ...]
    settings: Mapping[str, Any]
    factory: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Spawn:
    """Fork a worker; its socket, its output and the pipe for its exit status come along."""

    token: int
    nice: int
    fork: bool


@dataclass(frozen=True)
class Kill:
    """Kill a worker and its process group."""

    token: int


@dataclass(frozen=True)
class Value:
    """A method returned."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """A method raised."""

    kind: str
    text: str
    trace: str


@dataclass(frozen=True)
class Note:
    """Sent before the reply, to say how far a method has come."""

    value: Any


_channel: Channel | None = None


def note(value: Any) -> None:
    """Tell the parent how far the running method has come; nothing happens outside a worker."""
    if _channel is not None:
        _channel.send(dumps(Note(value)))


def resolve(path: str) -> Any:
    """The object of an import path ``package.module:name``.

    Raises:
        ArgumentValueError: the path is of another form.
    """
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise bad_value("import path", "package.module:name", repr(path))
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


# The worker.


def run_worker(channel: Channel) -> None:
    """Make the host, then answer requests until the parent closes the channel."""
    global _channel
    _channel = channel
    try:
        host = _make_host(pickle.loads(channel.receive()))
    except EOFError:
        return
    except BaseException as error:
        channel.send(dumps(_raised(error)))
        return
    channel.send(dumps(Value(None)))
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(_answer(host, request))


def _make_host(bootstrap: Bootstrap) -> Any:
    from tritonconv.runtime.settings import settings

    os.environ.clear()
    os.environ.update(bootstrap.environment)
    with contextlib.suppress(OSError):  # removed by now
        os.chdir(bootstrap.directory)
    sys.path[:] = bootstrap.path
    settings.reset()
    for name, value in bootstrap.settings.items():
        setattr(settings, name, value)
    return resolve(bootstrap.factory)(*bootstrap.arguments)


def _answer(host: Any, request: bytearray) -> bytes:
    try:
        method, arguments = pickle.loads(request)
        return dumps(Value(getattr(host, method)(*arguments)))
    except BaseException as error:
        return dumps(_raised(error))


def _raised(error: BaseException) -> Raised:
    trace = "".join(traceback.format_exception(error))
    return Raised(type(error).__name__, str(error), trace[-8000:])


# The fork server.


@dataclass
class _Child:
    token: int
    pid: int
    status: int
    """Descriptor of the pipe to which the exit status goes."""


class ForkServer:
    """Forks and kills workers on command until the parent is gone."""

    def __init__(self, control: socket.socket, parent: int, fork: bool) -> None:
        self.control = control
        self.parent = parent
        self.fork = fork
        self.children: dict[int, _Child] = {}
        wake, self.wakeup = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self.wakeup, False)
        self.wake = wake
        self.ended = False

    def run(self) -> None:
        """Serve; on the way out, kill what is left."""
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        selector = selectors.DefaultSelector()
        selector.register(self.control, selectors.EVENT_READ)
        selector.register(self.wake, selectors.EVENT_READ)
        # The socket closes with the parent, unless a fork of the parent holds it open.
        with contextlib.suppress(OSError, AttributeError):
            selector.register(os.pidfd_open(self.parent), selectors.EVENT_READ, self.parent)
        try:
            while not self.ended and os.getppid() == self.parent:
                for key, _ in selector.select(timeout=5.0):
                    if key.fileobj is self.control:
                        self._command()
                    elif key.fileobj == self.wake:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self.wake, 4096)
                    else:
                        self.ended = True
                self._reap()
        finally:
            self._kill_all()

    def _end(self, *_: Any) -> None:
        self.ended = True

    def _command(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self.control, _COMMAND_BYTES, 3)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        if not data:
            self.ended = True
            return
        command = pickle.loads(data)
        if isinstance(command, Spawn):
            self._spawn(command, descriptors)
        elif isinstance(command, Kill):
            for child in self.children.values():
                if child.token == command.token:
                    _kill_group(child.pid)

    def _spawn(self, command: Spawn, descriptors: list[int]) -> None:
        connection, output, status = descriptors
        pid = os.fork()
        if not pid:
            code = 1
            try:
                self._become_worker(command, connection, output)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        with contextlib.suppress(OSError):  # the child did so already, or is gone
            os.setpgid(pid, pid)
        os.close(connection)
        os.close(output)
        self.children[pid] = _Child(command.token, pid, status)

    def _become_worker(self, command: Spawn, connection: int, output: int) -> None:
        server = os.getppid()
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.control.close()
        for child in self.children.values():
            os.close(child.status)
        os.close(self.wake)
        os.close(self.wakeup)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if command.nice:
            with contextlib.suppress(OSError):
                os.nice(command.nice)
        if command.fork and self.fork and not _cuda_is_out_of_reach():
            run_worker(Channel(socket.socket(fileno=connection)))
        else:
            os.set_inheritable(connection, True)
            os.execv(sys.executable, [sys.executable, "-c", _fresh_worker(connection)])

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = self.children.pop(found.si_pid, None)
            if child is not None:
                # What it started, a compiler for instance; its number is not free before the wait.
                _kill_group(found.si_pid)
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                with contextlib.suppress(OSError):
                    os.write(child.status, struct.pack("!i", status))
                os.close(child.status)

    def _kill_all(self) -> None:
        for pid in self.children:
            _kill_group(pid)
        end = time.monotonic() + 10
        while self.children and time.monotonic() < end:
            self._reap()
            time.sleep(0.01)


def _fresh_worker(connection: int) -> str:
    return (
        f"import socket, sys; sys.path[:] = {sys.path!r}\n"
        "from tritonconv.autotune.forkserver import Channel, run_worker\n"
        f"run_worker(Channel(socket.socket(fileno={connection})))"
    )


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _load_prctl() -> Callable[[int, int], None]:
    try:
        function = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # not Linux
        return lambda option, value: None
    return lambda option, value: function(option, value, 0, 0, 0)


_prctl = _load_prctl()


def _cuda_is_out_of_reach() -> bool:
    """Whether something that was imported has touched CUDA, which a fork then cannot use."""
    torch = sys.modules.get("torch")
    poisoned = None if torch is None else getattr(torch.cuda, "_is_in_bad_fork", None)
    return poisoned is not None and bool(poisoned())


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def main(control: int, parent: int) -> None:
    """Import what workers need, then serve; the entry of the process.

    Args:
        control: descriptor of the socket on which commands come.
        parent: the process that started this one, with which it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of workers are reaped here
    for name in PRELOADED:
        importlib.import_module(name)
    _hash_triton()
    gc.collect()
    gc.freeze()  # or the first collection in a worker would copy every page
    # A thread does not survive a fork, and what it held stays locked: then start afresh instead.
    connection = socket.socket(fileno=control)
    ForkServer(connection, parent, fork=_threads() == 1).run()
    os._exit(0)  # nothing of what is done at exit concerns this process


def _hash_triton() -> None:
    """Have Triton hash itself, which takes a second and is part of every cache key."""
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()


__all__ = ["Bootstrap", "Channel", "Kill", "Note", "Raised", "Spawn", "Value", "dumps", "main"]
