"""Find what is fastest on this machine and still right.

    python eval/tune.py --device npu
    python inference.py --image_path photo.jpg --device npu --tuned latency
    python embed.py --image_path photos/ --output features/ --device npu --tuned throughput

Tries arithmetic, execution and levers, then the settings of the environment (on an NPU the queue of tasks and the affinity
of threads, on the CPU the number of threads), then batch sizes, each time with what led until then. Points run in child
processes, one for each environment; a point that crashes, runs out of memory or hangs is a row, not an end. Each point's
error is measured against a float64 run on the CPU, and only those within the bar count. Writes every row and three picks,
the fastest for throughput, for latency (batch size 1) and within 1e-5 (faithful), to results/tuned.json and the log to
logs/tuned.log (tuned_cpu.* and so on for devices other than an NPU). embed.py computes deterministically, which costs an NPU
speed: add --deterministic to tune for it.

Exit codes: 0 done; 1 nothing was within the bar; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used;
70 an unforeseen error; 130 stopped (what was measured until then is kept in tuned_partial*.json).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
from inference import Device, Encoder, LoadedModel, log, time_once, torch

from common import FEATURES, ChildError, Column, ask_child, keeping, positive_float, sample_crops
from eval_performance import inputs, warm_up
from measures import FAITHFUL, finite_or_null, relative_l2, token_errors

POINT = ("dtype", "allow_hf32", "execution", "without", "batch_size", "environment")
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
    table = []
    for row in result["rows"]:
        outcome = row["status"] if row["status"] != "ok" else "within the bar" if row["within_bar"] else "misses the bar"
        picked = [f"picked for {name}" for name, pick in result["picks"].items() if pick == row]
        said = {"arithmetic": row["dtype"] + (" (HF32, TF32 allowed)" if row["allow_hf32"] else "")}
        said["without_text"] = ", ".join(row["without"]) or "-"
        said["environment_text"] = ", ".join(f"{name}={value}" for name, value in row["environment"].items()) or "default"
        table.append(row | said | {"outcome": ", ".join([outcome, *picked])})
    return table


# --- one point, in this process ---


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
    relative, worst = relative_l2(tokens, reference[places[last]]), float(token_errors(tokens, reference[places[last]]).max())
    row = {
        "status": "ok",
        "execution": encoder.execution,
        "execution_fallback": encoder.fallback,
        "device_name": device.name,
        "median_time_s": statistics.median(times),
        "images_per_s": count / statistics.median(times),
        "relative_l2_error": relative,
        "worst_token_relative_l2_error": worst,
    }
    return finite_or_null(row)


def answer_points(given: dict[str, Any], tell: Callable[[Any], None]) -> None:
    """The child: tell that it is ready, then a row for each point."""
    from transformers import ViTModel  # noqa: F401 (takes seconds, which are not the first point's)

    args, reference = argparse.Namespace(**given["args"]), np.load(given["reference"])
    model, setting = None, None
    tell("ready")
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
        tell(row)


# --- points in child processes ---


def save_reference(args: argparse.Namespace, path: Path) -> None:
    """All tokens of the sample photos in float64, computed here on the CPU."""
    golden = inference.load_as_asked(args, inference.open_device("cpu"), dtype="float64", levers=())
    hidden = [inference.forward(golden, crop[None]).hidden for crop in sample_crops(golden.preprocess)]
    np.save(path, torch.cat(hidden).numpy())


def measure_points(given: dict[str, Any], points: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each point, a child for each environment; whatever ends a child is its point's row, and another goes on."""
    others = {name: value for name, value in os.environ.items() if name not in given["variables"]}
    left = sorted(points, key=lambda point: sorted(point["environment"].items()))
    while left:
        environment = left[0]["environment"]
        alike = [point for point in left if point["environment"] == environment]
        answers = ask_child(
            "import tune; tune.answer_points(given, tell)",
            given | {"points": alike},
            1 + len(alike),
            given["args"]["point_limit"],
            others | environment,
        )
        try:
            for row in itertools.islice(answers, 1, None):
                yield left.pop(0) | row
        except ChildError as error:
            yield left.pop(0) | {"status": error.status, "reason": str(error)}


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


def search(kind: str, batch: int, levers: Sequence[str], measure: Callable[[list], None], rows: list) -> None:
    """Coarse to fine: measure(points) appends to `rows`, and each step varies what leads until then."""
    arithmetics = [("float32", False), ("bfloat16", False)]
    if kind != "cpu":
        arithmetics += [("float32", True), ("float16", False)]
    ways = itertools.product(arithmetics, ("eager",) if kind == "cpu" else ("eager", "graph"), (1, batch))
    measure([dict(zip(POINT, (*arithmetic, execution, [], size, {}), strict=True)) for arithmetic, execution, size in ways])
    for lever in levers:
        measure(varied(rows, [{"without": [lever]}]))
    for variable, values in ENVIRONMENTS[kind].items():
        measure(varied(rows, [{"environment": {variable: value}} for value in values]))
    measure(varied(rows, [{"batch_size": size} for size in BATCH_SIZES[kind]], ("throughput", "faithful")))


def varied(rows: list, changes: Sequence[dict[str, Any]], picks: Sequence[str] = PICKS) -> list[dict[str, Any]]:
    """The points of `picks` with each of `changes`, unless they were tried."""
    leaders = [row for name, row in pick(rows).items() if row and name in picks]
    tried, found = [{name: row[name] for name in POINT} for row in rows], []
    for row, change in itertools.product(leaders, changes):
        around = row["environment"] | change.get("environment", {})
        without = [lever for lever in inference.LEVERS if lever in (*row["without"], *change.get("without", ()))]
        point = {name: row[name] for name in POINT} | change | {"environment": around, "without": without}
        if point not in tried + found:
            found.append(point)
    return found


def tune(args: argparse.Namespace, device: Device) -> int:
    """Search, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    model = inference.load_from_args(args, device)
    result: dict[str, Any] = {
        "device": device.kind,
        "image_size": model.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "tuned_on": inference.what_is_tuned(model),
        "variables": list(ENVIRONMENTS[device.kind]),
        "rows": [],
        "picks": dict.fromkeys(PICKS),
        **inference.provenance(args, model),
    }
    batch, levers, rows = args.batch_size or inference.default_batch_size(device), model.levers, result["rows"]
    del model  # its memory is the children's
    with tempfile.TemporaryDirectory() as folder, keeping(args, result) as keep:
        log.info("Computing the float64 reference ...")
        given = {"args": vars(args) | {"device": str(device.torch_device)}, "reference": f"{folder}/reference.npy"}
        save_reference(args, Path(given["reference"]))

        def measure(points: Sequence[dict[str, Any]]) -> None:
            for row in measure_points(given | {"variables": result["variables"]}, points):
                rows.append(row | {"within_bar": within(row, args.threshold_percent / 100)})
                keep(picks=pick(rows))
                log.info(summary(rows[-1]))

        search(device.kind, batch, levers, measure, rows)
    log.info("=== Tuning Summary ===")
    for name, row in result["picks"].items():
        log.info(f"--tuned {name}: {summary(row) if row else 'nothing was within its bar'}")
    inference.write_result(args, result)
    return 0 if any(result["picks"].values()) else 1


def summary(row: dict[str, Any]) -> str:
    """A point in one line."""
    [told] = tuned_rows({"rows": [row], "picks": {}})
    told["outcome"] += f" ({row['reason']})" if "reason" in row else ""
    return ", ".join(f"{column.en}: {column.cell(told)}" for column in TUNED_COLUMNS)


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
