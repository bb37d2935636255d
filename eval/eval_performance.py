"""How fast, how close to the hardware's limit, and against whom.

    python eval/eval_performance.py --device npu --end_to_end 500
    python eval/eval_performance.py --device cuda --dtype float16 --batch_sizes 1 8 64 256 --execution graph

What is timed is the bundle's forward pass: uint8 crops on the device to class token and mean patch token, the device
synchronised around each run, another input each time. Beside it stand the host's part of that time, the rate of matrix
products at the model's own shapes, and what one would use instead (plain transformers, on an NPU also with torch_npu's own
defaults, on the CPU ONNX Runtime and OpenVINO where installed), taking turns; on an NPU also its power and the cost of
--deterministic. --end_to_end adds what a user waits for: a cold start, and a folder of N photos made from the samples. Writes
results/performance_eval.json and logs/performance_eval.log (performance_eval_cuda.* and so on for devices other than an NPU).

Exit codes: 0 done; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used; 70 an unforeseen error; 130 stopped.
Whatever ends it early, the rows measured until then are kept in performance_eval_partial*.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference
import numpy as np
from inference import Column, Encoder, LoadedModel, UsageError, log, time_once, torch

import npu_watch
from end_to_end import FEATURES, FIXED_SHARE, SAMPLES, log_end_to_end, measure_end_to_end, run_child

UNSTEADY = 0.10  # a spread of times, (max - min) / median, beyond which something else was at work on the machine
SETTLED = 0.05  # warm-up ends when two runs in a row differ by less
MAX_WARMUP_S = 10.0
LAUNCH_BOUND = 0.8  # the host's share of a run from which the device waits for launches
COPIED_BYTES = 256 * 2**20
PUBLISHED = inference.ROOT / "results" / "published" / "performance_eval.json"
MEMORY_KEYS = {"npu": "npu_memory_mb", "cuda": "gpu_memory_mb", "cpu": "peak_resident_memory_mb"}
MEMORY_LABELS = {"npu": "NPU Memory", "cuda": "GPU Memory", "cpu": "Peak resident memory"}

ROW_COLUMNS = (
    Column("Batch", "批大小", "batch_size"),
    Column("Mean (ms)", "平均（ms）", "mean_time_s", ".2f", 1e3),
    Column("P50 (ms)", "P50（ms）", "p50_s", ".2f", 1e3),
    Column("P50, 95% interval (ms)", "P50 的 95% 区间（ms）", "interval_ms"),
    Column("P95 (ms), if earned", "P95（ms），次数足够时", "earned_p95_s", ".2f", 1e3),
    Column("P99 (ms), if earned", "P99（ms），次数足够时", "earned_p99_s", ".2f", 1e3),
    Column("Enqueue (ms)", "下发（ms）", "enqueue_s", ".2f", 1e3),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
    Column("Pipelined images/s", "流水图片/秒", "pipelined_throughput_img_s", ".2f"),
    Column("Memory (MiB)", "内存（MiB）", "memory_mb", ".0f"),
    Column("TFLOP/s", "TFLOP/s", "tflops", ".2f"),
    Column("Of limit (%), median of paired turns", "占上限（%），成对轮次的中位数", "share_of_limit_percent", ".1f"),
    Column("Remarks", "说明", "remarks"),
)
LIMIT_COLUMNS = (
    Column("Limit (images/s)", "上限（图片/秒）", "limit_img_s", ".2f"),
    Column("Matrix products (TFLOP/s)", "矩阵乘（TFLOP/s）", "matmul_tflops", ".2f"),
    Column("Copy (GB/s)", "拷贝（GB/s）", "copy_gb_s", ".1f"),
    Column("GFLOP an image", "每图 GFLOP", "gflop_per_image", ".2f"),
    Column("Execution", "执行方式", "execution"),
    Column("Joules an image", "每图焦耳", "power.joules_per_image", ".3f"),
    Column("Power of the card (W)", "整卡功耗（W）", "power.watts", ".1f"),
    Column("--deterministic takes (times)", "--deterministic 耗时（倍）", "deterministic_cost.ratio", ".3f"),
)
PEER_COLUMNS = (
    Column("Instead", "替代方案", "peer"),
    Column("Batch", "批大小", "batch_size"),
    Column("Its images/s", "其图片/秒", "throughput_img_s", ".2f"),
    Column("This bundle's", "本项目图片/秒", "bundle_throughput_img_s", ".2f"),
    Column("Times as fast (median of paired turns)", "本项目快几倍（成对轮次的中位数）", "speed_ratio", ".3f"),
    Column("Turns", "轮次", "rounds"),
    Column("Remarks", "说明", "remarks"),
)

# --- rows of the tables ---


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for ROW_COLUMNS, of the published run's result too."""
    table = []
    for row in result["results"]:
        runs = len(row.get("raw_times_s", ())) or result.get("num_runs", 0)
        interval = [f"{1e3 * value:.2f}" for value in row.get("p50_interval_s") or ()]
        remarks = {"out_of_memory": "out of memory", "launch_bound": "launch-bound", "unsteady": "unsteady"}
        said = {
            "interval_ms": " to ".join(interval) or None,
            "memory_mb": next((row[key] for key in MEMORY_KEYS.values() if key in row), None),
            "remarks": ", ".join(words for key, words in remarks.items() if row.get(key)) or None,
        }
        said |= {f"earned_p{percent}_s": row.get(f"p{percent}_s") for percent in (95, 99) if runs >= runs_for(percent)}
        table.append(row | said)
    return table


