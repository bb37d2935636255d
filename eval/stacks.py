"""Which CANN, torch_npu, torch and numpy go together, and what to type to install them. Needs nothing but Python."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ASCEND = Path("/usr/local/Ascend")
SET_ENV = f"source {ASCEND}/cann/set_env.sh (before CANN 8.5: source {ASCEND}/ascend-toolkit/set_env.sh)"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Stack(NamedTuple):
    """What to install on a bare host for a CANN release. `paired`: every torch_npu that the documents recommend with it."""

    cann: str
    torch: str
    torch_npu: str
    numpy: str
    python: tuple[str, ...]
    paired: tuple[str, ...]


PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PAIRED_WITH_9_1 = (
    *("2.9.0.post6", "2.9.0.post8", "2.10.0.post4", "2.10.0.post6"),
    *("2.11.0", "2.11.0.post2", "2.12.0", "2.12.0.post2"),
)
# Ascend/pytorch, COMPATIBILITY to TorchNPU 26.1.1; 2.9.0.post1 by the published run. Of a torch the last one in `paired` is the
# newest. Release notes allow each torch_npu here with each CANN here.
STACKS = [
    Stack("8.5", "2.9.0", "2.9.0", "numpy>=1.26,<2", PYTHONS[:3], ("2.9.0", "2.9.0.post1")),
    Stack("9.0", "2.9.0", "2.9.0.post2", "numpy>=1.26,<3", PYTHONS, ("2.9.0.post2", "2.10.0")),
    Stack("9.1", "2.10.0", "2.10.0.post6", "numpy>=1.26,<3", PYTHONS[:3], PAIRED_WITH_9_1),
]
# torch_npu whose import ends the process, beside PyPI's torch of the same version on x86_64.
ABORTING = "2.14.0"
# What CANN's operator compiler imports, beside numpy (hiascend, CANN 8.5.0, instg_0045).
CANN_PACKAGES = [
    *("decorator>=4.4", "sympy", "cffi", "protobuf==3.20.*", "attrs", "cython", "pyyaml", "pathlib2", "scipy"),
    *("requests", "psutil", "absl-py"),
]
# Files below CANN's home that tell its version, the surest first: version.info's Version may be a component's own number.
CANN_FILES = (
    ("ascend_*_install.info", r"^version=(.+)$"),
    ("*/ascend_*_install.info", r"^version=(.+)$"),
    ("version.cfg", r"version=\[[^:\]]*:([^\]]+)\]"),
    ("version.info", r"^version_dir=(?:cann-)?(.+)$"),
    ("version.info", r"^Version=(.+)$"),
)


# --- what is there ---


def installed(name: str) -> str | None:
    """Version of a package."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


class Cann(NamedTuple):
    """`reported`: CANN's version, or else its folder; `number`: the version alone; `note`: what to do before it can be used."""

    reported: str | None
    number: str | None
    note: str | None = None


def find_cann(environment: Mapping[str, str]) -> Cann:
    """The CANN that set_env.sh has set up, else one that is installed and was not set up; None for what is not known."""
    home = environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH")
    if home:
        gone = None if Path(home).is_dir() else f"CANN was set up as {home}, which is no folder: install it"
        return Cann(*_version_of(home), gone)
    for script in (ASCEND / "cann/set_env.sh", ASCEND / "ascend-toolkit/set_env.sh", *sorted(ASCEND.glob("cann-*/set_env.sh"))):
        if script.is_file():
            latest = script.parent / "latest"
            home = str(latest if latest.is_dir() else script.parent)
            return Cann(*_version_of(home), f"CANN is installed and not set up: run: source {script}")
    return Cann(None, None)


