"""Which CANN, torch_npu, torch and numpy go together, and what to type to install them. Needs nothing but Python.

    python eval/stacks.py

Asks pip (25.1 or later) what each recommended stack resolves to on aarch64, where nothing is installed, and writes
results/install_resolution.json. It needs the network and no NPU, downloads what gives no metadata, and installs nothing.

Exit codes: 0 each stack resolves; 1 one does not; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = ROOT / "results" / "install_resolution.json"
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
# Ascend/pytorch, COMPATIBILITY; 2.9.0.post1 by the published run. Release notes allow each torch_npu here with each CANN here.
STACKS = [
    Stack("8.5", "2.9.0", "2.9.0", "numpy>=1.26,<2", PYTHONS[:3], ("2.9.0", "2.9.0.post1")),
    Stack("9.0", "2.9.0", "2.9.0.post2", "numpy>=1.26,<3", PYTHONS, ("2.9.0.post2", "2.10.0")),
    Stack("9.1", "2.10.0", "2.10.0.post4", "numpy>=1.26,<3", PYTHONS, ("2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0")),
]
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
        found = _read_cann(home)
        return (
            found if Path(home).is_dir() else found._replace(note=f"CANN was set up as {home}, which is no folder: install it")
        )
    for script in (ASCEND / "cann/set_env.sh", ASCEND / "ascend-toolkit/set_env.sh", *sorted(ASCEND.glob("cann-*/set_env.sh"))):
        if script.is_file():
            latest = script.parent / "latest"
            found = _read_cann(str(latest if latest.is_dir() else script.parent))
            return found._replace(note=f"CANN is installed and not set up: run: source {script}")
    return Cann(None, None)


def _read_cann(home: str) -> Cann:
    for pattern, line in CANN_FILES:
        for path in sorted(Path(home).glob(pattern)):
            with suppress(OSError):
                found = re.search(line, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
                if found and re.match(r"\d+\.\d", found[1]):
                    return Cann(found[1].strip(), found[1].strip())
    numbers = re.findall(r"(?<=[/-])\d+\.\d+[\w.]*", os.path.realpath(home))
    return Cann(home, numbers[-1] if numbers else None)


def unmet(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Of the requirements in `lines`, those that are not met: what is there instead, and the requirement."""
    from packaging.requirements import InvalidRequirement, Requirement

    problems = []
    for line in lines:
        with suppress(InvalidRequirement):  # a comment
            wanted = Requirement(line)
            version = installed(wanted.name)
            if version is None:
                problems.append((f"{wanted.name} is not installed", line))
            elif not wanted.specifier.contains(version, prereleases=True):
                problems.append((f"{wanted.name} is {version}", line))
    return problems


def requirements_fit(lines: Iterable[str]) -> list[str]:
    """What to install so that the packages are within requirements.txt."""
    return [f"{problem}: pip install {shlex.quote(line)} (requirements.txt)" for problem, line in unmet(lines)]


def cann_packages_fit(cann: str | None) -> list[str]:
    """What to install so that CANN's operator compiler can start."""
    stack = stack_for(cann)
    problems = unmet([*([stack.numpy] if stack else []), *CANN_PACKAGES])
    if not problems:
        return []
    told, lines = zip(*problems, strict=True)
    return [f"CANN's compiler may not start (error code 500001): {', '.join(told)}: pip install {shlex.join(lines)}"]


# --- what goes together ---


