"""Run a few lines of torch_npu over the stand-in for CANN, in a process of their own, and read what they found.

Scenarios are forked from a process that has imported torch and torch_npu (forks.py). What these read from the environment while
they are imported needs `fresh=True`: a process of its own from the start.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import subprocess
import tempfile
import textwrap
import time
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

from cann import build, forks, stacks

# What each scenario begins with: say(name=value) reports, error_of(function) gives the type and first line of what it raises.
HELPERS = """
import json, os, sys, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
def say(**found):
    print("FOUND " + json.dumps(found), flush=True)
def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
"""
PRELUDE = HELPERS + "import torch, torch_npu\n"
# Without torch: the stand-in's own functions through ctypes.
BARE = (
    HELPERS
    + """
import ctypes
cann = ctypes.CDLL("libascendcl.so")
cann.aclGetRecentErrMsg.restype = ctypes.c_char_p
def made(function, *arguments):
    handle = ctypes.c_void_p()
    code = function(ctypes.byref(handle), *arguments)
    return handle if code == 0 else code
"""
)


@dataclass
class Outcome:
    """What a scenario left: its exit code (None: it did not end in time), texts, reports and the stand-in's trace."""

    code: int | None
    out: str
    err: str
    found: dict = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)

    def calls(self, name: str) -> list[str]:
        """Lines of the trace of one function or operator."""
        return [line for line in self.trace if line.split()[0] == name]

    def operators(self, state: str = "eager") -> list[str]:
        """Names of the operators that were launched, captured or replayed, in order, without the "aclnn"."""
        lines = [line.split() for line in self.trace]
        return [fields[0][5:] for fields in lines if fields[0].startswith("aclnn") and fields[2:3] == [state]]


def run(
    stack: str,
    body: str,
    *arguments: object,
    fresh: bool = False,
    seconds: float = 100,
    prelude: str = PRELUDE,
    **variables: str,
) -> Outcome:
    """Run the lines `body` on a stack, with environment variables, over the stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        code = [prelude + textwrap.dedent(body), *map(str, arguments)]
        return python(stack, Path(folder), "-c", *code, fresh=fresh, seconds=seconds, **variables)


def python(stack: str, folder: Path, *argv: str, fresh: bool = False, seconds: float = 100, **variables: str) -> Outcome:
    """What a stack's `python ARGV` leaves, started in `folder`; it is killed after `seconds`."""
    interpreter, needed = libraries(stack)
    names = [folder / f"{name}{uuid.uuid4().hex[:8]}" for name in ("out", "err", "trace")]
    environment = {**os.environ, **needed, "OMP_NUM_THREADS": "1", "STANDIN_TRACE": str(names[2]), **variables}
    with names[0].open("wb") as out, names[1].open("wb") as err:
        if fresh:
            code = _ended([str(interpreter), *argv], folder, environment, out, err, seconds)
        else:
            place = _forks(stack)
            environment["STANDIN_FORKS"] = str(place)
            code = forks.ask(place, list(argv), folder, environment, {1: out.fileno(), 2: err.fileno()}, seconds)
    out, err, trace = (path.read_text(errors="replace") if path.exists() else "" for path in names)
    outcome = Outcome(code, out, err, trace=trace.splitlines())
    for line in out.splitlines():
        if line.startswith("FOUND "):
            outcome.found |= json.loads(line.removeprefix("FOUND "))
    return outcome


def _ended(command: list[str], folder: Path, environment: dict[str, str], out: IO, err: IO, seconds: float) -> int | None:
    try:
        return subprocess.run(command, env=environment, cwd=folder, stdout=out, stderr=err, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


@lru_cache(None)
def _forks(stack: str) -> Path:
    """Where a process serves forks of a stack: one for all workers of a test run, which ends with the last of them."""
    run_of_tests = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex
    place = Path(tempfile.gettempdir()) / f"forks-{run_of_tests[:12]}-{stack}"
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection = forks.connect(place)
        except OSError:
            _start_forks(stack, place)
            connection = forks.connect(place)
    atexit.register(connection.close)
    return place


def _start_forks(stack: str, place: Path) -> None:
    interpreter, needed = libraries(stack)
    environment = {**os.environ, **needed, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        command = [str(interpreter), str(build.HERE / "forks.py"), str(place)]
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while not place.exists():
            if server.poll() is not None:
                said.seek(0)
                raise RuntimeError(f"stack {stack}: {said.read()[-2000:]}")
            time.sleep(0.05)
    atexit.register(server.wait)


@lru_cache(None)
def libraries(stack: str) -> tuple[Path, dict[str, str]]:
    """Interpreter and variables of a stack. Skips the test where it cannot be had; fails it where all must be there."""
    import pytest  # alone of what is here, which check.py uses without

    required = os.environ.get("WEBSSL_REQUIRE_STACKS") == "1"
    try:
        if not required and not stacks.is_made(stack):
            pytest.skip(f"stack {stack} is not there: python tests/cann/stacks.py makes it")
        python = stacks.interpreter(stack)
        return python, build.environment(python)
    except (stacks.StackError, build.StandinError) as error:
        if required:
            pytest.fail(str(error))
        pytest.skip(str(error))
