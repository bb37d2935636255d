"""What machine is this, can its NPU be used, do its versions go together, and what is to be installed?

    python eval/env_check.py
    python eval/env_check.py --lock_weights weights/webssl-mae300m-full2b-224

Prints the environment and writes results/env_info.json and logs/env_check.log. A machine whose NPU is BLOCKED keeps a record
of one that works, or that is BLOCKED for the same reason: it writes results/trial/ and logs/trial/, or with --publish results/
and logs/ (env_info_cpu.json and env_check_cpu.log beside an NPU's). User names, host names and what looks like a secret are
left out. --lock_weights loads weights, and records sizes and SHA-256 of their files in locked_models.md.

Exit codes: 0 done, also where no NPU can be used; 2 wrong usage, a package that is missing, unusable weights or a file that
cannot be written; 70 an error nobody foresaw; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]
ENVIRONMENT = dict(os.environ)  # the user's own: what is imported below adds to it
MISSING: str | None = None  # on a bare host this script still says what to install

from stacks import CANN_PACKAGES, find_cann, install_advice, installed, pairing, stack_for, unmet

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as inference.py has it, before torch
try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
    import torch
except (ImportError, OSError) as error:  # a library that torch needs may be missing
    MISSING = str(error)
else:
    import inference
    from inference import Blocked, UsageError

LOCKS = ROOT / "locked_models.md"
LOCK_HEADING = "| model | file | bytes | sha256 |"
TOOL_TIMEOUT_S = 20.0

# What changes numbers or speed without a word, and how.
SILENT_VARIABLES = {
    "ACL_*": "a setting of CANN's runtime and operators",
    "ASCEND_LAUNCH_BLOCKING": "1: each operator is waited for, so that no speed means anything",
    "ASCEND_RT_VISIBLE_DEVICES": "the NPUs that can be seen here; npu:0 is the first of them",
    "CPU_AFFINITY_CONF": "which cores the threads that launch operators are bound to",
    "INF_NAN_MODE_ENABLE": "1, the default of Atlas A2 and A3: an overflow gives Inf; 0 alone is refused there",
    "INF_NAN_MODE_FORCE_DISABLE": "1: an overflow gives the largest number, and NaN becomes 0",
    "OMP_NUM_THREADS": "how many threads compute on the CPU",
    "PYTORCH_NPU_ALLOC_CONF": "how torch_npu reserves memory",
    "TASK_QUEUE_ENABLE": "how operators are launched: 0 waits, 1 is the default, 2 is fastest and refused in graphs",
    "TORCH_NPU_USE_COMPATIBLE_IMPL": "1: torch_npu 26.0 and later compute gelu and others as torch does on a GPU",
}
SHOWN_VARIABLES = re.compile(r"ASCEND|CANN|HCCL|NPU_|TORCH_|PYTORCH_NPU|(?:LD_LIBRARY_PATH|PYTHONPATH|HF_ENDPOINT)$", re.I)
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL", re.IGNORECASE)
SECRETS = (
    (r"(?<=://)\S+@", "***@"),
    (r"((?:token|secret|password|passwd|key|credential)\w*=)[^&;,\s]+", r"\1***"),
    (r"\b(?:hf_|gh[a-z]_)[a-z0-9]{16,}|\b(?:github_pat_|glpat-|sk-)[\w-]{16,}", "***"),
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{8,}", "***"),
    (r"\beyJ[\w-]+\.[\w.-]+", "***"),
)
LONG_TOKEN = re.compile(r"\b(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]{40,}\b", re.IGNORECASE)


# --- what must not be published ---


def mask(text: str) -> str:
    """`text` without credentials in URLs, tokens known by their beginning, and the names of home directories."""
    for pattern, replacement in SECRETS:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(r"(?<![\w.~])/(?:home|Users)/[^/\s:]+", "~", text)


def meaning_of(variable: str) -> str | None:
    return SILENT_VARIABLES.get("ACL_*" if variable.startswith("ACL_") else variable)


def shown_variables(environment: Mapping[str, str]) -> list[str]:
    """NAME=value of what rules CANN, torch_npu and the downloads, secrets masked; what decides silently is explained."""
    lines = []
    for name in sorted(environment):
        meaning = meaning_of(name)
        if meaning or SHOWN_VARIABLES.match(name):
            value = LONG_TOKEN.sub("***", mask(" ".join(environment[name].split())))
            value = "***" if SECRET_NAMES.search(name) else value
            lines.append(f"{name}={value} ({meaning})" if meaning else f"{name}={value}")
    return lines


# --- what is there ---


def tool_output(*command: str) -> str:
    """What a program prints, or a line that says that it is absent, failed or hangs."""
    name, called = command[0], " ".join(command)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        output = process.communicate(timeout=TOOL_TIMEOUT_S)[0].rstrip()
    except FileNotFoundError:
        return f"{name}: not found"
    except OSError as error:
        return f"{name}: cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a program that is stuck in its driver cannot be killed
        return f"{called}: no answer within {TOOL_TIMEOUT_S:g} s"
    return output if process.returncode == 0 else f"{called}: failed with exit code {process.returncode}\n{output}".rstrip()


def find_npu() -> dict[str, Any]:
    """Model and number of NPUs, or why none can be used."""
    try:
        device = inference.open_device("npu")
        found = {"npu_model": device.name, "npu_count": torch.npu.device_count()}
        return found | {"npu_status": "available", "npu_blocked_reason": None, "what_to_do": None}
    except Exception as error:  # noqa: BLE001 (whatever is wrong with a machine is what this script is there to tell)
        blocked = error if isinstance(error, Blocked) else inference.explain_npu(error, "the NPU cannot be used")
        found = {"npu_model": None, "npu_count": None, "npu_status": "blocked", "npu_blocked_reason": str(blocked)}
        return found | {"what_to_do": blocked.remedy}


IMPORTS = """
import logging, sys
sys.path.insert(0, sys.argv[1])
import inference
inference.log.addHandler(logging.StreamHandler(sys.stdout))
try:
    inference.import_transformers("cpu")
