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
import dataclasses
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
import numpy as np
import torch
from inference import LoadedModel, UsageError, log, time_once

import npu_watch
from bulk import levers
from bulk.encoder import Encoder
from common import FEATURES, ChildError, Column, ask_child, keeping, log_table, peak_memory_mb, positive_float, sample_crops
from end_to_end import FIXED_SHARE, log_end_to_end, measure_end_to_end
from stages import Arithmetic

UNSTEADY = 0.10  # a spread, from the 5th to the 95th percentile over the median, beyond which something else was at work
SETTLED = 0.05  # warm-up ends when two runs in a row differ by less
MAX_WARMUP_S = 10.0
SLOWER = 0.97  # times as fast as eager execution, below which a graph is called slower
LAUNCH_BOUND = 0.8  # the host's share of a run from which the device waits for launches
EARNED_BY = {95: 130, 99: 662}  # runs from which a percentile may be quoted: MLPerf's early stopping at 99% confidence
MEMORY_KEYS = {"npu": "npu_memory_mb", "cuda": "gpu_memory_mb", "cpu": "peak_resident_memory_mb"}
MEMORY_LABELS = {"npu": "NPU Memory", "cuda": "GPU Memory", "cpu": "Peak resident memory"}

ROW_COLUMNS = (
    Column("Batch", "批大小", "batch_size"),
    Column("Mean (ms)", "平均（ms）", "mean_time_s", ".2f", 1e3),
    Column("SD (ms)", "标准差（ms）", "std_time_s", ".2f", 1e3),
    Column("P50 (ms)", "P50（ms）", "p50_s", ".2f", 1e3),
    Column("P50, 95% interval (ms)", "P50 的 95% 区间（ms）", "interval_ms"),
    Column("P95 (ms)", "P95（ms）", "earned_p95_s", ".2f", 1e3),
    Column("P99 (ms)", "P99（ms）", "earned_p99_s", ".2f", 1e3),
    Column("Enqueue (ms)", "下发（ms）", "enqueue_s", ".2f", 1e3),
    Column("Images/s", "图片/秒", "throughput_img_s", ".2f"),
    Column("Pipelined images/s", "流水图片/秒", "pipelined_throughput_img_s", ".2f"),
    Column("Memory (MiB)", "内存（MiB）", "memory_mb", ".0f"),
    Column("TFLOP/s", "TFLOP/s", "tflops", ".2f"),
    Column("Graph to eager", "图与即时执行之比", "graph_to_eager", ".2f"),
    Column("Of limit (%)", "占上限（%）", "share_of_limit_percent", ".1f"),
    Column("Remarks", "说明", "remarks"),
)
LIMIT_COLUMNS = (
    Column("Limit (images/s)", "上限（图片/秒）", "limit_img_s", ".2f"),
    Column("Matrix products (TFLOP/s)", "矩阵乘（TFLOP/s）", "matmul_tflops", ".2f"),
    Column("GFLOP an image", "每图 GFLOP", "gflop_per_image", ".2f"),
    Column("Execution", "执行方式", "execution"),
    Column("Joules an image, whole card", "每图焦耳（整卡）", "power.joules_per_image", ".3f"),
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
    """Rows for ROW_COLUMNS; of the published run too, whose P95 stands as it was published, though of ten timings."""
    published = "weights" not in result
    remarks = {"out_of_memory": "out of memory", "launch_bound": "launch-bound", "unsteady": "unsteady"}
    table = []
    for row in result["results"]:
        runs = len(row.get("raw_times_s", ())) or result.get("num_runs", 0)
        said = {
            f"earned_p{percent}_s": row.get(f"p{percent}_s")
            for percent, least in EARNED_BY.items()
            if published or runs >= least
        }
        said["interval_ms"] = " to ".join(f"{1e3 * value:.2f}" for value in row.get("p50_interval_s") or ()) or None
        said["memory_mb"] = next((row[key] for key in MEMORY_KEYS.values() if key in row), None)
        said["remarks"] = ", ".join(words for key, words in remarks.items() if row.get(key)) or None
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
        "unsteady": bool(np.ptp(np.percentile(times, (5, 95))) / median > UNSTEADY),
        "raw_times_s": list(times),
    }


# --- timing ---


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


