"""The whole evaluation in one go: environment, inference, accuracy with sweep, performance with end to end, and the page.

    python eval/submit.py --device npu

Each step is a process of its own. Whatever becomes of it (FAILED, BLOCKED, crashed), the later ones run, and the page is
written. What is measured already, by these scripts, with these flags, weights and versions, is kept: stopped half way, the same
command goes on; --again measures all anew. Outcomes are kept in results/trial/submit.json. At the end the audit table is shown.

Exit codes: the highest of the steps': 0 done; 1 missed its bar; 2 wrong usage or unusable input; 3 BLOCKED; 70 crashed;
130 stopped, at once.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import UsageError

import evidence
import tables

SAMPLES = "assets/samples"


class Step(NamedTuple):
    """A script and its arguments. `result`: the name of what it measures; None where it is quick and always run."""

    name: str
    script: str
    arguments: tuple[str, ...]
    result: str | None = None


STEPS = (
    Step("environment", "eval/env_check.py", ()),
    Step("inference", "inference.py", ("--image_path", SAMPLES, "--pca", "picture.png"), "inference"),
    Step("accuracy", "eval/eval_accuracy.py", ("--sweep",), "accuracy_eval"),
    Step("performance", "eval/eval_performance.py", ("--end_to_end", "500"), "performance_eval"),
)
OUTCOMES = {0: "done", 1: "FAIL", 2: "wrong usage or unusable input", 3: "BLOCKED"}


def run(step: Step, arguments: Sequence[str]) -> int:
    """Run a script to its end; its exit code, 70 where a signal ended it. Ctrl-C reaches it through this process, once."""
    command = [sys.executable, str(inference.ROOT / step.script), *arguments]
    child = subprocess.Popen(command, cwd=inference.ROOT, start_new_session=True)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()  # it keeps what it has measured, and says where
        child.wait()
        raise
    return code if code >= 0 else 70


def on_record(step: Step, arguments: Sequence[str], kind: str) -> int | None:
    """The exit code of a measurement that need not be made again; None where there is none like it."""
    record = inference.read_record(inference.ROOT / "results" / f"{inference.result_name(step.result, kind)}.json")
    if record.get("status") == "BLOCKED" or "scripts_sha256" not in record:
        return None
    command = shlex.join(["python", step.script, *map(inference.shown_path, arguments)])
    scripts = {path: _sha256(inference.ROOT / path) for path in record["scripts_sha256"]}
    machine = inference.read_record(inference.ROOT / "results" / "env_info.json")
    same = record["command"] == command and record["scripts_sha256"] == scripts and record["versions"] == inference.versions()
    same = same and (kind != "npu" or record["device_name"] == machine.get("npu_model")) and _same_weights(record["weights"])
    return (1 if record.get("overall") == "FAIL" else 0) if same else None


def _same_weights(weights: dict[str, Any]) -> bool:
    """Whether the files that a result names are still those; one from the hub is pinned by its commit."""
    place = inference.ROOT / (weights.get("path") or "")
    folder = place if place.is_dir() else place.parent
    return (
        weights["source"] == "random"
        or not place.exists()
        or all(_sha256(folder / name) == digest for name, digest in weights["sha256"].items())
    )


@cache
def _sha256(path: Path) -> str | None:
    return inference.sha256(path) if path.is_file() else None


def submit(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run all steps, then the page. Returns the highest exit code."""
    kind, outcomes = args.device.partition(":")[0], []
    for step in STEPS:
        own = [*step.arguments, *(flags if step.result else [])]
        kept = None if args.again or step.result is None else on_record(step, own, kind)
        print(
            f"\n=== {step.name}: {'on record, kept' if kept is not None else shlex.join(['python', step.script, *own])}",
            flush=True,
        )
        started = time.monotonic()
        code = run(step, own) if kept is None else kept
        outcome = OUTCOMES.get(code, "crashed") + (" (kept)" if kept is not None else "")
        outcomes.append(
            {"step": step.name, "exit_code": code, "outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
        )
        inference.write_json(inference.ROOT / "results" / "trial" / "submit.json", {"steps": outcomes})
    print("\n=== page", flush=True)
    page = run(Step("page", "eval/evidence.py", ()), ["--allow_simulated"] if args.allow_simulated else [])
    outcomes.append({"step": "page", "exit_code": page, "outcome": OUTCOMES.get(page, "crashed"), "seconds": None})
    inference.write_json(inference.ROOT / "results" / "trial" / "submit.json", {"steps": outcomes})
    print("\n" + "\n".join(f"{row['step']:<12} {row['outcome']}" for row in outcomes))
    with suppress(UsageError):  # the page's step has told it
        [audit] = tables.audit(evidence.read_evidence(inference.ROOT, args.allow_simulated))
        print(tables.render([audit._replace(columns=audit.columns[:3])], "en"))  # a terminal has no use for links
    return max(row["exit_code"] for row in outcomes)


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--again", action="store_true", help="measure again what is measured already")
    parser.add_argument("--allow_simulated", action="store_true", help="for the tests only: write a page of the simulated NPU")
    inference.add_model_arguments(parser)
    parser.set_defaults(device="npu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_args(words)
    if args.device == "auto":
        parser.error("--device auto: name the device that is submitted, such as npu")
    flags = [word for word in words if word not in ("--again", "--allow_simulated", "--allow-simulated")]
    flags += [] if any(word.startswith("--device") for word in words) else ["--device", args.device]
    inference.stopping.last_words = "stopped; what is measured is kept: run the same command to go on"
    inference.stopping.graceful = True
    return evidence.guarded("submit", lambda: submit(args, flags))


if __name__ == "__main__":
    sys.exit(main())
