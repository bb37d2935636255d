"""WebSSL-MAE-300M: turn images into features on an Ascend NPU, a GPU or the CPU.

    python inference.py --image_path photo.jpg --device npu
    python inference.py --image_path photo.jpg --output features.npz --pca picture.png
    python inference.py --image_path photos/ --output features/ --device npu --dtype float16
    torchrun --nproc_per_node 8 inference.py --image_path photos/ --output features/ --device npu

One image or a few are run at once, timed, and described in the log and in results/inference.json (results/inference_cpu.json
and so on for other devices); --output NAME.npz also saves their features. --output FOLDER/ is for any number of images:
features are written in parts, and the same command goes on where an interrupted run stopped.

Exit codes: 0 done; 1 an evaluation (eval/) missed its bar; 2 wrong usage or unusable input; 3 BLOCKED: the device that was
asked for cannot be used; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os

# torch >= 2.5 imports torch_npu by itself and fails where CANN is absent, even for a run on the CPU.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import time

STARTED = time.perf_counter()  # before torch is imported: what a user waits for begins here

import argparse
import dataclasses
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import platform
import re
import shlex
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tarfile
import uuid
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

ROOT = Path(__file__).resolve().parent
MODEL_NAME = "webssl-mae300m-full2b-224"
HUB_ID = f"facebook/{MODEL_NAME}"
HUB_COMMIT = "4655a0ac1726c206ba14d5ccb26758c62a4d03b0"
DEFAULT_MODEL_PATH = f"weights/{MODEL_NAME}"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEED = 0

# ViT-L/16 as facebookresearch/webssl builds it (timm's vit_large_patch16_224.mae): timm's layer norm eps is 1e-6.
VIT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
MAX_FILE_BYTES = 1 << 30

log = logging.getLogger("webssl")


class UsageError(Exception):
    """Wrong usage or unusable input: exit code 2. The message is one line: what is wrong, where, what to do."""


class Blocked(Exception):
    """The device that was asked for cannot be used: exit code 3. The message says what is missing and what to do."""


class BadImage(Exception):
    """This image cannot be decoded, whoever asks again."""


class Unreadable(Exception):
    """The disk or the network did not give a file that may well be good."""


def first_line(error: Exception) -> str:
    """What an error says, short enough for a message of one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:300] or type(error).__name__


# --- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device that works. `reason` says why it was chosen; `allow_hf32` whether float32 may be rounded (HF32, TF32)."""

    torch_device: torch.device
    name: str
    reason: str
    allow_hf32: bool = False

    @property
    def kind(self) -> str:
        return self.torch_device.type


def open_device(spec: str = "auto", allow_hf32: bool = False) -> Device:
    """Make the device `spec` (auto, cpu, cuda, cuda:1, npu, npu:1) ready for use and set its float32 precision.

    Under torchrun, `cuda` and `npu` mean the device of this process's LOCAL_RANK. `auto` takes an NPU, else a GPU, else the CPU.
    Raises UsageError for a spec that makes no sense and Blocked for a device that cannot be used; it never falls back.
    """
    kind, _, index = spec.partition(":")
    if kind not in ("auto", "cpu", "cuda", "npu") or (":" in spec and (kind in ("auto", "cpu") or not index.isdecimal())):
        raise UsageError(f"--device {spec}: not a device; use auto, cpu, cuda, cuda:N, npu or npu:N")
    if index and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UsageError(f"--device {spec}: under torchrun each process takes its own device; leave out ':{index}'")
    position = int(index or os.environ.get("LOCAL_RANK", "0"))
    if kind == "auto":
        device = _open_best(position)
    else:
        device = {"cpu": _open_cpu, "cuda": _open_cuda, "npu": _open_npu}[kind](position, f"asked for with --device {spec}")
    set_float32_precision(device.kind, allow_hf32)
    if device.kind != "npu":
        # transformers imports any torch_npu it finds, which fails where CANN is absent.
        sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]
    return dataclasses.replace(device, allow_hf32=allow_hf32)


def _open_best(position: int) -> Device:
    obstacles = []
    for kind, opener in (("NPU", _open_npu), ("GPU", _open_cuda)):
        try:
            return opener(position, "; ".join(["chosen by --device auto", *obstacles]))
        except Blocked as error:
            obstacles.append(f"no {kind}: {str(error).split('. ')[0]}")
    return _open_cpu(0, "; ".join(["chosen by --device auto", *obstacles]))


def _open_cpu(_position: int, reason: str) -> Device:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        name = next((fields[key].strip() for key in fields if key.strip() == "model name"), name)
    return Device(torch.device("cpu"), f"{name}, {torch.get_num_threads()} threads", reason)


def _open_cuda(position: int, reason: str) -> Device:
    if torch.version.cuda is None and torch.version.hip is None:
        raise Blocked(f"this torch ({torch.__version__}) is built without GPU support. Install a CUDA build of torch")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        visible = _environment_note("CUDA_VISIBLE_DEVICES")
        raise Blocked(f"torch sees no GPU{visible}. Check the driver with nvidia-smi, and that the container was given a GPU")
    if position >= count:
        raise Blocked(f"there is no cuda:{position}: torch sees {count} GPU(s). Use a number below {count}")
    return _first_use("cuda", position, reason)


def _open_npu(position: int, reason: str) -> Device:
    if sys.modules.get("torch_npu", "never looked for") is None:
        del sys.modules["torch_npu"]
    if importlib.util.find_spec("torch_npu") is None:
        raise Blocked(
            f"torch_npu is not installed. Install the torch_npu that goes with torch {torch.__version__} (README: versions)"
        )
    _check_torch_npu_version()
    try:
        import torch_npu  # noqa: F401

        count = torch.npu.device_count() if torch.npu.is_available() else 0
    except Exception as error:
        raise Blocked(_explain_import_failure(error)) from error
    if count == 0:
        visible = _environment_note("ASCEND_RT_VISIBLE_DEVICES")
        raise Blocked(
            f"torch_npu sees no NPU{visible}. Check the driver with npu-smi info, and that the container was given /dev/davinci*"
        )
    if position >= count:
        raise Blocked(f"there is no npu:{position}: torch_npu sees {count} NPU(s). Use a number below {count}")
    return _first_use("npu", position, reason)


def _environment_note(variable: str) -> str:
    return f" ({variable}={os.environ[variable]})" if variable in os.environ else ""


def _check_torch_npu_version() -> None:
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise Blocked(f"torch {torch.__version__} and torch_npu {version} do not go together. Install the same version of both")


def _explain_import_failure(error: Exception) -> str:
    text = first_line(error)
    if "cannot open shared object file" in text:
        return f"CANN is not installed or not set up ({text}). Install CANN, then run: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    if "Two accelerators" in text:
        return "torch_npu cannot work beside a CUDA build of torch on a machine with a GPU. Install the CPU build of torch"
    if "undefined symbol" in text:
        return f"torch_npu does not fit this torch or this CANN ({text}). Install versions that go together (README: versions)"
    return f"torch_npu cannot be imported ({text}). Run eval/env_check.py to see the whole environment"


def _first_use(kind: str, position: int, reason: str) -> Device:
    """Allocate and compute once: a device that is listed may still be held by another process or have a failing driver."""
    backend = torch.get_device_module(kind)
    try:
        backend.set_device(position)
        torch.zeros(1, device=f"{kind}:{position}").add_(1)
        backend.synchronize()
        return Device(torch.device(kind, position), backend.get_device_name(position), reason)
    except RuntimeError as error:
        raise Blocked(
            f"{kind}:{position} is listed but fails at first use ({first_line(error)}). Check that no other process holds it"
        ) from error


def set_float32_precision(kind: str, allow_hf32: bool) -> None:
    """Allow or forbid rounded float32 on all devices of a kind.

    Left alone, torch_npu rounds the inputs of float32 convolutions to HF32, and cuDNN to TF32.
    """
    if kind == "npu":
        torch.npu.conv.allow_hf32 = allow_hf32
        torch.npu.matmul.allow_hf32 = allow_hf32
    elif kind == "cuda":
        precision = "tf32" if allow_hf32 else "ieee"
        torch.backends.cudnn.conv.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = precision


def synchronize(device: Device) -> None:
    """Wait until the device has finished all that was queued on it (at once on the CPU)."""
    torch.get_device_module(device.torch_device).synchronize()


def peak_memory_mb(device: Device) -> float:
    """Peak memory in MiB: allocated on an accelerator since it was last reset, resident for this process on the CPU."""
    if device.kind == "cpu":
        return _peak_resident_bytes() / 2**20
    return torch.get_device_module(device.torch_device).max_memory_allocated(device.torch_device) / 2**20