def limit_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The row for LIMIT_COLUMNS."""
    return [result | result["limit"]] if result.get("limit") else []


def peer_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for PEER_COLUMNS."""
    return [row | {"remarks": row.get("unavailable") or row.get("reason")} for row in result.get("peers") or []]


# --- arithmetic: pure functions ---


def flop_per_image(model: LoadedModel) -> int:
    """Floating-point operations of a plain forward pass over one image, as torch counts them: 2 for a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    config = copy.deepcopy(model.module.config)
    config._attn_implementation = "eager"
    size = model.preprocess.image_size
    with torch.device("meta"):
        plain = type(model.module)(config).to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(pixel_values=torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def runs_for(percent: int, confidence: float = 0.99) -> int:
    """Runs from which a percentile may be quoted: the least n with P(Binomial(n, 1 - p) <= 1) <= 1 - confidence.

    That is MLPerf's early-stopping rule for its single-stream scenario with one run allowed above the estimate (LoadGen,
    early_stopping.cc, and the appendix "Early Stopping" of the inference rules): 64 for P90, 130 for P95, 662 for P99.
    """
    below, runs = percent / 100, 1
    while below**runs + runs * (1 - below) * below ** (runs - 1) > 1 - confidence:
        runs += 1
    return runs


def median_interval(times: Sequence[float], confidence: float = 0.95) -> list[float] | None:
    """The narrowest two order statistics, as far from either end, with the median between them; None for fewer than 6 times."""
    ordered, count, outside, place = sorted(times), len(times), 0.0, 0
    while (outside := outside + 2 * math.comb(count, place) / 2**count) <= 1 - confidence:
        place += 1
    return [ordered[place - 1], ordered[-place]] if place else None


def summarize(times: Sequence[float], enqueue: Sequence[float], batch_size: int) -> dict[str, Any]:
    """The published statistics of seconds per run (population standard deviation, linear percentiles), and what qualifies them.

    enqueue: the host's seconds until each call returned; none where the host itself computes.
    """
    mean, median = float(np.mean(times)), float(np.median(times))
    queued = float(np.median(enqueue)) if enqueue else None
    return {
        "mean_time_s": mean,
        "std_time_s": float(np.std(times)),
        "p50_s": median,
        "p95_s": float(np.percentile(times, 95)),
        "p99_s": float(np.percentile(times, 99)),
        "min_time_s": float(np.min(times)),
        "throughput_img_s": batch_size / mean,
        "p50_interval_s": median_interval(times),
        "enqueue_s": queued,
        "launch_bound": queued is not None and queued > LAUNCH_BOUND * median,
        "unsteady": bool((max(times) - min(times)) / median > UNSTEADY),
        "raw_times_s": list(times),
    }


def compare_rows(ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput of each batch size that both measured, and this run's as a multiple of the other's."""
    key = "throughput_img_s"
    theirs = {row["batch_size"]: row[key] for row in others if key in row}
    return [
        {"batch_size": size, key: row[key], f"other_{key}": theirs[size], "ratio": row[key] / theirs[size]}
        for row in ours
        if key in row and (size := row["batch_size"]) in theirs
    ]


# --- timing ---


