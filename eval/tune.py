"""Find what is fastest on this machine and still right.

    python eval/tune.py --device npu
    python inference.py --image_path photo.jpg --device npu --tuned latency
    python embed.py --image_path photos/ --output features/ --device npu --tuned throughput

Tries arithmetic, execution and levers, then the settings of the environment (on an NPU the queue of tasks and the affinity
of threads, on the CPU the number of threads), then batch sizes, each time with what led until then. Points run in child
processes, one for each environment; a point that crashes, runs out of memory or hangs is a row, not an end. Each point's
error is measured against a float64 run on the CPU, and only those within the bar count. Writes every row and three picks,
the fastest for throughput, for latency (batch size 1) and within 1e-5 (faithful), to results/tuned.json and the log to
logs/tuned.log (tuned_cpu.* and so on for devices other than an NPU).

Exit codes: 0 done; 1 nothing was within the bar; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used;
70 an unforeseen error; 130 stopped (what was measured until then is kept in tuned_partial*.json).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import Column, Device, Encoder, LoadedModel, log, time_once, torch

from eval_performance import FEATURES, inputs, keeping, positive_float, sample_crops, warm_up

FAITHFUL = 1e-5  # the bar for float32 itself, eval_accuracy.py's
START_UP_S = 120.0  # what a child's imports may take besides
POINT = ("dtype", "allow_hf32", "execution", "without", "batch_size")
PICKS = ("throughput", "latency", "faithful")
ENVIRONMENTS = {
    "npu": {"TASK_QUEUE_ENABLE": ("0", "1", "2"), "CPU_AFFINITY_CONF": ("0", "1", "2")},
    "cuda": {},
    "cpu": {"OMP_NUM_THREADS": tuple(sorted({str(max(1, (os.cpu_count() or 1) // part)) for part in (1, 2, 4)}))},
}
BATCH_SIZES = {"cpu": (2, 4, 16, 32), "cuda": (16, 32, 128, 256), "npu": (16, 32, 128, 256)}
TUNED_COLUMNS = (
    Column("Arithmetic", "精度", "arithmetic"),
    Column("Execution", "执行方式", "execution"),
    Column("Without", "关闭的加速项", "without_text"),
    Column("Environment", "环境变量", "environment_text"),
    Column("Batch", "批大小", "batch_size"),
    Column("Images/s", "图片/秒", "images_per_s", ".2f"),
    Column("Median (ms)", "中位耗时（ms）", "median_time_s", ".2f", 1e3),
    Column("Relative L2 to float64", "相对 float64 的 L2 误差", "relative_l2_error", ".2e"),
    Column("Worst token", "最差词元", "worst_token_relative_l2_error", ".2e"),
    Column("Outcome", "结果", "outcome"),
)


def tuned_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for TUNED_COLUMNS: the points in the order in which they were tried."""
    return [describe(row, result) for row in result["rows"]]


