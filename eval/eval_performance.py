"""How fast, how close to the hardware's limit, and against whom.

    python eval/eval_performance.py --device npu
    python eval/eval_performance.py --device cuda --dtype float16 --batch_sizes 1 8 64 256 --execution graph
    python eval/eval_performance.py --device npu --end_to_end 500

What is timed is the bundle's forward pass: uint8 crops on the device to class token and mean patch token, the device
synchronised around each run, another input each time. Beside it stand the rate of matrix products at the model's own
shapes, measured in the same process, and the same forward pass by a plain transformers loop (on the CPU also ONNX Runtime
and OpenVINO where they are installed), taking turns. --end_to_end adds what a user waits for: a cold start, and a folder of
photos made from the samples. Writes results/performance_eval.json and logs/performance_eval.log (performance_eval_cuda.*
and so on for devices other than an NPU).

Exit codes: 0 done; 2 wrong usage or unusable input; 3 BLOCKED: the device cannot be used; 130 stopped by Ctrl-C (what was
measured until then is kept in performance_eval_partial*.json).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference  # first of all: it sets what must precede torch
import numpy as np
import torch
from inference import Encoder, LoadedModel, UsageError, log
from PIL import Image, ImageOps

FEATURES = ("class_token", "mean_patch_token")
UNSTEADY = 0.10  # a spread of times, (max - min) / median, beyond which something else was at work on the machine
SETTLED = 0.05  # warm-up ends when two runs in a row differ by less
MAX_WARMUP_S = 10.0
COPIED_BYTES = 256 * 2**20
PUBLISHED = inference.ROOT / "results" / "published" / "performance_eval.json"
MEMORY_KEYS = {"npu": "npu_memory_mb", "cuda": "gpu_memory_mb", "cpu": "peak_resident_memory_mb"}
MEMORY_LABELS = {"npu": "NPU Memory", "cuda": "GPU Memory", "cpu": "Peak resident memory"}


# --- arithmetic: pure functions ---


def flop_per_image(config: Any, image_size: int) -> int:
    """Floating-point operations of a forward pass over one image, 2 for a multiply-add, in matrix products alone.

    Of a ViT with T tokens, width D and MLP width M, a layer has four D x D projections, an MLP and two products of
    attention; patch embedding and pooler come on top.
    """
    patches = (image_size // config.patch_size) ** 2
    tokens, width, mlp = patches + 1, config.hidden_size, config.intermediate_size
    layer = 4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * mlp + 2 * 2 * tokens**2 * width
    return 2 * patches * 3 * config.patch_size**2 * width + config.num_hidden_layers * layer + 2 * width**2


def summarize(times: Sequence[float], batch_size: int) -> dict[str, Any]:
    """The published statistics of seconds per run (population standard deviation, linear percentiles), and whether they spread."""
    mean, median = float(np.mean(times)), float(np.median(times))
    return {
        "mean_time_s": mean,
        "std_time_s": float(np.std(times)),
        "p50_s": median,
        "p95_s": float(np.percentile(times, 95)),
        "p99_s": float(np.percentile(times, 99)),
        "min_time_s": float(np.min(times)),
        "throughput_img_s": batch_size / mean,
        "unsteady": bool((max(times) - min(times)) / median > UNSTEADY),
        "raw_times_s": list(times),
    }


def compare_rows(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput of each batch size that both measured, and this run's as a multiple of the other's."""
    theirs = {row["batch_size"]: row["throughput_img_s"] for row in others if "throughput_img_s" in row}
    return [
        {
            "batch_size": row["batch_size"],
            "throughput_img_s": row["throughput_img_s"],
            "other_throughput_img_s": theirs[row["batch_size"]],
            "ratio": row["throughput_img_s"] / theirs[row["batch_size"]],
        }
        for row in rows
        if "throughput_img_s" in row and row["batch_size"] in theirs
    ]


# --- timing ---


def time_once(device: inference.Device, run: Callable[[], Any]) -> float:
    """Seconds from a synchronised device until all that `run` queues on it is done."""
    inference.synchronize(device)
    started = time.perf_counter()
    run()
    inference.synchronize(device)
    return time.perf_counter() - started


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


