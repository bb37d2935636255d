"""What machine is this, can its NPU be used, and do its versions go together?

    python eval/env_check.py
    python eval/env_check.py --lock_weights weights/webssl-mae300m-full2b-224

Prints the environment, overwrites logs/env_check.log with the same text, and writes results/env_info.json. Where that file
records a machine with an NPU and here there is none, it is kept, and env_info_cpu.json and env_check_cpu.log are written.
User names, host names and what looks like a secret are left out, so that both files can be published. --lock_weights first
loads the weights, and records sizes and SHA-256 of their files in locked_models.md.

Exit codes: 0 done, also where no NPU can be used; 2 wrong usage, unusable weights or a file that cannot be written.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ENVIRONMENT = dict(os.environ)  # the user's own: what is imported below adds to it

try:
    import inference  # first of all: it sets what must precede torch
except ImportError as error:
    print(f"error: {error}. Run: pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None
import torch
from inference import Blocked, UsageError

REPOSITORY = "webssl-mae300m-npu"
LOCKS = inference.ROOT / "locked_models.md"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
TOOL_TIMEOUT_S = 20.0

# The CANN that each torch_npu goes with: Ascend/pytorch's release notes; 2.9.0.post1 by the published run, which ran.
RECORDED_CANN = {
    "2.9.0": "8.5.0",
    "2.9.0.post1": "8.5.1",
    "2.9.0.post2": "9.0.0",
    "2.9.0.post6": "9.1.0",
    "2.10.0.post4": "9.1.0",
    "2.11.0": "9.1.0",
    "2.12.0": "9.1.0",
}

# Files below CANN's home that tell its version, the surest first: version.info's Version may be a component's own number.
CANN_FILES = (
    ("ascend_*_install.info", r"^version=(.+)$"),
    ("*/ascend_*_install.info", r"^version=(.+)$"),
    ("version.cfg", r"version=\[[^:\]]*:([^\]]+)\]"),
    ("version.info", r"^version_dir=(?:cann-)?(.+)$"),
    ("version.info", r"^Version=(.+)$"),
)

SHOWN_VARIABLES = re.compile(
    r"ASCEND|CANN|HCCL|NPU_|TORCH_|TASK_QUEUE|PYTORCH_NPU|(?:LD_LIBRARY_PATH|PYTHONPATH|HF_ENDPOINT)$", re.IGNORECASE
)
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


def shown_variables(environment: Mapping[str, str]) -> list[str]:
    """NAME=value of the variables that rule CANN, torch_npu and the downloads, one line each, secrets masked."""
    lines = []
    for name in sorted(environment):
        if SHOWN_VARIABLES.match(name):
            value = LONG_TOKEN.sub("***", mask(" ".join(environment[name].split())))
            lines.append(f"{name}=***" if SECRET_NAMES.search(name) else f"{name}={value}")
    return lines


# --- what is there ---


def tool_output(*command: str) -> str:
    """What a program prints, or a line that says that it is absent, failed or hangs."""
    name, called = command[0], " ".join(command)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        return f"{name}: not found"
    except OSError as error:
        return f"{name}: cannot be run ({error.strerror})"
    try:
        output = process.communicate(timeout=TOOL_TIMEOUT_S)[0].rstrip()
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)  # not longer: a program that is stuck in its driver cannot be killed
        return f"{called}: no answer within {TOOL_TIMEOUT_S:g} s"
    if process.returncode != 0:
        return "\n".join([f"{called}: failed with exit code {process.returncode}", *output.splitlines()])
    return output


def find_npu() -> dict[str, Any]:
    """Model and number of NPUs, or why none can be used."""
    try:
        device = inference.open_device("npu")
        found = {"npu_model": device.name, "npu_count": torch.npu.device_count()}
        return found | {"npu_status": "available", "npu_blocked_reason": None}
    except Exception as error:  # noqa: BLE001 (whatever is wrong with a machine is what this script is there to tell)
        reason = str(error) if isinstance(error, Blocked) else inference.first_line(error)
        return {"npu_model": None, "npu_count": None, "npu_status": "blocked", "npu_blocked_reason": mask(reason)}


def find_cann(environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """CANN's version as it is reported, a number or else its folder, and the number alone; None for what is not known."""
    home = environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH")
    if not home:
        return None, None
    for pattern, line in CANN_FILES:
        for path in sorted(Path(home).glob(pattern)):
            with suppress(OSError):
                found = re.search(line, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
                if found and re.match(r"\d+\.\d", found[1]):
                    return found[1].strip(), found[1].strip()
    numbers = re.findall(r"(?<=[/-])\d+\.\d+[\w.]*", os.path.realpath(home))
    return home, numbers[-1] if numbers else None


def gpu_name() -> str | None:
    """Name of the first GPU that torch can use."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return None


def cpu_name() -> str:
    name = inference.open_device("cpu").name.rpartition(", ")[0]
    if name == platform.machine():  # Arm's /proc/cpuinfo has no model name
        found = re.search(r"^Model name: *(\S.*)$", tool_output("lscpu"), re.MULTILINE)
        name = found[1] if found else name
    return name


def memory_gb() -> float | None:
    """The machine's memory in GiB."""
    with suppress(AttributeError, OSError, ValueError):
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return None


def collect() -> dict[str, Any]:
    """What results/env_info.json holds: the published keys first."""
    npu, (cann, cann_number), found = find_npu(), find_cann(os.environ), inference.versions()
    requirements = inference.ROOT / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    advice = versions_fit(torch.__version__, found["torch_npu"], cann_number) + requirements_fit(lines)
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python_version": platform.python_version(),
        "architecture": platform.machine(),
        "npu_model": npu.pop("npu_model"),
        "npu_count": npu.pop("npu_count"),
        "cann_version": mask(cann) if cann else None,
        "torch_version": torch.__version__,
        "torch_npu_version": found["torch_npu"],
        "transformers_version": found["transformers"],
        "numpy_version": found["numpy"],
        **npu,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gb": memory_gb(),
        "gpu": gpu_name(),
        "advice": advice,
        "time_utc": inference.utc_now(),
        "command": mask(inference.command_line()),
        **inference.git_state(),
    }


