"""What eval_accuracy.py and msprobe, Ascend's own accuracy tool, say of the same planted errors.

    python tests/cann/beside_msprobe.py

Over the stand-in for CANN, on torch_npu 2.13.0, a matrix product of a small ViT (random weights) is made wrong: not at all, a
little, more, or for one image of the batch. eval_accuracy.py runs there as it is. msprobe (mindstudio-probe, from PyPI) dumps
the same model and photos there and on the CPU, in an environment of its own that sees the stack's packages and leaves them as
they are; its compare command says what it finds. Nothing of msprobe is configured but task and level. Writes
results/beside_msprobe.json, from which a table of results/README.md is made.

Exit codes: 0 eval_accuracy named what was planted, and nothing else, each time; 1 it did not, or something could not be run;
2 wrong usage, or the stack or msprobe cannot be had; 70 unforeseen; 130 stopped.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tests")]

import inference  # first of all: it sets what must precede torch
from inference import STAND_IN, UsageError, log

from bulk.levers import DEFAULT_LEVERS
from cann import build, harness, stacks
from checked import BESIDE_MSPROBE as NAME
from checked import MSPROBE_COLUMNS, MSPROBE_TASKS, msprobe_rows

STACK, MSPROBE = "2.13.0", "mindstudio-probe==26.2.0"
LAYERS, LAYER = 4, 3
PRODUCTS = 6 * LAYERS + 1  # aclnnAddmm of a forward pass: query, key, value, output, two of the MLP; and the pooler
PLACE = f"aclnnAddmm:{6 * LAYER}%{PRODUCTS}"
STAGE = f"layer {LAYER} MLP"
# The outputs of that product, by msprobe's names for functions (level L1) and modules.
PLANTED_ROWS = (f"Functional.linear.{6 * LAYER - 1}.forward.output.0", f"layers.{LAYER - 1}.mlp.fc2.Linear.forward.0.output.0")
PHOTOS = [ROOT / "assets" / "samples" / name for name in ("chelsea.jpg", "coffee.jpg", "rocket.jpg")]
PASSES = "pass"


class Planted(NamedTuple):
    """The output of the second matrix product of layer 3's MLP is multiplied by 1 + size, for all images or the second of 3."""

    size: float
    images: str

    @property
    def rule(self) -> str:
        rows = "@17-34" if self.images != "all" else ""  # an image has 17 tokens
        return f"{PLACE}{rows}={self.size:g}"


# 1e-3 is the bar itself by which msprobe counts elements in task "tensor", so that rounding decides: 2e-3 stands beside it.
ERRORS = (*(Planted(size, "all") for size in (0, 1e-5, 1e-3, 2e-3)), Planted(1e-3, "1 of 3"), Planted(5e-2, "1 of 3"))


# --- eval_accuracy ---


def run_accuracy(model: Path, planted: Planted, folder: Path) -> dict[str, Any]:
    """Which stages eval_accuracy names on the stack, the own errors of their worst tokens, and its verdicts."""
    words = ["--device", "npu", "--model_path", model, "--views", 0, "--probe", 0, "--without", *DEFAULT_LEVERS]
    where = ["--results_dir", folder, "--output_log", folder / "log", "--image_path", *PHOTOS]
    command = [str(ROOT / "eval" / "eval_accuracy.py"), *map(str, [*words, *where])]
    done = harness.python(STACK, folder, *command, seconds=300, STANDIN_WRONG=planted.rule)
    found = list(folder.glob("accuracy_eval*.json"))
    if done.code not in (0, 1) or len(found) != 1:
        return {"ran": False, "reason": f"exit code {done.code}: {(done.err.strip().splitlines() or ['nothing was said'])[-1]}"}
    result = json.loads(found[0].read_text())
    errors = {row["stage"]: row["own_worst_token_relative_l2_error"] for row in result["stages"] if row["at_fault"]}
    told = {name: result[name] for name in ("overall", "faithful", "versions")}
    alone = result["invariance"]["batch_invariance_relative_l2_error"]
    return {"ran": True, "named": result["begins_at"], "own_errors": errors, "alone_against_batch": alone, **told}


