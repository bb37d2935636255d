"""Find what is fastest on this machine and still right.

    python eval/tune.py --device npu

Tries arithmetic, execution and levers, then the settings of the environment (on an NPU the queue of tasks and the affinity
of threads, on the CPU the number of threads), then batch sizes, each time with what led until then. Points run in child
processes, one for each environment; a point that crashes, runs out of memory or hangs is a row, not an end. Each point's
error is measured against a float64 run on the CPU, and only those within the bar count. Ends with three picks as commands to
paste: the fastest for throughput, for latency (batch size 1) and within 1e-5 (faithful). Writes every row and the picks to
results/tuned.json and the log to logs/tuned.log (tuned_cpu.* and so on for devices other than an NPU). embed.py computes
deterministically, which costs an NPU speed: add --deterministic to tune for it.

Exit codes: 0 done; 1 nothing was within the bar; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used;
70 an unforeseen error; 130 stopped (what was measured until then is kept in tuned_partial*.json).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import LoadedModel, log, time_once

import end_to_end
from bulk import levers
from bulk.encoder import Encoder
from common import FEATURES, ChildError, Column, ask_child, keeping, log_table, positive_float, sample_crops
from eval_performance import SLOWER, inputs, warm_up
from measures import FAITHFUL, finite_or_null, relative_l2, token_errors

LOST = "device lost"
DECODING_ROUNDS = 5
POINT = ("dtype", "allow_hf32", "execution", "without", "with_levers", "batch_size", "environment")
PICKS = ("throughput", "latency", "faithful")
ENVIRONMENTS = {
    "npu": {"TASK_QUEUE_ENABLE": ("0", "1", "2"), "CPU_AFFINITY_CONF": ("0", "1", "2")},
    "cuda": {},
    "cpu": {"OMP_NUM_THREADS": tuple(sorted({str(max(1, (os.cpu_count() or 1) // part)) for part in (1, 2, 4)}))},
}
OPTIONAL_LEVERS = {"npu": ("fused_norms", "fused_mlp"), "cuda": ("fused_norms",), "cpu": ()}
BATCH_SIZES = {"cpu": (2, 4, 16, 32), "cuda": (16, 32, 128, 256), "npu": (16, 32, 128, 256)}
TUNED_COLUMNS = (
    Column("Arithmetic", "精度", "arithmetic"),
    Column("Execution", "执行方式", "execution"),
    Column("Levers", "加速项", "levers_text"),
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
        switched = [f"without {name}" for name in row["without"]] + [f"with {name}" for name in row.get("with_levers", ())]
        said["levers_text"] = ", ".join(switched) or "-"
        said["environment_text"] = ", ".join(f"{name}={value}" for name, value in row["environment"].items()) or "default"
        table.append(row | said | {"outcome": ", ".join([outcome, *picked])})
    return table


def picked_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The picks as rows for TUNED_COLUMNS, each with its name as "pick"."""
    picks = {name: row for name, row in result["picks"].items() if row}
    return [row | {"pick": name} for name, row in zip(picks, tuned_rows({"rows": [*picks.values()], "picks": {}}), strict=True)]


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
    inference.require_computing(device)
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
        asked = [point[name] for name in ("dtype", "allow_hf32", "without", "with_levers")]
        try:
            if asked != setting:
                model, setting = None, asked  # the one before must not stand in memory beside it
                device = inference.open_device(args.device, point["allow_hf32"], args.deterministic)
                args.without, args.with_levers = point["without"], point["with_levers"]
                model = levers.load_as_asked(args, device, dtype=point["dtype"])
            row = measure_point(model, point, reference, args.seconds)
        except Exception as error:  # noqa: BLE001 (whatever a setting breaks is its row)
            status = "out of memory" if inference.is_out_of_memory(error) else "failed"
            status = LOST if inference.is_lost(error) else status
            row = {"status": status, "reason": f"{type(error).__name__}: {inference.first_line(error)}"}
            setting = None
        tell(row)
        if row["status"] == LOST:
            return  # the next point gets a process of its own


# --- points in child processes ---


def save_reference(args: argparse.Namespace, path: Path) -> None:
    """All tokens of the sample photos in float64, computed here on the CPU."""
    golden = inference.load_as_asked(args, inference.open_device("cpu"), dtype="float64")
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
                if row["status"] == LOST:
                    break
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


def search(kind: str, batch: int, used: Sequence[str], measure: Callable[[list], None], rows: list) -> None:
    """Coarse to fine: measure(points) appends to `rows`, and each step varies what leads until then."""
    arithmetics = [("float32", False), ("bfloat16", False)]
    if kind != "cpu":
        arithmetics += [("float32", True), ("float16", False)]
    ways = itertools.product(arithmetics, ("eager",) if kind == "cpu" else ("eager", "graph"), (1, batch))
    start = [(*arithmetic, execution, [], [], size, {}) for arithmetic, execution, size in ways]
    measure([dict(zip(POINT, point, strict=True)) for point in start])
    tell_slow_graphs(rows)
    for lever in used:
        measure(varied(rows, [{"without": [lever]}]))
    for lever in OPTIONAL_LEVERS[kind]:
        measure(varied(rows, [{"with_levers": [lever]}]))
    for variable, values in ENVIRONMENTS[kind].items():
        measure(varied(rows, [{"environment": {variable: value}} for value in values]))
    measure(varied(rows, [{"batch_size": size} for size in BATCH_SIZES[kind]], ("throughput", "faithful")))