def or_out_of_memory(encoder: Encoder, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """measure(), or what a row says of memory that ran out."""
    try:
        return measure()
    except Exception as error:
        inference.raise_if_lost(error)
        if not inference.is_out_of_memory(error):
            raise
        reason = inference.first_line(error)
    encoder.release()  # only here has the error let go of what the attempt allocated
    return {"out_of_memory": True, "reason": reason}


def measure_row(encoder: Encoder, crops: torch.Tensor, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of one batch size."""
    device, queues = encoder.model.device, encoder.model.device.kind != "cpu"
    encoder.batch_size = batch_size
    if queues:
        torch.get_device_module(device.torch_device).reset_peak_memory_stats()
    batches, enqueue = inputs(crops, batch_size, device), []

    def run() -> None:
        started = time.perf_counter()
        encoder.run(next(batches))
        enqueue.append(time.perf_counter() - started)

    warmup_runs = warm_up(device, run, args.warmup)
    enqueue.clear()
    times = [time_once(device, run) for _ in range(args.num_runs)]
    row = {"warmup_runs": warmup_runs} | summarize(times, enqueue if queues else [], batch_size)
    row["pipelined_throughput_img_s"] = None
    if queues:
        seconds = time_once(device, lambda: [encoder.run(next(batches)) for _ in range(args.num_runs)])
        row["pipelined_throughput_img_s"] = args.num_runs * batch_size / seconds
    return row | {MEMORY_KEYS[device.kind]: peak_memory_mb(device)}


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
    return {
        "batch_size": batch_size,
        "throughput_img_s": batch_size / statistics.median(times[1]),
        "bundle_throughput_img_s": batch_size / statistics.median(times[0]),
        "speed_ratio": statistics.median(theirs / ours for ours, theirs in zip(*times, strict=True)),
        "rounds": rounds,
        "bundle_times_s": times[0],
        "peer_times_s": times[1],
    }


# --- the limit ---


def against_eager(encoder: Encoder, crops: torch.Tensor, batch_size: int, rounds: int) -> dict[str, Any]:
    """How many times as fast as eager execution a graph is, in turns."""
    eager = Encoder(encoder.model, FEATURES, batch_size)
    return {"graph_to_eager": take_turns(encoder, crops, eager.run, crops, batch_size, rounds)["speed_ratio"]}


def measure_limit(
    encoder: Encoder, crops: torch.Tensor, batch_sizes: Sequence[int], rounds: int, gflop: float, largest: int
) -> dict[str, Any]:
    """Rate of the model's own matrix products alone, at batch size `largest`, and each batch size's share of it.

    limit_img_s is what a forward pass would reach if it consisted of these products alone. Products and forward pass take
    turns, so that a share stays right where the machine's speed drifts.
    """
    products = list(matrix_products(encoder.model, largest))

    def run_products(_crops: torch.Tensor) -> None:
        for count, product in products:
            for _ in range(count):
                product()

    turns = [take_turns(encoder, crops, run_products, crops, size, rounds) for size in batch_sizes]
    for row in turns:
        row["share_of_limit_percent"] = 100 * row["speed_ratio"] * row["batch_size"] / largest
    rate = largest / statistics.median(seconds for row in turns for seconds in row["peer_times_s"])
    return {"batch_size": largest, "matmul_tflops": rate * gflop / 1e3, "limit_img_s": rate, "turns": turns}


def matrix_products(model: LoadedModel, batch_size: int) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
    """How often each matrix product occurs in a forward pass, and the product itself on random numbers.

    The pooler's product, a ten-thousandth of the whole, is left out.
    """
    config = model.module.config
    layers, width, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    patches = (model.preprocess.image_size // config.patch_size) ** 2
    tokens, heads = patches + 1, config.num_attention_heads

    shapes = (  # how often, blocks, rows, columns, results
        (1, 1, batch_size * patches, 3 * config.patch_size**2, width),
        (4 * layers, 1, batch_size * tokens, width, width),
        (layers, 1, batch_size * tokens, width, mlp),
        (layers, 1, batch_size * tokens, mlp, width),
        (layers, batch_size * heads, tokens, width // heads, tokens),
        (layers, batch_size * heads, tokens, tokens, width // heads),
    )
    for count, blocks, rows, columns, results in shapes:
        left, right = torch.randn(blocks, rows, columns), torch.randn(blocks, results, columns)
        left, right = (values.squeeze(0).to(model.device.torch_device, model.dtype) for values in (left, right))
        if "packed_weights" in model.levers and blocks == 1:  # else the forward pass would be faster than its limit
            yield count, partial(levers.packed(right, None), left)
        else:
            yield count, partial(torch.matmul, left, right.mT)


# --- the peers ---


def without_mask(module: torch.nn.Module) -> torch.nn.Module:
    """transformers' model with attention that takes no mask: while traced, a ViT gets one of all true, which costs speed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(_module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **_options: Any) -> Any:
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return levers.attention(*parts, fused=False), None

    ALL_ATTENTION_FUNCTIONS.register("without_mask", attend)
    module.config._attn_implementation = "without_mask"
    return module


def transformers_peer(plain: LoadedModel, arithmetic: Arithmetic, _pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """A plain transformers forward pass over pixel values that were normalised beforehand."""

    def run(pixels: torch.Tensor) -> Any:
        with arithmetic.active(plain.device), torch.inference_mode():
            return plain.module(pixel_values=pixels)

    return run


def only_last_hidden_state(plain: LoadedModel) -> torch.nn.Module:
    """The model as exporters want it: one tensor in, one out."""
    whole = without_mask(plain.module).forward
    plain.module.forward = lambda pixel_values: whole(pixel_values=pixel_values).last_hidden_state
    return plain.module


def compile_peer(plain: LoadedModel, arithmetic: Arithmetic, _pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """torch.compile, in its fastest mode for one image and for more."""
    module = without_mask(plain.module)
    alone, together = (torch.compile(module, mode=mode, dynamic=False) for mode in ("reduce-overhead", "default"))

    def run(pixels: torch.Tensor) -> Any:
        with arithmetic.active(plain.device), torch.inference_mode():
            return (alone if len(pixels) == 1 else together)(pixel_values=pixels)

    return run


def onnxruntime_peer(plain: LoadedModel, _arithmetic: Arithmetic, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """ONNX Runtime with as many threads as torch, on the model exported by torch.onnx."""
    import onnxruntime

    two = pixels[:1].repeat(2, 1, 1, 1)  # of one, the exporter would make a constant
    dynamic = {"pixel_values": {0: torch.export.Dim("batch")}}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(only_last_hidden_state(plain), (two,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})[0]


def openvino_peer(plain: LoadedModel, _arithmetic: Arithmetic, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """OpenVINO in float32 with as many threads as torch."""
    import openvino

    converted = openvino.convert_model(only_last_hidden_state(plain), example_input=pixels[:1])
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
    plain = Arithmetic("transformers", args.dtype, (args.allow_hf32, args.allow_hf32), plain=True)
    peers = {"transformers": (transformers_peer, plain)}
    if model.device.kind == "npu":  # its defaults: tanh GELU, and float32 convolutions rounded to HF32
        left = dataclasses.replace(plain, hf32=(True, args.allow_hf32), as_left=True)
        peers["as torch_npu leaves it"] = transformers_peer, left
    elif model.device.kind == "cuda":
        peers["torch.compile"] = compile_peer, plain
    elif model.dtype == torch.float32:
        peers |= {"onnxruntime": (onnxruntime_peer, plain), "openvino": (openvino_peer, plain)}
    for name, (make, arithmetic) in peers.items():
        log.info(f"Taking turns with {name} ...")
        peer = None  # the one before must not stand in memory beside it
        try:
            with warnings.catch_warnings():  # exporters warn a dozen times about what they do not need
                warnings.simplefilter("ignore")
                warnings_of.setLevel(logging.ERROR)
                peer = make(arithmetic.load(args, model.device), arithmetic, pixels)
                peer(pixels[:1].to(model.device.torch_device))
        except Exception as error:  # noqa: BLE001
            inference.raise_if_lost(error)  # else an exporter that is not installed, or fails on this model or version
            yield {"peer": name, "unavailable": f"{type(error).__name__}: {inference.first_line(error)}"}
            continue
        for size in batch_sizes:
            turns = partial(take_turns, encoder, crops, peer, pixels, size, args.rounds)
            yield {"peer": name, "batch_size": size} | or_out_of_memory(encoder, turns)


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


def measure_deterministic_cost(args: argparse.Namespace, device: inference.Device, row: dict[str, Any]) -> dict[str, Any]:
    """How many times as long as `row` --deterministic takes: in a process of its own, as it acts only at first use."""
    batch = {"batch_size": row["batch_size"]}
    given = batch | {"args": vars(args) | {"device": str(device.torch_device), "deterministic": True}}
    try:
        [seconds] = ask_child("import eval_performance; tell(eval_performance.median_time(given))", given, 1, 600)
    except ChildError as error:
        log.warning(f"What --deterministic costs is not known: {error}")
        return batch | {"unavailable": str(error)}
    return batch | {"p50_s": row["p50_s"], "deterministic_p50_s": seconds, "ratio": seconds / row["p50_s"]}


def median_time(given: dict[str, Any]) -> float:
    """The child's part: seconds of a batch on a device that was opened as the arguments ask."""
    args = argparse.Namespace(**given["args"])
    model = levers.load_as_asked(args, inference.open_device(args.device, args.allow_hf32, args.deterministic))
    encoder = Encoder(model, FEATURES, 1, args.execution)
    return measure_row(encoder, sample_crops(model.preprocess), given["batch_size"], args)["p50_s"]


# --- the evaluation ---


def evaluate(args: argparse.Namespace) -> int:
    """Measure, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    device = inference.open_as_asked(args)
    model = levers.load_from_args(args, device)
    encoder = Encoder(model, FEATURES, 1, args.execution)
    log.info(f"Image size: {model.preprocess.image_size}, Batch sizes: {args.batch_sizes}")
    log.info(f"Warmup: {args.warmup}, Num runs: {args.num_runs}")
    result: dict[str, Any] = {
        "device": device.kind,
        "dtype": args.dtype,
        "image_size": model.preprocess.image_size,
        "warmup": args.warmup,
        "num_runs": args.num_runs,
        "gflop_per_image": flop_per_image(model) / 1e9,
        "results": [],
        **dict.fromkeys(("limit", "power", "deterministic_cost", "peers", "end_to_end")),
        **inference.provenance(model),
    }
    with keeping(args, result, device) as keep:
        measure(encoder, args, result, keep)
    inference.write_result(args, result)
    return 0


def measure(encoder: Encoder, args: argparse.Namespace, result: dict[str, Any], keep: Callable[..., None]) -> None:
    """Fill `result`, and keep it after each step."""
    device, crops = encoder.model.device, sample_crops(encoder.model.preprocess)
    others = npu_watch.others_on(npu_watch.chip_of(device)) if device.kind == "npu" else []
    if others:
        log.warning(f"Other processes are on this NPU, and its times may be too long: {', '.join(others)}")
    result["other_processes"] = others
    for batch_size in args.batch_sizes:
        log.info(f"--- Batch size: {batch_size} ---")
        row = or_out_of_memory(encoder, partial(measure_row, encoder, crops, batch_size, args))
        log_row(row, device.kind)
        if encoder.execution == "graph" and "raw_times_s" in row:
            row |= or_out_of_memory(encoder, partial(against_eager, encoder, crops, batch_size, args.rounds))
            if row.get("graph_to_eager", 1) < SLOWER:
                log.warning(f"The graph is slower than eager execution: {row['graph_to_eager']:.2f} times as fast")
        result["results"].append({"batch_size": batch_size, "image_size": result["image_size"]} | row)
        keep(execution=encoder.execution, execution_fallback=encoder.fallback)
    fitting = [row for row in result["results"] if "throughput_img_s" in row]
    if not fitting:
        raise UsageError(f"out of memory at every batch size of {args.batch_sizes}; try a smaller one, or --dtype float16")
    log.info("Measuring the limit ...")
    sizes = [row["batch_size"] for row in fitting]
    limit, largest = {"out_of_memory": True}, 2 * max(sizes)
    while "out_of_memory" in limit and largest > 1:  # the products stand beside the forward pass in memory
        largest //= 2
        products = partial(measure_limit, encoder, crops, sizes, args.rounds, result["gflop_per_image"], largest)
        limit = or_out_of_memory(encoder, products)
    for row, turn in zip(fitting, limit.get("turns", ()), strict=False):
        row["tflops"] = row["throughput_img_s"] * result["gflop_per_image"] / 1e3
        row["share_of_limit_percent"] = turn["share_of_limit_percent"]
    keep(limit=limit)
    if device.kind == "npu":
        best = max(fitting, key=lambda row: row["throughput_img_s"])
        keep(power=measure_power(encoder, crops, best["batch_size"]))
        if not device.deterministic:
            keep(deterministic_cost=measure_deterministic_cost(args, device, best))
    log.info(f"=== Performance Summary ==={' (random weights)' if result['weights']['source'] == 'random' else ''}")
    log_table(ROW_COLUMNS, rows(result))
    log_table(LIMIT_COLUMNS, limit_rows(result))
    result["peers"] = []
    for row in measure_peers(encoder, crops, args, sizes):
        result["peers"].append(row)
        keep()
    log_table(PEER_COLUMNS, peer_rows(result))
    if args.end_to_end:
        encoder.release()
        measure_end_to_end(encoder.model, args, keep)
        log_end_to_end(result)


def log_row(row: dict[str, Any], kind: str) -> None:
    """The published lines."""
    if row.get("out_of_memory"):
        log.warning(f"Out of memory: {row['reason']}")
        return
    few = f" (a P95 needs {EARNED_BY[95]} runs)" if len(row["raw_times_s"]) < EARNED_BY[95] else ""
    log.info(f"Mean: {row['mean_time_s']:.4f}s, P50: {row['p50_s']:.4f}s, P95: {row['p95_s']:.4f}s{few}")
    log.info(f"Throughput: {row['throughput_img_s']:.2f} img/s, {MEMORY_LABELS[kind]}: {row[MEMORY_KEYS[kind]]:.1f} MiB")


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
    levers.add_lever_arguments(parser)
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("performance_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    inference.leave(main())
