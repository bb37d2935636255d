"""Asks pip what each recommended stack resolves to on a bare aarch64 host: python tests/resolve_stacks.py.

Writes results/install_resolution.json, from which README's install lines say for which Python they resolve. It needs the
network and pip 25.1 or later, no NPU, and installs nothing. PyPI's torch stands for the CPU index's, which for 2.9.0
and 2.10.0 on aarch64 is the same CPU build; x86_64 is not asked: torch_npu 2.9.0 wants torch 2.9.0+cpu there.

Exit codes: 0 each stack resolves; 1 one does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))

from stacks import STACKS, Stack, install_line, installed, stack_requirements

RESOLUTION = ROOT / "results" / "install_resolution.json"

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
        outcome = {"cann": stack.cann, "python": python, "resolves": done.returncode == 0}
        if done.returncode != 0:
            return outcome | {"error": done.stderr.strip().rpartition("\n")[2]}
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return outcome | {"versions": {item["name"].lower().replace("_", "-"): item["version"] for item in found}}


def main() -> int:
    outcomes = []
    for stack in STACKS:
        for python in stack.python:
            outcomes.append(resolve(stack, python))
            print(stack.cann, python, outcomes[-1].get("error") or f"{len(outcomes[-1]['versions'])} packages", flush=True)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    made = {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pip": installed("pip"),
        "requirements": [line for line in lines if not line.startswith("#")],
        "stacks": [stack._asdict() | {"install": install_line(stack)} for stack in STACKS],
        "resolved": outcomes,
    }
    RESOLUTION.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0 if all(outcome["resolves"] for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