def sample_crops(preprocess: inference.Preprocess) -> torch.Tensor:
    """The sample photos as uint8 crops [N, H, W, 3]."""
    return inference.crops_of(inference.find_images([str(SAMPLES)]), preprocess)


def warm_up(device: inference.Device, run: Callable[[], Any], at_least: int) -> int:
    """Run until two times in a row are alike, or for MAX_WARMUP_S; returns how many runs it took."""
    times: list[float] = []
    while len(times) < at_least or (sum(times) < MAX_WARMUP_S and (len(times) < 2 or abs(times[-1] / times[-2] - 1) > SETTLED)):
        times.append(time_once(device, run))
    return len(times)


def inputs(crops: torch.Tensor, batch_size: int, device: inference.Device) -> Iterator[torch.Tensor]:
    """Batches on the device without end, each another selection of the crops uint8 [N, H, W, 3]."""
    places = torch.arange(batch_size)
    batches = [crops[(places + first) % len(crops)].to(device.torch_device) for first in range(len(crops))]
    while True:
        yield from batches


def or_out_of_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """measure(), or what a row says of memory that ran out."""
    try:
        return measure()
    except Exception as error:
        if not inference.is_out_of_memory(error):
            raise
        return {"out_of_memory": True, "reason": inference.first_line(error)}


def halving(measure: Callable[[int], Any], size: int) -> Any:
    """measure(size), or of the half, the quarter and so on where that is out of memory, down to 1."""
    while True:
        try:
            return measure(size)
        except Exception as error:
            if size == 1 or not inference.is_out_of_memory(error):
                raise
        size //= 2  # only here has the error let go of what the attempt allocated