def tell_slow_graphs(rows: Sequence[dict[str, Any]]) -> None:
    """Warn of points that are slower as a graph than eagerly."""
    graphs = {}
    for row in rows:
        key = row["dtype"], row["allow_hf32"], row["batch_size"]
        graphs.setdefault(key, {})[row["execution"]] = row.get("images_per_s")
    for (dtype, _, batch_size), rates in graphs.items():
        if rates.get("graph") and rates.get("eager") and rates["graph"] < SLOWER * rates["eager"]:
            told = f"{rates['graph']:.2f} images/s, not {rates['eager']:.2f}"
            log.warning(f"{dtype}, batch size {batch_size}: the graph is slower than eager execution ({told})")


def varied(rows: list, changes: Sequence[dict[str, Any]], picks: Sequence[str] = PICKS) -> list[dict[str, Any]]:
    """The points of `picks` with each of `changes`, unless they were tried."""
    leaders = [row for name, row in pick(rows).items() if row and name in picks]
    tried, found = [{name: row[name] for name in POINT} for row in rows], []
    for row, change in itertools.product(leaders, changes):
        around = row["environment"] | change.get("environment", {})
        point = {name: row[name] for name in POINT} | change | {"environment": around}
        for name in ("without", "with_levers"):
            point[name] = [lever for lever in levers.LEVERS if lever in (*row[name], *change.get(name, ()))]
        if point["dtype"] == "float32" and "fused_mlp" in point["with_levers"]:
            continue  # it exists in half precision alone
        if point not in tried + found:
            found.append(point)
    return found


def tune(args: argparse.Namespace) -> int:
    """Search, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    device = inference.open_as_asked(args)
    model = levers.load_from_args(args, device)
    result: dict[str, Any] = {
        "device": device.kind,
        "image_size": model.preprocess.image_size,
        "threshold_percent": args.threshold_percent,
        "variables": list(ENVIRONMENTS[device.kind]),
        "rows": [],
        "picks": dict.fromkeys(PICKS),
        "commands": dict.fromkeys(PICKS),
        **inference.provenance(model),
    }
    preprocess = model.preprocess
    batch, used, rows = args.batch_size or inference.default_batch_size(device.kind), model.levers, result["rows"]
    del model  # its memory is the children's
    with tempfile.TemporaryDirectory() as folder, keeping(args, result, device) as keep:
        log.info("Computing the float64 reference ...")
        given = {"args": vars(args) | {"device": str(device.torch_device)}, "reference": f"{folder}/reference.npy"}
        save_reference(args, Path(given["reference"]))

        def measure(points: Sequence[dict[str, Any]]) -> None:
            for row in measure_points(given | {"variables": result["variables"]}, points):
                rows.append(row | {"within_bar": within(row, args.threshold_percent / 100)})
                keep(picks=pick(rows))
                log.info(summary(rows[-1]))

        search(device.kind, batch, used, measure, rows)
        result["decoding"] = end_to_end.measure_decoding(preprocess, args.seconds / 4, DECODING_ROUNDS)
    log.info("=== Tuning Summary ===")
    log_table(end_to_end.DECODING_COLUMNS, result["decoding"])
    for row in result["decoding"]:
        log.info(f"--decode {'fast' if row['ratio'] > 1 else 'exact'} is the faster one here for {row['photo']}")
    for name, row in result["picks"].items():
        log.info(f"{name}: {summary(row) if row else 'nothing was within its bar'}")
        if row:
            log.info(f"    {command_for(row, args, device.kind, args.model_path)}")
            result["commands"][name] = command_for(row, args, device.kind, inference.shown_path(args.model_path))
    inference.write_result(args, result)
    return 0 if any(result["picks"].values()) else 1


def command_for(row: dict[str, Any], args: argparse.Namespace, kind: str, model_path: str) -> str:
    """What to type so that embed.py computes as a point did, with the model that was loaded: environment and flags."""
    unset = [f"-u {name}" for name in ENVIRONMENTS[kind] if name in os.environ.keys() - row["environment"]]
    variables = [f"{name}={value}" for name, value in row["environment"].items()]
    words = [*(["env", *unset] if unset else []), *variables, "python embed.py --image_path photos/ --output features/"]
    words += [f"--device {kind if args.device == 'auto' else args.device}", f"--dtype {row['dtype']}"]
    words += [f"--batch_size {row['batch_size']}"]
    words += [f"--execution {row['execution']}"] if row["execution"] != "eager" else []
    words += ["--allow_hf32"] if row["allow_hf32"] else []
    words += [f"--without {' '.join(row['without'])}"] if row["without"] else []
    words += [f"--with {' '.join(row['with_levers'])}"] if row["with_levers"] else []
    words += [f"--model_path {shlex.quote(model_path)}"] if model_path != inference.DEFAULT_MODEL_PATH else []
    words += [f"--image_size {args.image_size}"] if args.image_size else []
    words += [f"--resize {args.resize}"] if args.resize != "crop" else []
    words += [f"--decode {args.decode}"] if args.decode != "exact" else []
    words += [f"--{name}" for name in ("random_weights", "trust_remote_code", "allow_unlocked") if getattr(args, name)]
    return " ".join(words)


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
    levers.add_lever_arguments(parser)
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("tuned", make_parser().parse_args(argv), tune)


if __name__ == "__main__":
    inference.leave(main())