def _peak_resident_bytes() -> int:
    import resource

    with suppress(OSError, AttributeError):  # getrusage would give the peak of the process that started this one, if larger
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Where the weights came from. `files` are hashed in the background, so that nobody waits who does not ask."""

    source: str
    path: str | None = None
    seed: int | None = None
    files: dict[str, Future] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """JSON for results: source, and path and sha256 of each file (waits for the hashes) or the seed."""
        if self.source == "random":
            return {"source": "random", "note": "random weights: not the model, features mean nothing", "seed": self.seed}
        return {
            "source": self.source,
            "path": self.path,
            "sha256": {name: future.result() for name, future in self.files.items()},
        }

    @property
    def label(self) -> str:
        return f"random weights, seed {self.seed}" if self.source == "random" else f"checkpoint {self.path}"


@dataclass(frozen=True)
class LoadedModel:
    """A ViT in eval mode on its device. `pooler` is "trained", "untrained", "missing" (then seeded here) or "none"."""

    module: torch.nn.Module
    device: Device
    dtype: torch.dtype
    preprocess: Preprocess
    weights: Weights
    parameters: int
    missing_keys: list[str]
    pooler: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Checkpoint:
    """What was read of a checkpoint before any model is built; the tensors go by the hub's names."""

    model_class: Any
    config: Any
    state_dict: dict[str, torch.Tensor]
    weights: Weights
    preprocess: Preprocess


