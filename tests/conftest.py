"""Fixtures: tiny checkpoints of the same architecture, the simulated NPU, and ways to run the scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SAMPLES = ROOT / "assets" / "samples"
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores; threads beside it would only contend

import inference
import torch

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TINY_PREPROCESS = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 64},
}


def tiny_model(seed: int = 1, layers: int = TINY["num_hidden_layers"]) -> torch.nn.Module:
    """A ViT of the tiny size whose parameters, biases and norms too, are all random, so that a mix-up shows.

    Drawn in the order of the hub's names: each version of transformers has its own order.
    """
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTModel

    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        ViTModel(ViTConfig(**TINY | {"num_hidden_layers": layers})).save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        for name in sorted(tensors):
            spread = 0.5 if tensors[name].dim() == 1 else 0.1
            tensors[name] = torch.empty(tensors[name].shape).normal_(0, spread, generator=generator)
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        module = ViTModel.from_pretrained(folder).eval()
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # not mapped to a file that is about to go
    return module


def save_checkpoint(folder: Path, module: torch.nn.Module, preprocess: dict | None = TINY_PREPROCESS) -> Path:
    module.save_pretrained(folder)
    if preprocess is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint in transformers' layout, with a pooler that counts as trained."""
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", tiny_model())


@pytest.fixture(scope="session")
def tiny_native(tmp_path_factory, tiny_folder) -> Path:
    """The same weights as Meta's native .pth: timm's names, query, key and value stacked, no pooler; its heads beside it."""
    from safetensors.torch import load_file

    path = tmp_path_factory.mktemp("native") / "tiny.pth"
    torch.save(to_native_names(load_file(tiny_folder / "model.safetensors")), path)
    (path.parent / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS))
    (path.parent / "config.json").write_text(json.dumps({"num_attention_heads": TINY["num_attention_heads"]}))
    return path


def to_native_names(hub: dict[str, torch.Tensor], layers: int = TINY["num_hidden_layers"]) -> dict[str, torch.Tensor]:
    native = {
        "cls_token": hub["embeddings.cls_token"],
        "pos_embed": hub["embeddings.position_embeddings"],
        "patch_embed.proj.weight": hub["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": hub["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": hub["layernorm.weight"],
        "norm.bias": hub["layernorm.bias"],
    }
    for layer in range(layers):
        old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
        for leaf in ("weight", "bias"):
            stacked = [hub[f"{old}.attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            native[f"{new}.attn.qkv.{leaf}"] = torch.cat(stacked)
            native[f"{new}.attn.proj.{leaf}"] = hub[f"{old}.attention.output.dense.{leaf}"]
            native[f"{new}.norm1.{leaf}"] = hub[f"{old}.layernorm_before.{leaf}"]
            native[f"{new}.norm2.{leaf}"] = hub[f"{old}.layernorm_after.{leaf}"]
            native[f"{new}.mlp.fc1.{leaf}"] = hub[f"{old}.intermediate.dense.{leaf}"]
            native[f"{new}.mlp.fc2.{leaf}"] = hub[f"{old}.output.dense.{leaf}"]
    return native


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder of seven photos at three depths and two files that are none."""
    photo = (SAMPLES / "chelsea.jpg").read_bytes()
    for name in ("b.JPG", "a.jpeg", "sub/c.Webp", "sub/deep/d.tif", "z.png", "e.gif", "f.BMP"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo)
    (tmp_path / "photos" / "notes.md").write_text("not an image")
    (tmp_path / "photos" / "sub" / "labels.csv").touch()
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def cpu() -> inference.Device:
    return inference.open_device("cpu")


@pytest.fixture(scope="session")
def tiny(cpu, tiny_folder) -> inference.LoadedModel:
    return inference.load_model(cpu, str(tiny_folder))


@pytest.fixture
def npu() -> Iterator:
    """The simulated NPU, in its initial state."""
    simulator = pytest.importorskip(
        "npu_simulator", reason="this torch cannot register a device from Python", exc_type=ImportError
    )
    simulator.install()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield simulator
    simulator.reset()
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    sys.modules.pop("torch_npu", None)


@pytest.fixture
def run(tmp_path, capsys) -> Callable[..., SimpleNamespace]:
    """Run a script's main() in this process, with results and log in tmp_path: exit code, terminal, log, result."""

    def run_main(*arguments: object, main: Callable = inference.main, name: str = "inference") -> SimpleNamespace:
        log, results = tmp_path / f"{name}.log", tmp_path / "results"
        log.unlink(missing_ok=True)
        try:
            code = main([*map(str, arguments), "--output_log", str(log), "--results_dir", str(results)])
        except SystemExit as error:
            code = error.code
        terminal = capsys.readouterr().err
        found = sorted(results.glob(f"{name}*.json")) if results.is_dir() else []
        result = json.loads(found[-1].read_text()) if found else None
        logged = log.read_text() if log.exists() else ""
        return SimpleNamespace(code=code, terminal=terminal, log=logged, result=result, folder=results)

    return run_main


def script_environment(**variables: str) -> dict[str, str]:
    """The environment of a script that must not reach the network nor see what the tests have set."""
    quiet = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **quiet, **variables}


def run_script(*arguments: object, root: Path = ROOT, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess:
    """Run a script of the bundle as a process of its own."""
    command = [sys.executable, str(root / str(arguments[0])), *map(str, arguments[1:])]
    return subprocess.run(
        command, env=script_environment(**variables), capture_output=True, text=True, timeout=timeout, check=False
    )
