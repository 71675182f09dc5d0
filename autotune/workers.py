"""Child processes that hold an object and call its methods, with deadlines.

A :class:`Worker` is a process of its own: what it runs may hang, crash or break the GPU context,
and the worker is killed with everything it started, while nothing happens to this process. Workers
are forked from a server process that has PyTorch and Triton imported already (:mod:`.forkserver`);
the main program is not run again in them, so that scripts, notebooks and ``python -c`` may use them
without a guard. Ctrl-C reaches this process only, and none of the workers outlives it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
import pickle
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.settings import TABLE, settings

from .forkserver import Bootstrap, Channel, Kill, Note, Raised, Spawn, Value, dumps

START_SECONDS = 120.0
_KILL_SECONDS = 30.0
_OUTPUT_BYTES = 1 << 20  # of a worker's stray prints, then the oldest are dropped
_TAIL_BYTES = 4000


class WorkerError(TritonConvError):
    """A call to a worker did not return a value."""


class WorkerTimeoutError(WorkerError):
    """A worker did not answer in time and was killed."""


class WorkerDiedError(WorkerError):
    """A worker ended in the middle of a call; ``tail`` is the end of its output."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


class RemoteError(WorkerError):
    """The method raised; the worker lives on.

    Attributes:
        kind: name of the exception's class.
        text: its message.
        trace: the traceback, as text.
    """

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text
        self.trace = trace


class _Server:
    """The fork server of this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.tokens = itertools.count(1)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the server
        self.last_words = ""
        environment = worker_environment()
        environment["OPENBLAS_NUM_THREADS"] = "1"  # its threads would forbid to fork
        # The path goes through the standard input: the package must be found before it is imported.
        program = (
            "import pickle, sys\n"
            "sys.path[:], control, parent = pickle.load(sys.stdin.buffer)\n"
            "from tritonconv.autotune.forkserver import main\n"
            "main(control, parent)"
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal goes to the terminal's session
            )
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
                pickle.dump((sys.path, theirs.fileno(), self.owner), stdin)

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, command: Spawn | Kill, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self.control, [pickle.dumps(command)], list(descriptors))

    def tail(self) -> str:
        return self.last_words or _tail(self.output.fileno())

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(timeout=_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.last_words = self.tail() or "the server of this process's workers was shut down"
        self.output.close()


_server: _Server | None = None
_lock = threading.Lock()


def start() -> None:
    """Start the fork server, if it is not running, and return at once.

    It takes seconds to be ready; whoever will need workers later saves that time by calling this
    early.
    """
    _running_server()


def _running_server() -> _Server:
    global _server
    with _lock:
        if _server is not None and not _server.alive():
            _server.close()
            _server = None
        if _server is None:
            _server = _Server()
        return _server


@atexit.register
def shutdown() -> None:
    """Kill all workers of this process and their server; a new worker starts a new server."""
    global _server
    with _lock:
        if _server is not None:
            _server.close()
            _server = None


def _forget() -> None:
    """In a fork of this process: the workers are not its own."""
    global _server, _lock
    _lock = threading.Lock()
    if _server is not None:
        _server.control.close()  # or the server would not see its parent's end
        _server.process.returncode = 0  # not a child of the fork: nothing to wait for
        _server = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def worker_environment() -> dict[str, str]:
    """This process's environment as workers get it: kernels are compiled there, not interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _worker_settings() -> dict[str, Any]:
    values = {row.name: getattr(settings, row.name) for row in TABLE}
    if values["autotune"] == "tune":
        values["autotune"] = "lookup"  # a worker measures what it is told to, and nothing else
    values["report_misses"] = False
    return values


