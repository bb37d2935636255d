"""The whole evaluation in one go: environment, inference, colours, accuracy, performance, tuning, the page.

    python eval/submit.py --device npu

Each step is a process of its own. Whatever becomes of it (FAILED, BLOCKED, crashed), the later ones run, and the page is
written. What is measured already, by this code, with these flags, weights and versions, is kept: stopped half way, the same
command goes on; --again measures all anew. Outcomes are kept in results/trial/submit.json. At the end the audit table is shown.

Exit codes: the highest of the steps': 0 done; 1 missed its bar; 2 wrong usage or unusable input; 3 BLOCKED; 70 crashed;
130 stopped, at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
from inference import UsageError

import evidence
import stacks
import tables


class Step(NamedTuple):
    """A script and its arguments. `result`: the name of what it measures; None where it is quick and always run."""

    name: str
    script: str
    arguments: tuple[str, ...]
    result: str | None


STEPS = (
    Step("environment", "eval/env_check.py", (), None),
    Step("inference", "inference.py", ("--image_path", "assets/samples"), "inference"),
    Step("colours", "eval/pca.py", ("--image_path", "assets/samples"), "pca"),
    Step("accuracy", "eval/eval_accuracy.py", ("--sweep",), "accuracy_eval"),
    Step("performance", "eval/eval_performance.py", ("--end_to_end", "500"), "performance_eval"),
    Step("tuning", "eval/tune.py", (), "tuned"),
    Step("page", "eval/evidence.py", (), None),
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


def fingerprint(step: Step, arguments: Sequence[str], args: argparse.Namespace) -> str:
    """Changes with all that a measurement depends on, flags, code, versions, weights, machine, and with what it has written."""
    root, place = inference.ROOT, inference.ROOT / args.model_path
    machine = inference.read_record(root / "results" / "env_info.json")
    code = [path for pattern in ("*.py", "bulk/*.py", "eval/*.py") for path in root.glob(pattern)]
    files = [*code, *(place.iterdir() if place.is_dir() else [place])]
    files += [root / "results" / f"{inference.result_name(step.result, args.device.partition(':')[0])}.json"]
    digests = [inference.sha256(path) if path.is_file() else None for path in sorted(files)]
    optional = [stacks.installed(name) for name in ("scikit-learn", "onnxruntime", "openvino")]
    made_of = [step, list(arguments), digests, inference.versions(), optional, machine.get("npu_model"), machine.get("cpu")]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def submit(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run all steps. Returns the highest exit code."""
    record = inference.ROOT / "results" / "trial" / "submit.json"
    before, outcomes = inference.read_record(record), {}
    for step in STEPS:
        arguments = [*step.arguments, *(flags if step.result else [])]
        kept = before.get(step.name) if step.result and not args.again else None
        if kept and kept["exit_code"] in (0, 1) and kept["fingerprint"] == fingerprint(step, arguments, args):
            print(f"\n=== {step.name}: on record, kept", flush=True)
            outcomes[step.name] = kept
        else:
            print(f"\n=== {step.name}: {shlex.join(['python', step.script, *arguments])}", flush=True)
            code = run(step, arguments)
            outcomes[step.name] = {"exit_code": code, "outcome": OUTCOMES.get(code, "crashed")}
            outcomes[step.name]["fingerprint"] = fingerprint(step, arguments, args) if step.result else None
        inference.write_json(record, before | outcomes)
    print("\n" + "\n".join(f"{name:<12} {row['outcome']}" for name, row in outcomes.items()))
    with suppress(UsageError):  # the page's step has told it
        audit, *words = tables.audit(evidence.read_evidence(inference.ROOT))
        short = tables.Table(audit.headings, audit.rows[:-1])  # a terminal has no use for the row of links
        print(tables.render([short, *words], "en"))
    return max(row["exit_code"] for row in outcomes.values())


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--again", action="store_true", help="measure again what is measured already")
    inference.add_model_arguments(parser)
    parser.set_defaults(device="npu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_args(words)
    if args.device == "auto":
        parser.error("--device auto: name the device that is submitted, such as npu")
    for flag in ("results_dir", "output_log"):
        if getattr(args, flag):
            parser.error(f"--{flag}: not here: the page is made of results/ and logs/")
    flags = [word for word in words if word != "--again"]
    flags += [] if any(word.startswith("--device") for word in words) else ["--device", args.device]
    last_words = "stopped; what is measured is kept: run the same command to go on"
    return inference.guarded("submit", lambda: submit(args, flags), last_words)


if __name__ == "__main__":
    inference.leave(main())