# --- what goes together ---


def versions_fit(torch_version: str, torch_npu_version: str | None, cann: str | None) -> list[str]:
    """What to change so that torch, torch_npu and CANN go together; empty where they do, or where there is no torch_npu."""
    if torch_npu_version is None:
        return []
    npu, ours = torch_npu_version.split("+")[0], torch_version.split("+")[0]
    wanted = ".".join(npu.split(".")[:3])
    advice = []
    if ours.split(".")[:3] != wanted.split("."):
        advice.append(
            f"torch_npu {npu} needs torch {wanted}, and this is torch {torch_version}: install torch {wanted} (on x86_64 its CPU "
            "build), or the torch_npu of torch's version"
        )
    recorded = RECORDED_CANN.get(npu)
    if cann is None:
        which = f"CANN {recorded}, which torch_npu {npu} goes with" if recorded else "CANN"
        advice.append(f"CANN's version cannot be told: install {which}, then run: {SET_ENV}")
    elif cann != recorded:
        advice.append(_cann_advice(npu, recorded, cann))
    return advice


def _cann_advice(npu: str, recorded: str | None, cann: str) -> str:
    fitting = [version for version, known in RECORDED_CANN.items() if known == cann]
    alternative = f"torch_npu recorded with CANN {cann}: {', '.join(fitting)}" if fitting else ""
    if recorded is None or recorded.split(".")[:2] == cann.split(".")[:2]:
        known = "; ".join(filter(None, [f"torch_npu {npu} is recorded with CANN {recorded}" if recorded else "", alternative]))
        return f"torch_npu {npu} with CANN {cann} was not recorded, which does not make it wrong" + (
            f" ({known})" if known else ""
        )
    return f"torch_npu {npu} goes with CANN {recorded}, and this is CANN {cann}: install CANN {recorded}" + (
        f", or a {alternative}" if alternative else ""
    )