# --- msprobe ---

# One process imports all; each dump and each comparison is a fork of it, with a stand-in that has read its rule.
WORK = """
import ctypes, json, os, sys, traceback
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
root, model_path, photos, jobs = json.loads(sys.argv[1])
sys.path[:0] = [root]
import inference
inference.import_transformers("npu")
import msprobe.msprobe
from msprobe.pytorch import PrecisionDebugger
def dump(kind, folder, task, level, rule):
    os.environ["STANDIN_WRONG"] = rule
    ctypes.CDLL("libascendcl.so").standin_restart()
    device = inference.open_device(kind)
    model = inference.load_model(device, model_path)
    crops = inference.crops_of(photos, model.preprocess).to(device.torch_device)
    debugger = PrecisionDebugger(dump_path=folder, task=task, level=level)
    debugger.start(model.module)
    inference.forward(model, crops)
    debugger.stop()
    debugger.step()
def compare(target, golden, folder):
    sys.argv = ["msprobe", "compare", "-tp", f"{target}/step0", "-gp", f"{golden}/step0", "-o", folder]
    msprobe.msprobe.main()
for name, *arguments in jobs:
    if not (child := os.fork()):
        code = 1
        try:
            globals()[name](*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        print("FAILED", name, *arguments, flush=True)
import importlib.metadata
names = ("mindstudio-probe", "pandas", "protobuf", "onnx")
print("VERSIONS", json.dumps(inference.versions() | {name: importlib.metadata.version(name) for name in names}), flush=True)
"""


def msprobe_python(stack: Path) -> Path:
    """The interpreter of an environment with msprobe that sees a stack's packages, made once. Raises UsageError."""
    made = stacks.cache() / f"msprobe-{MSPROBE.rpartition('=')[2]}-{stack.parent.parent.name}"
    python, ready = made / "bin" / "python", made / "ready"
    if not ready.is_file():
        log.info(f"Installing {MSPROBE} ...")
        library = stack.parent.parent / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        commands = ([sys.executable, "-m", "venv", "--clear", made], [python, "-m", "pip", "install", "--quiet", MSPROBE])
        for command in commands:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(f"{MSPROBE} cannot be installed: {(done.stderr.splitlines() or ['no message'])[-1]}")
            (made / library.relative_to(stack.parent.parent) / "stack.pth").write_text(f"{library}\n")
        ready.touch()
    return python


