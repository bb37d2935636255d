"""What a user waits for: a cold start, and a folder of photos. eval_performance.py --end_to_end runs it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import inference
import numpy as np
import torch
from inference import LoadedModel, UsageError, log, time_once
from PIL import Image, ImageOps

import embed
from bulk.decoding import Decoder, default_num_workers, keep_freed_memory
from bulk.encoder import Encoder
from bulk.rounds import RunLock
from bulk.sources import list_sources
from common import FEATURES, SAMPLES, ChildError, Column, ask_child, log_table, sample_crops

FIXED_SHARE = 0.05  # of a turn over a folder, at most, where the turn is long enough

COLD_COLUMNS = (
    Column("Import (s)", "导入（s）", "import_s", ".2f"),
    Column("Load (s)", "加载（s）", "load_s", ".2f"),
    Column("First image (s)", "首图（s）", "first_image_s", ".2f"),
    Column("Total (s)", "合计（s）", "total_s", ".2f"),
    Column("Peak (MiB)", "峰值（MiB）", "peak_memory_mb", ".0f"),
)
FOLDER_COLUMNS = (
    Column("Folder of photos", "照片文件夹", "what"),
    Column("Images/s", "图片/秒", "images_per_s", ".2f"),
    Column("To this bundle (median of paired turns)", "与本项目之比（成对轮次的中位数）", "ratio_to_this_bundle", ".3f"),
    Column("Images a turn", "每轮图片数", "images_per_turn"),
    Column("Fixed costs in a turn (%)", "每轮固定开销（%）", "fixed_percent", ".1f"),
)
SCALE_COLUMNS = (
    Column("Rate of", "速率来自", "what"),
    Column("Images/s", "图片/秒", "images_per_s", ".2f"),
    Column("1 million on one (h)", "一百万张，1 卡（h）", "million_h", ",.1f"),
    Column("1 billion on 8 (h)", "十亿张，8 卡（h）", "billion_8_h", ",.0f"),
    Column("1 billion on 64 (h)", "十亿张，64 卡（h）", "billion_64_h", ",.0f"),
)

DECODED = ((512, 384), (1024, 768), (4000, 3000))  # small photos, and one of a phone
DECODING_COLUMNS = (
    Column("Photo", "照片", "photo"),
    Column("exact, images/s of a core", "exact，单核图片/秒", "exact_images_per_s", ".2f"),
    Column("fast, images/s of a core", "fast，单核图片/秒", "fast_images_per_s", ".2f"),
    Column("Times as fast (median of paired turns)", "快几倍（成对轮次的中位数）", "ratio", ".2f"),
)


def cold_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The row for COLD_COLUMNS."""
    return [row] if (row := (result.get("end_to_end") or {}).get("cold_start")) else []


def folder_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for FOLDER_COLUMNS."""
    return ((result.get("end_to_end") or {}).get("folder") or {}).get("rows", [])


def scale_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for SCALE_COLUMNS: hours at the best measured rates. Many devices are taken as so many times one: not measured."""
    whole = {row["batch_size"]: row["throughput_img_s"] for row in result["results"] if "throughput_img_s" in row}
    best = max(whole, key=whole.get, default=None)
    rates = {f"forward pass, batch {best}": whole[best]} if whole else {}
    for row in folder_rows(result)[:1]:
        rates["folder of photos to features"] = row["images_per_s"]
    hours = {"million_h": 1e6, "billion_8_h": 1e9 / 8, "billion_64_h": 1e9 / 64}
    return [
        {"what": what, "images_per_s": rate, **{key: images / rate / 3600 for key, images in hours.items()}}
        for what, rate in rates.items()
    ]


# --- a cold start ---

COLD_START = """
import inference, transformers
from transformers import ViTModel
imported = time.time()
device = inference.open_device(given["device"])
model = inference.load_model(device, given["folder"], given["dtype"], allow_unlocked=True)
loaded = time.time()
inference.features(model, given["photo"], ["class_token"])
done = time.time()
from common import peak_memory_mb
tell([imported, loaded, done, peak_memory_mb(inference.open_device("cpu"))])
"""