def requirements_fit(lines: Sequence[str]) -> list[str]:
    """What to install so that the packages are within requirements.txt; torch_npu is left to versions_fit."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed: pip install -r requirements.txt"]
    advice = []
    for line in lines:
        with suppress(ValueError):
            wanted = Requirement(line)
            if wanted.name == "torch_npu" or (wanted.marker and not wanted.marker.evaluate()):
                continue
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                advice.append(f"{wanted.name} is not installed: pip install -r requirements.txt")
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                advice.append(f"{wanted.name} {version} is not what requirements.txt asks for: pip install '{wanted}'")
    return advice


# --- the log ---


def sections(info: dict[str, Any], notes: Sequence[str]) -> str:
    """The log: the published sections, then whether it all goes together. `notes` are its last lines."""
    uname = platform.uname()
    versions = {name: info[f"{name}_version"] or "not installed" for name in ("torch", "torch_npu", "transformers")}
    parts = {
        "System Info": f"{uname.system} {uname.release} {uname.version} {uname.machine}",
        "Python": f"Python {info['python_version']}\n{_pip_version()}",
        "NPU Info": tool_output("npu-smi", "info"),
        "CANN Version": info["cann_version"] or "not found",
        "PyTorch": versions["torch"],
        "torch_npu": versions["torch_npu"],
        "transformers": versions["transformers"],
        "Git Info": _git_lines(info),
        "Ascend environment variables": "\n".join(shown_variables(ENVIRONMENT)) or "none",
        "What goes together": "\n".join([*verdict(info), *notes]),
    }
    heading = ["# Environment Check Log", f"# Repository: {REPOSITORY}", f"# Model: {inference.MODEL_NAME}"]
    heading.append(f"# Date: {info['time_utc'][:19].replace('T', ' ')} UTC")
    text = "\n".join([*heading, *(f"## {name}\n{body}" for name, body in parts.items())]) + "\n"
    return mask(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _git_lines(info: dict[str, Any]) -> str:
    if info["git_commit"] is None:
        return "no git, or no git repository"
    branch = tool_output("git", "-C", str(inference.ROOT), "branch", "--show-current") or "none (a commit is checked out)"
    changed = "yes" if info["git_dirty"] else "no"
    return f"Branch: {branch}\nCommit: {info['git_commit']}\nPython files changed since: {changed}"


def _pip_version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"pip {importlib.metadata.version('pip')} (python {'.'.join(platform.python_version_tuple()[:2])})"
    return "pip: not installed"


def verdict(info: dict[str, Any]) -> list[str]:
    """Whether the NPU can be used, what else computes, and what to change."""
    if info["npu_status"] == "available":
        npu = f"NPU: available, {info['npu_count']} x {info['npu_model']}"
    else:
        npu = f"NPU: BLOCKED: {info['npu_blocked_reason']}"
    hardware = f"CPU: {info['cpu']}, {info['cpu_cores']} cores, {info['memory_gb']} GiB; GPU: {info['gpu'] or 'none'}"
    if info["advice"]:
        return [npu, hardware, "Versions: look at", *(f"- {line}" for line in info["advice"])]
    compared = "torch, torch_npu and CANN go together" if info["torch_npu_version"] else "no torch_npu to compare"
    return [npu, hardware, f"Versions: {compared}; requirements.txt is met"]


def keeps_record(path: Path, status: str) -> bool:
    """Whether `path` records a machine whose NPU works and this one's does not: then it must not be overwritten."""
    with suppress(OSError, ValueError, AttributeError):
        return status == "blocked" and json.loads(path.read_text(encoding="utf-8")).get("npu_status") == "available"
    return False


# --- the lock ---