def measure_row(encoder: Encoder, crops: torch.Tensor, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of one batch size, or a row that says that it does not fit."""
    device = encoder.model.device
    encoder.batch_size = batch_size

    def measure() -> dict[str, Any]:
        if device.kind != "cpu":
            torch.get_device_module(device.torch_device).reset_peak_memory_stats()
        batches, enqueue = inputs(crops, batch_size, device), []

        def run() -> None:
            started = time.perf_counter()
            encoder.run(next(batches))
            enqueue.append(time.perf_counter() - started)

        warmup_runs = warm_up(device, run, args.warmup)
        enqueue.clear()
        times = [time_once(device, run) for _ in range(args.num_runs)]
        row = {"warmup_runs": warmup_runs} | summarize(times, enqueue if device.kind != "cpu" else [], batch_size)
        pipelined = None
        if device.kind != "cpu":  # which queues nothing
            seconds = time_once(device, lambda: [encoder.run(next(batches)) for _ in range(args.num_runs)])
            pipelined = args.num_runs * batch_size / seconds
        return row | {"pipelined_throughput_img_s": pipelined, MEMORY_KEYS[device.kind]: inference.peak_memory_mb(device)}

    row = {"batch_size": batch_size, "image_size": encoder.model.preprocess.image_size} | or_out_of_memory(measure)
    if "out_of_memory" in row:
        encoder.release()
    return row


def take_turns(
    encoder: Encoder, crops: torch.Tensor, peer: Callable, pixels: torch.Tensor, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Time peer and bundle on the same images in turns, the first of a turn alternating."""
    encoder.batch_size, device = batch_size, encoder.model.device
    ours, theirs = inputs(crops, batch_size, device), inputs(pixels, batch_size, device)
    runners: list[Callable[[], Any]] = [lambda: encoder.run(next(ours)), lambda: peer(next(theirs))]
    times: list[list[float]] = [[], []]
    for runner in runners:
        warm_up(device, runner, 1)
    for turn in range(rounds):
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            times[who].append(time_once(device, runners[who]))
    median = statistics.median(times[1])
    return {
        "median_time_s": median,
        "throughput_img_s": batch_size / median,
        "bundle_throughput_img_s": batch_size / statistics.median(times[0]),
        "speed_ratio": statistics.median(theirs / ours for ours, theirs in zip(*times, strict=True)),
        "rounds": rounds,
        "bundle_times_s": times[0],
        "peer_times_s": times[1],
    }


# --- the limit ---


def measure_limit(
    encoder: Encoder, crops: torch.Tensor, batch_sizes: Sequence[int], rounds: int, gflop: float, largest: int
) -> dict[str, Any]:
    """Rate of the model's own matrix products alone, at batch size `largest`, and each batch size's share of it; and of a copy.

    limit_img_s is what a forward pass would reach if it consisted of these products alone. Products and forward pass take
    turns, so that a share stays right where the machine's speed drifts.
    """
    products = list(matrix_products(encoder.model, largest))

    def run_products(_crops: torch.Tensor) -> None:
        for count, product in products:
            for _ in range(count):
                product()

    turns = [{"batch_size": size} | take_turns(encoder, crops, run_products, crops, size, rounds) for size in batch_sizes]
    rate = largest / statistics.median(seconds for row in turns for seconds in row["peer_times_s"])
    return {
        "batch_size": largest,
        "matmul_tflops": rate * gflop / 1e3,
        "limit_img_s": rate,
        "copy_gb_s": halving(partial(copy_bandwidth, encoder.model.device, rounds), COPIED_BYTES),
        "turns": [
            {
                "batch_size": row["batch_size"],
                "share_of_limit_percent": 100 * row["speed_ratio"] * row["batch_size"] / largest,
                "bundle_times_s": row["bundle_times_s"],
                "products_times_s": row["peer_times_s"],
            }
            for row in turns
        ],
    }


def copy_bandwidth(device: inference.Device, runs: int, size: int) -> float:
    """Gigabytes (1e9) a second, read and written, of a copy of `size` bytes within the device."""
    source = torch.ones(size // 4, device=device.torch_device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(time_once(device, lambda: target.copy_(source)) for _ in range(runs)) / 1e9


def matrix_products(model: LoadedModel, batch_size: int) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
    """How often each matrix product occurs in a forward pass, and the product itself on random numbers.

    The pooler's product, a ten-thousandth of the whole, is left out.
    """
    config = model.module.config
    layers, width, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    patches = (model.preprocess.image_size // config.patch_size) ** 2
    tokens, heads = patches + 1, config.num_attention_heads

    def random(*shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(inference.SEED)
        return torch.randn(shape, generator=generator).to(model.device.torch_device, model.dtype)

    def linear(rows: int, columns: int, results: int) -> Callable[[], torch.Tensor]:
        values, weight = random(rows, columns), random(results, columns)
        return lambda: torch.nn.functional.linear(values, weight)

    def batched(*shapes: tuple[int, int]) -> Callable[[], torch.Tensor]:
        left, right = (random(batch_size * heads, *shape) for shape in shapes)
        return lambda: torch.bmm(left, right)

    yield 1, linear(batch_size * patches, 3 * config.patch_size**2, width)
    yield 4 * layers, linear(batch_size * tokens, width, width)
    yield layers, linear(batch_size * tokens, width, mlp)
    yield layers, linear(batch_size * tokens, mlp, width)
    yield layers, batched((tokens, width // heads), (width // heads, tokens))
    yield layers, batched((tokens, tokens), (tokens, width // heads))


# --- the peers ---


def last_hidden_state_only(module: torch.nn.Module) -> torch.nn.Module:
    """The model as exporters want it: one tensor in, one out."""

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.module(pixel_values=pixel_values).last_hidden_state

    return LastHiddenState().eval()


def transformers_peer(
    plain: LoadedModel, _pixels: torch.Tensor, hf32_convolutions: bool = False
) -> Callable[[torch.Tensor], Any]:
    """A plain transformers forward pass over pixel values that were normalised beforehand."""
    kind, usual = plain.device.kind, plain.device.allow_hf32

    def run(pixels: torch.Tensor) -> Any:
        inference.set_float32_precision(kind, usual or hf32_convolutions, usual)  # read at each call
        try:
            with torch.inference_mode():
                return plain.module(pixel_values=pixels)
        finally:
            inference.set_float32_precision(kind, usual, usual)

    return run


def onnxruntime_peer(plain: LoadedModel, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """ONNX Runtime with as many threads as torch, on the model exported by torch.onnx."""
    import onnxruntime

    two = pixels[:1].repeat(2, 1, 1, 1)  # of one, the exporter would make a constant
    dynamic = {"pixel_values": {0: torch.export.Dim("batch")}}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        module = last_hidden_state_only(plain.module)
        torch.onnx.export(module, (two,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})[0]


def openvino_peer(plain: LoadedModel, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """OpenVINO in float32 with as many threads as torch."""
    import openvino

    converted = openvino.convert_model(last_hidden_state_only(plain.module), example_input=pixels[:1])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda pixels: compiled(pixels.numpy())[0]


def measure_peers(
    encoder: Encoder, crops: torch.Tensor, args: argparse.Namespace, batch_sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each peer and batch size: the peer and this bundle take turns, and the median ratio counts."""
    model, warnings_of = encoder.model, logging.getLogger("torch.onnx")
    wide = torch.promote_types(model.dtype, torch.float32)
    pixels = inference.normalize(crops, model.preprocess, wide).to(model.dtype)
    peers = {"transformers": (transformers_peer, {})}
    if model.device.kind == "npu":  # its defaults: tanh GELU, and float32 convolutions rounded to HF32
        peers["as torch_npu leaves it"] = partial(transformers_peer, hf32_convolutions=True), {"exact_gelu": False}
    elif (model.device.kind, model.dtype) == ("cpu", torch.float32):
        peers |= {"onnxruntime": (onnxruntime_peer, {}), "openvino": (openvino_peer, {})}
    for name, (make, changes) in peers.items():
        peer = None  # the one before must not stand in memory beside it
        try:
            with warnings.catch_warnings():  # exporters warn a dozen times about what they do not need
                warnings.simplefilter("ignore")
                warnings_of.setLevel(logging.ERROR)
                peer = make(inference.load_as_asked(args, model.device, levers=(), **changes), pixels)
                peer(pixels[:1].to(model.device.torch_device))
        except Exception as error:  # noqa: BLE001 (an exporter that is not installed, or fails on this model or version)
            yield {"peer": name, "unavailable": f"{type(error).__name__}: {inference.first_line(error)}"}
            continue
        for size in batch_sizes:
            turns = partial(take_turns, encoder, crops, peer, pixels, size, args.rounds)
            yield {"peer": name, "batch_size": size} | or_out_of_memory(turns)


# --- on an NPU ---


def measure_power(encoder: Encoder, crops: torch.Tensor, batch_size: int, seconds: float = 10.0) -> dict[str, Any] | None:
    """Keep the device busy for `seconds` while npu-smi watches it from a process of its own."""
    device, chip = encoder.model.device, npu_watch.chip_of(encoder.model.device)
    encoder.batch_size = batch_size
    batches, images, spent = inputs(crops, batch_size, device), 0, 0.0
    with npu_watch.watching(chip) as lines:
        while spent < seconds:
            spent += time_once(device, lambda: [encoder.run(next(batches)) for _ in range(10)])
            images += 10 * batch_size
    return npu_watch.summarize_watch(lines, chip, images / spent)


def measure_deterministic_cost(args: argparse.Namespace, device: inference.Device, batch_size: int) -> dict[str, Any]:
    """Times of a run with --deterministic and without, each in a process of its own: it acts only before the first operator."""
    given = {"args": json.loads(json.dumps(vars(args), default=str)), "batch_size": batch_size}
    try:
        with tempfile.TemporaryDirectory() as folder:
            times = [run_child("timed", Path(folder), device, deterministic=how, **given)[0] for how in (False, True)]
    except UsageError as error:
        return {"batch_size": batch_size, "unavailable": str(error)}
    return {"batch_size": batch_size, "p50_s": times[0], "deterministic_p50_s": times[1], "ratio": times[1] / times[0]}


# --- against the past ---


def read_other(path: Path) -> dict[str, Any]:
    """An earlier result. Raises UsageError if it is not one."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        compare_rows([], other["results"])
        return other
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--compare {path}: not a result of eval_performance.py ({inference.first_line(error)})") from error


def compare_with(path: Path, other: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Ratios per batch size, and what differs between the two runs' settings and environments."""
    info = inference.read_record(path.with_name("env_info.json")) if "versions" not in other else {}

    def describe(run: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:  # the published run names versions beside it
        names = ("device", "dtype", "image_size", "warmup", "num_runs", "execution", "allow_hf32")
        found = {name: run.get(name) for name in names}
        found["device_name"] = run.get("device_name", beside.get("npu_model"))
        for name in inference.versions():
            found[name] = run.get("versions", {}).get(name, beside.get(f"{name}_version"))
        return found | {"weights": run.get("weights", {}).get("source")}

    here, there = describe(result, {}), describe(other, info)
    return {
        "file": inference.relative_to_root(path),
        "rows": compare_rows(result["results"], other["results"]),
        "differences": {key: [here[key], there[key]] for key in here if here[key] != there[key]},
    }


# --- the evaluation ---


@contextmanager
def keeping(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """Gives a function that saves `result` as it is; whatever ends the block, that stays, and the last line says where.

    The file is NAME_partial.json beside the whole result, which it never replaces; it goes when all is done.
    """
    path = args.results / f"{inference.result_name(f'{args.script}_partial', result['device'])}.json"

    def keep() -> str:
        words = "nothing was measured yet"
        if rows:
            inference.write_json(path, result)
            words = f"what was measured so far ({len(rows)} rows) is in {inference.relative_to_root(path)}"
        inference.stopping.last_words = f"stopped; {words}"
        return words

    try:
        yield keep
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {keep()}") from None
    except UsageError as error:
        raise UsageError(f"{error}; {keep()}") from error
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {inference.first_line(error)}; {keep()}") from error
    path.unlink(missing_ok=True)


def evaluate(args: argparse.Namespace, device: inference.Device) -> int:
    """Measure, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    compare_path = Path(args.compare) if args.compare else PUBLISHED if device.kind == "npu" else None
    other = read_other(compare_path) if compare_path else None
    model = inference.load_from_args(args, device)
    encoder = Encoder(model, FEATURES, 1, args.execution)
    log.info(f"Image size: {model.preprocess.image_size}, Batch sizes: {args.batch_sizes}")
    log.info(f"Warmup: {args.warmup}, Num runs: {args.num_runs}")
    result: dict[str, Any] = {
        "device": device.kind,
        "dtype": args.dtype,
        "image_size": model.preprocess.image_size,
        "warmup": args.warmup,
        "num_runs": args.num_runs,
        "execution": args.execution,
        "partial": True,
        "gflop_per_image": flop_per_image(model) / 1e9,
        "results": [],
        **dict.fromkeys(("limit", "power", "deterministic_cost", "peers", "end_to_end", "comparison", "execution_fallback")),
        **inference.provenance(args, model),
    }
    with keeping(args, result, result["results"]) as keep:
        for _step in measure(encoder, args, result):
            keep()
    if other is not None:
        result["comparison"] = compare_with(compare_path, other, result)
        log_comparison(result["comparison"])
    inference.write_result(args, result | {"partial": False})
    return 0


def measure(encoder: Encoder, args: argparse.Namespace, result: dict[str, Any]) -> Iterator[None]:
    """Fill `result` in place, a step at a time, so that whatever ends it finds what there is."""
    device, crops = encoder.model.device, sample_crops(encoder.model.preprocess)
    others = npu_watch.others_on(npu_watch.chip_of(device)) if device.kind == "npu" else []
    if others:
        log.warning(f"Other processes are on this NPU, and its times may be too long: {', '.join(others)}")
    result["other_processes"] = others
    for batch_size in args.batch_sizes:
        log.info(f"--- Batch size: {batch_size} ---")
        result["results"].append(measure_row(encoder, crops, batch_size, args))
        log_row(result["results"][-1], device.kind)
        result["execution"], result["execution_fallback"] = encoder.execution, encoder.fallback
        yield
    fitting = {row["batch_size"]: row["throughput_img_s"] for row in result["results"] if "throughput_img_s" in row}
    if not fitting:
        raise UsageError(f"out of memory at every batch size of {args.batch_sizes}; try a smaller one, or --dtype float16")
    log.info("Measuring the limit ...")
    # The products stand beside the forward pass in memory, and may need to be of a smaller batch.
    limit = partial(measure_limit, encoder, crops, list(fitting), args.rounds, result["gflop_per_image"])
    result["limit"] = halving(limit, max(fitting))
    add_shares(result)
    if device.kind == "npu":
        best = max(fitting, key=fitting.get)
        result["power"] = measure_power(encoder, crops, best)
        result["deterministic_cost"] = measure_deterministic_cost(args, device, best)
    log_summary(result)
    yield
    result["peers"] = []
    for row in measure_peers(encoder, crops, args, list(fitting)):
        result["peers"].append(row)
        log_peer(row)
        yield
    if args.end_to_end:
        encoder.release()
        result["end_to_end"] = {}
        yield from measure_end_to_end(encoder.model, args, crops, result["end_to_end"])
        log_end_to_end(result)


def add_shares(result: dict[str, Any]) -> None:
    """Add to each row the rate of arithmetic that it reached, and the share of the limit."""
    shares = {turn["batch_size"]: turn["share_of_limit_percent"] for turn in result["limit"]["turns"]}
    for row in result["results"]:
        if "throughput_img_s" in row:
            row["tflops"] = row["throughput_img_s"] * result["gflop_per_image"] / 1e3
            row["share_of_limit_percent"] = shares[row["batch_size"]]


def log_row(row: dict[str, Any], kind: str) -> None:
    """The published lines."""
    if row.get("out_of_memory"):
        log.warning(f"Out of memory: {row['reason']}")
        return
    runs = len(row["raw_times_s"])
    few = f" ({runs} runs; a P95 needs {runs_for(95)})" if runs < runs_for(95) else ""
    log.info(f"Mean: {row['mean_time_s']:.4f}s, P50: {row['p50_s']:.4f}s, P95: {row['p95_s']:.4f}s{few}")
    log.info(f"Throughput: {row['throughput_img_s']:.2f} img/s, {MEMORY_LABELS[kind]}: {row[MEMORY_KEYS[kind]]:.1f} MiB")
    if row["launch_bound"]:
        log.info(f"Launch-bound: the host takes {1e3 * row['enqueue_s']:.2f} ms of it to queue the work, and the device waits")
    if row["unsteady"]:
        log.warning(f"Unsteady: times spread by more than {UNSTEADY:.0%}; something else was at work on this machine")


def log_summary(result: dict[str, Any]) -> None:
    """The published table, with the limit beside it."""
    log.info(f"=== Performance Summary ==={' (random weights)' if result['weights']['source'] == 'random' else ''}")
    inference.log_table(ROW_COLUMNS, rows(result))
    inference.log_table(LIMIT_COLUMNS, limit_rows(result))
    if power := result["power"]:
        told = f"{power['watts']:.1f} W for the whole card, {power['joules_per_image']:.3f} J an image"
        log.info(f"Power: {told} at {power['images_per_s']:.2f} img/s ({power['samples']} samples of npu-smi)")
    if cost := result["deterministic_cost"]:
        told = f"{cost['ratio']:.3f} times as long" if "ratio" in cost else f"(not measured: {cost['unavailable']})"
        log.info(f"--deterministic takes {told} at batch size {cost['batch_size']}")


def log_peer(row: dict[str, Any]) -> None:
    if "speed_ratio" not in row:
        log.info(f"Against {row['peer']}: not measured ({row.get('unavailable') or row['reason']})")
        return
    ours = f"this bundle {row['bundle_throughput_img_s']:.2f}, {row['speed_ratio']:.3f} times as fast"
    rates = f"{row['throughput_img_s']:.2f} img/s, {ours} (median of {row['rounds']} turns)"
    log.info(f"Against {row['peer']}, batch size {row['batch_size']}: {rates}")


def log_comparison(comparison: dict[str, Any]) -> None:
    log.info(f"Against {comparison['file']}:")
    for row in comparison["rows"]:
        there = f"there {row['other_throughput_img_s']:.2f}: {row['ratio']:.3f} times"
        log.info(f"Batch size {row['batch_size']}: {row['throughput_img_s']:.2f} img/s, {there}")
    for key, (here, there) in comparison["differences"].items():
        log.info(f"Differs: {key} is {here}, there {there}")


def positive_float(text: str) -> float:
    """An argparse type."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    number = inference.positive_int
    add = parser.add_argument_group("measurement").add_argument
    add("--batch_sizes", nargs="+", type=number, default=[1, 2, 4, 8], metavar="N", help="(default: 1 2 4 8)")
    add("--warmup", type=number, default=3, metavar="N", help="runs before timing, more until they settle (default: 3)")
    add("--num_runs", type=number, default=10, metavar="N", help="timed runs of each batch size (default: 10)")
    add("--rounds", type=number, default=5, metavar="N", help="turns that limit and peers take (default: 5)")
    how = "graph: capture the forward pass and replay it (NPU, GPU)"
    add("--execution", choices=("eager", "graph"), default="eager", help=how)
    add("--end_to_end", type=number, metavar="N", help="also measure a cold start and a folder of N photos")
    sizes = "their sizes (default: 0.2 12)"
    add("--megapixels", nargs=2, type=positive_float, default=[0.2, 12], metavar=("LOW", "HIGH"), help=sizes)
    length = f"of a turn through the folder (default: until fixed costs are {FIXED_SHARE:.0%}% of it)"
    add("--turn_seconds", type=positive_float, metavar="S", help=length)
    add("--compare", metavar="FILE", help="an earlier result to compare with (default on an NPU: the published run)")
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("performance_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    sys.exit(main())