def _version_of(home: str) -> tuple[str, str | None]:
    for pattern, line in CANN_FILES:
        for path in sorted(Path(home).glob(pattern)):
            with suppress(OSError):
                found = re.search(line, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
                if found and re.match(r"\d+\.\d", found[1]):
                    return found[1].strip(), found[1].strip()
    numbers = re.findall(r"(?<=[/-])\d+\.\d+[\w.]*", os.path.realpath(home))
    return home, numbers[-1] if numbers else None


def unmet(lines: Iterable[str], why: str) -> list[str]:
    """What to install so that the requirements in `lines` are met."""
    from packaging.requirements import InvalidRequirement, Requirement

    advice = []
    for line in lines:
        with suppress(InvalidRequirement):  # a comment
            wanted, version = Requirement(line), installed(Requirement(line).name)
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                has = f"is {version}" if version else "is not installed"
                advice.append(f"{wanted.name} {has}: pip install {shlex.quote(line)} ({why})")
    return advice


# --- what goes together ---


def _release(version: str) -> tuple[int, ...]:
    """(9, 0) of "9.0.0" or "9.0.RC1"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def pairing(torch_version: str, torch_npu: str, cann: str | None) -> tuple[bool, str]:
    """Whether torch, torch_npu and CANN may go together, and what the documents say of it, or what to change."""
    npu = torch_npu.split("+")[0]
    parts = 2 if _release(npu) >= (2, 13) else 3
    wanted = npu.split(".")[:parts]
    if torch_version.split("+")[0].split(".")[:parts] != wanted:
        version = ".".join(wanted) + (".*" if parts == 2 else "")
        command = f"pip install {shlex.quote(f'torch=={version}')} --index-url {CPU_INDEX}, or install the whole line"
        return False, f"torch_npu {npu} needs torch {version}, and this is torch {torch_version}: {command}"
    if npu == ABORTING and platform.machine() == "x86_64":
        return (
            False,
            f"torch_npu {npu} ends the process when it is imported beside PyPI's torch {torch_version}: install another",
        )
    if cann is None:
        return False, f"CANN's version cannot be told: install CANN, then run: {SET_ENV}"
    both = f"torch_npu {npu} with CANN {cann}"
    recommended = next((stack.cann for stack in STACKS if npu in stack.paired), None)
    if recommended is None:
        risk = "; an older CANN may lack its symbols (undefined symbol at import)" if parts == 2 else ""
        return False, f"{both} is not paired in the documents read{risk}"
    if _release(recommended) == _release(cann):
        newest = newest_of(npu)
        return True, f"{both} is a recommended pair" + (f"; the newest for it is {newest}" if newest != npu else "")
    allowed = any(_release(stack.cann) == _release(cann) for stack in STACKS)
    said = "allowed" if allowed else "not in the official matrix"
    return allowed, f"{both} is {said}; the recommended pair is CANN {recommended}"


def newest_of(torch_npu: str) -> str:
    """The newest torch_npu for the same torch and CANN as a recommended one."""
    stack = next(stack for stack in STACKS if torch_npu in stack.paired)
    return [other for other in stack.paired if other.split(".")[:3] == torch_npu.split(".")[:3]][-1]


# --- what to install ---


def stack_for(cann: str | None) -> Stack | None:
    """The newest recommended stack that is not newer than this CANN."""
    fitting = [stack for stack in STACKS if cann and _release(stack.cann) <= _release(cann)]
    return fitting[-1] if fitting else None


def stack_requirements(stack: Stack) -> list[str]:
    """What is installed after torch, beside requirements.txt."""
    return [f"torch_npu=={stack.torch_npu}", stack.numpy, *CANN_PACKAGES]


def install_line(stack: Stack) -> str:
    """The whole line for a bare host, for both architectures."""
    packages = shlex.join(stack_requirements(stack))
    return f"pip install torch=={stack.torch} --index-url {CPU_INDEX} && pip install {packages} -r requirements.txt"


def install_advice(torch_version: str | None, torch_npu: str | None, cann: Cann, works: bool = False) -> str:
    """What to type on this machine. `works`: its NPU can be used."""
    stack, python = stack_for(cann.number), platform.python_version().rpartition(".")[0]
    if torch_npu and torch_version and (works or pairing(torch_version, torch_npu, cann.number)[0]):
        packages = f"pip install -r requirements.txt{f' {shlex.quote(stack.numpy)}' if stack else ''}"
        own = f"python -m venv --system-site-packages .venv && .venv/bin/{packages}"
        keep = f"keep torch {torch_version} and torch_npu {torch_npu}: {packages}"
        return f"{keep}, with this machine's own Python, or with one that sees its packages: {own}"
    if cann.reported is None:
        with_one = f"install its driver and CANN, run: {SET_ENV}, then this"
        return f"without an NPU: pip install -r requirements.txt; with one: {with_one}"
    if stack is None and cann.number:
        newer = " or ".join(stack.cann for stack in STACKS)
        return f"CANN {cann.number} is older than torch_npu 2.9 allows: install CANN {newer}"
    lines = [f"recommended pair for CANN {stack.cann}: {install_line(stack)}" for stack in ([stack] if stack else STACKS)]
    if stack and python not in stack.python:
        lines.append(f"this is Python {python}; torch_npu {stack.torch_npu} wants Python {' or '.join(stack.python)}")
    return "\n".join([*lines, "(torch from the CPU index: PyPI's is a CUDA build on x86_64, and on aarch64 from 2.11 on)"])
