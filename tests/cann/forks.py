"""A process that has imported torch, torch_npu and the bundle, uses nothing of them, and forks a child for whoever asks.

To import them takes ten seconds, and a scenario of the tests half of one. serve(path) is that process; ask(path, argv, ...)
runs what `python ARGV` would, in a child with files, environment and folder of its own. What a child starts by sys.executable
comes back here too. What is read from the environment at import needs a real process instead.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HIGH = 100  # descriptors from here on are nobody's
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


# --- who asks ---


def connect(path: str | Path) -> socket.socket:
    """A connection to the process that serves at `path`, which lives as long as somebody has one. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def ask(
    path: str | Path,
    argv: list[str],
    folder: str | Path,
    environment: dict[str, str],
    descriptors: dict[int, int],
    seconds: float | None = None,
) -> int | None:
    """Run python's `argv` in a folder; its exit code, None where it did not end in time and was killed.

    descriptors: which of this process's the child has, by their numbers there.
    """
    request = {"argv": argv, "environment": environment, "folder": str(folder), "numbers": list(descriptors)}
    with connect(path) as connection:
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data], list(descriptors.values()))
        connection.sendall(data[sent:])
        for number in STOPPING if seconds is None else ():  # a program that stands for its child, in a process of its own
            signal.signal(number, lambda number, _frame: connection.sendall(bytes([number])))
        if not select.select([connection], [], [], seconds)[0]:
            return None
        return int(connection.recv(100) or -signal.SIGKILL)


def stand_for_python() -> int:
    """The program PROGRAM below: `python ARGV`, forked."""
    inherited = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself
            if os.get_inheritable(number):
                inherited[number] = number
    code = ask(os.environ["STANDIN_FORKS"], sys.argv[1:], os.getcwd(), dict(os.environ), inherited)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# --- who serves ---


def serve(path: str) -> dict[str, Any]:
    """Answer until nobody is connected any more, then exit. Returns in each child, with what it is to run."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen(64)
        os.rename(path + ".new", path)  # from now on it can be found
        children: dict[int, socket.socket] = {}
        waiting: list[socket.socket] = [server]
        while True:
            ready = select.select([*waiting, *children.values()], [], [], 0.005 if children else None)[0]
            for connection in ready:
                if connection is server:
                    waiting.append(server.accept()[0])
                elif connection in waiting:
                    waiting.remove(connection)
                    request, given = _receive(connection)
                    if request is not None:
                        sys.stdout.flush()
                        pid = os.fork()
                        if not pid:
                            for other in (*waiting, *children.values(), connection):
                                other.close()
                            _become(request, given)
                            return request
                        children[pid] = connection
                    for descriptor in given:
                        os.close(descriptor)
                else:
                    _pass_on(connection, next(pid for pid, other in children.items() if other is connection))
            _reap(children)
            if waiting == [server] and not children:
                for name in (path, f"{path}.python", f"{path}.lock"):
                    Path(name).unlink(missing_ok=True)
                os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    data, given, _flags, _address = socket.recv_fds(connection, 1 << 16, 32)
    while data and not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return (json.loads(data) if data else None), given


def _pass_on(connection: socket.socket, pid: int) -> None:
    """A signal for a child; who asked and is gone takes its child along."""
    with suppress(ProcessLookupError):
        if numbers := connection.recv(1):
            os.kill(pid, numbers[0])
        else:
            os.killpg(pid, signal.SIGKILL)


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as connection, suppress(OSError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: dict[str, Any], given: list[int]) -> None:
    """In the child: files, environment and folder of who asked, and a stand-in that has read this environment."""
    os.setsid()
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH) for descriptor in given]
    for descriptor in given:
        os.close(descriptor)
    for descriptor, number in zip(aside, request["numbers"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    ctypes.CDLL("libascendcl.so").standin_restart()


def run(argv: list[str]) -> None:
    """What `python ARGV` runs: -c CODE, -m MODULE or a script, each with arguments."""
    while argv[0] in ("-u", "-I", "-B"):
        argv = argv[1:]
    how, *rest = argv
    if how == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(how).resolve().parent))
        runpy.run_path(how, run_name="__main__")


def end_with(function: Callable[[], None]) -> NoReturn:
    """Run and exit as an interpreter does, exit handlers included, but for taking every module apart: that takes seconds."""
    code: Any = 0
    try:
        function()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(code, (int, type(None))):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 255)


def import_all() -> None:
    """What scenarios use, all but used: nobody may ask for devices yet, since torch_npu keeps their number."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.path[:0] = [str(ROOT), str(ROOT / "eval")]
    import inference
    import torch
    import torch_npu  # noqa: F401

    asks = torch.npu.device_count, torch.npu.is_available
    torch.npu.device_count, torch.npu.is_available = lambda: 1, lambda: True  # transformers asks
    inference.import_transformers("npu")
    torch.npu.device_count, torch.npu.is_available = asks
    import embed  # noqa: F401


PROGRAM = f"""#!{sys.executable} -ISs
import sys
sys.path.insert(0, {str(HERE)!r})
import forks
sys.exit(forks.stand_for_python())
"""

if __name__ == "__main__":
    program = Path(f"{sys.argv[1]}.python")
    program.write_text(PROGRAM)
    program.chmod(0o755)
    import_all()
    sys.executable = str(program)
    sys.path.remove(str(HERE))
    gc.collect()
    gc.freeze()  # what is here is not looked through in each child, which would copy it
    request = serve(sys.argv[1])
    end_with(lambda: run(request["argv"]))