def lock_weights(given: str) -> list[str]:
    """Record the files of the weights at `given` in locked_models.md. Returns a line for each file."""
    path = Path(given).expanduser()
    path = path if path.exists() else inference.ROOT / given
    if not (path.suffix == ".pth" and path.is_file()) and not any(path.glob("*.safetensors")):
        raise UsageError(
            f"--lock_weights {given}: no weights there; name a folder in transformers' layout with *.safetensors, or a .pth file"
        )
    # Loaded first: what the loader refuses, such as a truncated file, must not become the record.
    weights = inference.load_model(inference.open_device("cpu"), str(path)).weights
    folder = path if path.is_dir() else path.parent
    described = [
        folder / name for name in ("config.json", "preprocessor_config.json") if path.is_dir() and (folder / name).is_file()
    ]
    hashes = inference.sha256_in_background(described) | weights.files
    try:
        found = {name: ((folder / name).stat().st_size, future.result()) for name, future in hashes.items()}
        text = LOCKS.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--lock_weights {given}: {error}; nothing was recorded") from error
    updated = update_locks(text, found)
    if updated != text:
        with inference.replacing(LOCKS) as file:
            file.write(updated.encode("utf-8"))
    return [f"Locked: {name}, {size} bytes, sha256 {digest}" for name, (size, digest) in found.items()]


def update_locks(text: str, files: Mapping[str, tuple[int, str]]) -> str:
    """The text of locked_models.md with sizes and hashes of `files` in its table; nothing else changes.

    Raises UsageError where another hash is recorded for one of them: a lock is not replaced by the way.
    """
    lines = text.splitlines(keepends=True)
    headers = [number for number, line in enumerate(lines) if re.match(r"\| *file *\| *bytes *\| *sha256 *\|", line)]
    if not headers:
        raise UsageError("locked_models.md has no table '| file | bytes | sha256 |'; fetch the file again")
    new, end = dict(files), headers[0] + 1
    while end < len(lines) and lines[end].startswith("|"):
        row = re.match(r"\| *`([^`|]+)` *\|[^|]*\| *`?([^|`]*?)`? *\|", lines[end])
        if row and row[1] in new:
            size, digest = new.pop(row[1])
            if re.fullmatch(r"[0-9a-f]{64}", row[2]) and row[2] != digest:
                raise UsageError(
                    f"{row[1]}: locked_models.md records another sha256 ({row[2][:12]}...), nothing was recorded. "
                    "To lock these weights in its place, set its row to 'not recorded' first"
                )
            lines[end] = f"| `{row[1]}` | {size} | `{digest}` |" + lines[end][row.end() :]
        end += 1
    newline = "\r\n" if lines[headers[0]].endswith("\r\n") else "\n"
    if new and not lines[end - 1].endswith("\n"):
        lines[end - 1] += newline
    lines[end:end] = [f"| `{name}` | {size} | `{digest}` |{newline}" for name, (size, digest) in new.items()]
    return "".join(lines)


# --- command line ---


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument(
        "--lock_weights", metavar="PATH", help="record the files of these weights (a folder or a .pth) in locked_models.md"
    )
    parser.add_argument("--output_log", metavar="FILE", help="write the text to FILE (default: logs/env_check.log)")
    parser.add_argument(
        "--results_dir",
        default=str(inference.ROOT / "results"),
        metavar="DIR",
        help="folder for env_info.json (default: results/)",
    )
    return parser


def check(results_dir: str, output_log: str | None, locked: Sequence[str]) -> None:
    """Write JSON and log, and print the log. `locked` are lines about weights that were recorded before."""
    info, folder, notes = collect(), Path(results_dir), list(locked)
    name, log_name = "env_info.json", "env_check.log"
    if keeps_record(folder / name, info["npu_status"]):
        kept = inference.relative_to_root(folder / name)
        name, log_name = "env_info_cpu.json", "env_check_cpu.log"
        notes.append(f"{kept} is kept: it records a machine whose NPU works. This machine is in {name}")
    log_path = Path(output_log or inference.ROOT / "logs" / log_name)
    text = sections(info, notes)
    try:
        inference.write_json(folder / name, info)
        with inference.replacing(log_path) as file:
            file.write(text.encode("utf-8"))
    except UsageError as error:
        raise UsageError(f"{error}; name another place with --results_dir and --output_log") from error
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="")
    print(f"Saved to {inference.relative_to_root(folder / name)} and {inference.relative_to_root(log_path)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        locked = lock_weights(args.lock_weights) if args.lock_weights else []
        check(args.results_dir, args.output_log, locked)
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