class Worker:
    """A process with an object in it.

    The process starts in the background; the first call waits for it. All calls come from one
    thread at a time.

    Example:
        >>> from tritonconv.autotune.workers import Worker
        >>> with Worker("fractions:Fraction", (3, 4)) as worker:
        ...     worker.call("limit_denominator", 2, timeout=60)
        Fraction(1, 1)
    """

    def __init__(
        self,
        factory: str,
        arguments: tuple[Any, ...] = (),
        *,
        environment: Mapping[str, str] | None = None,
        nice: int = 0,
        fork: bool = True,
    ) -> None:
        """Start a worker.

        Args:
            factory: import path ``package.module:name`` of what makes the object in the worker.
            arguments: passed to it; pickled.
            environment: variables that differ from this process's.
            nice: how much lower than this process's its priority is.
            fork: fork from the server; False starts a fresh interpreter, which takes seconds.
        """
        self.factory = factory
        self._owner = os.getpid()
        bootstrap = Bootstrap(
            {**worker_environment(), **(environment or {})},
            os.getcwd(),
            tuple(sys.path),
            _worker_settings(),
            factory,
            arguments,
        )
        message = dumps(bootstrap)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        _append_only(self._output.fileno())
        self._server = _running_server()
        self._token = next(self._server.tokens)
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._status, status = os.pipe()
        self._exit: str | None = None
        try:
            self._server.send(
                Spawn(self._token, nice, fork),
                (theirs.fileno(), self._output.fileno(), status),
            )
        except OSError:
            pass  # the server is gone, which the first call finds out and explains
        finally:
            theirs.close()
            os.close(status)
        self._finalizer = weakref.finalize(
            self, _release, self._server, self._token, self._channel, self._status, self._output
        )
        self._starting = self.busy = True
        with contextlib.suppress(OSError):
            self._channel.send(message, START_SECONDS)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor that is readable when there is an answer, or the worker has ended."""
        return self._channel.fileno()

    @property
    def alive(self) -> bool:
        """Whether the worker can be called; False once it has ended for whatever reason."""
        return self._exit is None and not self._ended(0.0)

    def call(
        self,
        method: str,
        *arguments: Any,
        timeout: float,
        heed: Callable[[Any], float] | None = None,
    ) -> Any:
        """Call a method of the object and return its value.

        Args:
            method: its name.
            arguments: pickled.
            timeout: seconds; a worker that takes longer is killed.
            heed: given what the method reports with :func:`.forkserver.note`; returns the seconds
                that it has from then on.

        Raises:
            WorkerTimeoutError: the worker was killed at the deadline.
            WorkerDiedError: the worker ended, or its object could not be made.
            RemoteError: the method raised.
            ArgumentValueError: an argument needs something of ``__main__``.
        """
        if self._starting:
            self.receive(START_SECONDS)
        self.send(method, *arguments)
        return self.receive(timeout, heed)

    def send(self, method: str, *arguments: Any) -> None:
        """Send the request of a call; :meth:`receive` gets its answer."""
        assert not self.busy, "one call at a time"
        message = dumps((method, arguments))
        if os.fstat(self._output.fileno()).st_size > _OUTPUT_BYTES:
            os.ftruncate(self._output.fileno(), 0)
        self.busy = True
        with contextlib.suppress(OSError):  # a worker that is gone: receive says why
            self._channel.send(message, _KILL_SECONDS)

    def receive(self, timeout: float, heed: Callable[[Any], float] | None = None) -> Any:
        """The answer to the request that was sent last, or None for a worker that has started."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                reply = pickle.loads(self._channel.receive(deadline))
                if not isinstance(reply, Note):
                    break
                if heed is not None:
                    timeout = heed(reply.value)
                    deadline = time.monotonic() + timeout
        except TimeoutError:
            self.kill()
            raise WorkerTimeoutError(f"no answer within {timeout:g} s") from None
        except EOFError:
            self.kill()
            raise WorkerDiedError(self._obituary(), self.tail()) from None
        except BaseException:  # Ctrl-C: the answer to come would be taken for that of a later call
            self.kill()
            raise
        starting, self.busy, self._starting = self._starting, False, False
        if isinstance(reply, Raised) and starting:
            self.kill()
            message = f"the process cannot start: {reply.kind}: {reply.text}"
            raise WorkerDiedError(message, reply.trace)
        if isinstance(reply, Raised):
            raise RemoteError(reply.kind, reply.text, reply.trace)
        assert isinstance(reply, Value)
        return reply.value

    def kill(self) -> None:
        """Kill the worker and its process group, and wait until it is gone."""
        self.busy = False  # a later call finds it dead
        if self._exit is not None or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):  # the server is gone, and all workers with it
            self._server.send(Kill(self._token))
        if not self._ended(_KILL_SECONDS):
            self._exit = f"cannot be killed within {_KILL_SECONDS:g} s"

    def close(self) -> None:
        """Kill the worker and release its files."""
        self.kill()
        self._finalizer()

    def tail(self) -> str:
        """The end of what the worker, or its server, printed."""
        if self._finalizer.alive:
            return _tail(self._output.fileno())
        return ""

    def _ended(self, seconds: float) -> bool:
        """Whether the worker ends within some seconds; its exit status is read then."""
        if self._exit is not None:
            return True
        if not _readable(self._status, seconds):
            return False
        data = os.read(self._status, 4)
        if len(data) == 4:
            self._exit = _describe(struct.unpack("!i", data)[0])
        else:
            self._exit = "ended together with the server that forked it"
        return True

    def _obituary(self) -> str:
        text, gist = self._exit or "ended", _gist(self.tail())
        if not gist and not self._server.alive():
            gist = _gist(self._server.tail())
        return f"the process {text}" + (f": {gist}" if gist else "")


def _release(server: _Server, token: int, channel: Channel, status: int, output: Any) -> None:
    if server.owner == os.getpid():
        with contextlib.suppress(OSError):
            server.send(Kill(token))
    channel.close()
    os.close(status)
    output.close()


def _readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


def _append_only(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    return data.decode(errors="replace")


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


_TELLING = re.compile(r"error|assert|fatal|abort|fail|exception", re.IGNORECASE)


def _gist(tail: str) -> str:
    """The line that says most: the last one that speaks of an error, else the last one."""
    lines = [" ".join(line.split()) for line in tail.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return (telling or lines or [""])[-1][:200]


__all__ = [
    "RemoteError",
    "Worker",
    "WorkerDiedError",
    "WorkerError",
    "WorkerTimeoutError",
    "shutdown",
    "start",
    "worker_environment",
]
