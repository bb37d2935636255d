"""The virtual environments in which the tests run torch_npu: one for each wheel that matters, made once and kept.

    python tests/cann/stacks.py            # make what is missing, say where each is
    python tests/cann/stacks.py 2.9.0      # one of them

They lie in ${XDG_CACHE_HOME:-~/.cache}/webssl-mae300m-npu, or where WEBSSL_STACKS says, with the wheels that were downloaded
for them: a later run finds both, from another clone too. About 1.2 GB are downloaded and 5 GB kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")


@dataclass(frozen=True)
class Stack:
    """What an environment holds beside requirements.txt. `base`: the stack whose packages it shares but for torch_npu."""

    torch: str
    torch_npu: str
    pins: tuple[str, ...] = ()
    base: str | None = None


# PyPI's torch 2.9.0 for x86_64 is a CUDA build: without its dependencies, for which build.py makes stubs.
OLD = ("transformers==4.57.6", "numpy==1.26.4", "pillow==10.4.0")
STACKS = {
    "2.13.0": Stack("2.13.0", "2.13.0", ("transformers>=5,<6",)),
    "2.9.0": Stack("2.9.0", "2.9.0", OLD),
    "2.9.0.post2": Stack("2.9.0", "2.9.0.post2", OLD, base="2.9.0"),
}


class StackError(Exception):
    """An environment cannot be had here; the message is one line that says why."""


def cache() -> Path:
    """Where environments and wheels are kept."""
    chosen = os.environ.get("WEBSSL_STACKS")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen).expanduser() if chosen else home / "webssl-mae300m-npu"


def interpreter(name: str) -> Path:
    """The Python of a stack, which is made where it is missing. Raises StackError."""
    stack = STACKS[name]
    base = interpreter(stack.base).parent.parent if stack.base else None
    folder = _folder(name)
    python = folder / "bin" / "python"
    if _ready(folder):
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _ready(folder):
            shutil.rmtree(folder, ignore_errors=True)  # one that was not finished
            _make(name, stack, folder, base)
            (folder / "ready.json").write_text(json.dumps(asdict(stack)))
    return python


def is_made(name: str) -> bool:
    """Whether interpreter(name) returns at once."""
    return _ready(_folder(name)) and (STACKS[name].base is None or is_made(str(STACKS[name].base)))


def _ready(folder: Path) -> bool:
    return (folder / "ready.json").is_file()


def _folder(name: str) -> Path:
    """Named after all that decides what is in it."""
    what = json.dumps([asdict(STACKS[name]), _requirements(), TORCH_NEEDS, sys.version])
    return cache() / "stacks" / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def _requirements() -> list[str]:
    """The bundle's own and its tests', less torch, whose version is the stack's."""
    files = (ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "torch"))]


def _make(name: str, stack: Stack, folder: Path, base: Path | None) -> None:
    _run(name, sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = Path(_run(name, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    if base:
        (site / "base.pth").write_text(f"{base / site.relative_to(folder)}\n")
    else:
        _install(name, python, "--no-deps", _wheel(name, "torch", stack.torch))
        _install(name, python, *TORCH_NEEDS, "pyyaml", *_requirements(), *stack.pins)
    _install(name, python, "--no-deps", _wheel(name, "torch_npu", stack.torch_npu))


def _wheel(name: str, package: str, version: str) -> Path:
    """A wheel for this Python, downloaded once."""
    folder = cache() / "wheels"
    pattern = f"{package}-{version}[-+]*cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    if not any(folder.glob(pattern)):
        download = ("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, f"{package}=={version}")
        _run(name, sys.executable, "-m", "pip", *download)
    return next(folder.glob(pattern))


def _install(name: str, python: Path, *what: object) -> None:
    _run(name, python, "-m", "pip", "install", "--quiet", *what)


def _run(name: str, *command: object) -> str:
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise StackError(f"stack {name}: {error}") from None
    if done.returncode:
        said = done.stderr.splitlines() or ["no message"]
        errors = [line for line in said if line.startswith("ERROR")]
        raise StackError(f"stack {name}: {' '.join(map(str, command[:4]))} failed: {(errors or said)[-1]}")
    return done.stdout


def main(names: list[str]) -> int:
    """Make what is asked for, or all; one that cannot be had does not keep the others."""
    unknown = [name for name in names if name not in STACKS]
    if unknown:
        print(f"error: there is no stack {unknown[0]}; there are {', '.join(STACKS)}", file=sys.stderr)
        return 2
    failed = False
    for name in names or STACKS:
        try:
            print(f"{name}: {interpreter(name)}")
        except StackError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