def measure_row(encoder: Encoder, crops: torch.Tensor, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of one batch size, or a row that says that it does not fit."""
    device = encoder.model.device
    row: dict[str, Any] = {"batch_size": batch_size, "image_size": encoder.model.preprocess.image_size}
    encoder.batch_size = batch_size
    try:
        if device.kind != "cpu":
            torch.get_device_module(device.torch_device).reset_peak_memory_stats()
        batches = inputs(crops, batch_size, device)
        row["warmup_runs"] = warm_up(device, lambda: encoder.run(next(batches)), args.warmup)
        times = [time_once(device, lambda: encoder.run(next(batches))) for _ in range(args.num_runs)]
        row |= summarize(times, batch_size)
        row["pipelined_throughput_img_s"] = None
        if device.kind != "cpu":  # which queues nothing
            seconds = time_once(device, lambda: [encoder.run(next(batches)) for _ in range(args.num_runs)])
            row["pipelined_throughput_img_s"] = args.num_runs * batch_size / seconds
        row[MEMORY_KEYS[device.kind]] = inference.peak_memory_mb(device)
    except torch.OutOfMemoryError as error:
        encoder.release()
        row |= {"out_of_memory": True, "reason": inference.first_line(error)}
    return row


# --- the limit ---


def measure_limit(
    encoder: Encoder, crops: torch.Tensor, batch_sizes: Sequence[int], rounds: int, largest: int
) -> dict[str, Any]:
    """Rate of the model's own matrix products alone, at batch size `largest`, and each batch size's share of it; and of a copy.

    limit_img_s is what a forward pass would reach if it consisted of these products alone. Products and forward pass take
    turns, so that a share stays right where the machine's speed drifts.
    """
    model = encoder.model
    products = list(matrix_products(model, largest))

    def run_products(_crops: torch.Tensor) -> None:
        for count, product in products:
            for _ in range(count):
                product()

    turns = [{"batch_size": size} | take_turns(encoder, crops, run_products, crops, size, rounds) for size in batch_sizes]
    rate = largest / statistics.median(seconds for row in turns for seconds in row["peer_times_s"])
    return {
        "batch_size": largest,
        "matmul_tflops": rate * flop_per_image(model.module.config, model.preprocess.image_size) / 1e12,
        "limit_img_s": rate,
        "copy_gb_s": halving(partial(copy_bandwidth, model.device, rounds), COPIED_BYTES),
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


def halving(measure: Callable[[int], Any], size: int) -> Any:
    """measure(size), or of the half, the quarter and so on where that is out of memory, down to 1."""
    while True:
        try:
            return measure(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # only here has the error let go of what the attempt allocated


def copy_bandwidth(device: inference.Device, runs: int, size: int) -> float:
    """Gigabytes a second, read and written, of a copy of `size` bytes within the device."""
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


class _LastHiddenState(torch.nn.Module):
    """The model as exporters want it: one tensor in, one out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.module(pixel_values=pixel_values).last_hidden_state


def transformers_peer(model: LoadedModel, _pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """A plain transformers forward pass over pixel values that were normalised beforehand."""

    def run(pixels: torch.Tensor) -> Any:
        with torch.inference_mode():
            return model.module(pixel_values=pixels)

    return run


def onnxruntime_peer(model: LoadedModel, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """ONNX Runtime with as many threads as torch, on the model exported by torch.onnx."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        dynamic = {"pixel_values": {0: torch.export.Dim("batch")}}
        # Two images: of one, the exporter would make a constant.
        torch.onnx.export(
            _LastHiddenState(model.module).eval(),
            (pixels[:1].repeat(2, 1, 1, 1),),
            path,
            dynamo=True,
            dynamic_shapes=dynamic,
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels.numpy()})[0]


def openvino_peer(model: LoadedModel, pixels: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """OpenVINO in float32 with as many threads as torch."""
    import openvino

    converted = openvino.convert_model(_LastHiddenState(model.module).eval(), example_input=pixels[:1])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda pixels: compiled(pixels.numpy())[0]


PEERS = {"transformers": transformers_peer, "onnxruntime": onnxruntime_peer, "openvino": openvino_peer}


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Exporters warn a dozen times about what they do not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def measure_peers(
    encoder: Encoder, crops: torch.Tensor, args: argparse.Namespace, batch_sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each peer and batch size: the peer and this bundle take turns, and the median ratio counts."""
    model = encoder.model
    wide = torch.promote_types(model.dtype, torch.float32)
    pixels = inference.normalize(crops, model.preprocess, wide).to(model.dtype)
    names = list(PEERS) if (model.device.kind, model.dtype) == ("cpu", torch.float32) else ["transformers"]
    for name in names:
        try:
            with _quiet_exporters():
                peer = PEERS[name](model, pixels)
                peer(pixels[:1].to(model.device.torch_device))
        except Exception as error:  # an exporter that is not installed, or that fails on this model or version
            yield {"peer": name, "unavailable": f"{type(error).__name__}: {inference.first_line(error)}"}
            continue
        for batch_size in batch_sizes:
            yield {"peer": name, "batch_size": batch_size} | take_turns(encoder, crops, peer, pixels, batch_size, args.rounds)


def take_turns(
    encoder: Encoder,
    crops: torch.Tensor,
    peer: Callable[[torch.Tensor], Any],
    pixels: torch.Tensor,
    batch_size: int,
    rounds: int,
) -> dict[str, Any]:
    """Time peer and bundle on the same images in turns, the first of a turn alternating."""
    device = encoder.model.device
    encoder.batch_size = batch_size
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


# --- what a user waits for ---

# A cold start in a process of its own, through the bundle and with the bare minimum: import, read the file, one forward pass.
COLD_START = {
    "bundle": """
import sys, time
import inference, transformers
from transformers import ViTModel
imported = time.time()
device = inference.open_device(sys.argv[2])
model = inference.load_model(device, sys.argv[1], sys.argv[4])
loaded = time.time()
crop = inference.read_crop(inference.list_images([sys.argv[3]])[0], model.preprocess)
inference.Encoder(model, ["class_token"], 1).submit(inference.torch.from_numpy(crop)[None])()
done = time.time()
print(imported, loaded, done, inference.peak_memory_mb(inference.open_device("cpu")), flush=True)
inference.os._exit(0)  # nobody who has the features waits for the hash of the weights
""",
    "bare": """
import os, sys, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
if sys.argv[2].startswith("npu"):
    import torch_npu
from transformers import ViTConfig, ViTModel
imported = time.time()
data = open(sys.argv[1] + "/model.safetensors", "rb").read()
with torch.device("meta"):
    model = ViTModel(ViTConfig.from_pretrained(sys.argv[1])).eval()
dtype = getattr(torch, sys.argv[4])
model = model.to(dtype).to_empty(device=sys.argv[2])
loaded = time.time()
with torch.inference_mode():
    size = model.config.image_size
    model(torch.zeros(1, 3, size, size, dtype=dtype, device=sys.argv[2])).last_hidden_state.cpu()
done = time.time()
import inference
print(imported, loaded, done, inference.peak_memory_mb(inference.open_device("cpu")))
""",
}


def measure_cold_start(model: LoadedModel, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of a process to the first feature of one photo from a checkpoint in `folder`; medians over rounds."""
    photo = inference.ROOT / "assets" / "samples" / "chelsea.jpg"
    arguments = [str(folder), str(model.device.torch_device), str(photo), model.dtype_name]
    found: dict[str, list[list[float]]] = {"bundle": [], "bare": []}
    for _ in range(rounds):
        for who, script in COLD_START.items():
            found[who].append(_run_cold(script, arguments))
    imported, loaded, total, memory = (statistics.median(column) for column in zip(*found["bundle"], strict=True))
    bare_total, bare_memory = (statistics.median(row[column] for row in found["bare"]) for column in (2, 3))
    return {
        "import_s": imported,
        "load_s": loaded - imported,
        "first_image_s": total - loaded,
        "total_s": total,
        "peak_memory_mb": memory,
        "bare_minimum_s": bare_total,
        "bare_peak_memory_mb": bare_memory,
        "ratio_to_bare": statistics.median(a[2] / b[2] for a, b in zip(found["bundle"], found["bare"], strict=True)),
        "rounds": rounds,
    }


def _run_cold(script: str, arguments: Sequence[str]) -> list[float]:
    """Seconds until imported, until loaded, until done, and peak resident memory in MiB."""
    started = time.time()
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=inference.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"--end_to_end: the cold start failed ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    *moments, memory = map(float, done.stdout.split())
    return [moment - started for moment in moments] + [memory]


def make_photos(folder: Path, count: int, megapixels: tuple[float, float]) -> float:
    """Write `count` JPEG photos, made from the samples, of sizes spread evenly on a log scale; returns their mean megapixels."""
    sources = [Image.open(path).convert("RGB") for path in sorted((inference.ROOT / "assets" / "samples").glob("*.jpg"))]
    numbers = np.random.default_rng(inference.SEED)
    sizes = np.exp(numbers.uniform(*np.log(megapixels), count))
    for place, (size, aspect) in enumerate(zip(sizes, numbers.choice([2 / 3, 3 / 4, 1, 4 / 3, 3 / 2], count), strict=True)):
        height = math.sqrt(size * 1e6 / aspect)
        photo = ImageOps.fit(sources[place % len(sources)], (round(height * aspect), round(height)))
        photo.save(folder / f"{place:06d}.jpg", quality=90)
    return float(sizes.mean())


def plain_loop(model: LoadedModel, processor: Any, batch_size: int) -> Callable[[list[str]], Any]:
    """What one writes without this bundle: decode, image processor, model, one batch after another."""
    from transformers.image_utils import load_image

    def run(paths: list[str]) -> np.ndarray:
        features = []
        for first in range(0, len(paths), batch_size):
            images = [load_image(path) for path in paths[first : first + batch_size]]
            pixels = processor(images, return_tensors="pt").pixel_values.to(model.device.torch_device, model.dtype)
            with torch.inference_mode():
                hidden = model.module(pixel_values=pixels).last_hidden_state
            features.append(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1).float().cpu().numpy())
        return np.concatenate(features)

    return run


def library_pipeline(model: LoadedModel, processor: Any, batch_size: int) -> Callable[[list[str]], Any]:
    """transformers' image-feature-extraction pipeline on the same weights."""
    import transformers

    pipeline = transformers.pipeline(
        "image-feature-extraction", model=model.module, image_processor=processor, device=model.device.torch_device
    )
    return lambda paths: pipeline(paths, batch_size=batch_size)


def bulk_run(model: LoadedModel, args: argparse.Namespace, folder: Path) -> Callable[[list[str]], Any]:
    """This bundle: photos to saved features."""

    def run(paths: list[str]) -> int:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            flags = ["--image_path", *paths, "--output", output, "--batch_size", str(args.batch), "--execution", args.execution]
            bulk_args = inference.make_parser().parse_args([*flags, "--allow_unlocked"])
            return inference.embed(bulk_args, inference.list_images(paths), model)

    return run


def decoding_alone(model: LoadedModel, batch_size: int) -> Callable[[list[str]], int]:
    """The bulk run's loader, with nothing done to what it gives."""

    def run(paths: list[str]) -> int:
        images = inference.list_images(paths)
        bulk = inference.Bulk(images, Path(), len(images), {}, "float32")
        loader = inference.decoding_loader(model, inference.KeyBatches(bulk, [0], batch_size), None)
        return sum(len(batch.crops) for batch in loader)

    return run


def computing_alone(model: LoadedModel, args: argparse.Namespace, crops: torch.Tensor) -> Callable[[list[str]], None]:
    """The bulk run's encoder, on crops that are in memory already."""
    encoder = Encoder(model, FEATURES, args.batch, args.execution)

    def run(paths: list[str]) -> None:
        for first in range(0, len(paths), args.batch):
            count = min(args.batch, len(paths) - first)
            encoder.submit(crops[torch.arange(count) % len(crops)])()

    return run


def measure_folder(model: LoadedModel, args: argparse.Namespace, crops: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Images a second of five ways through the same photos, each on one share of them after another, in turns."""
    photos = folder / "photos"
    photos.mkdir()
    log.info("Making %d photos of %g to %g megapixels ...", args.end_to_end, *args.megapixels)
    mean_size = make_photos(photos, args.end_to_end, args.megapixels)
    args = argparse.Namespace(**vars(args), batch=inference.default_batch_size(model.device))
    processor = library_processor(model.preprocess)
    ways = {
        "this bundle": bulk_run(model, args, folder),
        "transformers loop": plain_loop(model, processor, args.batch),
        "image-feature-extraction pipeline": library_pipeline(model, processor, args.batch),
        "decoding alone": decoding_alone(model, args.batch),
        "computing alone": computing_alone(model, args, crops),
    }
    paths = sorted(str(path) for path in photos.iterdir())
    shares = [paths[turn :: args.rounds] for turn in range(args.rounds) if paths[turn :: args.rounds]]
    rates: dict[str, list[float]] = {what: [] for what in ways}
    for turn, share in enumerate(shares):
        for what, way in ways.items():
            rates[what].append(len(share) / time_once(model.device, partial(quietly, way, share)))
            log.info("Turn %d of %d: %s, %.2f img/s", turn + 1, len(shares), what, rates[what][-1])
    ours = rates["this bundle"]
    rows = [
        {
            "what": what,
            "images_per_s": statistics.median(values),
            "ratio_to_this_bundle": statistics.median(value / own for value, own in zip(values, ours, strict=True)),
            "images_per_s_by_turn": values,
        }
        for what, values in rates.items()
    ]
    workers = inference.default_num_workers(model.device, args.batch, model.preprocess.image_size)
    return {"images": len(paths), "megapixels_mean": mean_size, "batch_size": args.batch, "num_workers": workers, "rows": rows}


def quietly(way: Callable[[list[str]], Any], share: list[str]) -> None:
    """Run without the log lines of a bulk run, which are not this script's."""
    level = log.level
    log.setLevel("WARNING")
    try:
        way(share)
    finally:
        log.setLevel(level)


def library_processor(preprocess: inference.Preprocess) -> Any:
    """transformers' PIL image processor for the same pre-processing."""
    try:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import BitImageProcessor as Processor
    edges = preprocess.resize
    return Processor(
        size={"shortest_edge": edges} if isinstance(edges, int) else {"height": edges[0], "width": edges[1]},
        crop_size={"height": preprocess.image_size, "width": preprocess.image_size},
        resample=preprocess.resample,
        rescale_factor=preprocess.rescale_factor,
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def measure_preprocessing(preprocess: inference.Preprocess, rounds: int) -> dict[str, Any]:
    """How many times as fast as the library's processor one core prepares the sample photos, decoding excluded."""
    processor = library_processor(preprocess)
    photos = [Image.open(path).convert("RGB") for path in sorted((inference.ROOT / "assets" / "samples").glob("*.jpg"))]

    def ours() -> None:
        for photo in photos:
            inference.normalize(torch.from_numpy(inference.crop_uint8(photo, preprocess).copy())[None], preprocess)

    def library() -> None:
        for photo in photos:
            processor(photo, return_tensors="pt")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu = inference.open_device("cpu")
        ratios = [time_once(cpu, library) / time_once(cpu, ours) for _ in range(rounds + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    return {"ratio_to_library": statistics.median(ratios), "photos": len(photos), "rounds": rounds}


def measure_end_to_end(model: LoadedModel, args: argparse.Namespace, crops: torch.Tensor) -> dict[str, Any]:
    """Cold start, a folder of photos, and pre-processing. Random weights are saved first, so that there is a file to load."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.module.save_pretrained(folder / "checkpoint")
        log.info("Cold start ...")
        cold_start = measure_cold_start(model, folder / "checkpoint", args.rounds)
        return {
            "cold_start": cold_start,
            "folder": measure_folder(model, args, crops, folder),
            "preprocessing": measure_preprocessing(model.preprocess, 5 * args.rounds),
        }


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
    environment = path.with_name("env_info.json")
    there = describe_environment(
        other, json.loads(environment.read_text()) if "versions" not in other and environment.is_file() else {}
    )
    here = describe_environment(result, {})
    return {
        "file": inference.relative_to_root(path),
        "rows": compare_rows(result["results"], other["results"]),
        "differences": {key: [here[key], there[key]] for key in here if here[key] != there[key]},
    }


def describe_environment(result: dict[str, Any], env_info: dict[str, Any]) -> dict[str, Any]:
    """What may explain a difference. The published run names versions and device in a file of its own, env_info.json."""
    versions = result.get("versions", {})
    described = {
        key: result.get(key) for key in ("device", "dtype", "image_size", "warmup", "num_runs", "execution", "allow_hf32")
    }
    described["device_name"] = result.get("device_name", env_info.get("npu_model"))
    for name in ("python", "torch", "torch_npu", "transformers", "numpy"):
        described[name] = versions.get(name, env_info.get(f"{name}_version"))
    return described | {"weights": result.get("weights", {}).get("source")}


# --- the evaluation ---


def evaluate(args: argparse.Namespace, device: inference.Device) -> int:
    """Measure, log, write the result, and return the exit code. Whatever ends it early, the rows so far are kept."""
    compare_path = Path(args.compare) if args.compare else PUBLISHED if device.kind == "npu" else None
    other = read_other(compare_path) if compare_path else None
    model = inference.load_from_args(args, device)
    crops = sample_crops(model.preprocess)
    encoder = Encoder(model, FEATURES, 1, args.execution)
    log.info("Image size: %d, Batch sizes: %s", model.preprocess.image_size, args.batch_sizes)
    log.info("Warmup: %d, Num runs: %d", args.warmup, args.num_runs)
    result: dict[str, Any] = {
        "device": device.kind,
        "dtype": args.dtype,
        "image_size": model.preprocess.image_size,
        "warmup": args.warmup,
        "num_runs": args.num_runs,
        "execution": args.execution,
        "partial": True,
        "gflop_per_image": flop_per_image(model.module.config, model.preprocess.image_size) / 1e9,
        "results": [],
        **dict.fromkeys(("limit", "peers", "end_to_end", "comparison")),
        **inference.provenance(args, model),
    }
    try:
        measure(encoder, crops, args, result)
    except KeyboardInterrupt:
        path = inference.write_result("performance_eval_partial", args, result)
        kept = f"what was measured so far ({len(result['results'])} batch sizes) is in {inference.relative_to_root(path)}"
        raise KeyboardInterrupt(f"stopped; {kept}") from None
    if other is not None:
        result["comparison"] = compare_with(compare_path, other, result)
        log_comparison(result["comparison"])
    inference.check_lock(model.weights, args.allow_unlocked)
    inference.write_result("performance_eval", args, result | {"partial": False})
    return 0


def measure(encoder: Encoder, crops: torch.Tensor, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill `result` in place, so that an interruption finds what there is."""
    for batch_size in args.batch_sizes:
        log.info("--- Batch size: %d ---", batch_size)
        result["results"].append(measure_row(encoder, crops, batch_size, args))
        log_row(result["results"][-1], result["device"])
    fitting = [row["batch_size"] for row in result["results"] if "throughput_img_s" in row]
    if not fitting:
        raise UsageError(f"out of memory at every batch size of {args.batch_sizes}; try a smaller one, or --dtype float16")
    log.info("Measuring the limit ...")
    # The products stand beside the forward pass in memory, and may need to be of a smaller batch.
    result["limit"] = halving(partial(measure_limit, encoder, crops, fitting, args.rounds), max(fitting))
    add_shares(result)
    log_summary(result)
    result["peers"] = []
    for row in measure_peers(encoder, crops, args, fitting):
        result["peers"].append(row)
        log_peer(row)
    if args.end_to_end:
        encoder.release()
        result["end_to_end"] = measure_end_to_end(encoder.model, args, crops)
        log_end_to_end(result["end_to_end"])


def sample_crops(preprocess: inference.Preprocess) -> torch.Tensor:
    """The sample photos as uint8 crops [N, H, W, 3]."""
    images = inference.list_images([str(inference.ROOT / "assets" / "samples")])
    return torch.from_numpy(np.stack([inference.read_crop(key, preprocess) for key in images]))


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
        log.warning("Out of memory: %s", row["reason"])
        return
    log.info("Mean: %.4fs, P50: %.4fs, P95: %.4fs", row["mean_time_s"], row["p50_s"], row["p95_s"])
    log.info("Throughput: %.2f img/s, %s: %.1f MB", row["throughput_img_s"], MEMORY_LABELS[kind], row[MEMORY_KEYS[kind]])
    if row["unsteady"]:
        log.warning("Unsteady: times spread by more than %d%%; something else was at work on this machine", 100 * UNSTEADY)


def log_summary(result: dict[str, Any]) -> None:
    """The published table, with the limit beside it."""
    random = " (random weights)" if result["weights"]["source"] == "random" else ""
    log.info("=== Performance Summary ===%s", random)
    log.info("%5s %9s %9s %9s %9s %9s %8s %6s", "Batch", "Mean(s)", "P50(s)", "P95(s)", "img/s", "Mem(MB)", "TFLOP/s", "limit")
    for row in result["results"]:
        if row.get("out_of_memory"):
            log.info("%5d out of memory", row["batch_size"])
            continue
        figures = (
            *(row[key] for key in ("mean_time_s", "p50_s", "p95_s", "throughput_img_s")),
            row[MEMORY_KEYS[result["device"]]],
        )
        log.info(
            "%5d %9.4f %9.4f %9.4f %9.2f %9.1f %8.2f %5.1f%%",
            *(row["batch_size"], *figures, row["tflops"], row["share_of_limit_percent"]),
        )
    limit = result["limit"]
    log.info(
        "Limit: matrix products of these shapes run at %.2f TFLOP/s, that is %.2f img/s; copies at %.1f GB/s",
        *(limit["matmul_tflops"], limit["limit_img_s"], limit["copy_gb_s"]),
    )


def log_peer(row: dict[str, Any]) -> None:
    if "unavailable" in row:
        log.info("Against %s: not measured (%s)", row["peer"], row["unavailable"])
        return
    log.info(
        "Against %s, batch size %d: %.2f img/s, this bundle %.2f, %.3f times as fast (median of %d turns)",
        *(row["peer"], row["batch_size"], row["throughput_img_s"], row["bundle_throughput_img_s"]),
        *(row["speed_ratio"], row["rounds"]),
    )


def log_end_to_end(found: dict[str, Any]) -> None:
    cold = found["cold_start"]
    log.info(
        "Cold start: import %.2f s, load %.2f s, first image %.2f s; %.2f times the bare minimum of %.2f s; peak memory %.0f MB",
        *(cold["import_s"], cold["load_s"], cold["first_image_s"], cold["ratio_to_bare"], cold["bare_minimum_s"]),
        cold["peak_memory_mb"],
    )
    folder = found["folder"]
    log.info(
        "Folder of %d photos, %.1f megapixels each, batch size %d",
        folder["images"],
        folder["megapixels_mean"],
        folder["batch_size"],
    )
    for row in folder["rows"]:
        log.info("%-34s %9.2f img/s %7.3f of this bundle's", row["what"], row["images_per_s"], row["ratio_to_this_bundle"])
    log.info("Pre-processing on one core: %.2f times as fast as the library's", found["preprocessing"]["ratio_to_library"])


def log_comparison(comparison: dict[str, Any]) -> None:
    log.info("Against %s:", comparison["file"])
    for row in comparison["rows"]:
        figures = (row["throughput_img_s"], row["other_throughput_img_s"], row["ratio"])
        log.info("Batch size %d: %.2f img/s, there %.2f: %.3f times", row["batch_size"], *figures)
    for key, (here, there) in comparison["differences"].items():
        log.info("Differs: %s is %s, there %s", key, here, there)


def positive_float(text: str) -> float:
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    number = inference.positive_int
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch_sizes", nargs="+", type=number, default=[1, 2, 4, 8], metavar="N", help="(default: 1 2 4 8)")
    group.add_argument(
        "--warmup", type=number, default=3, metavar="N", help="runs before timing, more until they settle (default: 3)"
    )
    group.add_argument("--num_runs", type=number, default=10, metavar="N", help="timed runs of each batch size (default: 10)")
    group.add_argument("--rounds", type=number, default=5, metavar="N", help="turns that limit and peers take (default: 5)")
    group.add_argument(
        "--execution",
        choices=("eager", "graph"),
        default="eager",
        help="graph: capture the forward pass and replay it (NPU, GPU)",
    )
    group.add_argument("--end_to_end", type=number, metavar="N", help="also measure a cold start and a folder of N photos")
    group.add_argument(
        "--megapixels",
        nargs=2,
        type=positive_float,
        default=[0.2, 12],
        metavar=("LOW", "HIGH"),
        help="their sizes (default: 0.2 12)",
    )
    group.add_argument(
        "--compare", metavar="FILE", help="an earlier result to compare with (default on an NPU: the published run)"
    )
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("performance_eval", make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    sys.exit(main())