def measure_cold_start(model: LoadedModel, checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of a process to the first feature of one photo; medians over rounds."""
    given = {"folder": checkpoint, "photo": SAMPLES / "chelsea.jpg", "dtype": model.dtype_name}
    given["device"] = str(model.device.torch_device)
    turns = []
    for _ in range(rounds):
        started = time.time()
        try:
            [(*moments, memory)] = ask_child(COLD_START, given, 1, 600)
        except ChildError as error:
            raise UsageError(f"the cold start failed ({error})") from error
        turns.append([moment - started for moment in moments] + [memory])
    imported, loaded, total, memory = (statistics.median(column) for column in zip(*turns, strict=True))
    seconds = {"import_s": imported, "load_s": loaded - imported, "first_image_s": total - loaded, "total_s": total}
    return seconds | {"peak_memory_mb": memory}


# --- decoding, in both ways ---


def measure_decoding(preprocess: inference.Preprocess, turn_s: float, rounds: int) -> list[dict[str, Any]]:
    """Rows for DECODING_COLUMNS: a JPEG's bytes to a crop, by --decode exact and fast in turns, in one thread of a process
    that keeps memory as decoding workers do."""
    if preprocess.resample not in inference.FAST_FILTERS:
        return []
    keep_freed_memory()
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for size in DECODED:
            with Image.open(SAMPLES / "coffee.jpg") as photo, io.BytesIO() as file:
                ImageOps.fit(photo.convert("RGB"), size).save(file, "jpeg", quality=90)
                data = file.getvalue()
            ways = {way: dataclasses.replace(preprocess, decode=way) for way in inference.DECODES}
            turns = [{way: decoding_rate(data, chosen, turn_s) for way, chosen in ways.items()} for _ in range(rounds)]
            row = {f"{way}_images_per_s": statistics.median(turn[way] for turn in turns) for way in ways}
            ratio = statistics.median(turn["fast"] / turn["exact"] for turn in turns)
            rows.append({"photo": f"{size[0]} x {size[1]}"} | row | {"ratio": ratio})
    finally:
        torch.set_num_threads(threads)
    return rows


def decoding_rate(data: bytes, preprocess: inference.Preprocess, turn_s: float) -> float:
    """Crops a second of one image's bytes."""
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < turn_s or not count:
        inference.crop_uint8(inference.decode(data, preprocess.least_edge), preprocess)
        count += 1
    return count / elapsed


# --- a folder of photos ---


def make_photos(folder: Path, count: int, megapixels: tuple[float, float]) -> float:
    """Write `count` JPEGs made from the samples, of sizes spread evenly on a log scale; returns their mean megapixels."""
    sources = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    numbers = np.random.default_rng(inference.SEED)
    sizes = np.exp(numbers.uniform(*np.log(megapixels), count))
    for place, (size, aspect) in enumerate(zip(sizes, numbers.choice([2 / 3, 3 / 4, 1, 4 / 3, 3 / 2], count), strict=True)):
        height = math.sqrt(size * 1e6 / aspect)
        photo = ImageOps.fit(sources[place % len(sources)], (round(height * aspect), round(height)))
        photo.save(folder / f"{place:06d}.jpg", quality=90)
    return float(sizes.mean())


def ways_through(model: LoadedModel, plain: LoadedModel, execution: str, folder: Path) -> dict[str, Callable]:
    """Ways to take a list of photos: the bundle's first, what one would use instead, and the bundle's two halves alone."""
    import transformers
    from transformers.image_utils import load_image

    batch, device = inference.default_batch_size(model.device.kind), model.device.torch_device
    processor = library_processor(model.preprocess)
    encoder, crops = Encoder(model, FEATURES, batch, execution), sample_crops(model.preprocess)
    num_workers = default_num_workers(model.device.kind, batch, model.preprocess.image_size)
    pipeline = transformers.pipeline("image-feature-extraction", model=plain.module, image_processor=processor, device=device)

    def bulk_run(paths: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            flags = ["--image_path", "photos", "--output", output, "--batch_size", str(batch), "--execution", execution]
            with RunLock(output) as lock, Decoder(model.preprocess, batch, num_workers) as decoder:
                embed.embed(embed.make_parser().parse_args(flags), list_sources(paths), model, lock, decoder)

    def plain_loop(paths: list[str]) -> None:
        for first in range(0, len(paths), batch):
            images = [load_image(path) for path in paths[first : first + batch]]
            pixels = processor(images, return_tensors="pt").pixel_values.to(device, model.dtype)
            with torch.inference_mode():
                hidden = plain.module(pixel_values=pixels).last_hidden_state
            torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1).float().cpu()

    def decoding_alone(paths: list[str]) -> None:
        keys = list(list_sources(paths).files)
        with Decoder(model.preprocess, batch, num_workers) as decoder:
            for _batch in decoder.decode(keys[first : first + batch] for first in range(0, len(keys), batch)):
                pass

    def computing_alone(paths: list[str]) -> None:
        for first in range(0, len(paths), batch):
            encoder.submit(crops[torch.arange(min(batch, len(paths) - first)) % len(crops)])()

    return {
        "this bundle": bulk_run,
        "transformers loop": plain_loop,
        "image-feature-extraction pipeline": lambda paths: pipeline(paths, batch_size=batch),
        "decoding alone": decoding_alone,
        "computing alone": computing_alone,
    }


def quietly(device: inference.Device, way: Callable, share: Sequence[str]) -> float:
    """Seconds that a way takes with photos, without the log lines of a bulk run, which are not this script's."""
    level = log.level
    log.setLevel("WARNING")
    try:
        return time_once(device, partial(way, list(share)))
    finally:
        log.setLevel(level)


def measure_folder(
    device: inference.Device, ways: dict[str, Callable], paths: Sequence[str], rounds: int, turn_seconds: float | None
) -> list[dict[str, Any]]:
    """Images a second of each way, in turns. A turn's photos are a share of all, taken again and again until it is long enough.

    Fixed costs are those of a run over one photo. None for turn_seconds: the bundle's, the first way's, are FIXED_SHARE of it.
    """
    rows, shares = [], [paths[turn::rounds] for turn in range(min(rounds, len(paths)))]
    for what, way in ways.items():
        fixed, repeats = min(quietly(device, way, paths[:1]) for _ in range(2)), 1
        turn_seconds = turn_seconds or fixed / FIXED_SHARE
        # Not counted, and what follows finds the files in memory.
        while (seconds := quietly(device, way, [*shares[0]] * repeats)) < turn_seconds:
            repeats = math.ceil(1.2 * repeats * turn_seconds / seconds)
        row = {"what": what, "repeats": repeats, "images_per_turn": repeats * len(shares[0])}
        rows.append(row | {"fixed_s": fixed, "fixed_percent": 0.0, "images_per_s_by_turn": []})
    for turn, share in enumerate(shares, 1):
        for row in rows:
            seconds = quietly(device, ways[row["what"]], [*share] * row["repeats"])
            row["images_per_s_by_turn"].append(row["repeats"] * len(share) / seconds)
            row["fixed_percent"] = max(row["fixed_percent"], 100 * row["fixed_s"] / seconds)
            log.info(f"Turn {turn} of {len(shares)}: {row['what']}, {row['images_per_s_by_turn'][-1]:.2f} img/s")
    for row in rows:
        rates, ours = row["images_per_s_by_turn"], rows[0]["images_per_s_by_turn"]
        row["images_per_s"] = statistics.median(rates)
        row["ratio_to_this_bundle"] = statistics.median(rate / own for rate, own in zip(rates, ours, strict=True))
    return rows


def library_processor(preprocess: inference.Preprocess) -> Any:
    """transformers' PIL image processor for the same pre-processing."""
    try:
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import BitImageProcessor as Processor
    edges, side = preprocess.resize, preprocess.image_size
    return Processor(
        size={"shortest_edge": edges} if isinstance(edges, int) else {"height": edges[0], "width": edges[1]},
        crop_size={"height": side, "width": side},
        resample=preprocess.resample,
        rescale_factor=preprocess.rescale_factor,
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def measure_end_to_end(model: LoadedModel, args: argparse.Namespace, keep: Callable[..., None]) -> None:
    """Measure and keep a cold start and a folder of photos."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log.info("Cold start ...")
        # A plain copy on the CPU, in float32 as the real checkpoint is: a device's tensors, and levers, cannot be saved.
        plain = inference.load_as_asked(args, inference.open_device("cpu"), dtype="float32")
        plain.module.save_pretrained(folder / "checkpoint")
        del plain  # its memory is the measurement's
        cold_start = measure_cold_start(model, folder / "checkpoint", args.rounds)
        keep(end_to_end={"cold_start": cold_start})
        (folder / "photos").mkdir()
        log.info(f"Making {args.end_to_end} photos of {args.megapixels[0]:g} to {args.megapixels[1]:g} megapixels ...")
        mean_size = make_photos(folder / "photos", args.end_to_end, args.megapixels)
        paths = sorted(map(str, (folder / "photos").iterdir()))
        ways = ways_through(model, inference.load_as_asked(args, model.device), args.execution, folder)
        rows = measure_folder(model.device, ways, paths, args.rounds, args.turn_seconds)
        found = {"images": len(paths), "megapixels_mean": mean_size, "rows": rows}
        keep(end_to_end={"cold_start": cold_start, "folder": found})


def log_end_to_end(result: dict[str, Any]) -> None:
    """Log cold start and folder."""
    folder = result["end_to_end"]["folder"]
    log.info("=== End to end ===")
    log_table(COLD_COLUMNS, cold_rows(result))
    log.info(f"Folder of {folder['images']} photos, {folder['megapixels_mean']:.1f} megapixels each")
    log_table(FOLDER_COLUMNS, folder["rows"])
    if (percent := folder["rows"][0]["fixed_percent"]) > 100 * FIXED_SHARE:
        log.warning(f"Fixed costs are {percent:.0f}% of this bundle's turns, and nothing is subtracted; longer: --turn_seconds")
    log_table(SCALE_COLUMNS, scale_rows(result))