def describe(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A row with what a table says of it in words."""
    picked = [name for name, pick in result["picks"].items() if pick == row]
    outcome = row["status"] if row["status"] != "ok" else "within the bar" if row["within_bar"] else "misses the bar"
    return row | {
        "arithmetic": row["dtype"] + (" (HF32, TF32 allowed)" if row["allow_hf32"] else ""),
        "without_text": ", ".join(row["without"]) or "-",
        "environment_text": ", ".join(f"{name}={value}" for name, value in row["environment"].items()) or "default",
        "outcome": ", ".join([outcome, *(f"picked for {name}" for name in picked)]),
    }


# --- one point, in this process ---


def errors(tokens: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Relative L2 error of tokens [N, T, D] over all of them, and of the worst one, against the reference [N, T, D]."""
    apart, size = (np.linalg.norm(value, axis=-1) for value in (tokens.astype(np.float64) - reference, reference))
    return float(np.linalg.norm(apart) / np.linalg.norm(size)), float((apart / size).max())


def measure_point(model: LoadedModel, point: dict[str, Any], reference: np.ndarray, seconds: float) -> dict[str, Any]:
    """Speed of one batch size and execution, over `seconds` and at least three runs, and the error on the sample photos."""
    crops = sample_crops(model.preprocess)
    count, device = point["batch_size"], model.device
    encoder = Encoder(model, FEATURES, count, point["execution"])
    batches = inputs(crops, count, device)
    warm_up(device, lambda: encoder.run(next(batches)), 2)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(time_once(device, lambda: encoder.run(next(batches))))
    encoder.release()
    checked = Encoder(model, ("class_token", "patch_tokens"), count, encoder.execution)
    places = torch.arange(max(count, len(crops))) % len(crops)  # as many as the batch holds: an error may depend on it
    found = checked.submit(crops[places])()
    last = slice(-len(crops), None)
    tokens = np.concatenate([found["class_token"][last, None], found["patch_tokens"][last]], 1)
    relative, worst = errors(tokens, reference[places[last]])
    return {
        "status": "ok",
        "execution": encoder.execution,
        "execution_fallback": encoder.fallback,
        "levers": list(model.levers),
        "device_name": device.name,
        "runs": len(times),
        "median_time_s": statistics.median(times),
        "images_per_s": count / statistics.median(times),
        "relative_l2_error": relative if math.isfinite(relative) else None,
        "worst_token_relative_l2_error": worst if math.isfinite(worst) else None,
    }


def run_points(folder: str) -> None:
    """The child: measure the points of points.json, a line of answers.jsonl for each; the first line says that it is ready."""
    from transformers import ViTModel  # noqa: F401 (takes seconds, which are not the first point's)

    given = json.loads(Path(folder, "points.json").read_text())
    args, reference = argparse.Namespace(**given["args"]), np.load(f"{folder}/reference.npy")
    model, setting = None, None
    with open(f"{folder}/answers.jsonl", "a", encoding="utf-8", buffering=1) as answers:
        answers.write("{}\n")
        for point in given["points"]:
            asked = [point[name] for name in ("dtype", "allow_hf32", "without")]
            try:
                if asked != setting:
                    model, setting = None, asked  # the one before must not stand in memory beside it
                    device = inference.open_device(args.device, point["allow_hf32"], args.deterministic)
                    levers = [lever for lever in inference.LEVERS if lever not in point["without"]]
                    model = inference.load_as_asked(args, device, dtype=point["dtype"], levers=levers)
                row = measure_point(model, point, reference, args.seconds)
            except Exception as error:  # noqa: BLE001 (whatever a setting breaks is its row)
                status = "out of memory" if inference.is_out_of_memory(error) else "failed"
                row = {"status": status, "reason": f"{type(error).__name__}: {inference.first_line(error)}"}
                setting = None
            answers.write(json.dumps(row, allow_nan=False) + "\n")


# --- points in child processes ---


class Points:
    """Measures points in child processes, against a float64 run that is computed once, here on the CPU."""

    def __init__(self, args: argparse.Namespace, device: Device, folder: Path) -> None:
        self.args = json.loads(json.dumps(vars(args), default=str)) | {"device": str(device.torch_device)}
        self.folder, self.kind = folder, device.kind
        golden = inference.load_as_asked(args, inference.open_device("cpu"), dtype="float64", levers=())
        hidden = [inference.forward(golden, crop[None]).hidden for crop in sample_crops(golden.preprocess)]
        np.save(folder / "reference.npy", torch.cat(hidden).numpy())

    def measure(self, points: Sequence[dict[str, Any]], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
        """A row for each point; whatever ends a child is the row of the point that it was at, and another goes on."""
        number = 0
        while number < len(points):
            for answer in self._run_child(points[number:], environment):
                yield points[number] | {"environment": environment} | answer
                number += 1

    def _run_child(self, points: Sequence[dict[str, Any]], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
        answers, output = self.folder / "answers.jsonl", self.folder / "output.txt"
        (self.folder / "points.json").write_text(json.dumps({"args": self.args, "points": points}))
        answers.write_text("")
        around = {name: value for name, value in os.environ.items() if name not in ENVIRONMENTS[self.kind]} | environment
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import tune; tune.run_points(sys.argv[1])"
        with output.open("w") as file:
            command = [sys.executable, "-c", code, str(self.folder)]
            child = subprocess.Popen(command, env=around, stdout=file, stderr=file, start_new_session=True)
        try:
            seen, since = 0, time.monotonic()
            while seen <= len(points):
                ended = child.poll() is not None  # asked before reading, so that what it wrote last is seen
                lines = answers.read_text().split("\n")[:-1]
                if len(lines) > seen:
                    yield from map(json.loads, lines[max(seen, 1) :])
                    seen, since = len(lines), time.monotonic()
                elif ended:
                    told = output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                    yield {"status": "crashed", "reason": f"exit code {child.returncode}: {told[-1][:200]}"}
                    return
                elif time.monotonic() - since > self.args["point_limit"] + (0 if seen else START_UP_S):
                    yield {"status": "hung", "reason": f"no answer within {self.args['point_limit']:g} s"}
                    return
                time.sleep(0.05)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


# --- the search ---


def within(row: dict[str, Any], bar: float) -> bool:
    """Whether a point's errors, over all tokens and of the worst one, are at most `bar`."""
    found = [row.get(name) for name in ("relative_l2_error", "worst_token_relative_l2_error")]
    return all(error is not None and error <= bar for error in found)


def pick(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The fastest rows within the bar: images a second, time of one image, and images a second within FAITHFUL."""
    usable = [row for row in rows if row.get("within_bar")]
    faithful = [row for row in usable if row["relative_l2_error"] <= FAITHFUL]
    return {
        "throughput": max(usable, key=lambda row: row["images_per_s"], default=None),
        "latency": min((row for row in usable if row["batch_size"] == 1), key=lambda row: row["median_time_s"], default=None),
        "faithful": max(faithful, key=lambda row: row["images_per_s"], default=None),
    }


def search(kind: str, batch: int, levers: Sequence[str], measure: Callable[[list, dict], None], rows: list) -> None:
    """Coarse to fine: measure(points, environment) appends to `rows`, and each stage varies what leads until then."""
    arithmetics = [("float32", False), ("bfloat16", False)]
    if kind != "cpu":
        arithmetics += [("float32", True), ("float16", False)]
    ways = list(itertools.product(arithmetics, ("eager",) if kind == "cpu" else ("eager", "graph"), (1, batch)))
    measure([dict(zip(POINT, (*arithmetic, execution, [], size), strict=True)) for arithmetic, execution, size in ways], {})
    for lever in levers:
        vary(rows, pick(rows), measure, {}, [{"without": [lever]}])
    for variable, values in ENVIRONMENTS[kind].items():
        leaders = pick(rows)
        for value in values:
            vary(rows, leaders, measure, {variable: value})
    leaders = {name: row for name, row in pick(rows).items() if name != "latency"}
    vary(rows, leaders, measure, {}, [{"batch_size": size} for size in BATCH_SIZES[kind]])


def vary(
    rows: list,
    leaders: dict,
    measure: Callable[[list, dict], None],
    environment: dict[str, str],
    changes: Sequence[dict] = ({},),
) -> None:
    """Measure what leads again with each of `changes`, unless it was; what needs the same environment together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    tried = [({name: row[name] for name in POINT}, row["environment"]) for row in rows]
    for row, change in itertools.product(filter(None, leaders.values()), changes):
        point, around = {name: row[name] for name in POINT} | change, row["environment"] | environment
        group = groups.setdefault(json.dumps(around, sort_keys=True), [])
        if point not in group and (point, around) not in tried:
            group.append(point)
    for around, points in groups.items():
        measure(points, json.loads(around))


def tune(args: argparse.Namespace, device: Device) -> int:
    """Search, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    model = inference.load_from_args(args, device)
    result: dict[str, Any] = {
        "device": device.kind,
        "image_size": model.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "partial": True,
        "tuned_on": inference.what_is_tuned(model),
        "variables": list(ENVIRONMENTS[device.kind]),
        "rows": [],
        "picks": dict.fromkeys(PICKS),
        **inference.provenance(args, model),
    }
    batch, levers, rows = args.batch_size or inference.default_batch_size(device), model.levers, result["rows"]
    del model  # its memory is the children's
    with tempfile.TemporaryDirectory() as folder, keeping(args, result, rows) as keep:
        log.info("Computing the float64 reference ...")
        children = Points(args, device, Path(folder))

        def measure(points: Sequence[dict[str, Any]], environment: dict[str, str]) -> None:
            for row in children.measure(points, environment):
                rows.append(row | {"within_bar": within(row, args.threshold_percent / 100)})
                result["picks"] = pick(rows)
                keep()
                log_point(rows[-1])

        search(device.kind, batch, levers, measure, rows)
    log.info("=== Tuning Summary ===")
    inference.log_table(TUNED_COLUMNS, [row for row in tuned_rows(result) if "picked" in row["outcome"]])
    for name, row in result["picks"].items():
        log.info(f"--tuned {name}: {summary(row) if row else 'nothing was within its bar'}")
    inference.write_result(args, result | {"partial": False})
    return 0 if any(result["picks"].values()) else 1


def summary(row: dict[str, Any]) -> str:
    """A pick in one line."""
    lines = describe(row, {"picks": {}})
    how = f"{lines['arithmetic']}, {row['execution']}, batch size {row['batch_size']}, environment {lines['environment_text']}"
    speed = f"{row['images_per_s']:.2f} img/s, {1e3 * row['median_time_s']:.2f} ms, relative L2 {row['relative_l2_error']:.2e}"
    return how + (f", without {lines['without_text']}" if row["without"] else "") + f": {speed}"


def log_point(row: dict[str, Any]) -> None:
    if row["status"] == "ok" and row["relative_l2_error"] is not None:
        log.info(f"{summary(row)} ({'within' if row['within_bar'] else 'misses'} the bar)")
    else:
        what = {name: row[name] for name in POINT if row[name]} | row["environment"]
        log.warning(f"{row['status']}: {what} ({row.get('reason', 'not a number')})")


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    add = parser.add_argument_group("search").add_argument
    coarse = "of the coarse search, beside 1 (default: 8 on the CPU, else 64)"
    add("--batch_size", type=inference.positive_int, metavar="N", help=coarse)
    add("--seconds", type=positive_float, default=2, metavar="S", help="of timing for each point (default: 2)")
    limit = "until a point that does not answer counts as hung (default: 180)"
    add("--point_limit", type=positive_float, default=180, metavar="S", help=limit)
    bar = "for the relative L2 error, and the worst token's (default: 1)"
    add("--threshold_percent", type=positive_float, default=1, metavar="P", help=bar)
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("tuned", make_parser().parse_args(argv), tune)


if __name__ == "__main__":
    sys.exit(main())