def _release(version: str) -> tuple[int, ...]:
    """(9, 0) of "9.0.0" or "9.0.RC1"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def pairing(torch_npu: str | None, cann: str | None) -> str | None:
    """What the documents say of torch_npu beside this CANN; None where one of them is not known."""
    if torch_npu is None or cann is None:
        return None
    npu = torch_npu.split("+")[0]
    recommended = next((stack.cann for stack in STACKS if npu in stack.paired), None)
    if recommended is None:
        risk = "; an older CANN may lack its symbols (undefined symbol at import)" if _release(npu) >= (2, 13) else ""
        return f"torch_npu {npu} with CANN {cann} is not paired in the documents read{risk}"
    if _release(recommended) == _release(cann):
        return f"torch_npu {npu} with CANN {cann} is a recommended pair"
    allowed = "allowed" if any(_release(stack.cann) == _release(cann) for stack in STACKS) else "not in the official matrix"
    return f"torch_npu {npu} with CANN {cann} is {allowed}; the recommended pair is CANN {recommended}"


def versions_fit(torch_version: str, torch_npu: str | None, cann: str | None) -> list[str]:
    """What to change so that torch, torch_npu and CANN go together; empty where they do, or where there is no torch_npu."""
    if torch_npu is None:
        return []
    advice, npu = [], torch_npu.split("+")[0]
    parts = 2 if _release(npu) >= (2, 13) else 3
    wanted = npu.split(".")[:parts]
    if torch_version.split("+")[0].split(".")[:parts] != wanted:
        version = ".".join(wanted) + (".*" if parts == 2 else "")
        command = f"pip install {shlex.quote(f'torch=={version}')} --index-url {CPU_INDEX}"
        advice.append(
            f"torch_npu {npu} needs torch {version}, and this is torch {torch_version}: {command}, or install the whole line"
        )
    pair = pairing(npu, cann)
    if pair is None:
        advice.append(f"CANN's version cannot be told: install CANN, then run: {SET_ENV}")
    elif "not paired" in pair or "not in the official" in pair:
        advice.append(pair)
    return advice


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


def stack_rows() -> list[dict[str, str]]:
    """STACKS for a table: the columns as text, and the install line."""
    joined = ("python", "paired")
    return [
        stack._asdict() | {name: ", ".join(getattr(stack, name)) for name in joined} | {"install": install_line(stack)}
        for stack in STACKS
    ]


def install_advice(torch_version: str | None, torch_npu: str | None, cann: Cann, works: bool = False) -> str:
    """What to type on this machine. `works`: its NPU can be used."""
    stack, python = stack_for(cann.number), platform.python_version().rpartition(".")[0]
    if torch_npu and torch_version and (works or not versions_fit(torch_version, torch_npu, cann.number)):
        packages = f"pip install -r requirements.txt{f' {shlex.quote(stack.numpy)}' if stack else ''}"
        return (
            f"keep torch {torch_version} and torch_npu {torch_npu}: {packages}, with this machine's own Python, or with one "
            f"that sees its packages: python -m venv --system-site-packages .venv && .venv/bin/{packages}"
        )
    if cann.reported is None:
        return (
            f"without an NPU: pip install -r requirements.txt; with one: install its driver and CANN, run: {SET_ENV}, then this"
        )
    if stack is None and cann.number:
        return (
            f"CANN {cann.number} is older than torch_npu 2.9 allows: install CANN {' or '.join(stack.cann for stack in STACKS)}"
        )
    lines = [f"recommended pair for CANN {stack.cann}: {install_line(stack)}" for stack in ([stack] if stack else STACKS)]
    if stack and python not in stack.python:
        lines.append(f"this is Python {python}; torch_npu {stack.torch_npu} wants Python {' or '.join(stack.python)}")
    return "\n".join([*lines, "(torch from the CPU index: PyPI's is a CUDA build on x86_64, and on aarch64 from 2.11 on)"])


# --- proof that it resolves ---

# pip takes the target's tags by flags, but evaluates markers such as platform_machine for the machine it runs on.
PIP = """
import sys
import pip._vendor.packaging.markers as markers
from pip._internal.cli.main import main
target = dict(platform_machine="aarch64", platform_system="Linux", sys_platform="linux", os_name="posix")
target |= dict(python_version=sys.argv[1], python_full_version=sys.argv[1] + ".0")
environment = markers.default_environment() | target
markers.default_environment = lambda: environment
sys.exit(main(sys.argv[2:]))
"""
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


def resolve(stack: Stack, python: str) -> dict[str, Any]:
    """What pip would install of a stack's line on a bare aarch64 host: versions by name, or pip's error."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-c", PIP, python, "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--target", folder, "--only-binary=:all:", "--python-version", python]
        command += [word for platform_tag in PLATFORMS for word in ("--platform", platform_tag)]
        command += [f"torch=={stack.torch}", *stack_requirements(stack), "-r", str(ROOT / "requirements.txt")]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        outcome: dict[str, Any] = {"cann": stack.cann, "python": python, "architecture": "aarch64"}
        if done.returncode != 0:
            return outcome | {
                "resolves": False,
                "error": errors[-1] if errors else f"pip ended with exit code {done.returncode}",
            }
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    versions = {item["name"].lower().replace("_", "-"): item["version"] for item in found}
    nvidia = sorted(name for name in versions if name.startswith(("nvidia-", "triton", "cuda-")))
    return outcome | {"resolves": True, "nvidia_packages": nvidia, "versions": dict(sorted(versions.items()))}


def main() -> int:
    if len(sys.argv) > 1:
        print(__doc__ if sys.argv[1:] == ["--help"] else "stacks.py: error: it takes no flags (--help says what it does)")
        return 0 if sys.argv[1:] == ["--help"] else 2
    outcomes = []
    for stack in STACKS:
        for python in stack.python:
            outcomes.append(resolve(stack, python))
            print(stack.cann, python, outcomes[-1].get("error") or f"{len(outcomes[-1]['versions'])} packages", flush=True)
    note = (
        "torch is PyPI's build for aarch64, which for 2.9.0 and 2.10.0 is a CPU build of the same version: the index that the "
        f"install line names ({CPU_INDEX}) was not asked. x86_64 is not resolved: torch_npu 2.9.0 wants torch 2.9.0+cpu there"
    )
    stacks = [stack._asdict() | {"install": install_line(stack)} for stack in STACKS]
    made = {"time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"), "pip": installed("pip"), "note": note}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    made |= {"requirements": [line for line in lines if not line.startswith("#")], "stacks": stacks}
    RESOLUTION.write_text(json.dumps(made | {"resolved": outcomes}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(outcome["resolves"] for outcome in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        sys.exit(130)
