"""The bundle's scripts on a stack with a tiny checkpoint: a process for each run, and what it leaves."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import inference
import numpy as np
from PIL import Image

from cann import harness
from conftest import ROOT

NAMES = ("class_token", "mean_patch_token", "patch_tokens", "pooler_output")


@lru_cache(None)
def photos() -> Path:
    """Eight images of the tiny checkpoint's own size, so that nothing depends on who decodes and resizes them."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numbers = np.random.default_rng(0)
    for place in range(8):
        Image.fromarray(numbers.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{place}.png")
    return folder


@lru_cache(None)
def on_the_cpu(weights: Path, names: tuple[str, ...] = NAMES, image_size: int | None = None) -> dict[str, np.ndarray]:
    """Features of photos() by transformers in float32, in this process."""
    model = inference.load_model(inference.open_device("cpu"), str(weights), image_size=image_size)
    return inference.features(model, inference.find_images([str(photos())]), names)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative L2 error of a photo's features."""
    found, expected = (values.reshape(len(values), -1).astype(np.float64) for values in (found, expected))
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def parts(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What the parts in a folder hold, by their files' names."""
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("part-*.npz"))}


@dataclass
class Scene:
    """A stack, a folder to work in, and weights."""

    stack: str
    folder: Path
    weights: Path

    def run(self, script: str, *flags: object, before: str = "", **options: str | bool | float) -> harness.Outcome:
        """Run a script of the bundle on the NPU, in the folder. `before`: lines that its process runs first."""
        self.folder.mkdir(exist_ok=True)
        words = ["--model_path", self.weights, "--device", "npu", "--results_dir", "results", "--output_log", "log", *flags]
        argv = [str(ROOT / script), *map(str, words)]
        if before:
            stem = Path(script).stem
            argv = ["-c", f"{before}\nimport inference, {stem}\ninference.leave({stem}.main())", *argv[1:]]
        return harness.python(self.stack, self.folder, *argv, **options)

    def embed(self, *flags: object, **options: str | bool | float) -> harness.Outcome:
        common = ("--image_path", photos(), "--output", "features", "--num_workers", 0)
        return self.run("embed.py", *common, *flags, **options)

    def inference(self, *flags: object, **options: str | bool | float) -> harness.Outcome:
        return self.run("inference.py", "--image_path", photos(), "--output", "features.npz", *flags, **options)