def run_msprobe(python: Path, model: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Versions, and for each planted error what msprobe said in each task and level."""
    jobs = []
    for task, level in MSPROBE_TASKS:
        golden = str(folder / f"cpu-{task}-{level}")
        jobs.append(("dump", "cpu", golden, task, level, ""))
        for number, planted in enumerate(ERRORS):
            target, output = (str(folder / f"{what}{number}-{task}-{level}") for what in ("npu", "compared"))
            jobs += [("dump", "npu", target, task, level, planted.rule), ("compare", target, golden, output)]
    given = json.dumps([str(ROOT), str(model), [*map(str, PHOTOS)], jobs])
    needed = {**inference.os.environ, **build.environment(python), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), "-c", WORK, given], env=needed, capture_output=True, text=True, check=False)
    versions = [line for line in done.stdout.splitlines() if line.startswith("VERSIONS ")]
    if not versions:
        raise UsageError(f"msprobe cannot be run: {(done.stderr.strip().splitlines() or ['nothing was said'])[-1]}")
    said = [
        {f"{task} {level}": verdict(folder / f"compared{number}-{task}-{level}") for task, level in MSPROBE_TASKS}
        for number in range(len(ERRORS))
    ]
    return json.loads(versions[0].partition(" ")[2]), said


def verdict(folder: Path) -> dict[str, Any]:
    """What a comparison's file says: rows, those that do not pass, and the numbers beside the planted ones."""
    files = list(folder.glob("*.csv"))
    if len(files) != 1:
        return {"ran": False, "reason": "its compare command left no file"}
    with files[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    flagged = [{"row": row["NPU Name"], "result": row["Result"]} for row in rows if row["Result"] != PASSES]
    planted = [row for row in rows if row["NPU Name"].endswith(PLANTED_ROWS)]
    numbers = ("Result", "Cosine", "MaxAbsErr", "MaxRelativeErr", "One Thousandth Err Ratio", "NormRelativeErr")
    shown = {row["NPU Name"]: {name: row[name] for name in numbers if name in row} for row in planted}
    named = any(row["row"] in shown for row in flagged)
    return {"ran": True, "rows": len(rows), "flagged": flagged, "planted_named": named, "planted_rows": shown}


# --- all of it ---


def compare() -> dict[str, Any]:
    """The whole result. Raises UsageError where stack or msprobe cannot be had."""
    from conftest import save_checkpoint, tiny_model

    try:
        stack = stacks.interpreter(STACK)
        build.environment(stack)
    except (stacks.StackError, build.StandinError) as error:
        raise UsageError(str(error)) from error
    python, rows = msprobe_python(stack), []
    with TemporaryDirectory() as folder:
        model = save_checkpoint(Path(folder), tiny_model(layers=LAYERS))
        for number, planted in enumerate(ERRORS):
            (place := Path(folder) / f"accuracy{number}").mkdir()
            row = {**planted._asdict(), "stage": STAGE if planted.size else None, "rule": planted.rule}
            rows.append(row | {"eval_accuracy": run_accuracy(model, planted, place)})
            log.info(f"{planted.rule}: eval_accuracy: {rows[-1]['eval_accuracy'].get('named')}")
        log.info("msprobe dumps and compares ...")
        versions, said = run_msprobe(python, model, Path(folder) / "msprobe")
    for row, found in zip(rows, said, strict=True):
        row["msprobe"] = found
    return {
        "device": STAND_IN,
        **inference.run_provenance(),
        "model": f"a small ViT of {LAYERS} layers, {len(PHOTOS)} photos in a batch",
        "eval_accuracy_versions": next(
            (row["eval_accuracy"].pop("versions") for row in rows if row["eval_accuracy"]["ran"]), None
        ),
        "msprobe_versions": versions,
        "msprobe_settings": "PrecisionDebugger(dump_path, task, level), one forward pass; msprobe compare -tp -gp -o",
        "operator": PLACE,
        "photos": [path.name for path in PHOTOS],
        "rows": rows,
    }


def misses(result: dict[str, Any]) -> list[str]:
    """A line for each planted error that eval_accuracy did not name alone, and for each run that was none."""
    lines = []
    for row in result["rows"]:
        if (named := row["eval_accuracy"].get("named")) != ([row["stage"]] if row["stage"] else []):
            lines.append(f"{row['rule']}: eval_accuracy named {named}: {row['eval_accuracy'].get('reason', 'it ran')}")
        lines += [
            f"{row['rule']}: msprobe, {task}: {said['reason']}" for task, said in row["msprobe"].items() if not said["ran"]
        ]
    return lines


def run(results_dir: str | None) -> int:
    """Compare, write, say what was not as it should. Returns the exit code."""
    result = compare()
    missed = misses(result)
    for line in missed:
        log.error(f"error: {line}")
    folder = Path(results_dir) if results_dir else inference.ROOT / "results" / ("trial" if missed else ".")
    path = folder / f"{NAME}.json"
    inference.write_json(path, result)
    for row in msprobe_rows(result):
        log.info("; ".join(f"{column.en}: {column.cell(row)}" for column in MSPROBE_COLUMNS))
    log.info(f"Results saved to {inference.relative_to_root(path)}")
    return int(bool(missed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = inference.ArgumentParser(__doc__)
    parser.add_argument("--results_dir", metavar="DIR", help="folder for the result, whatever it says")
    args = parser.parse_args(argv)
    return inference.guarded(NAME, lambda: run(args.results_dir))


if __name__ == "__main__":
    inference.leave(main())