except inference.UsageError as error:
    print(error)
"""


def imports_fit() -> list[str]:
    """What the bundle says when it imports what it needs, in a process of its own: packages that are broken or not needed."""
    command = [sys.executable, "-c", IMPORTS, str(ROOT)]
    try:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, errors="replace", timeout=300)
    except subprocess.TimeoutExpired:
        return ["importing transformers takes over five minutes"]
    crashed = [done.stderr.strip().rpartition("\n")[2]] if done.returncode else []
    return [*done.stdout.splitlines(), *crashed]


def collect() -> dict[str, Any]:
    """What results/env_info.json holds: the published keys first."""
    npu, cann, found = find_npu(), find_cann(os.environ), inference.versions()
    together = pairing(torch.__version__, found["torch_npu"], cann.number)[1] if found["torch_npu"] else None
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    what_to_do = npu.pop("what_to_do")
    advice = [
        *filter(None, [what_to_do if found["torch_npu"] else None, cann.note]),
        *imports_fit(),
        *variables_fit(ENVIRONMENT),
    ]
    advice += unmet(requirements, "requirements.txt")
    if cann.reported:
        stack = stack_for(cann.number)
        needed = [*CANN_PACKAGES, *([stack.numpy] if stack else [])]
        advice += unmet(needed, "CANN's compiler may not start without it: error code 500001")
    info = {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python_version": platform.python_version(),
        "architecture": platform.machine(),
        "npu_model": npu.pop("npu_model"),
        "npu_count": npu.pop("npu_count"),
        "cann_version": cann.reported,
        "torch_version": torch.__version__,
        "torch_npu_version": found["torch_npu"],
        "transformers_version": found["transformers"],
        "numpy_version": found["numpy"],
        **npu,
        "cpu": inference.cpu_name(),
        "cpu_cores": os.cpu_count(),
        "pairing": together,
        "install": install_advice(torch.__version__, found["torch_npu"], cann, npu["npu_status"] == "available"),
        "time_utc": inference.utc_now(),
        "command": inference.command_line(),
        **inference.git_state(),
    }
    info = {key: mask(value) if isinstance(value, str) else value for key, value in info.items()}
    silent = {name: mask(value) for name, value in sorted(ENVIRONMENT.items()) if meaning_of(name)}
    return info | {"advice": list(map(mask, advice)), "silent_variables": silent}


def variables_fit(environment: Mapping[str, str]) -> list[str]:
    """What to change in the environment variables that decide silently."""
    advice, visible = [], environment.get("ASCEND_RT_VISIBLE_DEVICES", "")
    if environment.get("INF_NAN_MODE_FORCE_DISABLE") == "1":
        advice.append(
            "INF_NAN_MODE_FORCE_DISABLE=1: an overflow saturates instead of giving Inf, so a check for finite numbers passes "
            "on garbage, and inference.py refuses float16: unset it"
        )
    numbers = [int(number) for number in re.findall(r"\d+", visible)]
    if visible and (numbers != sorted(set(numbers)) or not re.fullmatch(r"\d+( *, *\d+)*", visible.strip())):
        advice.append(f"ASCEND_RT_VISIBLE_DEVICES={visible}: it must be ascending numbers with commas between, such as 0,1")
    return advice


# --- the log ---


def sections(info: dict[str, Any], locked: Sequence[str]) -> str:
    """The log: the published sections, then whether it all goes together. `locked` are its last lines."""
    uname = platform.uname()
    versions = {name: info[f"{name}_version"] or "not installed" for name in ("torch", "torch_npu", "transformers")}
    git = "no git, or no git repository"
    if info["git_commit"]:
        branch = inference.git("branch", "--show-current") or "none (a commit is checked out)"
        changed = "yes" if info["git_dirty"] else "no"
        git = f"Branch: {branch}\nCommit: {info['git_commit']}\nUncommitted changes in Python files: {changed}"
    parts = {
        "System Info": f"{uname.system} {uname.release} {uname.version} {uname.machine}",
        "Python": f"Python {info['python_version']}\npip {installed('pip') or 'not installed'}",
        "NPU Info": tool_output("npu-smi", "info"),
        "CANN Version": info["cann_version"] or "not found",
        "PyTorch": versions["torch"],
        "torch_npu": versions["torch_npu"],
        "transformers": versions["transformers"],
        "Git Info": git,
        "Ascend environment variables": "\n".join(shown_variables(ENVIRONMENT)) or "none",
        "What goes together": "\n".join([*verdict(info), *locked]),
    }
    date = f"{info['time_utc'][:19].replace('T', ' ')} UTC"
    text = f"# Environment Check Log\n# Repository: webssl-mae300m-npu\n# Model: {inference.MODEL_NAME}\n# Date: {date}\n"
    text += "".join(f"## {name}\n{body}\n" for name, body in parts.items())
    return mask(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def verdict(info: dict[str, Any]) -> list[str]:
    """Whether the NPU can be used, what else computes, what to change and what to install."""
    works = info["npu_status"] == "available"
    state = f"available, {info['npu_count']} x {info['npu_model']}" if works else f"BLOCKED: {info['npu_blocked_reason']}"
    return [
        f"NPU: {state}",
        f"CPU: {info['cpu']}, {info['cpu_cores']} cores",
        f"Versions: {info['pairing'] or 'no torch_npu'}",
        *(["Look at", *(f"- {line}" for line in info["advice"])] if info["advice"] else ["Nothing to change"]),
        f"Install: {info['install']}",
    ]


def destination(args: argparse.Namespace, info: dict[str, Any]) -> tuple[Path, Path]:
    """Where JSON and log go: a BLOCKED machine replaces neither the record of an NPU nor one of its like."""
    folder = Path(args.results_dir or ROOT / "results")
    record, blocked = inference.read_record(folder / "env_info.json"), info["npu_status"] == "blocked"
    if inference.STAND_IN in str(info["npu_model"]):
        return ROOT / "results/trial/env_info.json", Path(args.output_log or ROOT / "logs/trial/env_check.log")
    works = blocked and record.get("npu_status") == "available"
    same = blocked and "npu_blocked_reason" in record and _gist(record) == _gist(info)
    below, suffix = ("trial" if (works or same) and not args.publish else ""), ("_cpu" if works else "")
    path = (folder if args.results_dir else folder / below) / f"env_info{suffix}.json"
    return path, Path(args.output_log or ROOT / "logs" / below / f"env_check{suffix}.log")


def _gist(info: dict[str, Any]) -> str:
    """The reason of a BLOCKED machine without what differs from one to the next: its versions, and the advice."""
    return re.sub(r"\d[\w.+]*", "", str(info["npu_blocked_reason"]).split(". ")[0])


# --- the lock ---


def lock_weights(given: str) -> list[str]:
    """Record the files of the weights at `given` in locked_models.md. Returns a line for each file."""
    path = Path(given).expanduser()
    path = path if path.exists() else ROOT / given
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"--lock_weights {given}: no weights there; name a folder with *.safetensors")
    # Loaded first: what the loader refuses, such as a truncated file, must not become the record.
    inference.log.setLevel("ERROR")  # what differs from the record is an error here, told below
    model = inference.load_model(inference.open_device("cpu"), str(path), allow_unlocked=True)
    if model.name not in {card.hub_id for card in inference.CARDS}:
        raise UsageError(f"--lock_weights {given}: this is {model.name}, no Web-SSL MAE encoder; nothing was recorded")
    if model.weights.note:
        raise UsageError(f"--lock_weights {given}: the checkpoint {model.weights.note}; nothing was recorded")
    found = {name: ((path / name).stat().st_size, digest.result()) for name, digest in model.weights.files.items()}
    updated = update_locks(LOCKS.read_text(encoding="utf-8"), model.name, found)
    with inference.replacing(LOCKS) as file:
        file.write(updated.encode("utf-8"))
    return [f"Locked: {model.name}, {name}, {size} bytes, sha256 {digest}" for name, (size, digest) in found.items()]


def update_locks(text: str, model: str, files: Mapping[str, tuple[int, str]]) -> str:
    """The text of locked_models.md with sizes and hashes of a model's `files` in its table; nothing else changes.

    Raises UsageError where another hash is recorded for one of them: a lock is not replaced by the way.
    """
    for name, (size, digest) in files.items():
        table = re.search(rf"^{re.escape(LOCK_HEADING)}(?:\n\|.*)*", text, re.MULTILINE)
        row = re.search(rf"^\| `{re.escape(model)}` \| `{re.escape(name)}` \|.*\| (.*) \|$", table[0], re.MULTILINE)
        if row and row[1] not in ("not recorded", f"`{digest}`"):
            raise UsageError(
                f"{name}: locked_models.md records another sha256 for {model} ({row[1][1:13]}...), nothing was recorded. "
                "To lock these weights in its place, set its row to 'not recorded' first"
            )
        new = f"| `{model}` | `{name}` | {size} | `{digest}` |"
        changed = table[0].replace(row[0], new) if row else f"{table[0]}\n{new}"
        text = text.replace(table[0], changed)
    return text


# --- command line ---


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--lock_weights", metavar="PATH", help="record the weights in this folder in locked_models.md")
    parser.add_argument("--output_log", metavar="FILE", help="write the text to FILE (default: logs/env_check.log)")
    parser.add_argument("--results_dir", metavar="DIR", help="folder for env_info.json (default: results/)")
    parser.add_argument("--publish", action="store_true", help="write results/ and logs/ also where the NPU is BLOCKED")
    return parser


def check(args: argparse.Namespace) -> int:
    """Write JSON and log, and print the log. Returns the exit code."""
    locked = lock_weights(args.lock_weights) if args.lock_weights else []
    info = collect()
    path, log_path = destination(args, info)
    text = sections(info, locked)
    try:
        inference.write_json(path, info)
        with inference.replacing(log_path) as file:
            file.write(text.encode("utf-8"))
    except UsageError as error:
        raise UsageError(f"{error}; name another place with --results_dir and --output_log") from error
    sys.stdout.reconfigure(errors="backslashreplace")
    print(text, end="")
    print(f"Saved to {inference.relative_to_root(path)} and {inference.relative_to_root(log_path)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    if MISSING:
        advice = install_advice(installed("torch"), installed("torch_npu"), find_cann(ENVIRONMENT))
        print(f"error: {MISSING}. To install: {advice}", file=sys.stderr)
        return 2
    args = make_parser().parse_args(argv)
    return inference.guarded("env_check", lambda: check(args), "stopped; run it again")


if __name__ == "__main__":
    sys.exit(main()) if MISSING else inference.leave(main())