def load_model(
    device: Device,
    model_path: str = DEFAULT_MODEL_PATH,
    dtype: str = "float32",
    image_size: int | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a ViT through transformers and put it on `device` in eval mode.

    model_path: a folder in transformers' layout, a hub id, or Meta's native .pth (a state dict in timm's names). dtype: a key of
    DTYPES. image_size: side of the square input in pixels, a multiple of the patch size; None takes the checkpoint's own.
    Raises UsageError for anything that cannot be loaded whole: wrong path, broken file, other architecture, missing keys.
    """
    # Importing transformers takes seconds: a mistyped flag or a missing device should not wait for it.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    missing: list[str] = []
    if random_weights:
        module, weights, preprocess = _random_model(DTYPES[dtype]), Weights("random", seed=SEED), Preprocess()
    else:
        location = find_weights(model_path)
        read = _read_native if location.is_file() else _read_folder
        checkpoint = read(location, model_path, DTYPES[dtype], trust_remote_code)
        module, missing = _build(checkpoint, DTYPES[dtype])
        weights, preprocess = checkpoint.weights, checkpoint.preprocess
    pooler = _settle_pooler(module, missing)
    preprocess = preprocess.for_image_size(image_size)
    _resize_position_embeddings(module, preprocess.image_size)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    try:
        module = module.eval().requires_grad_(False).to(device.torch_device)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{device.torch_device} has too little memory for the model; try --dtype float16") from error
    return LoadedModel(module, device, DTYPES[dtype], preprocess, weights, parameters, missing, pooler)


def _build(checkpoint: _Checkpoint, dtype: torch.dtype) -> tuple[torch.nn.Module, list[str]]:
    """Let transformers build the model around the tensors: no initialisation, no copy, its own renaming of old keys.

    Returns the model and the keys that were missing: none, or those of the pooler. Any other difference is a UsageError.
    """
    try:
        module, info = checkpoint.model_class.from_pretrained(
            None,
            config=checkpoint.config,
            state_dict=checkpoint.state_dict,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name, where transformers would raise without
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{checkpoint.weights.label}: transformers cannot build the model: {first_line(error)}") from error
    for kind, verb in (("missing", "lacks"), ("unexpected", "has unexpected"), ("mismatched", "has the wrong shape for")):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        if names and (kind, names) != ("missing", POOLER_KEYS):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"{checkpoint.weights.label}: it {verb} {', '.join(names[:3])}{more}; nothing was loaded")
    return module, sorted(info["missing_keys"])


def find_weights(model_path: str) -> Path:
    """Local folder or file of `model_path`, downloaded where it is a hub id. Raises UsageError if there is none."""
    is_default = model_path.rstrip("/") == DEFAULT_MODEL_PATH
    path = ROOT / model_path if is_default else Path(model_path).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if is_default:
        return _download(HUB_ID, f"there are no weights at {DEFAULT_MODEL_PATH}, and ")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_path) and not (path.parent.exists() or (ROOT / path.parent).exists()):
        return _download(model_path, f"--model_path {model_path}: not a folder or file here, and ")
    raise UsageError(f"--model_path {model_path}: no such folder or file")


def _download(hub_id: str, context: str) -> Path:
    import huggingface_hub

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    commit = HUB_COMMIT if hub_id == HUB_ID else None
    wanted = {"repo_id": hub_id, "revision": commit, "allow_patterns": ["*.json", "*.safetensors", "*.py"]}
    if commit is not None:
        with suppress(OSError):  # a pinned commit never changes: what is in the cache needs no network
            folder = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
            if any(folder.glob("*.safetensors")):
                return folder
    log.info("Downloading %s from %s ...", hub_id, endpoint)
    try:
        # One plain question first: snapshot_download tries again for half a minute where there is no network.
        huggingface_hub.HfApi().repo_info(hub_id, revision=commit, timeout=10)
        return Path(huggingface_hub.snapshot_download(**wanted))
    except Exception as error:
        raise UsageError(
            f"{context}{hub_id} could not be downloaded from {endpoint} ({first_line(error)}). Ways to get the weights: "
            f"(1) set HF_ENDPOINT to a mirror and run again; (2) put the files of {HUB_ID} from the hub, GitCode or "
            f"ModelScope into {DEFAULT_MODEL_PATH} (see weights/README.md); (3) --model_path FILE.pth with Meta's native "
            "file. To try everything without the weights: --random_weights"
        ) from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {what} cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: {what} is not a JSON object")
    return data


def _read_folder(folder: Path, model_path: str, dtype: torch.dtype, trust_remote_code: bool) -> _Checkpoint:
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model_path {model_path}: no config.json in it; a folder in transformers' layout is wanted")
    model_class, config = _read_config(folder, trust_remote_code)
    files = _safetensors_files(folder)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= _read_safetensors(file, dtype)
    weights = Weights("checkpoint", model_path, files=sha256_in_background(files))
    return _Checkpoint(model_class, config, state_dict, weights, read_preprocess(folder, config.image_size))


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Class and configuration of the model: transformers' own ViT, or with `trust_remote_code` what the folder brings."""
    from transformers import AutoConfig, ViTConfig, ViTModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    path = folder / "config.json"
    fields = _read_json(path, "the model's configuration")
    own_code = fields.get("auto_map", {}).get("AutoModel")
    try:
        if own_code and trust_remote_code:
            log.warning("--trust_remote_code: running the Python code that comes with %s", folder)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            return get_class_from_dynamic_module(own_code, str(folder)), config
        if fields.get("model_type") == "vit":
            return ViTModel, ViTConfig.from_dict(fields)
    except Exception as error:
        raise UsageError(f"{path}: not a usable configuration ({first_line(error)})") from error
    hint = "; it brings its own code, which runs only with --trust_remote_code" if own_code else ""
    raise UsageError(f"{path}: model_type is {fields.get('model_type')!r}, and this bundle runs 'vit'{hint}")


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, "the index of the weight files").get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: {name} is missing; only safetensors files (or Meta's native .pth) are read")
    return [folder / name for name in names]


def _read_safetensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one file in `dtype`. float32 stays mapped to the file: no copy, and it is ready at once."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if dtype == torch.float32:
                return {name: file.get_tensor(name).to(dtype) for name in names}
        tensors = {}
        for name in names:
            # Opened anew for each tensor, so that the pages of the file do not stay in memory beside the converted copy.
            with safe_open(path, "pt") as file:
                tensors[name] = file.get_tensor(name).to(dtype)
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: {_damage(path)} ({first_line(error)}); fetch the file again") from error


def _damage(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run git lfs pull"
    return "empty" if not start else "truncated or damaged"


def _read_native(path: Path, model_path: str, dtype: torch.dtype, _trust_remote_code: bool) -> _Checkpoint:
    """Meta's .pth: a plain state dict in timm's names, without a pooler."""
    from transformers import ViTConfig, ViTModel

    try:
        # Mapped where nothing is converted; else read whole, so that converting can let go of one tensor after another.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=dtype == torch.float32)
    except Exception as error:
        raise UsageError(f"{path}: {_damage(path)}, or not a plain state dict ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path}: not a plain state dict of tensors; Meta's native .pth is wanted")
    try:
        config = ViTConfig(**_native_config(state))
    except (KeyError, IndexError) as error:
        raise UsageError(f"{path}: not a ViT in timm's layout: {error} is missing") from error
    for name in list(state):
        state[name] = state.pop(name).to(dtype)
    weights = Weights("checkpoint", model_path, files=sha256_in_background([path]))
    return _Checkpoint(ViTModel, config, map_native_names(state), weights, read_preprocess(path.parent, config.image_size))


def _native_config(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    hidden_size = state["cls_token"].shape[-1]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": sum(name.endswith(".attn.qkv.weight") for name in state),
        "num_attention_heads": hidden_size // 64,  # every timm ViT of these families has heads of 64
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "layer_norm_eps": VIT_LARGE["layer_norm_eps"],
    }


POOLER_KEYS = ["pooler.dense.bias", "pooler.dense.weight"]
NATIVE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}


def map_native_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a timm ViT state dict to the hub's names; `attn.qkv` holds query, key and value stacked in that order.

    Names that are not known are kept, so that the loader reports them as unexpected.
    """
    mapped = {}
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed"):
            mapped[NATIVE_NAMES[name]] = tensor
            continue
        stem, _, leaf = name.rpartition(".")
        prefix = ""
        if stem.startswith("blocks."):
            _, number, stem = stem.split(".", 2)
            prefix = f"encoder.layer.{number}."
        if stem == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3)):
                mapped[f"{prefix}attention.attention.{part}.{leaf}"] = chunk
        else:
            mapped[f"{prefix}{NATIVE_NAMES.get(stem, stem)}.{leaf}"] = tensor
    return mapped


def _random_model(dtype: torch.dtype) -> torch.nn.Module:
    """The exact architecture with seeded weights, in a third of the time that transformers' own initialisation takes.

    Matrices are uniform with transformers' standard deviation (initializer_range), which is drawn faster than a normal
    distribution; each has its own generator, so that the result does not depend on the number of threads.
    """
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        module = ViTModel(ViTConfig(**VIT_LARGE))
    module = module.to(dtype).to_empty(device="cpu")
    bound = math.sqrt(3) * module.config.initializer_range

    def draw(seed: int, matrix: torch.Tensor) -> None:
        values = matrix if dtype == torch.float32 else torch.empty(matrix.shape)
        matrix.copy_(values.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed)))

    matrices = [parameter.data for parameter in module.parameters() if parameter.dim() > 1]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(SEED, SEED + len(matrices)), matrices))
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0)
    return module


def _settle_pooler(module: torch.nn.Module, missing: list[str]) -> str:
    """State of the pooler; a missing one gets seeded weights, where transformers would draw new ones at each load."""
    if getattr(module, "pooler", None) is None:
        return "none"
    dense = module.pooler.dense
    spread = module.config.initializer_range
    if missing:
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            dense.weight.copy_(torch.empty(dense.weight.shape).normal_(0, spread, generator=generator))
            dense.bias.zero_()
        return "missing"
    return classify_pooler(dense.weight, dense.bias, spread)


def classify_pooler(weight: torch.Tensor, bias: torch.Tensor, initializer_range: float) -> str:
    """Tell a pooler whose bias is zero and whose weights have the spread of an initialisation, "untrained", from "trained".

    The tolerance is 1% for rounding plus five standard errors of a spread measured on this many weights.
    """
    tolerance = 0.01 + 5 / math.sqrt(2 * weight.numel())
    spread = weight.float().std().item()
    as_initialised = not bias.any() and abs(spread / initializer_range - 1) < tolerance
    return "untrained" if as_initialised else "trained"


def _resize_position_embeddings(module: torch.nn.Module, image_size: int) -> None:
    """Interpolate the position embeddings once, on the CPU in float32, with the model's own formula.

    The model would do it in every forward pass, on the device and in its dtype.
    """
    config = module.config
    if image_size % config.patch_size:
        raise UsageError(f"--image_size {image_size}: not a multiple of the patch size, {config.patch_size}")
    if image_size == config.image_size:
        return
    embeddings = module.embeddings
    dtype = embeddings.position_embeddings.dtype
    embeddings.position_embeddings.data = embeddings.position_embeddings.data.float()
    tokens = torch.empty(1, 1 + (image_size // config.patch_size) ** 2, config.hidden_size, device="meta")
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    embeddings.position_embeddings = torch.nn.Parameter(positions.to(dtype), requires_grad=False)
    config.image_size = image_size
    for part in (embeddings, embeddings.patch_embeddings):
        part.image_size = (image_size, image_size)


def sha256_in_background(files: Sequence[Path]) -> dict[str, Future]:
    """Start hashing; each future gives a file's SHA-256 in hex."""
    pool = ThreadPoolExecutor(1)
    futures = {path.name: pool.submit(_sha256, path) for path in files}
    pool.shutdown(wait=False)
    return futures


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop to a square, scale, normalise. The defaults are the official demo's (facebookresearch/webssl).

    resize: length of the short edge, or (height, width). resample: Pillow's number of the filter.
    """

    resize: int | tuple[int, int] = 224
    image_size: int = 224
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def for_image_size(self, image_size: int | None) -> Preprocess:
        """The same for another input size in pixels, resize and crop in the same proportion."""
        if image_size is None or image_size == self.image_size:
            return self
        if image_size < 1:
            raise UsageError(f"--image_size {image_size}: a positive number of pixels is wanted")
        scale = image_size / self.image_size
        resize = (
            round(self.resize * scale) if isinstance(self.resize, int) else tuple(round(edge * scale) for edge in self.resize)
        )
        return dataclasses.replace(self, resize=resize, image_size=image_size)


# transformers' processors whose fields are understood, and what each assumes of a field that its file leaves out.
IMAGE_PROCESSORS = {"BitImageProcessor": {}, "CLIPImageProcessor": {}, "ViTImageProcessor": {"do_center_crop": False}}


def read_preprocess(folder: Path, image_size: int) -> Preprocess:
    """What preprocessor_config.json says, or the defaults for `image_size` where there is none.

    Raises UsageError naming the first field that is missing, unknown, or asks for what is not supported.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocess().for_image_size(image_size)
    fields = {name: value for name, value in _read_json(path, "the pre-processing").items() if value is not None}

    def take(name: str, convert: Callable[[Any], Any]) -> Any:
        if name not in fields:
            raise UsageError(f"{path}: field {name!r} is missing")
        value = fields.pop(name)
        try:
            return convert(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: {name} is {value!r}, which is not supported") from error

    assumed = take("image_processor_type", lambda kind: IMAGE_PROCESSORS[kind.removesuffix("Fast")])
    fields = {"do_convert_rgb": True, **assumed, **fields}
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        take(name, {True: True}.__getitem__)
    resize = take("size", _edges)
    if take("do_center_crop", bool):
        crop = take("crop_size", lambda value: _square(_edges(value), resize))
    elif isinstance(resize, int) or resize[0] != resize[1]:
        raise UsageError(f"{path}: size without do_center_crop does not give a square, which is not supported")
    else:
        crop = resize[0]
        fields.pop("crop_size", None)
    preprocess = Preprocess(
        resize=resize,
        image_size=crop,
        resample=take("resample", lambda value: int(Image.Resampling(value))),
        rescale_factor=take("rescale_factor", float),
        mean=take("image_mean", _colour),
        std=take("image_std", _colour),
    )
    if fields:
        raise UsageError(f"{path}: field {sorted(fields)[0]!r} is not known to this bundle; remove it if it changes nothing")
    return preprocess


def _edges(value: dict[str, int]) -> int | tuple[int, int]:
    return int(value["shortest_edge"]) if value.keys() == {"shortest_edge"} else (int(value["height"]), int(value["width"]))


def _square(crop: Any, resize: int | tuple[int, int]) -> int:
    height, width = crop
    if height != width or height > (resize if isinstance(resize, int) else min(resize)):
        raise ValueError
    return height


def _colour(value: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = value
    return float(red), float(green), float(blue)


class ImageKey(NamedTuple):
    """One image: its place in the input list, its name, and where its bytes are (a file, or a stretch of a tar)."""

    index: int
    name: str
    file: str
    offset: int
    size: int


class ImageList:
    """Names of any number of images, in order, in about 32 bytes an image more than the names themselves."""

    def __init__(self) -> None:
        self.ignored = 0
        self._names = bytearray()
        self._ends = array("q", [0])
        self._file_lengths = array("q")  # how much of the name is the path of the file: all of it, but for a member of a tar
        self._offsets = array("q")
        self._sizes = array("q")

    def append(self, name: str, file: str | None = None, offset: int = 0, size: int = -1) -> None:
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._file_lengths.append(len(os.fsencode(name if file is None else file)))
        self._offsets.append(offset)
        self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> ImageKey:
        name = bytes(self._names[self._ends[index] : self._ends[index + 1]])
        file = name[: self._file_lengths[index]]
        return ImageKey(index, os.fsdecode(name), os.fsdecode(file), self._offsets[index], self._sizes[index])

    def longest_name(self) -> int:
        """Length in bytes of the longest name."""
        return int(np.diff(np.frombuffer(self._ends, np.int64)).max(initial=0))

    def sha256(self) -> str:
        """Digest of all names in order."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()


def list_images(arguments: Sequence[str]) -> ImageList:
    """All images that files, folders (recursively), glob patterns, .txt lists of paths and .tar files name, in a fixed order.

    Names that were given are taken whatever their suffix; in folders and tars, files without a suffix of IMAGE_SUFFIXES are
    counted in `ignored`. Raises UsageError where an argument names nothing or cannot be read, or where no image is found.
    """
    images = ImageList()
    for argument in arguments:
        if os.path.exists(argument):
            matches = [argument]
        else:
            matches = sorted(glob.glob(argument, recursive=True)) if glob.has_magic(argument) else []
        if not matches:
            raise UsageError(f"--image_path {argument}: no such file or folder")
        for match in matches:
            try:
                _list_one(images, match)
            except (OSError, UnicodeError, tarfile.TarError) as error:
                raise UsageError(f"--image_path {match}: cannot be read ({error})") from error
    if not len(images):
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it ({images.ignored:,} other files ignored)")
    return images


def _list_one(images: ImageList, path: str) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        _list_folder(images, path)
    elif suffix == ".txt":
        _list_lines(images, path)
    elif suffix == ".tar":
        _list_tar(images, path)
    elif path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UsageError(
            f"--image_path {path}: a compressed tar cannot be read out of order; unpack it or make it a plain .tar"
        )
    else:
        images.append(path)


def _list_folder(images: ImageList, folder: str) -> None:
    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link back to where we have been
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix == ".tar":
                _list_tar(images, os.path.join(parent, name))
            elif suffix in IMAGE_SUFFIXES:
                images.append(os.path.join(parent, name))
            else:
                images.ignored += 1


def _list_lines(images: ImageList, path: str) -> None:
    index: tuple[str, dict[str, tarfile.TarInfo]] = ("", {})
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
        for line in lines:
            name = line.rstrip("\r\n")
            tar, separator, member = name.partition(".tar/")
            if name.lower().endswith(".tar"):
                _list_tar(images, name)
            elif separator and os.path.isfile(tar + ".tar"):
                if index[0] != tar:
                    index = (tar, {info.name: info for info in _members(tar + ".tar")})
                if member not in index[1]:
                    raise UsageError(f"{path}: {tar}.tar has no member {member}")
                images.append(name, tar + ".tar", index[1][member].offset_data, index[1][member].size)
            elif name.strip():
                images.append(name)


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or a tar of millions of members stays in memory
            if info.isfile():
                yield info


def _list_tar(images: ImageList, path: str) -> None:
    for info in _members(path):
        if os.path.splitext(info.name)[1].lower() in IMAGE_SUFFIXES:
            images.append(f"{path}/{info.name}", path, info.offset_data, info.size)
        else:
            images.ignored += 1


def read_bytes(key: ImageKey) -> bytes:
    """The bytes of an image. Raises BadImage where the path itself is at fault, Unreadable where the disk or network is.

    A disk or network error is tried again twice. A file that is gone counts as the path's fault while its folder is there:
    without its folder, a disk is more likely unmounted than emptied.
    """
    for delay in (0.5, 2.0, None):
        try:
            status = os.stat(key.file)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file" if not stat.S_ISDIR(status.st_mode) else "a folder, not an image")
            size = status.st_size if key.size < 0 else key.size
            if size > MAX_FILE_BYTES:
                raise BadImage(f"{size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")
            with open(key.file, "rb") as file:
                file.seek(key.offset)
                data = file.read(size)
            if len(data) != size:
                raise OSError(errno.EIO, "the file is shorter than it was")
            return data
        except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise BadImage(error.strerror) from error
        except ValueError as error:
            raise BadImage(str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) or (
                error.errno == errno.ENOENT and os.path.isdir(os.path.dirname(key.file) or ".")
            ):
                raise BadImage(error.strerror) from error
            if delay is None:
                raise Unreadable(f"{key.name}: {error.strerror}") from error
            time.sleep(delay)
    raise AssertionError("unreachable")


def decode(data: bytes) -> Image.Image:
    """An image in RGB or L from the bytes of a file, upright (EXIF), its first frame if it is animated. Raises BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large or untidy, but readable: not worth a line on the terminal for each image
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb_or_grey(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image that can be read ({', '.join(IMAGE_FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _to_rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L") and not image.has_transparency_data:
        return image  # grey stays grey until it is resized, at a third of the cost
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey to 255, which turns most of it white: take the high byte, as viewers do.
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadImage("32-bit grey, whose black and white are not defined")
        return Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point grey, whose black and white are not defined")
    if image.has_transparency_data:
        # Onto white, as a viewer shows it and as transformers 5 does: dropping the alpha would bring out whatever colour
        # lies under transparent pixels.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_uint8(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Resize and centre crop an image to uint8 [image_size, image_size, 3], bit for bit as transformers' processor does."""
    width, height = image.size
    size, resample = preprocess.image_size, preprocess.resample
    if isinstance(preprocess.resize, int):
        short, long = preprocess.resize, int(preprocess.resize * max(width, height) / min(width, height))
        new_width, new_height = (short, long) if width <= height else (long, short)
    else:
        new_height, new_width = preprocess.resize
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if max(new_width, new_height) > 100 * size:
        # A strip, which would fill gigabytes once resized: resize the crop's part of it alone. Pillow keeps the box in
        # float32, so that a value may be off by a grey level or two.
        scale_x, scale_y = width / new_width, height / new_height
        box = (left * scale_x, top * scale_y, min((left + size) * scale_x, width), min((top + size) * scale_y, height))
        image = image.resize((size, size), resample, box=box)
    elif width > height and isinstance(preprocess.resize, int):
        # Pillow resizes rows first, then columns: those that the crop drops need not take part in the second pass.
        image = image.resize((new_width, height), resample).crop((left, 0, left + size, height))
        image = image.resize((size, new_height), resample).crop((0, top, size, top + size))
    else:
        image = image.resize((new_width, new_height), resample).crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"))


def read_crop(key: ImageKey, preprocess: Preprocess) -> np.ndarray:
    """Read, decode, resize and crop one image: uint8 [image_size, image_size, 3]. Raises BadImage or Unreadable."""
    return crop_uint8(decode(read_bytes(key)), preprocess)


# --- features --------------------------------------------------------------------------------------------------------


@lru_cache
def _mean_and_std(preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device) for values in (preprocess.mean, preprocess.std))
    return mean, std


def normalize(crops: torch.Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 crops [N, H, W, 3] on any device to pixel values [N, 3, H, W], with the arithmetic of transformers' processor."""
    mean, std = _mean_and_std(preprocess, crops.device, dtype)
    return (crops.permute(0, 3, 1, 2).to(dtype) * preprocess.rescale_factor - mean) / std


@torch.inference_mode()
def forward(model: LoadedModel, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 crops [N, H, W, 3] on the model's device to last_hidden_state [N, 1 + patches, D] and pooler_output [N, D] or None."""
    wide = torch.promote_types(model.dtype, torch.float32)  # half precision begins after the pixels are normalised
    output = model.module(pixel_values=normalize(crops, model.preprocess, wide).to(model.dtype).contiguous())
    return output.last_hidden_state, getattr(output, "pooler_output", None)


# What can be computed from last_hidden_state [N, 1 + patches, D] and pooler_output [N, D], all on the device.
FEATURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "class_token": lambda hidden, pooler: hidden[:, 0],
    "mean_patch_token": lambda hidden, pooler: hidden[:, 1:].float().mean(1),
    "patch_tokens": lambda hidden, pooler: hidden[:, 1:],
    "pooler_output": lambda hidden, pooler: pooler,
    "hidden_norm": lambda hidden, pooler: hidden.float().norm(dim=-1).mean(1),
    "pooler_norm": lambda hidden, pooler: pooler.float().norm(dim=-1),
}


class Encoder:
    """Runs a model over batches of crops and brings the wanted features to the host without waiting for them.

    names: keys of FEATURES. execution "graph" captures the forward pass once and replays it, which saves launching its
    operators one by one; every batch is then padded to `batch_size`, so that one capture serves all. Out of memory halves
    `batch_size` and goes on.
    """

    def __init__(
        self,
        model: LoadedModel,
        names: Sequence[str],
        batch_size: int,
        execution: str = "eager",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if execution == "graph" and model.device.kind == "cpu":
            raise UsageError("--execution graph: the CPU has no graphs to capture; use it with cuda or npu")
        self.model = model
        self.names = tuple(names)
        self.batch_size = batch_size
        self.execution = execution
        self.dtype = dtype
        self._backend = torch.get_device_module(model.device.torch_device)
        self._graph: _Graph | None = None
        self._pins = can_pin_memory(model.device)

    @torch.inference_mode()
    def features(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        """The wanted features of crops on the device, and "finite", bool [N]: whether everything about an image is a number."""
        hidden, pooler = forward(self.model, crops)
        features = {name: FEATURES[name](hidden, pooler).to(self.dtype) for name in self.names}
        finite = [torch.isfinite(value).reshape(len(value), -1).all(1) for value in (hidden, *features.values())]
        return features | {"finite": torch.stack(finite).all(0)}

    @torch.inference_mode()
    def run(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queue at most `batch_size` crops from host or device; the results stay on the device, until the next call in graph mode."""
        if self.execution == "eager":
            return self.features(crops.to(self.model.device.torch_device, non_blocking=True))
        if self._graph is None or self._graph.batch_size != self.batch_size:
            self._graph = None  # the old capture holds memory that the new one may need
            self._graph = _Graph(self, crops)
        return self._graph.replay(crops)

    @torch.inference_mode()
    def submit(self, crops: torch.Tensor) -> Callable[[], dict[str, np.ndarray]]:
        """Queue any number of crops uint8 [N, H, W, 3] from the host. Returns a function that waits for their features."""
        while True:
            try:
                chunks = [
                    {name: self._to_host(value) for name, value in self.run(chunk).items()}
                    for chunk in crops.split(self.batch_size)
                ]
                break
            except torch.OutOfMemoryError as error:
                self._shrink(min(self.batch_size, len(crops)), error)
        event = self._backend.Event()
        event.record()

        def wait() -> dict[str, np.ndarray]:
            event.synchronize()
            return {name: np.concatenate([chunk[name].numpy() for chunk in chunks]) for name in chunks[0]}

        return wait

    def _to_host(self, value: torch.Tensor) -> torch.Tensor:
        if not self._pins:
            return value.cpu()
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)

    def release(self) -> None:
        """Give back the memory of a captured graph, and what the allocator holds in reserve."""
        self._graph = None
        if self.model.device.kind != "cpu":
            self._backend.empty_cache()

    def _shrink(self, batch_size: int, error: Exception) -> None:
        self.release()
        if batch_size <= 1:
            raise UsageError(
                f"out of memory on {self.model.device.torch_device} with a single image: use --dtype float16, or free the device"
            ) from error
        self.batch_size = batch_size // 2
        log.warning(
            "Out of memory on %s with batch size %d: going on with %d",
            self.model.device.torch_device,
            batch_size,
            self.batch_size,
        )


class _Graph:
    """A captured forward pass: torch.cuda.CUDAGraph or its twin torch.npu.NPUGraph."""

    def __init__(self, encoder: Encoder, crops: torch.Tensor) -> None:
        device = encoder.model.device.torch_device
        backend = torch.get_device_module(device)
        self.batch_size = encoder.batch_size
        self.crops = torch.zeros(self.batch_size, *crops.shape[1:], dtype=torch.uint8, device=device)
        stream = backend.Stream()
        stream.wait_stream(backend.current_stream())
        with backend.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate workspaces at first use, which cannot be captured
                encoder.features(self.crops)
        backend.current_stream().wait_stream(stream)
        self.graph = backend.NPUGraph() if device.type == "npu" else backend.CUDAGraph()
        with backend.graph(self.graph):
            self.outputs = encoder.features(self.crops)

    def replay(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        self.crops[: len(crops)].copy_(crops, non_blocking=True)
        self.graph.replay()
        return {name: value[: len(crops)] for name, value in self.outputs.items()}


def can_pin_memory(device: Device) -> bool:
    """Whether the host can set memory aside that the device copies from and to by itself."""
    if device.kind == "cpu":
        return False
    try:
        torch.empty(1).pin_memory()
        return True
    except RuntimeError:
        return False


def default_batch_size(device: Device) -> int:
    """Large enough to keep the device busy, small enough for any of its kind; larger gains little."""
    return 8 if device.kind == "cpu" else 64


# --- one image or a few ----------------------------------------------------------------------------------------------


def run_few(args: argparse.Namespace, device: Device) -> int:
    """Run all images in this process, time the forward pass, log and save what came out. Returns the exit code."""
    images = list_images(args.image_path)
    if len(images) > 1000:
        log.warning(
            "%s images at once: --output FOLDER/ decodes in parallel and can go on after an interruption", f"{len(images):,}"
        )
    log_images(images)
    model = load_from_args(args, device)
    crops = torch.from_numpy(np.stack([_crop_or_stop(key, model.preprocess) for key in images]))
    names = ["class_token", "mean_patch_token", "hidden_norm"] + (["pooler_norm"] if model.pooler != "none" else [])
    names += _names_on_request(args, model)
    if args.pca and "patch_tokens" not in names:
        names.append("patch_tokens")
    batch_size = min(args.batch_size or default_batch_size(device), len(images))
    encoder = Encoder(model, names, batch_size, args.execution)
    log.info("Input shape: (%d, 3, %d, %d)", len(images), *crops.shape[1:3])
    log.info("Warming up ...")
    features = encoder.submit(crops)()
    log.info("First features after %.2f s", time.perf_counter() - STARTED)
    for key, finite in zip(images, features.pop("finite")):
        if not finite:
            raise UsageError(
                f"{key.name}: its features in {model.dtype_name} hold NaN or Inf; nothing was saved. Try --dtype float32"
            )
    log.info("Running inference ...")
    timed = crops[: encoder.batch_size]
    result = describe_few(model, images, features, len(timed), time_forward(encoder, timed))
    check_lock(model.weights, args.allow_unlocked)
    log_few(model, result)
    if args.output:
        arrays = {
            name: features[name]
            for name in ("class_token", "mean_patch_token", "patch_tokens", "pooler_output")
            if name in names
        }
        arrays |= {"index": np.arange(len(images)), "path": np.array([key.name for key in images])}
        write_npz(Path(args.output), arrays)
        log.info("Features saved to %s (%s)", args.output, model.weights.label)
    result |= provenance(args, model)
    if args.pca:
        colours, explained = patch_colours(features["patch_tokens"])
        result["pca"] = {
            "explained_variance_percent": explained,
            "colours_hex": [patches.tobytes().hex() for patches in colours],
        }
        picture = draw_pca(crops.numpy(), colours, [key.name for key in images], pca_heading(result))
        with replacing(Path(args.pca)) as file:
            picture.save(file, format="PNG")
        log.info("Picture saved to %s; its three components explain %.1f%% of the variance", args.pca, explained)
    write_result("inference", args, result)
    return 0


def _crop_or_stop(key: ImageKey, preprocess: Preprocess) -> np.ndarray:
    try:
        return read_crop(key, preprocess)
    except BadImage as error:
        raise UsageError(f"{key.name}: {error}") from error
    except Unreadable as error:
        raise UsageError(f"{error}; it was tried three times") from error


def _names_on_request(args: argparse.Namespace, model: LoadedModel) -> list[str]:
    """Features that are saved only when asked for: patch tokens for their size, the pooler because it is seldom trained."""
    if args.save_pooler and model.pooler == "none":
        raise UsageError("--save_pooler: this model has no pooler")
    return ["patch_tokens"] * args.save_patch_tokens + ["pooler_output"] * args.save_pooler


def time_forward(encoder: Encoder, crops: torch.Tensor, runs: int = 10, enough_s: float = 3.0) -> list[float]:
    """Seconds of each of up to `runs` forward passes (at least 3, no more once `enough_s` have passed), synchronised around each."""
    device = encoder.model.device
    crops = crops.to(device.torch_device)
    times: list[float] = []
    while len(times) < 3 or (len(times) < runs and sum(times) < enough_s):
        synchronize(device)
        started = time.perf_counter()
        encoder.run(crops)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def describe_few(
    model: LoadedModel, images: ImageList, features: dict[str, np.ndarray], batch: int, times: list[float]
) -> dict[str, Any]:
    """The published run's keys. Norms are means over the images; time and throughput are those of the median run of one batch."""
    count, hidden_size = features["class_token"].shape
    tokens = 1 + (model.preprocess.image_size // model.module.config.patch_size) ** 2
    has_pooler = "pooler_norm" in features
    return {
        "device": model.device.kind,
        "dtype": model.dtype_name,
        "image_size": model.preprocess.image_size,
        "image_path": images[0].name if count == 1 else [key.name for key in images],
        "pooler_shape": [count, hidden_size] if has_pooler else None,
        "last_hidden_shape": [count, tokens, hidden_size],
        "pooler_norm": float(features["pooler_norm"].mean()) if has_pooler else None,
        "hidden_mean_norm": float(features["hidden_norm"].mean()),
        "inference_time_s": statistics.median(times),
        "throughput_img_s": batch / statistics.median(times),
        "batch_size": batch,
        "inference_times_s": times,
    }


def log_few(model: LoadedModel, result: dict[str, Any]) -> None:
    """The published run's lines."""
    log.info("=== %s Inference Results%s ===", MODEL_NAME, " (random weights)" if model.weights.source == "random" else "")
    log.info("Device: %s", result["device"])
    log.info("Dtype: %s", result["dtype"])
    log.info("Image size: %dx%d", result["image_size"], result["image_size"])
    if result["pooler_shape"]:
        log.info("Pooler output shape: %s", tuple(result["pooler_shape"]))
    log.info("Last hidden state shape: %s", tuple(result["last_hidden_shape"]))
    if result["pooler_shape"]:
        log.info(
            "Pooler L2 norm: %.4f%s",
            result["pooler_norm"],
            "" if model.pooler == "trained" else f" (the pooler is {model.pooler}: its output means nothing)",
        )
    log.info("Hidden states mean L2 norm: %.4f", result["hidden_mean_norm"])
    log.info(
        "Inference time: %.4fs (batch size %d, median of %d runs)",
        result["inference_time_s"],
        result["batch_size"],
        len(result["inference_times_s"]),
    )
    log.info("Throughput: %.2f img/s", result["throughput_img_s"])


def principal_components(patch_tokens: np.ndarray, count: int = 3) -> tuple[np.ndarray, float]:
    """Project patch tokens [N, P, D] on their first components over all images: [N, P, count], and the variance explained in percent.

    The sign of a component is arbitrary; it is set so that its largest weight is positive.
    """
    tokens = patch_tokens.reshape(-1, patch_tokens.shape[-1]).astype(np.float64)
    tokens -= tokens.mean(0)
    _, singular, directions = np.linalg.svd(tokens, full_matrices=False)
    directions = directions[:count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    projected = tokens @ (directions * np.sign(largest)).T
    explained = 100 * (singular[:count] ** 2).sum() / max((singular**2).sum(), np.finfo(np.float64).tiny)
    return projected.reshape(*patch_tokens.shape[:2], -1), float(explained)


def patch_colours(patch_tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Colours uint8 [N, rows, columns, 3] of patch tokens [N, P, D]: their first three components as red, green and blue.

    They run from the 1st to the 99th percentile of each component over all images, so that they compare between images.
    Returns the variance explained in percent too.
    """
    projected, explained = principal_components(patch_tokens)
    low, high = np.percentile(projected, (1, 99), axis=(0, 1))
    colours = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
    grid = math.isqrt(patch_tokens.shape[1])
    return (colours.reshape(-1, grid, grid, 3) * 255).round().astype(np.uint8), explained


def draw_pca(crops: np.ndarray, colours: np.ndarray, names: Sequence[str], heading: Sequence[str]) -> Image.Image:
    """Draw each crop uint8 [N, H, W, 3] beside its patches' colours uint8 [N, rows, columns, 3], under lines of heading."""
    side, margin, line = 448, 16, 22
    font = ImageFont.load_default(size=16)
    top = margin + line * len(heading)
    picture = Image.new("RGB", (2 * side + 3 * margin, top + len(crops) * (side + line + margin)), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(heading):
        draw.text((margin, margin // 2 + line * number), _fit_text(text, font, 2 * side + margin), "black", font)
    for crop, colour, name in zip(crops, colours, names):
        picture.paste(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC), (margin, top))
        picture.paste(Image.fromarray(colour).resize((side, side), Image.Resampling.NEAREST), (2 * margin + side, top))
        draw.text((margin, top + side + 2), _fit_text(name, font, 2 * side + margin), "black", font)
        top += side + line + margin
    return picture


def pca_heading(result: dict[str, Any]) -> list[str]:
    """What the picture of an inference result says of itself."""
    made_of = "random weights: the colours mean nothing" if result["weights"]["source"] == "random" else "patch tokens"
    return [
        f"{MODEL_NAME}, {result['dtype']} on {result['device_name']}",
        f"{made_of}; first 3 principal components, {result['pca']['explained_variance_percent']:.1f}% of the variance",
    ]


def _fit_text(text: str, font: Any, width: int) -> str:
    """The end of `text` that fits: of a path, the end tells most."""
    shown = text
    while font.getlength(shown) > width:
        shown = "..." + shown[4:]
    return shown


# --- bulk runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """A bulk run: which images, in parts of how many, and what is written where. Part k holds places k*part_size and on."""

    images: ImageList
    folder: Path
    part_size: int
    shapes: dict[str, tuple[int, ...]]
    dtype: str

    @property
    def part_count(self) -> int:
        return -(-len(self.images) // self.part_size)

    def places(self, part: int) -> range:
        return range(part * self.part_size, min((part + 1) * self.part_size, len(self.images)))

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    def unfinished(self) -> list[int]:
        return [part for part in range(self.part_count) if not self.path(part).exists()]

    @property
    def bytes_per_image(self) -> int:
        values = sum(math.prod(shape) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize
        return values + 8 + 4 * self.images.longest_name()  # the place, and the path as UCS-4


class Batch(NamedTuple):
    """What a worker returns: crops uint8 [n, H, W, 3] of the places from `first` on, black where an image failed."""

    first: int
    crops: torch.Tensor
    failures: list[tuple[int, str, str]]
    unreadable: str


class _Crops(torch.utils.data.Dataset):
    """Makes batches in DataLoader's workers. It knows no paths: the sampler sends them, so that no worker holds the list."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __getitem__(self, keys: list[ImageKey]) -> Batch:
        size = self.preprocess.image_size
        crops = np.zeros((len(keys), size, size, 3), np.uint8)
        failures = []
        for row, key in enumerate(keys):
            try:
                crops[row] = read_crop(key, self.preprocess)
            except BadImage as error:
                failures.append((key.index, key.name, str(error)))
            except Unreadable as error:
                return Batch(keys[0].index, torch.from_numpy(crops), failures, str(error))
        return Batch(keys[0].index, torch.from_numpy(crops), failures, "")


class KeyBatches:
    """The sampler: lists of at most `batch_size` keys, never across two parts, so that a resumed run makes the same batches."""

    def __init__(self, bulk: Bulk, parts: Sequence[int], batch_size: int) -> None:
        self.bulk, self.parts, self.batch_size = bulk, parts, batch_size
        self.given_up: dict[int, str] = {}

    def __iter__(self) -> Iterator[list[ImageKey]]:
        for part in self.parts:
            places = self.bulk.places(part)
            for first in places[:: self.batch_size]:
                if part in self.given_up:
                    break
                yield [self.bulk.images[place] for place in range(first, min(first + self.batch_size, places.stop))]


class _PartRows:
    """The rows of one part while it is being filled."""

    def __init__(self, bulk: Bulk, part: int) -> None:
        self.bulk, self.part, self.places = bulk, part, bulk.places(part)
        self.values = {name: np.zeros((len(self.places), *shape), bulk.dtype) for name, shape in bulk.shapes.items()}
        self.failures: list[tuple[int, str, str]] = []
        self.filled = 0

    def add(self, batch: Batch, features: dict[str, np.ndarray]) -> int:
        """Add a batch; returns how many of its images failed."""
        rows = slice(batch.first - self.places.start, batch.first - self.places.start + len(batch.crops))
        failures = {place: (place, name, reason) for place, name, reason in batch.failures}
        for row in np.flatnonzero(~features["finite"]):
            place = batch.first + int(row)
            failures.setdefault(place, (place, self.bulk.images[place].name, "its features hold NaN or Inf"))
        for name, values in self.values.items():
            values[rows] = features[name]
        self.failures += [failures[place] for place in sorted(failures)]
        self.filled += len(batch.crops)
        return len(failures)

    def arrays(self) -> dict[str, np.ndarray]:
        """What the part's file holds: a row for each image that has features, and the failures beside."""
        failed = np.array([place for place, _, _ in self.failures], np.int64)
        index = np.setdiff1d(np.arange(self.places.start, self.places.stop), failed)
        rows = index - self.places.start
        return {
            "index": index,
            "path": np.array([self.bulk.images[place].name for place in index], dtype=str),
            **{name: values[rows] for name, values in self.values.items()},
            "failed_index": failed,
            "failed_path": np.array([name for _, name, _ in self.failures], dtype=str),
            "failed_reason": np.array([reason for _, _, reason in self.failures], dtype=str),
        }


@dataclass
class Totals:
    """Counts of a run, and the seconds that were waited for each of its three stages."""

    images: int = 0
    failed: int = 0
    waited: dict[str, float] = field(default_factory=lambda: {"reading": 0.0, "computing": 0.0, "writing": 0.0})

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waited[stage] += time.perf_counter() - started


def run_bulk(args: argparse.Namespace, device: Device) -> int:
    """Write the features of any number of images to a folder, part by part. Returns the exit code."""
    images = list_images(args.image_path)
    log_images(images)
    return embed(args, images, load_from_args(args, device))


def embed(args: argparse.Namespace, images: ImageList, model: LoadedModel) -> int:
    """Write the parts that args.output lacks, or this rank's share of them. Returns the exit code."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    bulk = plan_bulk(args, images, model)
    check_lock(model.weights, args.allow_unlocked)
    check_disk(bulk)
    agree_on_manifest(bulk.folder, make_manifest(args, bulk, model))
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = [part for part in bulk.unfinished() if part % ranks == rank]
    batch_size = args.batch_size or default_batch_size(model.device)
    encoder = Encoder(model, tuple(bulk.shapes), batch_size, args.execution, getattr(torch, bulk.dtype))
    batches = KeyBatches(bulk, parts, batch_size)
    loader = decoding_loader(model, batches, args.num_workers)
    log.info(
        "Rank %d of %d: %d of %d parts to do; batch size %d, %d decoding workers, %s",
        *(rank, ranks, len(parts), bulk.part_count, batch_size, loader.num_workers, args.execution),
    )
    total = sum(len(bulk.places(part)) for part in parts)
    started = time.perf_counter()
    try:
        with logging_redirect_tqdm([log]), progress_bar(total, visible=rank == 0) as progress:
            totals = encode_parts(bulk, encoder, loader, batches, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_how_to_go_on(bulk)}") from None
    except UsageError as error:
        raise UsageError(f"{error}; {_how_to_go_on(bulk)}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"a decoding worker was lost, most likely for lack of memory ({reason}); use a smaller --num_workers; {_how_to_go_on(bulk)}"
        ) from error
    return finish_bulk(bulk, batches.given_up, totals, time.perf_counter() - started)


def decoding_loader(model: LoadedModel, batches: KeyBatches, num_workers: int | None) -> torch.utils.data.DataLoader:
    """Gives a Batch for each list of keys, decoded in `num_workers` processes (None: by the cores there are)."""
    if num_workers is None:
        num_workers = default_num_workers(model.device, batches.batch_size, model.preprocess.image_size)
    return torch.utils.data.DataLoader(
        _Crops(model.preprocess),
        batch_size=None,  # the sampler gives whole batches
        sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=can_pin_memory(model.device),
    )


def plan_bulk(args: argparse.Namespace, images: ImageList, model: LoadedModel) -> Bulk:
    """Work out what the parts hold. A part is held in memory until it is written: hence fewer images where patch tokens are saved."""
    size = model.module.config.hidden_size
    patches = (model.preprocess.image_size // model.module.config.patch_size) ** 2
    names = ["class_token", "mean_patch_token", *_names_on_request(args, model)]
    shapes = {name: (patches, size) if name == "patch_tokens" else (size,) for name in names}
    part_size = args.part_size or (200 if args.save_patch_tokens else 10_000)
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {args.output}: the folder cannot be made ({error.strerror})") from error
    return Bulk(images, Path(args.output), part_size, shapes, args.feature_dtype)


def default_num_workers(device: Device, batch_size: int, image_size: int) -> int:
    """Enough processes to keep up with the device. Two batches each wait in /dev/shm, of which a container may have 64 MiB only."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, cores // 4) if device.kind == "cpu" else max(1, min(16, cores - 1))
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return workers
    return max(1, min(workers, free // (4 * batch_size * image_size * image_size * 3)))


def _start_worker(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the main process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def encode_parts(bulk: Bulk, encoder: Encoder, loader: Iterable[Batch], batches: KeyBatches, progress: Any) -> Totals:
    """Run all batches through the encoder and write each part when it is full. Raises UsageError if a part cannot be written."""
    totals = Totals()
    rows: _PartRows | None = None
    writing: Future | None = None
    with ThreadPoolExecutor(1) as writer:
        for batch, features in _one_ahead(loader, encoder, totals):
            part = batch.first // bulk.part_size
            if batch.unreadable and part not in batches.given_up:
                batches.given_up[part] = batch.unreadable
                log.error("Part %d is left unwritten: %s (tried three times)", part, batch.unreadable)
            if part in batches.given_up:
                rows = None
                continue
            if rows is None or rows.part != part:
                rows = _PartRows(bulk, part)
            failed = rows.add(batch, features)
            totals.images += len(batch.crops)
            totals.failed += failed
            progress.set_postfix(failed=totals.failed, refresh=False)
            progress.update(len(batch.crops))
            if rows.filled == len(rows.places):
                with totals.waiting_for("writing"):
                    if writing is not None:
                        writing.result()
                writing = writer.submit(write_part, bulk.path(part), rows.arrays())
                rows = None
        with totals.waiting_for("writing"):
            if writing is not None:
                writing.result()
    return totals


def _one_ahead(loader: Iterable[Batch], encoder: Encoder, totals: Totals) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Batches with their features, each fetched from the device only after the next one is queued there."""
    iterator = iter(loader)
    previous: tuple[Batch, Callable[[], dict[str, np.ndarray]]] | None = None
    while True:
        with totals.waiting_for("reading"):
            batch = next(iterator, None)
        with totals.waiting_for("computing"):
            wait = encoder.submit(batch.crops) if batch is not None else None
            features = previous[1]() if previous is not None else None
        if previous is not None:
            yield previous[0], features
        if batch is None:
            return
        previous = (batch, wait)


def write_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write one part, and clear away what a killed run left of it."""
    write_npz(path, arrays)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def finish_bulk(bulk: Bulk, given_up: dict[int, str], totals: Totals, seconds: float) -> int:
    """Write failures.jsonl once all parts are there, and say how the run went. Returns the exit code."""
    if not bulk.unfinished():
        failures = write_failures(bulk)
        log.info("All %d parts are in %s; %d images failed (failures.jsonl)", bulk.part_count, bulk.folder, failures)
    rate = totals.images / seconds if seconds else 0.0
    waited = ", ".join(f"{stage} {value:.1f} s" for stage, value in totals.waited.items())
    log.info(
        "%s images in %.1f s: %.2f img/s, %s failed; waited for %s",
        f"{totals.images:,}",
        seconds,
        rate,
        f"{totals.failed:,}",
        waited,
    )
    if given_up:
        raise UsageError(f"{len(given_up)} parts are left unwritten because files could not be read; {_how_to_go_on(bulk)}")
    if totals.images and totals.failed == totals.images:
        raise UsageError("not one of these images gave features: see failures.jsonl or the log for the reasons")
    return 0


def write_failures(bulk: Bulk) -> int:
    """Gather the failures of all parts into failures.jsonl, in input order; returns how many there are."""
    lines = []
    for part in range(bulk.part_count):
        with np.load(bulk.path(part)) as arrays:
            columns = (arrays["failed_index"].tolist(), arrays["failed_path"].tolist(), arrays["failed_reason"].tolist())
        lines += [json.dumps({"index": index, "path": path, "reason": reason}) + "\n" for index, path, reason in zip(*columns)]
    with replacing(bulk.folder / "failures.jsonl") as file:
        file.write("".join(lines).encode())
    return len(lines)


def _how_to_go_on(bulk: Bulk) -> str:
    finished = bulk.part_count - len(bulk.unfinished())
    return f"{finished} of {bulk.part_count} parts are finished in {bulk.folder}; run the same command again to go on"


def check_disk(bulk: Bulk) -> None:
    """Log what the unfinished parts will need. Raises UsageError where the disk has less."""
    unfinished = bulk.unfinished()
    needed = bulk.bytes_per_image * sum(len(bulk.places(part)) for part in unfinished)
    free = shutil.disk_usage(bulk.folder).free
    log.info(
        "Output: %d parts to write, %s needed, %s free in %s",
        len(unfinished),
        _gigabytes(needed),
        _gigabytes(free),
        bulk.folder,
    )
    if needed > free:
        raise UsageError(
            f"--output {bulk.folder}: {_gigabytes(needed)} needed and {_gigabytes(free)} free; "
            "make room, save less, or use --feature_dtype float16"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def make_manifest(args: argparse.Namespace, bulk: Bulk, model: LoadedModel) -> dict[str, Any]:
    """What makes the features of a bulk run. All of `made_from` must be the same for a run to go on; the rest tells who began it."""
    weights = model.weights.describe()
    weights.pop("path", None)
    return {
        "made_from": {
            "images": len(bulk.images),
            "image_list_sha256": bulk.images.sha256(),
            "part_size": bulk.part_size,
            "features": {name: list(shape) for name, shape in bulk.shapes.items()},
            "feature_dtype": bulk.dtype,
            "dtype": model.dtype_name,
            "allow_hf32": model.device.allow_hf32,
            "image_size": model.preprocess.image_size,
            "preprocess": json.loads(json.dumps(dataclasses.asdict(model.preprocess))),
            "pooler": model.pooler,
            "weights": weights,
        },
        "parts": bulk.part_count,
        "weights_label": model.weights.label,
        "device_name": model.device.name,
        "versions": versions(),
        "command": command_line(),
        "time_utc": utc_now(),
    }


def agree_on_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, or check the one that is there. Raises UsageError saying what differs."""
    path = folder / "manifest.json"
    if not path.exists():
        if any(folder.glob("part-*.npz")):
            raise UsageError(f"--output {folder}: it holds parts but no manifest.json; use an empty or new folder")
        write_json(path, manifest)
    made_from = _read_json(path, "the manifest").get("made_from", {})
    for key, value in manifest["made_from"].items():
        if made_from.get(key) != value:
            raise UsageError(
                f"--output {folder}: begun with another {key} ({_short(made_from.get(key))}, now {_short(value)}); "
                "repeat the first command (manifest.json has it) or use another folder"
            )
    older = _read_json(path, "the manifest").get("versions")
    if older != manifest["versions"]:
        log.warning("This run was begun with other versions: %s, now %s", _short(older), _short(manifest["versions"]))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


class _LogLines(io.StringIO):
    """Makes log lines of what tqdm writes, where there is no terminal to draw a bar on."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def progress_bar(total: int, visible: bool) -> Any:
    """A bar on a terminal, a log line every half minute elsewhere: images done, rate, time left, failures."""
    from tqdm import tqdm

    lines = not sys.stderr.isatty()
    return tqdm(
        total=total,
        unit="img",
        disable=not visible,
        file=_LogLines() if lines else None,
        mininterval=30 if lines else 0.2,
        dynamic_ncols=not lines,
        bar_format="{n_fmt} of {total_fmt} images, {rate_noinv_fmt}, {remaining} left{postfix}" if lines else None,
    )


# --- log, results, provenance ----------------------------------------------------------------------------------------


class _TerminalFormatter(logging.Formatter):
    """On the terminal an error is one plain line; all else looks as in the file."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.levelno >= logging.ERROR else super().format(record)


class _LogFile(logging.FileHandler):
    """Where the disk is full, the run goes on without its log and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        log.error("%s: the log cannot be written any more (%s)", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is still in its buffer
            super().close()


def start_log(path: Path) -> None:
    """Log to the terminal and append to `path`, as `2026-05-15 04:33:04,368 [INFO] text`. Raises UsageError if that cannot be."""
    layout = "%(asctime)s [%(levelname)s] %(message)s"
    stop_log()
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    terminal = logging.StreamHandler()
    terminal.setFormatter(_TerminalFormatter(layout))
    terminal.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    log.addHandler(terminal)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(
            f"{path}: the log cannot be written ({error.strerror}); name another file with --output_log"
        ) from error
    file.setFormatter(logging.Formatter(layout))
    log.addHandler(file)


def stop_log() -> None:
    """Close the log's files."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def log_images(images: ImageList) -> None:
    if len(images) == 1:
        log.info("Loading image: %s", images[0].name)
    else:
        log.info("%s images, %s other files ignored", f"{len(images):,}", f"{images.ignored:,}")


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file to write that takes the place of `path` at the end: a crash leaves the old file or the new, never a half.

    Raises UsageError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as .npz, uncompressed, all at once or not at all. Raises UsageError if it cannot be written."""
    with replacing(path) as file:
        np.savez(file, **arrays)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON without NaN or Infinity, all at once or not at all. Raises UsageError if it cannot be written."""
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def result_name(name: str, kind: str) -> str:
    """An NPU's results have the deliverables' names, those of another device carry its name: inference, inference_cpu."""
    return name if kind == "npu" else f"{name}_{kind}"


def write_result(name: str, args: argparse.Namespace, data: dict[str, Any]) -> Path:
    """Write results/NAME.json (NAME_cpu.json and so on for other devices) and log it. Returns its path."""
    path = Path(args.results_dir) / f"{result_name(name, data['device'])}.json"
    write_json(path, data)
    log.info("Results saved to %s", relative_to_root(path))
    return path


def provenance(args: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """What every result carries: when, by which command and code, on which device, with which weights."""
    return {
        "time_utc": utc_now(),
        "command": command_line(),
        **git_state(),
        "scripts_sha256": {
            relative_to_root(path): _sha256(path)
            for path in sorted({Path(__file__).resolve(), Path(sys.argv[0]).resolve()})
            if path.is_file()
        },
        "device_name": model.device.name,
        "versions": versions(),
        "allow_hf32": model.device.allow_hf32,
        "parameters": model.parameters,
        "missing_keys": model.missing_keys,
        "pooler": model.pooler,
        "weights": model.weights.describe(),
    }


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def relative_to_root(path: Path) -> str:
    """`path` as seen from the bundle where it lies in it: results should not tell where somebody's copy is."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def command_line() -> str:
    return shlex.join(["python", relative_to_root(Path(sys.argv[0])), *sys.argv[1:]])


def git_state() -> dict[str, Any]:
    """The commit, and whether any Python file differs from it; null for both where there is no git or no repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "*.py")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def versions() -> dict[str, str | None]:
    """Versions of what computes: null where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torch_npu", "transformers", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_locks(path: Path = ROOT / "locked_models.md") -> dict[str, str]:
    """SHA-256 by file name, from the rows `| file | bytes | sha256 |` of locked_models.md that record one."""
    if not path.is_file():
        return {}
    rows = re.findall(r"^\| *`([^`|]+)` *\|[^|]*\| *`([0-9a-f]{64})` *\|", path.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def check_lock(weights: Weights, allow_unlocked: bool) -> None:
    """Raises UsageError if a weight file's hash is not the one that locked_models.md records for a file of its name."""
    locks = read_locks()
    for name, digest in weights.files.items():
        log.info("Weights: %s, sha256 %s", name, digest.result())
        if name in locks and locks[name] != digest.result():
            message = f"{name}: its sha256 is not the one recorded in locked_models.md ({locks[name][:12]}...)"
            if not allow_unlocked:
                raise UsageError(
                    f"{message}; nothing was saved. Fetch the weights again, or use --allow_unlocked for other weights"
                )
            log.warning("%s; accepted by --allow_unlocked", message)


# --- command line ----------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Takes flags with hyphens too, no abbreviations, and answers a mistake with one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_args(
            [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args], namespace
        )

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def positive_int(text: str) -> int:
    """An argparse type: a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in every script."""
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--model_path",
        default=DEFAULT_MODEL_PATH,
        help="folder, hub id or Meta's native .pth (default: %(default)s, else the hub)",
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N, npu or npu:N (default: an NPU, else a GPU, else the CPU)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic of the model (default: %(default)s)")
    group.add_argument(
        "--image_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the input, a multiple of 16 (default: the checkpoint's, 224)",
    )
    group.add_argument(
        "--allow_hf32",
        action="store_true",
        help="let float32 be rounded (HF32 on an NPU, TF32 on a GPU): faster, 1000 times less exact",
    )
    group.add_argument(
        "--random_weights",
        action="store_true",
        help="seeded random weights: to try the pipeline and its speed without the checkpoint",
    )
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with a checkpoint: only if you trust its source",
    )
    group.add_argument(
        "--allow_unlocked", action="store_true", help="accept weights whose sha256 is not the one recorded in locked_models.md"
    )
    group.add_argument(
        "--output_log", metavar="FILE", help="append the log to FILE (default: logs/, named after the script and device)"
    )
    group.add_argument(
        "--results_dir", default=str(ROOT / "results"), metavar="DIR", help="folder for the JSON result (default: results/)"
    )


def load_from_args(args: argparse.Namespace, device: Device) -> LoadedModel:
    """load_model with the flags of add_model_arguments, and a log of what was loaded."""
    log.info("Loading %s from %s ...", MODEL_NAME, "random weights" if args.random_weights else args.model_path)
    model = load_model(device, args.model_path, args.dtype, args.image_size, args.random_weights, args.trust_remote_code)
    log.info("Model loaded on %s, dtype=%s (%s)", device.kind, model.dtype, model.weights.label)
    log.info("Parameters: %s (%.1fM)", f"{model.parameters:,}", model.parameters / 1e6)
    recommended = recommended_arithmetic(Path(args.results_dir), device.kind)
    if recommended:
        log.info("Fastest arithmetic within the accuracy bar on this kind of device: %s", recommended)
    if model.missing_keys:
        log.warning("Missing from the checkpoint: %s", ", ".join(model.missing_keys))
    if model.pooler in ("missing", "untrained"):
        state = (
            "missing from the checkpoint, seeded here"
            if model.pooler == "missing"
            else "untrained, as an initialisation leaves it"
        )
        log.warning("Pooler: %s. Its output is a random projection of the class token, not a learned feature", state)
    return model


def recommended_arithmetic(results: Path, kind: str) -> str | None:
    """What `eval_accuracy.py --sweep` found, and where it says so; None where it has not run."""
    path = results / f"{result_name('accuracy_eval', kind)}.json"
    with suppress(OSError, ValueError, AttributeError):
        recommended = json.loads(path.read_text(encoding="utf-8")).get("recommended")
        return f"{recommended} ({relative_to_root(path)})" if recommended else None
    return None


def run_script(name: str, args: argparse.Namespace, body: Callable[[argparse.Namespace, Device], int]) -> int:
    """Open the device and the log, run body(args, device), and turn whatever ends it into an exit code and one line."""
    previous_handler = signal.signal(signal.SIGTERM, _stop)
    device: Device | None = None
    failure: Exception | None = None
    try:
        device = open_device(args.device, args.allow_hf32)
    except (Blocked, UsageError) as error:
        failure = error
    try:
        kind = device.kind if device else args.device.partition(":")[0]
        rank = f"_rank{os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
        start_log(Path(args.output_log or ROOT / "logs" / f"{result_name(name, kind)}{rank}.log"))
        if failure is not None:
            raise failure
        log.info("Device: %s, %s (%s)", device.torch_device, device.name, device.reason)
        if args.dtype == "float32":
            log.info(
                "float32 arithmetic: %s",
                "rounded where the device can (HF32, TF32)" if args.allow_hf32 else "true float32 (no HF32, no TF32)",
            )
        return body(args, device)
    except Blocked as error:
        log.error("BLOCKED: %s", error)
        return 3
    except UsageError as error:
        log.error("error: %s", error)
        return 2
    except KeyboardInterrupt as error:
        log.error("%s", str(error) or "stopped; nothing was saved")
        return 130
    finally:
        stop_log()
        signal.signal(signal.SIGTERM, previous_handler)


def _stop(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("images and output")
    group.add_argument(
        "--image_path", nargs="+", required=True, metavar="PATH", help="images, folders, globs, .txt lists of paths, .tar files"
    )
    group.add_argument(
        "--output",
        metavar="PATH",
        help="NAME.npz for the features of a few images, a folder for any number (in parts, resumable)",
    )
    group.add_argument("--pca", metavar="FILE.png", help="draw each crop beside its patch tokens as colours (few images only)")
    group.add_argument("--save_patch_tokens", action="store_true", help="save all patch tokens too: 100 times the size")
    group.add_argument(
        "--save_pooler",
        action="store_true",
        help="save the pooler's output too: not a learned feature unless the pooler is trained",
    )
    group.add_argument(
        "--feature_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how features are saved (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help="images at once (default: 8 on the CPU, 64 elsewhere; halved when memory is short)",
    )
    group.add_argument(
        "--num_workers", type=int, metavar="N", help="decoding processes of a bulk run (default: by the cores there are)"
    )
    group.add_argument(
        "--part_size",
        type=positive_int,
        metavar="N",
        help="images in a part of a bulk run (default: 10000; 200 with patch tokens)",
    )
    group.add_argument(
        "--execution",
        choices=("eager", "graph"),
        default="eager",
        help="graph: capture the forward pass and replay it (NPU, GPU)",
    )
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    in_parts = args.output is not None and not args.output.endswith(".npz")
    if in_parts and args.pca:
        parser.error("--pca draws a few images: use it without --output FOLDER")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers: 0 (decode in this process) or more")
    return run_script("inference", args, run_bulk if in_parts else run_few)


if __name__ == "__main__":
    sys.exit(main())
