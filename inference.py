"""WebSSL-MAE-300M: turn photos into features on an Ascend NPU, a GPU or the CPU.

    python inference.py --image_path photo.jpg --device npu
    python inference.py --image_path a.jpg b.png --output features.npz --pca picture.png

One photo or a few are run at once, timed, and described in the log and in results/inference.json (results/inference_cpu.json
and so on for other devices). For a folder of any size, a list or a tar: embed.py. From Python:

    model = load_model(open_device("npu"))
    arrays = features(model, ["photo.jpg"])

Exit codes: 0 done; 1 an evaluation (eval/) missed its bar; 2 wrong usage or unusable input; 3 BLOCKED: the device that was
asked for cannot be used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path, PurePath

STARTED = time.perf_counter()  # what a user waits for begins here
ROOT = Path(__file__).resolve().parent

# torch >= 2.5 imports torch_npu by itself and fails where CANN is absent, even for a run on the CPU.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


class Stopping:
    """Answers Ctrl-C, SIGTERM and SIGHUP: the first, while `graceful`, by KeyboardInterrupt, else it ends at once."""

    def __init__(self) -> None:
        self.graceful = False
        self.last_words = "stopped; nothing was saved"

    def __call__(self, _signal: int, _frame: object) -> None:
        if not self.graceful:
            os.write(2, f"\n{self.last_words}\n".encode())
            os._exit(130)
        self.graceful = False
        raise KeyboardInterrupt

    def listen(self) -> dict[int, Any]:
        """Take over the signals but those that are ignored, as nohup has it; returns who answered them before."""
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        return {number: signal.signal(number, self) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}


stopping = Stopping()
RUN_AS_SCRIPT = Path(sys.argv[0]).is_file() and Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "eval")
if RUN_AS_SCRIPT:
    stopping.listen()  # the imports below take a while

import argparse
import dataclasses
import errno
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import logging.handlers
import math
import platform
import re
import shlex
import stat
import statistics
import subprocess
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
except ImportError as error:
    if not RUN_AS_SCRIPT:
        raise
    print(f"error: {error}. Run: pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None


class _Lazy:
    """A module that is imported when it is first used: --help and a wrong flag need not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
else:
    torch = _Lazy("torch")

MODEL_NAME = "webssl-mae300m-full2b-224"
HUB_ID = f"facebook/{MODEL_NAME}"
HUB_COMMITS = {HUB_ID: "4655a0ac1726c206ba14d5ccb26758c62a4d03b0"}
DEFAULT_MODEL_PATH = f"weights/{MODEL_NAME}"
DTYPES = ("float32", "float16", "bfloat16")
SEED = 0
LAYER_NORM_EPS = 1e-6  # timm's, with which Meta's native files were trained

# What changes how a forward pass is computed, not what it computes; --without switches one off.
LEVERS = ("folded_patches", "fused_attention")

# Environment variables that change speed or results without a word.
SILENT_VARIABLES = (
    *("INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "OMP_NUM_THREADS"),
    *("PYTORCH_NPU_ALLOC_CONF", "ASCEND_LAUNCH_BLOCKING", "TORCH_NPU_USE_COMPATIBLE_IMPL", "ASCEND_RT_VISIBLE_DEVICES"),
)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
MAX_FILE_BYTES = 1 << 30

log = logging.getLogger("webssl")


class UsageError(Exception):
    """Wrong usage or unusable input: exit code 2. The message is one line: what is wrong, where, what to do."""


class Blocked(Exception):
    """The device that was asked for cannot be used: exit code 3. What is missing, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


class BadImage(Exception):
    """This image cannot be decoded, whoever asks again."""


class Unreadable(Exception):
    """The disk, the network or missing rights did not give a file that may well be good."""


def first_line(error: BaseException) -> str:
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
    allow_hf32: bool
    deterministic: bool

    @property
    def kind(self) -> str:
        return self.torch_device.type


def device_spec(text: str) -> str:
    """An argparse type: auto, cpu, cuda, cuda:1, npu, npu:1."""
    if not re.fullmatch(r"auto|cpu|(cuda|npu)(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use auto, cpu, cuda, cuda:N, npu or npu:N")
    return text


def open_device(spec: str = "auto", allow_hf32: bool = False, deterministic: bool = False) -> Device:
    """Make the device `spec` (auto, cpu, cuda, cuda:1, npu, npu:1) ready for use and set its float32 precision.

    Under torchrun `cuda` and `npu` mean the device of this process's LOCAL_RANK. `auto` takes an NPU, else a GPU, else the CPU.
    deterministic: the same bits on every run; on an NPU it acts only before the first operator of the process.
    Raises UsageError for a spec that makes no sense and Blocked for a device that cannot be used; it never falls back.
    """
    try:
        kind, _, index = device_spec(spec).partition(":")
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--device: {error}") from None
    if index and rank_of("LOCAL_WORLD_SIZE", 1) > 1:
        raise UsageError(f"--device {spec}: under torchrun each process takes its own device; leave out ':{index}'")
    position = int(index) if index else rank_of("LOCAL_RANK", 0)
    reasons = ["chosen by --device auto" if kind == "auto" else f"asked for with --device {spec}"]
    for candidate in ("npu", "cuda", "cpu") if kind == "auto" else (kind,):
        try:
            name = {"cpu": _open_cpu, "cuda": _open_cuda, "npu": _open_npu}[candidate](position, deterministic)
            break
        except Blocked as error:
            if kind != "auto":
                raise
            reasons.append(f"no {'NPU' if candidate == 'npu' else 'GPU'}: {error.reason}")
    set_float32_precision(candidate, allow_hf32, allow_hf32)
    if candidate != "npu":
        # transformers imports any torch_npu it finds, which fails where CANN is absent.
        sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]
    place = torch.device("cpu") if candidate == "cpu" else torch.device(candidate, position)
    return Device(place, name, "; ".join(reasons), allow_hf32, deterministic)


def rank_of(variable: str, default: int) -> int:
    """A number that torchrun sets in the environment. Raises UsageError where it is none."""
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"the environment variable {variable} is {text!r}, not a number; unset it, or start with torchrun")
    return int(text)


def _open_cpu(_position: int, _deterministic: bool) -> str:
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    with suppress(OSError, TypeError):
        return re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].strip()
    return platform.machine()


def _open_cuda(position: int, _deterministic: bool) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        raise Blocked(f"this torch ({torch.__version__}) is built without GPU support", "Install a CUDA build of torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return _first_use("cuda", position, count, "nvidia-smi, and that the container was given a GPU")


def _open_npu(position: int, deterministic: bool) -> str:
    if sys.modules.get("torch_npu", "never looked for") is None:
        del sys.modules["torch_npu"]
    if importlib.util.find_spec("torch_npu") is None:
        raise Blocked("torch_npu is not installed", "Run eval/env_check.py: it prints the line that installs what fits here")
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch_npu")
        if version.split(".")[:2] != torch.__version__.split(".")[:2]:
            reason = f"torch {torch.__version__} and torch_npu {version} do not go together"
            raise Blocked(reason, "Install the same version of both")
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    numbers = [int(number) for number in re.findall(r"[0-9]+", visible)]
    if numbers != sorted(set(numbers)):
        reason = f"ASCEND_RT_VISIBLE_DEVICES={visible} is not in ascending order, with which CANN finds no device"
        raise Blocked(reason, f"Set it to {','.join(map(str, sorted(set(numbers))))}")
    try:
        import torch_npu  # noqa: F401

        if deterministic:  # only a thread's first setting acts; matmul and layer norm are not deterministic without
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        count = torch.npu.device_count() if torch.npu.is_available() else 0
        if count:
            torch.npu.config.allow_internal_format = False  # or conv2d takes a path that no graph captures on Atlas A2
            set_float32_precision("npu", False, False)
    except Exception as error:
        raise _explain_npu(error, "torch_npu cannot be used", "Run eval/env_check.py to see the whole environment") from error
    return _first_use("npu", position, count, "npu-smi info, and that the container was given /dev/davinci*")


# What the errors of torch_npu 2.9.0 to 2.14.0 and CANN 8.5 mean: a part of the text, the reason, what to do.
NPU_ERRORS = (
    (
        "cannot open shared object file",
        "CANN is not installed or not set up",
        "Install CANN, then run: source /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: .../ascend-toolkit/set_env.sh)",
    ),
    (
        "Two accelerators",
        "torch_npu cannot work beside a CUDA build of torch on a machine with a GPU",
        "Install the CPU build of torch",
    ),
    (
        "undefined symbol",
        "torch_npu does not fit this torch or this CANN",
        "Install a recommended pair: eval/env_check.py names it",
    ),
    (
        "500001",
        "CANN's compiler cannot start",
        "Check numpy<2, decorator, attrs, psutil, scipy, protobuf, sympy, cffi; the log is below ~/ascend/log",
    ),
)


def _explain_npu(error: Exception, otherwise: str, remedy: str) -> Blocked:
    for part, reason, what_to_do in NPU_ERRORS:
        if part in str(error):
            return Blocked(f"{reason} ({first_line(error)})", what_to_do)
    return Blocked(f"{otherwise} ({first_line(error)})", remedy)


def _first_use(kind: str, position: int, count: int, check: str) -> str:
    """Allocate and compute once: a device that is listed may still be held by another process or have a failing driver."""
    label, variable = {"cuda": ("GPU", "CUDA_VISIBLE_DEVICES"), "npu": ("NPU", "ASCEND_RT_VISIBLE_DEVICES")}[kind]
    if not count:
        visible = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise Blocked(f"torch sees no {label}{visible}", f"Check {check}")
    if position >= count:
        raise Blocked(f"there is no {kind}:{position}: torch sees {count} {label}(s)", f"Use a number below {count}")
    backend = torch.get_device_module(kind)
    try:
        backend.set_device(position)
        torch.zeros(1, device=f"{kind}:{position}").add_(1)
        backend.synchronize()
        return backend.get_device_name(position)
    except Exception as error:
        failed = f"{kind}:{position} is listed but fails at first use"
        raise _explain_npu(error, failed, "Check that no other process holds it") from error


def set_float32_precision(kind: str, convolutions: bool, products: bool) -> None:
    """Allow or forbid rounded float32 on all devices of a kind, in convolutions and in matrix products.

    Left alone, torch_npu rounds the inputs of float32 convolutions to HF32, and cuDNN to TF32.
    """
    if kind == "npu":
        torch.npu.conv.allow_hf32 = convolutions
        torch.npu.matmul.allow_hf32 = products
    elif kind == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "tf32" if convolutions else "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if products else "ieee"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, says that memory ran out.

    torch_npu 2.9.0 raises a plain RuntimeError, later ones torch.OutOfMemoryError; the CPU's allocator has words of its own.
    """
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and re.search(r"out of memory|allocate memory|create a memory", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def synchronize(device: Device) -> None:
    """Wait until the device has finished all that was queued on it (at once on the CPU)."""
    torch.get_device_module(device.torch_device).synchronize()


def time_once(device: Device, run: Callable[[], Any]) -> float:
    """Seconds from a synchronised device until all that `run` queues on it is done."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


# --- weights ---------------------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """A published encoder, by its dimensions (facebookresearch/webssl mae/mae.py); the MLP is 4 times as wide."""

    hub_id: str
    width: int
    layers: int
    heads: int
    patch_size: int


CARDS = (
    Card(HUB_ID, 1024, 24, 16, 16),
    Card("facebook/webssl-mae700m-full2b-224", 1280, 32, 16, 14),
    Card("facebook/webssl-mae1b-full2b-224", 1536, 40, 24, 14),
    Card("facebook/webssl-mae2b-full2b-224", 2688, 24, 21, 14),
    Card("facebook/webssl-mae3b-full2b-224", 3072, 26, 24, 14),
)


def identify(config: Any) -> str:
    """Hub id of the published encoder with these dimensions, or "another model" with the dimensions."""
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    for card in CARDS:
        if found == tuple(card)[1:] and config.intermediate_size == 4 * card.width:
            return card.hub_id
    width, layers, heads, patch = found
    return f"another model ({width} wide, {layers} layers, {heads} heads, patches of {patch})"


@dataclass(frozen=True)
class Weights:
    """Where the weights came from. `files` are hashed in the background, so that nobody waits who does not ask."""

    source: str
    path: str | None = None
    seed: int | None = None
    files: dict[str, Future] = field(default_factory=dict)
    note: str | None = None

    def describe(self) -> dict[str, Any]:
        """JSON for results: source, and path and sha256 of each file (waits for the hashes) or the seed."""
        if self.source == "random":
            return {"source": "random", "note": "random weights: not the model, features mean nothing", "seed": self.seed}
        hashes = {name: future.result() for name, future in self.files.items()}
        return {"source": self.source, "path": shown_path(self.path or ""), "sha256": hashes, "note": self.note}

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
    name: str
    levers: tuple[str, ...]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_evidence(self) -> bool:
        """Whether these are weights that the page may speak of: a checkpoint with the card's dimensions."""
        return self.weights.source == "checkpoint" and self.name == HUB_ID and self.weights.note is None

    @property
    def title(self) -> str:
        """What log and pictures call the model."""
        name = self.name.rpartition("/")[2] if self.name.startswith("facebook/") else self.name
        note = "random weights" if self.weights.source == "random" else self.weights.note
        return f"{name} ({note})" if note else name


@dataclass
class _Checkpoint:
    """What was read of a checkpoint before any model is built; the tensors go by the hub's names."""

    model_class: Any
    config: Any
    state_dict: dict[str, torch.Tensor]
    files: list[Path]
    preprocess: Preprocess


def load_model(
    device: Device,
    model_path: str = DEFAULT_MODEL_PATH,
    dtype: str = "float32",
    image_size: int | None = None,
    resize: str = "crop",
    random_weights: bool = False,
    trust_remote_code: bool = False,
    allow_unlocked: bool = False,
    levers: Sequence[str] = LEVERS,
    exact_gelu: bool = True,
) -> LoadedModel:
    """Load a ViT through transformers and put it on `device` in eval mode.

    model_path: a folder in transformers' layout, a hub id, or Meta's native .pth (a state dict in timm's names). dtype: one of
    DTYPES. image_size: side of the square input in pixels, a multiple of the patch size; None takes the checkpoint's own.
    resize: a key of RESIZES. levers: those of LEVERS to use where the device has them; () leaves transformers' forward pass as
    it is. exact_gelu=False leaves torch_npu's tanh GELU. Raises UsageError for anything that cannot be loaded whole, and for
    files whose hash is not the one that locked_models.md records.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted, missing = getattr(torch, dtype), []
    if random_weights:
        module, weights, preprocess = _random_model(wanted), Weights("random", seed=SEED), Preprocess()
        name = identify(module.config)
    else:
        location = find_weights(model_path)
        checkpoint = (_read_native if location.is_file() else _read_folder)(location, wanted, trust_remote_code)
        hashes = sha256_in_background(checkpoint.files)
        module, missing = _build(checkpoint, wanted, model_path)
        preprocess, name = checkpoint.preprocess, identify(module.config)
        weights = Weights("checkpoint", model_path, files=hashes, note="looks untrained" if _looks_untrained(module) else None)
        check_lock(name, weights, allow_unlocked)
    pooler = _settle_pooler(module, missing)
    preprocess = preprocess.resized(image_size, resize)
    _resize_position_embeddings(module, preprocess.image_size)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    module = module.eval().requires_grad_(False)
    try:
        used = apply_levers(module, device, preprocess, levers, exact_gelu)
        module = module.to(device.torch_device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"{device.torch_device} has too little memory for the model; try --dtype float16") from error
    return LoadedModel(module, device, wanted, preprocess, weights, parameters, missing, pooler, name, used)


def _build(checkpoint: _Checkpoint, dtype: torch.dtype, label: str) -> tuple[torch.nn.Module, list[str]]:
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
    except Exception as error:
        raise UsageError(f"checkpoint {label}: transformers cannot build the model: {first_line(error)}") from error
    for kind, verb in (("missing", "lacks"), ("unexpected", "has unexpected"), ("mismatched", "has the wrong shape for")):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        if names and (kind, names) != ("missing", POOLER_KEYS):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"checkpoint {label}: it {verb} {', '.join(names[:3])}{more}; nothing was loaded")
    return module, sorted(info["missing_keys"])


def find_weights(model_path: str) -> Path:
    """Local folder or file of `model_path`, downloaded where it is a hub id. Raises UsageError if there is none."""
    is_default = model_path.rstrip("/") == DEFAULT_MODEL_PATH
    path = ROOT / model_path if is_default else Path(model_path).expanduser()
    if os.path.isdir(path) or os.path.isfile(path):
        return path
    if is_default:
        return _download(HUB_ID, f"there are no weights at {DEFAULT_MODEL_PATH}, and ")
    if re.fullmatch(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}", model_path) and not any(
        os.path.exists(folder / path.parent) for folder in (Path(), ROOT)
    ):
        return _download(model_path, f"--model_path {model_path}: not a folder or file here, and ")
    raise UsageError(f"--model_path {model_path}: no such folder or file")


def _download(hub_id: str, context: str) -> Path:
    import huggingface_hub

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    commit = HUB_COMMITS.get(hub_id)
    wanted = {"repo_id": hub_id, "revision": commit, "allow_patterns": ["*.json", "*.safetensors", "*.py"]}
    if commit is not None or huggingface_hub.constants.HF_HUB_OFFLINE:
        with suppress(OSError):  # a pinned commit never changes: what is in the cache needs no network
            folder = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
            if any(folder.glob("*.safetensors")):
                return folder
    log.info(f"Downloading {hub_id} from {endpoint} ...")
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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises UsageError naming the file where it is anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {what} cannot be read ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: {what} is not a JSON object")
    return data


def _read_folder(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> _Checkpoint:
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model_path {folder}: no config.json in it; a folder in transformers' layout is wanted")
    model_class, config = _read_config(folder, trust_remote_code)
    files = _safetensors_files(folder)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= _read_safetensors(file, dtype)
    described = [folder / name for name in ("config.json", "preprocessor_config.json") if (folder / name).is_file()]
    return _Checkpoint(model_class, config, state_dict, described + files, read_preprocess(folder, config.image_size))


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Class and configuration of the model: transformers' own ViT, or with `trust_remote_code` what the folder brings."""
    from transformers import AutoConfig, ViTConfig, ViTModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    path = folder / "config.json"
    fields = read_json(path, "the model's configuration")
    for name in ("image_size", "patch_size"):  # a pair of equal edges is legal too
        edges = fields.get(name)
        if isinstance(edges, list) and len(set(map(str, edges))) == 1:
            fields[name] = edges[0]
    own_code = fields["auto_map"].get("AutoModel") if isinstance(fields.get("auto_map"), dict) else None
    try:
        if own_code and trust_remote_code:
            log.warning(f"--trust_remote_code: running the Python code that comes with {folder}")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            return get_class_from_dynamic_module(own_code, str(folder)), config
        if fields.get("model_type") == "vit":
            config = ViTConfig.from_dict(fields)
            if config.image_size < 1 or config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
                raise ValueError("image_size, hidden_size and num_attention_heads do not fit together")
            return ViTModel, config
    except Exception as error:
        raise UsageError(f"{path}: not a usable configuration ({first_line(error)})") from error
    hint = "; it brings its own code, which runs only with --trust_remote_code" if own_code else ""
    raise UsageError(f"{path}: model_type is {fields.get('model_type')!r}, and this bundle runs 'vit'{hint}")


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index, "the index of the weight files").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UsageError(f"{index}: its weight_map does not name files; fetch the file again")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: {name} is missing; only safetensors files (or Meta's native .pth) are read")
    return [folder / name for name in names]


def _in_dtype(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise UsageError(f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')} values, not floating-point weights")
    return tensor.to(dtype)


def _read_safetensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one file in `dtype`. float32 stays mapped to the file: no copy, and it is ready at once."""
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return _in_dtype(path, name, file.get_tensor(name), dtype)

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if dtype == torch.float32:
                return {name: _in_dtype(path, name, file.get_tensor(name), dtype) for name in names}
        # Opened anew for each tensor, so that the pages of the file do not stay in memory beside a converted copy.
        return {name: read(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: {_damage(path)} ({first_line(error)}); fetch the file again") from error


def _damage(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run git lfs pull"
    return "empty" if not start else "truncated or damaged"


def _read_native(path: Path, dtype: torch.dtype, _trust_remote_code: bool) -> _Checkpoint:
    """Meta's .pth: a plain state dict in timm's names, without a pooler; or a training checkpoint that holds one as "model"."""
    from transformers import ViTConfig, ViTModel

    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("a compressed archive, which torch.save never writes")
        # Mapped where nothing is converted; else read whole, so that converting can let go of one tensor after another.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and dtype == torch.float32)
    except Exception as error:
        raise UsageError(f"{path}: {_damage(path)}, or not a plain state dict ({first_line(error)})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        log.info(f"{path}: a training checkpoint; its 'model' is loaded")
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path}: not a plain state dict of tensors; Meta's native .pth is wanted")
    decoder = [name for name in state if name.startswith("decoder_") or name == "mask_token"]
    if decoder:
        log.info(f"{path}: {len(decoder)} tensors of the decoder of MAE pre-training (mask_token, decoder_*) are left out")
    state = {name: state[name] for name in state if name not in decoder}
    try:
        config = ViTConfig(**_native_config(path, state))
    except (KeyError, IndexError) as error:
        raise UsageError(f"{path}: not a ViT in timm's layout: {error} is missing") from error
    for name in list(state):
        state[name] = _in_dtype(path, name, state.pop(name), dtype)
    return _Checkpoint(ViTModel, config, map_native_names(state), [path], read_preprocess(path.parent, config.image_size))


def _native_config(path: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Dimensions of a state dict. The number of heads is not in it: a wrong one gives wrong features without any error."""
    width = state["cls_token"].shape[-1]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    heads = {card.width: card.heads for card in CARDS}.get(width)
    beside = path.with_name("config.json")
    if beside.is_file():
        heads = read_json(beside, "the model's configuration").get("num_attention_heads", heads)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UsageError(
            f"{path}: {width} wide is none of the Web-SSL MAE encoders ({', '.join(str(card.width) for card in CARDS)}), "
            'and the number of heads is not in the file; put a config.json with {"num_attention_heads": N} beside it'
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".attn.qkv.weight") for name in state),
        "num_attention_heads": heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


POOLER_KEYS = ["pooler.dense.bias", "pooler.dense.weight"]
NATIVE_NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def map_native_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a timm ViT state dict to the hub's names; `attn.qkv` holds query, key and value stacked in that order.

    Names that are not known are kept, so that the loader reports them as unexpected.
    """
    mapped = {}
    for name, tensor in state.items():
        for native, hub in NATIVE_NAMES:
            name = re.sub(native, hub, name)
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            mapped |= {name.replace("qkv", part): chunk for part, chunk in parts}
        else:
            mapped[name] = tensor
    return mapped


def _random_model(dtype: torch.dtype) -> torch.nn.Module:
    """The exact architecture with seeded weights: matrices uniform with transformers' standard deviation (initializer_range).

    A uniform distribution is drawn in a third of the time that transformers' own initialisation takes.
    """
    from transformers import ViTConfig, ViTModel

    _, width, layers, heads, patch_size = CARDS[0]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config = ViTConfig(**shape, image_size=224, patch_size=patch_size, layer_norm_eps=LAYER_NORM_EPS)
    with torch.device("meta"):
        module = ViTModel(config)
    module = module.to(dtype).to_empty(device="cpu")
    bound = math.sqrt(3) * config.initializer_range

    def draw(number: int, matrix: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(SEED + number)  # one each: whatever the number of threads, the same result
        matrix.data.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))

    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(len(matrices)), matrices))
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0)
    return module


def _looks_untrained(module: torch.nn.Module) -> bool:
    """Whether every layer norm is as an initialisation leaves it, which no training does."""
    norms = [part for part in module.modules() if isinstance(part, torch.nn.LayerNorm)]
    return all(bool((norm.weight == 1).all()) and not bool(norm.bias.any()) for norm in norms)


def _settle_pooler(module: torch.nn.Module, missing: list[str]) -> str:
    """State of the pooler; a missing one gets seeded weights, where transformers would draw new ones at each load."""
    if getattr(module, "pooler", None) is None:
        return "none"
    dense, spread = module.pooler.dense, module.config.initializer_range
    if not missing:
        return classify_pooler(dense.weight, dense.bias, spread)
    generator = torch.Generator().manual_seed(SEED)
    dense.weight.data.copy_(torch.empty(dense.weight.shape).normal_(0, spread, generator=generator))
    dense.bias.data.zero_()
    return "missing"


def classify_pooler(weight: torch.Tensor, bias: torch.Tensor, initializer_range: float) -> str:
    """Tell a pooler whose bias is zero and whose weights have the spread of an initialisation, "untrained", from "trained".

    The tolerance is 1% for rounding plus five standard errors of a spread measured on this many weights.
    """
    tolerance = 0.01 + 5 / math.sqrt(2 * weight.numel())
    as_initialised = not bias.any() and abs(weight.float().std().item() / initializer_range - 1) < tolerance
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
    futures = {path.name: pool.submit(sha256, path) for path in files}
    pool.shutdown(wait=False)
    return futures


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_locks(path: Path = ROOT / "locked_models.md") -> dict[tuple[str, str], str]:
    """SHA-256 by model id and file name: the rows `| model | file | bytes | sha256 |` of locked_models.md that record one."""
    if not path.is_file():
        return {}
    row = r"^\| *`([^`|]+)` *\| *`([^`|]+)` *\|[^|]*\| *`([0-9a-f]{64})` *\|"
    return {(model, name): digest for model, name, digest in re.findall(row, path.read_text(encoding="utf-8"), re.MULTILINE)}


def check_lock(model: str, weights: Weights, allow_unlocked: bool) -> None:
    """Raises UsageError if a file's hash is not the one that locked_models.md records; waits only where it records one."""
    locks = read_locks()
    for name, digest in weights.files.items():
        locked = locks.get((model, name))
        if locked is not None and locked != digest.result():
            message = f"{name}: its sha256 is not the one recorded in locked_models.md for {model} ({locked[:12]}...)"
            if not allow_unlocked:
                raise UsageError(f"{message}; nothing was computed. Fetch the file again, or use --allow_unlocked")
            log.warning(f"{message}; accepted by --allow_unlocked")


# --- images ----------------------------------------------------------------------------------------------------------

RESIZES = ("crop", "squash", "256")


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

    def resized(self, image_size: int | None = None, resize: str = "crop") -> Preprocess:
        """The same for another input size in pixels, in the same proportion; resize is one of RESIZES, the official three.

        "crop" keeps the checkpoint's own rule, "squash" resizes both edges without a crop, "256" the short edge to 256 of 224.
        """
        size = image_size or self.image_size
        scale = size / self.image_size
        if resize == "squash":
            edges: int | tuple[int, int] = (size, size)
        elif resize == "256":
            edges = round(size * 256 / 224)
        elif isinstance(self.resize, int):
            edges = round(self.resize * scale)
        else:
            edges = (round(self.resize[0] * scale), round(self.resize[1] * scale))
        return dataclasses.replace(self, resize=edges, image_size=size)


# transformers' processors whose fields are understood, and what each assumes of a field that its file leaves out.
IMAGE_PROCESSORS = {"BitImageProcessor": {}, "CLIPImageProcessor": {}, "ViTImageProcessor": {"do_center_crop": False}}


def read_preprocess(folder: Path, image_size: int) -> Preprocess:
    """What preprocessor_config.json says, or the defaults for `image_size` where there is none.

    Raises UsageError naming the first field that is missing, unknown, or asks for what is not supported.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocess().resized(image_size)
    fields = {name: value for name, value in read_json(path, "the pre-processing").items() if value is not None}

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
        take(name, _require_true)
    resize = take("size", _edges)
    if take("do_center_crop", bool):
        crop = take("crop_size", lambda value: _square(_edges(value), resize))
    else:
        crop = resize[0] if isinstance(resize, tuple) and resize[0] == resize[1] else 0
        fields.pop("crop_size", None)
    if not crop:
        raise UsageError(f"{path}: size without do_center_crop does not give a square, which is not supported")
    colours = {name: take(f"image_{name}", _colour) for name in ("mean", "std")}
    resample, factor = take("resample", lambda value: int(Image.Resampling(value))), take("rescale_factor", float)
    if fields:
        raise UsageError(f"{path}: field {sorted(fields)[0]!r} is not known to this bundle; remove it if it changes nothing")
    return Preprocess(resize, crop, resample, factor, **colours)


def _edges(value: dict[str, int]) -> int | tuple[int, int]:
    return int(value["shortest_edge"]) if value.keys() == {"shortest_edge"} else (int(value["height"]), int(value["width"]))


def _require_true(value: Any) -> None:
    if value is not True:
        raise ValueError


def _square(crop: Any, resize: int | tuple[int, int]) -> int:
    height, width = crop
    if height != width or height > (resize if isinstance(resize, int) else min(resize)):
        raise ValueError
    return height


def _colour(value: Sequence[float]) -> tuple[float, ...]:
    red, green, blue = map(float, value)
    return red, green, blue


def walk_files(folder: str) -> Iterator[str]:
    """Paths of all files below `folder` in a fixed order; a link back to where the walk has been is not followed."""

    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(files))


def is_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _matches(pattern: str) -> list[str]:
    """What a pattern names; with ** by a walk, where glob.glob would list a file for each way through a circle of links."""
    base, deep, rest = pattern.partition("**")
    if "**" in rest:
        raise UsageError(f"--image_path {pattern}: a pattern may have one ** at most")
    roots = sorted(glob.glob(base)) if base else ["."]
    if not deep or not rest.strip("/*"):
        return roots
    found = {os.path.normpath(path) for root in roots for path in walk_files(root)}
    return sorted(path for path in found if PurePath(path).match(rest.strip("/")))


def for_each_named(arguments: Sequence[str], take: Callable[[str], None]) -> None:
    """Call take(path) for all that paths and glob patterns name, in a fixed order.

    Raises UsageError where an argument names nothing, or where it cannot be read.
    """
    for argument in arguments:
        try:
            matches = [argument] if os.path.exists(argument) else _matches(argument)
            for match in matches:
                take(match)
        except OSError as error:
            raise UsageError(f"--image_path {argument}: cannot be read ({error})") from error
        if not matches:
            raise UsageError(f"--image_path {argument}: no such file or folder")


def find_images(arguments: Sequence[str]) -> list[str]:
    """Paths of the images that files, globs and folders name, in a fixed order. Raises UsageError where one names nothing."""
    paths: list[str] = []

    def take(path: str) -> None:
        if path.lower().endswith((".txt", ".tar")):
            raise UsageError(f"--image_path {path}: lists and tars are for embed.py, which takes --output FOLDER/")
        paths.extend(filter(is_image_name, walk_files(path)) if os.path.isdir(path) else [path])

    for_each_named(arguments, take)
    if not paths:
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it")
    return paths


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    """The bytes of a file, or of a stretch of it. Raises BadImage where the path itself is at fault, else Unreadable.

    A disk or network error is tried again twice; what is not there, or may not be read, is not.
    """
    for delay in (0.5, 2.0, None):
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("a folder, not an image" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            size = status.st_size if size < 0 else size
            if size > MAX_FILE_BYTES:
                raise BadImage(f"{size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) != size:
                raise OSError(errno.EIO, "the file is shorter than it was")
            return data
        except ValueError as error:  # a null byte in the path
            raise BadImage(str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTDIR):
                raise BadImage(error.strerror) from error
            if delay is None or isinstance(error, PermissionError):
                raise Unreadable(f"{path}: {error.strerror}") from error
            time.sleep(delay)
    raise AssertionError("unreachable")


# EXIF orientation to what turns the picture upright (the numbers: TIFF 6.0, tag 274).
UPRIGHT = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))


def decode(data: bytes | Image.Image) -> Image.Image:
    """An image in RGB or L, upright (EXIF), its first frame if it is animated, from a file's bytes. Raises BadImage."""
    if data == b"":
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large or untidy, but readable: not worth a line on the terminal for each image
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) if isinstance(data, bytes) else data
            image.load()
            orientation = None
            with suppress(Exception):  # damaged EXIF costs the orientation, not the photo
                orientation = image.getexif().get(0x0112)
            upright = _to_rgb_or_grey(image)
            return upright.transpose(Image.Transpose(UPRIGHT[orientation])) if orientation in UPRIGHT else upright
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image that can be read ({', '.join(IMAGE_FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _to_rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_from_16_bits(image)
    if image.mode == "F":
        raise BadImage("floating-point grey, whose black and white are not defined")
    if image.has_transparency_data:
        # Onto white, as a viewer shows it and as transformers 5 does: dropping the alpha would bring out whatever colour
        # lies under transparent pixels.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # Grey stays grey until it is resized: a third of the cost.
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """The high byte of 16-bit grey, as viewers show it: Pillow's own conversion clips to 255, which turns most of it white."""
    grey = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # TIFF BitsPerSample: Pillow reads 12 bits into the same mode
    if not 8 < bits <= 16 or grey.min() < 0 or grey.max() >= 1 << bits:
        raise BadImage("32-bit grey, whose black and white are not defined")
    if tags.get(262) == 0:  # TIFF PhotometricInterpretation: white is zero
        grey = (1 << bits) - 1 - grey
    eight = (grey >> (bits - 8)).astype(np.uint8)
    transparent = image.info.get("transparency")  # PNG tRNS: one shade, as a number
    if isinstance(transparent, int):
        eight[grey == transparent] = 255
    return Image.fromarray(eight)


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


def read_photo(photo: str | Path | Image.Image) -> Image.Image:
    """The decoded image of a path, or a PIL image made alike. Raises UsageError naming one that cannot be read."""
    try:
        return decode(photo if isinstance(photo, Image.Image) else read_bytes(str(photo)))
    except BadImage as error:
        raise UsageError(f"{photo}: {error}") from error
    except Unreadable as error:
        raise UsageError(str(error)) from error


# --- the forward pass and its levers ---------------------------------------------------------------------------------


@lru_cache
def _mean_and_std(preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device) for values in (preprocess.mean, preprocess.std))
    return mean, std


def normalize(crops: torch.Tensor, preprocess: Preprocess, dtype: torch.dtype | None = None) -> torch.Tensor:
    """uint8 crops [N, H, W, 3] on any device to pixel values [N, 3, H, W] (float32), with transformers' own arithmetic."""
    dtype = dtype or torch.float32
    mean, std = _mean_and_std(preprocess, crops.device, dtype)
    return (crops.permute(0, 3, 1, 2).to(dtype) * preprocess.rescale_factor - mean) / std


@lru_cache
def _lever_modules() -> Any:
    """The modules that levers put into transformers' model. Built at first use, because torch is imported late."""

    class FoldedPatches(torch.nn.Module):
        """Patch embedding of raw pixels [N, 3, H, W], strided as uint8 crops are, as one matrix product.

        Normalisation is folded into weight and bias in float64. No permutation, no convolution, so no HF32 or TF32 either.
        Pixels are centred first: left between 0 and 255, their mean would cancel against the bias and cost digits.
        """

        def __init__(self, projection: torch.nn.Conv2d, preprocess: Preprocess) -> None:
            super().__init__()
            weight = projection.weight.detach().double()
            std = torch.tensor(preprocess.std, dtype=torch.float64).view(1, 3, 1, 1)
            mean = torch.tensor(preprocess.mean, dtype=torch.float64).view(1, 3, 1, 1)
            folded = weight * (preprocess.rescale_factor / std)
            bias = projection.bias.double() + (folded * (128 - mean / preprocess.rescale_factor)).sum((1, 2, 3))
            self.patch_size = projection.weight.shape[-1]
            self.projection = torch.nn.Linear(folded[0].numel(), len(folded), device="meta", dtype=projection.weight.dtype)
            self.projection.weight = torch.nn.Parameter(folded.permute(0, 2, 3, 1).flatten(1).to(projection.weight.dtype))
            self.projection.bias = torch.nn.Parameter(bias.to(projection.bias.dtype))

        def forward(self, pixels: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
            count, _, height, width = pixels.shape
            rows, columns = height // self.patch_size, width // self.patch_size
            patches = (pixels.permute(0, 2, 3, 1) - 128).reshape(count, rows, self.patch_size, columns, -1)
            return self.projection(patches.transpose(2, 3).reshape(count, rows * columns, -1))

    class ExactGelu(torch.nn.Module):
        """GELU by erf: on an NPU torch's own is the tanh approximation whatever it is asked for (op-plugin, npu_gelu)."""

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return sys.modules["torch_npu"].npu_gelu(values, approximate="none")

    return argparse.Namespace(FoldedPatches=FoldedPatches, ExactGelu=ExactGelu)


def _fused_attention(module, query, key, value, attention_mask=None, scaling=None, **_options):
    """transformers' attention interface through the NPU's fused kernel: [N, heads, T, d] in, [N, T, heads, d] out.

    Undoing transformers' transposition gives the layout BSND without a copy. sync=True leaves out the event with which
    torch_npu 2.9.0 forks a stream that no graph capture can join.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fused = sys.modules["torch_npu"].npu_fusion_attention
    return fused(query, key, value, query.shape[2], "BSND", scale=scale, sync=True)[0], None


def apply_levers(
    module: torch.nn.Module, device: Device, preprocess: Preprocess, levers: Sequence[str], exact_gelu: bool
) -> tuple[str, ...]:
    """Exchange parts of transformers' ViTModel, on the CPU, for equal ones that suit the device. Returns the levers in use."""
    used: list[str] = []
    made = _lever_modules()
    if device.kind == "npu" and exact_gelu:
        for parent in list(module.modules()):
            for name, part in list(parent.named_children()):
                if type(part).__name__ == "GELUActivation":
                    setattr(parent, name, made.ExactGelu())
    if type(module).__name__ != "ViTModel":
        return ()  # code that came with a checkpoint: its other parts are not known
    if device.kind == "npu" and "fused_attention" in levers:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register("npu_fused_attention", _fused_attention)
        module.config._attn_implementation = "npu_fused_attention"
        used.append("fused_attention")
    if "folded_patches" in levers:
        embeddings = module.embeddings
        embeddings.patch_embeddings = made.FoldedPatches(embeddings.patch_embeddings.projection, preprocess)
        used.append("folded_patches")
    return tuple(used)


def layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The encoder's layers in order; they have other places in transformers 4 and 5."""
    return [part for part in module.modules() if type(part).__name__ == "ViTLayer"]


class Outputs(NamedTuple):
    """last_hidden_state [N, 1 + patches, D], pooler_output [N, D] or None, and by number what layers leave, before the norm."""

    hidden: torch.Tensor
    pooler: torch.Tensor | None
    layers: dict[str, torch.Tensor]


def forward(model: LoadedModel, crops: torch.Tensor, layers: Sequence[str] = ()) -> Outputs:
    """Run uint8 crops [N, H, W, 3] on the model's device. `layers`: numbers from 1, "_normed" behind for after the norm."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: kept.update({name: output[0] if isinstance(output, tuple) else output})

    module = model.module
    parts = layers_of(module) if layers else []
    hooks = [parts[int(name.split("_")[0]) - 1].register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.inference_mode():
            if "folded_patches" in model.levers:
                pixels = crops.permute(0, 3, 1, 2)
            else:  # half precision begins after the pixels are normalised
                wide = torch.promote_types(model.dtype, torch.float32)
                pixels = normalize(crops, model.preprocess, wide).to(model.dtype).contiguous()
            output = module(pixel_values=pixels)
            kept = {name: module.layernorm(tokens) if "_" in name else tokens for name, tokens in kept.items()}
    finally:
        for hook in hooks:
            hook.remove()
    return Outputs(output.last_hidden_state, getattr(output, "pooler_output", None), kept)


def layer_names(model: LoadedModel, layers: Sequence[int], normed: bool) -> list[str]:
    """What forward() calls `layers`, numbered from 1 or from the end by -2 and so on; -1 is the output itself and left out.

    Raises UsageError for a layer that the model does not have.
    """
    count = model.module.config.num_hidden_layers
    names = []
    for layer in layers:
        number = layer + count + 1 if layer < 0 else layer
        if not 1 <= number <= count:
            raise UsageError(f"--layers {layer}: this model has layers 1 to {count}, from the end -1 to -{count}")
        names += [] if layer == -1 else [f"{number}{'_normed' if normed else ''}"]
    return list(dict.fromkeys(names))


FEATURES = ("class_token", "mean_patch_token", "patch_tokens", "pooler_output", "hidden_norm", "pooler_norm")


def feature_of(name: str, outputs: Outputs) -> torch.Tensor:
    """A feature by its name: class_token or mean_patch_token [N, D], with _layer_NUMBER behind for a layer's, and so on."""
    kind, _, layer = name.partition("_layer_")
    tokens = outputs.layers[layer] if layer else outputs.hidden
    if kind == "class_token":
        return tokens[:, 0]
    if kind == "mean_patch_token":
        return tokens[:, 1:].float().mean(1)
    if kind == "patch_tokens":
        return tokens[:, 1:]
    if kind == "hidden_norm":
        return tokens.float().norm(dim=-1).mean(1)
    return outputs.pooler if kind == "pooler_output" else outputs.pooler.float().norm(dim=-1)


class Encoder:
    """Runs a model over batches of crops and brings the wanted features to the host without waiting for them.

    names: what feature_of takes. execution "graph" captures the forward pass once and replays it, which saves launching its
    operators one by one; every batch is then padded to `batch_size`, so that one capture serves all. A capture that fails
    falls back to "eager" and says so. Out of memory halves `batch_size` and goes on.
    """

    def __init__(
        self, model: LoadedModel, names: Sequence[str], batch_size: int, execution: str = "eager", dtype: str = "float32"
    ) -> None:
        if execution == "graph" and model.device.kind == "cpu":
            raise UsageError("--execution graph: the CPU has no graphs to capture; use it with cuda or npu")
        for name in names:
            kind, _, layer = name.partition("_layer_")
            count = model.module.config.num_hidden_layers
            layers = map(str, range(1, count + 1)) if kind in FEATURES[:3] else ()
            if kind not in FEATURES or (layer and layer.removesuffix("_normed") not in layers):
                known = f"{', '.join(FEATURES)}, or _layer_1 to _layer_{count} behind one of the first three"
                raise UsageError(f"{name}: no such feature; use {known}")
        self.model = model
        self.names = tuple(names)
        self.batch_size = batch_size
        self.execution = execution
        self.fallback: str | None = None
        self.dtype = getattr(torch, dtype)
        self._layers = tuple(dict.fromkeys(name.partition("_layer_")[2] for name in names if "_layer_" in name))
        self._backend = torch.get_device_module(model.device.torch_device)
        self._graph: _Graph | None = None
        self._pins = can_pin_memory(model.device)
        self._copies = self._backend.Stream() if self._pins else None

    def features(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        """The wanted features of crops on the device, and "finite", bool [N]: whether everything about an image is a number."""
        with torch.inference_mode():
            outputs = forward(self.model, crops, self._layers)
            features = {name: feature_of(name, outputs).to(self.dtype) for name in self.names}
            finite = [torch.isfinite(value).reshape(len(value), -1).all(1) for value in (outputs.hidden, *features.values())]
            return features | {"finite": torch.stack(finite).all(0)}

    def run(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queue at most `batch_size` crops of the device; the results stay there, until the next call in graph mode."""
        if self.execution == "graph" and (self._graph is None or self._graph.batch_size != self.batch_size):
            self._graph = None  # the old capture holds memory that the new one may need
            try:
                self._graph = _Graph(self, crops)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.execution, self.fallback = "eager", first_line(error)
                log.warning(f"The forward pass cannot be captured as a graph ({self.fallback}): going on with eager execution")
        return self._graph.replay(crops) if self.execution == "graph" else self.features(crops)

    def submit(self, crops: torch.Tensor) -> Callable[[], dict[str, np.ndarray]]:
        """Queue any number of crops uint8 [N, H, W, 3] from the host. Returns a function that waits for their features."""
        pending = [self._retrying(lambda: self._queue(crops), len(crops))]

        def fetch() -> dict[str, np.ndarray]:
            # A device may report late that memory ran out: then all of it is queued again.
            chunks, event, _inputs = pending.pop() if pending else self._queue(crops)
            event.synchronize()
            return {name: np.concatenate([chunk[name].numpy() for chunk in chunks]) for name in chunks[0]}

        return lambda: self._retrying(fetch, len(crops))

    def _queue(self, crops: torch.Tensor) -> tuple[list[dict[str, torch.Tensor]], Any, list[torch.Tensor]]:
        """Features on their way to the host, the event that tells when they are there, and what must live until then."""
        inputs, chunks = [], []
        for chunk in crops.split(self.batch_size):
            inputs.append(self._to_device(chunk))
            chunks.append({name: self._to_host(value) for name, value in self.run(inputs[-1]).items()})
        event = self._backend.Event()
        event.record()
        return chunks, event, inputs

    def _to_device(self, crops: torch.Tensor) -> torch.Tensor:
        device = self.model.device.torch_device
        if self._copies is None:
            return crops.to(device)
        with self._backend.stream(self._copies):  # copies while the batch before it computes
            there = crops.to(device, non_blocking=True)
        self._backend.current_stream().wait_stream(self._copies)
        return there

    def _to_host(self, value: torch.Tensor) -> torch.Tensor:
        if not self._pins:
            return value.cpu()
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)

    def _retrying(self, attempt: Callable[[], Any], count: int) -> Any:
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._shrink(min(self.batch_size, count))  # only here has the error let go of what the attempt allocated

    def release(self) -> None:
        """Give back the memory of a captured graph, and what the allocator holds in reserve."""
        self._graph = None
        if self.model.device.kind != "cpu":
            self._backend.empty_cache()

    def _shrink(self, batch_size: int) -> None:
        self.release()
        device = self.model.device.torch_device
        if batch_size <= 1:
            raise UsageError(f"out of memory on {device} with a single image: use --dtype float16, or free the device")
        self.batch_size = batch_size // 2
        log.warning(f"Out of memory on {device} with batch size {batch_size}: going on with {self.batch_size}")


class _Graph:
    """A captured forward pass: torch.cuda.CUDAGraph or its twin torch.npu.NPUGraph."""

    def __init__(self, encoder: Encoder, crops: torch.Tensor) -> None:
        device = encoder.model.device.torch_device
        backend = torch.get_device_module(device)
        if device.type == "npu" and os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError("TASK_QUEUE_ENABLE=2 excludes graph capture; unset it")
        self.batch_size = encoder.batch_size
        self.crops = torch.zeros(self.batch_size, *crops.shape[1:], dtype=torch.uint8, device=device)
        stream = backend.Stream()
        stream.wait_stream(backend.current_stream())
        with backend.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate workspaces at first use, which cannot be captured
                encoder.features(self.crops)
        backend.current_stream().wait_stream(stream)
        self.graph = backend.NPUGraph() if device.type == "npu" else backend.CUDAGraph()
        # "thread_local": the loader's thread that pins memory may go on meanwhile. A capture that fails leaves its own stream
        # current: entering the present one anew brings it back.
        with backend.stream(backend.current_stream()), backend.graph(self.graph, capture_error_mode="thread_local"):
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


def features(
    model: LoadedModel,
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
    names: Sequence[str] = ("class_token", "mean_patch_token"),
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Features of photos (paths or PIL images) as arrays by name, a row for each photo; `names` are what feature_of takes.

    Raises UsageError naming a photo that cannot be read, or whose features are not numbers.
    """
    photos = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not photos:
        raise UsageError("no photos were given")
    encoder = Encoder(model, names, batch_size or default_batch_size(model.device))
    found = encoder.submit(crops_of(photos, model.preprocess))()
    require_finite(found.pop("finite"), [str(photo) for photo in photos], model)
    return found


def crops_of(photos: Sequence[str | Path | Image.Image], preprocess: Preprocess) -> torch.Tensor:
    """uint8 crops [N, image_size, image_size, 3] of paths or PIL images. Raises UsageError naming one that cannot be read."""
    return torch.from_numpy(np.stack([crop_uint8(read_photo(photo), preprocess) for photo in photos]))


def require_finite(finite: np.ndarray, names: Sequence[str], model: LoadedModel) -> None:
    """Raises UsageError naming the first image whose features hold NaN or Inf."""
    if not finite.all():
        hint = "the weights may be damaged" if model.dtype_name == "float32" else "try --dtype float32"
        name = names[int(np.argmin(finite))]
        raise UsageError(f"{name}: its features in {model.dtype_name} hold NaN or Inf; nothing was saved; {hint}")


def run_few(args: argparse.Namespace, device: Device) -> int:
    """Run all images in this process, time the forward pass, log and save what came out. Returns the exit code."""
    paths = find_images(args.image_path)
    if args.pca and len(paths) > 100:
        raise UsageError(f"--pca: at most 100 photos fit into a picture, and these are {len(paths):,}")
    if len(paths) > 1000:
        log.warning(f"{len(paths):,} images at once: embed.py decodes in parallel and can go on after an interruption")
    model = load_from_args(args, device)
    log.info(f"Loading image: {paths[0]}" if len(paths) == 1 else f"Loading {len(paths):,} images")
    crops = crops_of(paths, model.preprocess)
    saved = names_to_save(args, model)
    names = [*saved, "hidden_norm", *(["pooler_norm"] if model.pooler != "none" else [])]
    if args.pca and "patch_tokens" not in names:
        names.append("patch_tokens")
    encoder = Encoder(model, names, min(args.batch_size or default_batch_size(device), len(paths)), args.execution)
    log.info(f"Input shape: {(len(paths), 3, *crops.shape[1:3])}")
    log.info("Warming up ...")
    found = encoder.submit(crops)()
    log.info(f"First features after {time.perf_counter() - STARTED:.2f} s")
    require_finite(found.pop("finite"), paths, model)
    log.info("Running inference ...")
    timed = crops[: encoder.batch_size].to(device.torch_device)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < 3.0):
        times.append(time_once(device, lambda: encoder.run(timed)))
    result = describe_few(model, paths, found, len(timed), times)
    log_few(model, result)
    if args.output:
        with np.errstate(over="ignore"):
            arrays = {name: found[name].astype(args.feature_dtype) for name in saved}
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise UsageError(f"features over 65504 do not fit into {args.feature_dtype}; use --feature_dtype float32")
        with replacing(Path(args.output)) as file:
            np.savez(file, index=np.arange(len(paths)), path=np.array(paths), **arrays)
        log.info(f"Features saved to {args.output} ({model.weights.label})")
    result |= {"execution": encoder.execution, "execution_fallback": encoder.fallback} | provenance(args, model)
    if args.pca:
        result["pca"] = save_pca(Path(args.pca), crops.numpy(), found["patch_tokens"], paths, result)
    write_result(args, result)
    return 0


def names_to_save(args: argparse.Namespace, model: LoadedModel) -> list[str]:
    """Features that the flags ask for: patch tokens only on request for their size, the pooler because it is seldom trained."""
    if args.save_pooler and model.pooler == "none":
        raise UsageError("--save_pooler: this model has no pooler")
    kinds = ["class_token", "mean_patch_token"]
    names = kinds if -1 in args.layers else []
    names = names + [f"{kind}_layer_{layer}" for layer in layer_names(model, args.layers, args.norm_layers) for kind in kinds]
    return names + (["patch_tokens"] if args.save_patch_tokens else []) + (["pooler_output"] if args.save_pooler else [])


def describe_few(
    model: LoadedModel, paths: Sequence[str], found: dict[str, np.ndarray], batch: int, times: list[float]
) -> dict[str, Any]:
    """The published run's keys. Norms are means over the images; time and throughput are the median run's of one batch."""
    count, width = len(paths), model.module.config.hidden_size
    tokens = 1 + (model.preprocess.image_size // model.module.config.patch_size) ** 2
    has_pooler = "pooler_norm" in found
    return {
        "device": model.device.kind,
        "dtype": model.dtype_name,
        "image_size": model.preprocess.image_size,
        "image_path": shown_path(paths[0]) if count == 1 else [shown_path(path) for path in paths],
        "pooler_shape": [count, width] if has_pooler else None,
        "last_hidden_shape": [count, tokens, width],
        "pooler_norm": float(found["pooler_norm"].mean()) if has_pooler else None,
        "hidden_mean_norm": float(found["hidden_norm"].mean()),
        "inference_time_s": statistics.median(times),
        "throughput_img_s": batch / statistics.median(times),
        "batch_size": batch,
        "inference_times_s": times,
    }


def log_few(model: LoadedModel, result: dict[str, Any]) -> None:
    """The published run's lines."""
    log.info(f"=== {model.title} Inference Results ===")
    log.info(f"Device: {result['device']}")
    log.info(f"Dtype: {result['dtype']}")
    log.info(f"Image size: {result['image_size']}x{result['image_size']}")
    if result["pooler_shape"]:
        log.info(f"Pooler output shape: {tuple(result['pooler_shape'])}")
    log.info(f"Last hidden state shape: {tuple(result['last_hidden_shape'])}")
    if result["pooler_shape"]:
        note = "" if model.pooler == "trained" else f" (the pooler is {model.pooler}: its output means nothing)"
        log.info(f"Pooler L2 norm: {result['pooler_norm']:.4f}{note}")
    log.info(f"Hidden states mean L2 norm: {result['hidden_mean_norm']:.4f}")
    runs = f"batch size {result['batch_size']}, median of {len(result['inference_times_s'])} runs"
    log.info(f"Inference time: {result['inference_time_s']:.4f}s ({runs})")
    log.info(f"Throughput: {result['throughput_img_s']:.2f} img/s")
    log.info(f"Results: {json.dumps(result)}")


def principal_components(patch_tokens: np.ndarray, count: int = 3) -> tuple[np.ndarray, float]:
    """Patch tokens [N, P, D] on their first components over all images: [N, P, count], and the variance explained in percent.

    The sign of a component is arbitrary; it is set so that its largest weight is positive.
    """
    tokens = patch_tokens.reshape(-1, patch_tokens.shape[-1]).astype(np.float64)
    tokens -= tokens.mean(0)
    _, singular, directions = np.linalg.svd(tokens, full_matrices=False)
    directions = directions[:count]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    projected = tokens @ (directions * np.sign(largest)).T
    projected = np.pad(projected, ((0, 0), (0, count - len(directions))))  # fewer than three patches have fewer components
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


def save_pca(
    path: Path, crops: np.ndarray, patch_tokens: np.ndarray, names: Sequence[str], result: dict[str, Any]
) -> dict[str, Any]:
    """Draw crops uint8 [N, H, W, 3] beside the colours of their patch tokens [N, P, D]. Returns what the result says of it."""
    colours, explained = patch_colours(patch_tokens)
    pca = {"explained_variance_percent": explained, "colours_hex": [patches.tobytes().hex() for patches in colours]}
    picture = draw_pca(crops, colours, names, pca_heading(result | {"pca": pca}))
    with replacing(path) as file:
        picture.save(file, format="PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
    log.info(f"Picture saved to {path}; its three components explain {explained:.1f}% of the variance")
    return pca


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
        f"{result['model']}, {result['dtype']} on {result['device_name']}",
        f"{made_of}; first 3 principal components, {result['pca']['explained_variance_percent']:.1f}% of the variance",
    ]


def _fit_text(text: str, font: Any, width: int) -> str:
    """The end of `text` that fits: of a path, the end tells most."""
    shown = text
    while font.getlength(shown) > width:
        shown = "..." + shown[4:]
    return shown


# --- log, results, provenance ----------------------------------------------------------------------------------------


class _TerminalFormatter(logging.Formatter):
    """On the terminal an error is one plain line; all else looks as in the file."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.levelno >= logging.ERROR else super().format(record)


class _LogFile(logging.FileHandler):
    """Where the disk is full, the run goes on without its log and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        log.error(f"{self.baseFilename}: the log cannot be written any more ({sys.exc_info()[1]})")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is still in its buffer
            super().close()


LOG_LAYOUT = logging.Formatter("%(asctime)s [%(levelname)s] %(message)s")


def start_log() -> None:
    """Log to the terminal, and keep the lines for a file that open_log() names once it is known what the run is."""
    stop_log()
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    terminal = logging.StreamHandler()
    terminal.setFormatter(_TerminalFormatter(LOG_LAYOUT._fmt))
    log.addHandler(terminal)
    log.addHandler(logging.handlers.MemoryHandler(capacity=1 << 20, flushLevel=logging.CRITICAL + 1))
    log.setLevel(logging.INFO)
    log.propagate = False
    terminal.setLevel(logging.WARNING if rank_of("RANK", 0) else logging.INFO)


def open_log(path: Path) -> None:
    """Append to `path` what was logged and will be. Raises UsageError if that cannot be."""
    kept = next((handler for handler in log.handlers if isinstance(handler, logging.handlers.MemoryHandler)), None)
    if kept is None:
        return  # a file is open already, or nobody has started a log
    log.removeHandler(kept)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"{path}: the log cannot be written ({error.strerror}); name another with --output_log") from error
    file.setFormatter(LOG_LAYOUT)
    log.addHandler(file)
    kept.setTarget(file)
    kept.close()


def stop_log() -> None:
    """Close the log's files."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def result_name(name: str, kind: str) -> str:
    """An NPU's results have the deliverables' names, those of another device carry its name: inference, inference_cpu."""
    return name if kind == "npu" else f"{name}_{kind}"


def settle(args: argparse.Namespace, kind: str, trial: bool) -> None:
    """Decide where log and result of a run go, and open the log: results/ and logs/, or their trial/ folders.

    --output_log and --results_dir are obeyed to the letter. args.script is the script's name for them.
    """
    name = result_name(args.script, kind)
    folder = "trial" if trial else "."
    args.results = Path(args.results_dir) if args.results_dir else ROOT / "results" / folder
    rank = f"_rank{rank_of('RANK', 0)}" if rank_of("RANK", 0) else ""
    open_log(Path(args.output_log) if args.output_log else ROOT / "logs" / folder / f"{name}{rank}.log")


def is_trial(args: argparse.Namespace, model: LoadedModel) -> bool:
    """Whether a run's outcome is no evidence: not the card's weights and not --publish, or less than what is on record."""
    if model.is_evidence:
        return False
    record = read_record(ROOT / "results" / f"{result_name(args.script, model.device.kind)}.json")
    if args.publish and record.get("weights", {}).get("source") == "checkpoint":
        log.warning("--publish: a checkpoint's result is on record and stays; this one goes to results/trial/")
        return True
    return not args.publish


def read_record(path: Path) -> dict[str, Any]:
    """A result that is on record, or {} where there is none that can be read."""
    with suppress(UsageError):
        return read_json(path, "the result")
    return {}


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file to write that takes the place of `path` at the end: a crash leaves the old file or the new, never a half.

    Raises UsageError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}.tmp")
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


REASONS = ("reason", "unavailable", "execution_fallback", "npu_blocked_reason")  # what libraries say, often with a path


def without_paths(fields: dict[str, Any]) -> dict[str, Any]:
    """A result's fields with no path of somebody's machine in its reasons: it may be published."""
    return fields | {name: re.sub(r"/\S+/", ".../", fields[name]) for name in REASONS if isinstance(fields.get(name), str)}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON without NaN or Infinity, all at once or not at all. Raises UsageError if it cannot be written."""
    data = json.loads(json.dumps(data), object_hook=without_paths)
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_result(args: argparse.Namespace, data: dict[str, Any]) -> Path:
    """Write the result where settle() decided: NAME.json (NAME_cpu.json and so on for other devices). Returns its path."""
    path = args.results / f"{result_name(args.script, data['device'])}.json"
    write_json(path, data)
    log.info(f"Results saved to {relative_to_root(path)}")
    return path


def write_blocked(args: argparse.Namespace, blocked: Blocked) -> None:
    """Record why the device cannot be used; where a measurement or a BLOCKED with this reason is on record, in trial/."""
    kind = args.device.partition(":")[0]
    record = read_record(Path(args.results_dir or ROOT / "results") / f"{result_name(args.script, kind)}.json")
    reason = without_paths({"reason": blocked.reason})["reason"]
    settle(args, kind, trial=bool(record) and (record.get("status") != "BLOCKED" or record.get("reason") == reason))
    if args.script == "embed" or (args.results_dir and record and record.get("status") != "BLOCKED"):
        return
    data = {"status": "BLOCKED", "device": kind, "reason": reason, "what_to_do": blocked.remedy}
    write_result(args, data | {"dtype": args.dtype} | run_provenance())


def run_provenance() -> dict[str, Any]:
    """What every result carries of its making: when, by which command and code, versions, and what decides silently."""
    scripts = {path.resolve() for path in (Path(__file__), Path(sys.argv[0])) if path.is_file()}
    return {
        "time_utc": utc_now(),
        "command": command_line(),
        **git_state(),
        "scripts_sha256": {relative_to_root(path): sha256(path) for path in sorted(scripts)},
        "versions": versions(),
        "environment": {name: os.environ[name] for name in SILENT_VARIABLES if name in os.environ}
        | {name: value for name, value in os.environ.items() if name.startswith("ACL_")},
    }


def provenance(args: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """run_provenance(), and on which device with which model and weights."""
    config, device = model.module.config, model.device
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    return run_provenance() | {
        "device_name": device.name,
        "allow_hf32": device.allow_hf32,
        "deterministic": device.deterministic,
        "strict_float32": model.dtype_name == "float32" and not device.allow_hf32,
        "levers": list(model.levers),
        "model": model.name.rpartition("/")[2],
        "dimensions": {name: getattr(config, name, None) for name in names},
        "preprocess": dataclasses.asdict(model.preprocess),
        "parameters": model.parameters,
        "missing_keys": model.missing_keys,
        "pooler": model.pooler,
        "weights": model.weights.describe(),
        "tuned": getattr(args, "tuning", None),
    }


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def relative_to_root(path: Path) -> str:
    """`path` as seen from the bundle where it lies in it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shown_path(text: str) -> str:
    """A path as a result may show it: from the bundle's root, or an absolute one elsewhere by its name alone."""
    shown = relative_to_root(Path(text)) if os.path.isabs(text) else text
    return f".../{Path(shown).name}" if os.path.isabs(shown) else shown


def command_line() -> str:
    shown = ("=".join(map(shown_path, argument.split("=", 1))) for argument in sys.argv[1:])
    return shlex.join(["python", shown_path(os.path.abspath(sys.argv[0])), *shown])


def git(*arguments: str) -> str | None:
    """What git prints about this bundle; None without git, outside a repository of its own, or where it fails or hangs."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any]:
    """The commit, and whether any Python file differs from it; null for both where there is no git or no repository."""
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return {"git_commit": None, "git_dirty": None}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def versions() -> dict[str, str | None]:
    """Versions of what computes: null where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "torch_npu", "transformers", "numpy", "pillow"):
        found[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- command line ----------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Takes flags with hyphens too, no abbreviations, and answers a mistake with one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"(?<=^--)[\w-]+", lambda flag: flag[0].replace("-", "_"), arg) for arg in args]
        return super().parse_args(args, namespace)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def positive_int(text: str) -> int:
    """An argparse type: a whole number above zero."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in every script."""
    add = parser.add_argument_group("model and device").add_argument
    path = "folder, hub id or Meta's native .pth (default: %(default)s, else the hub)"
    add("--model_path", default=DEFAULT_MODEL_PATH, help=path)
    add("--device", type=device_spec, default="auto", help="auto (an NPU, else a GPU, else the CPU), cpu, cuda[:N], npu[:N]")
    add("--dtype", choices=DTYPES, default="float32", help="arithmetic of the model (default: %(default)s)")
    add("--image_size", type=positive_int, metavar="PIXELS", help="side of the input (default: the checkpoint's, 224)")
    ways = "crop: the checkpoint's way; squash: no crop; 256: short edge 256, crop"
    add("--resize", choices=RESIZES, default="crop", help=ways)
    add("--allow_hf32", action="store_true", help="let float32 be rounded (HF32, TF32): faster, 1000 times less exact")
    add("--deterministic", action="store_true", help="the same bits on every run on an NPU, at some cost (embed.py: always)")
    add("--without", nargs="+", choices=LEVERS, default=[], metavar="LEVER", help=f"switch off any of {', '.join(LEVERS)}")
    add("--tuned", choices=("throughput", "latency", "faithful"), help="use what eval/tune.py picked, not other flags")
    add("--random_weights", action="store_true", help="seeded random weights: to try the pipeline and its speed")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a checkpoint: only if you trust it")
    add("--allow_unlocked", action="store_true", help="accept files whose sha256 is not the one in locked_models.md")
    add("--publish", action="store_true", help="write the outcome of random or other weights to results/ all the same")
    add("--output_log", metavar="FILE", help="append the log to FILE (default: logs/, for a trial logs/trial/)")
    add("--results_dir", metavar="DIR", help="folder for the JSON result (default: results/, for a trial results/trial/)")


def apply_tuning(args: argparse.Namespace) -> None:
    """--tuned: take arithmetic, execution, batch size and environment from eval/tune.py's pick, before torch is imported."""
    args.tuning, kind = None, args.device.partition(":")[0]
    if getattr(args, "tuned", None) is None:
        return
    if kind == "auto":
        raise UsageError(f"--tuned {args.tuned}: name the device that was tuned, with --device npu, cuda or cpu")
    folders = [Path(args.results_dir)] if args.results_dir else [ROOT / "results", ROOT / "results" / "trial"]
    for path in (folder / f"{result_name('tuned', kind)}.json" for folder in folders):
        record = read_record(path)
        pick = (record.get("picks") or {}).get(args.tuned)
        if pick and (record["tuned_on"]["weights"]["source"] == "random") == args.random_weights:
            break
    else:
        raise UsageError(f"--tuned {args.tuned}: nothing was found for it yet; run first: python eval/tune.py --device {kind}")
    for name in record["variables"]:
        os.environ.pop(name, None)
    os.environ.update(pick["environment"])
    for name in ("dtype", "allow_hf32", "without", "execution"):
        setattr(args, name, pick[name])
    args.batch_size = getattr(args, "batch_size", None) or pick["batch_size"]
    tuned_on = record["tuned_on"] | {"device": pick["device_name"]}
    args.tuning = {"file": relative_to_root(path), "for": args.tuned, "tuned_on": tuned_on} | pick


def what_is_tuned(model: LoadedModel) -> dict[str, Any]:
    """What a tuning holds for, and nothing else."""
    weights, found = model.weights.describe(), versions()
    return {
        "device": model.device.name,
        "versions": {name: found[name] for name in ("torch", "torch_npu", "transformers")},
        "weights": {name: weights.get(name) for name in ("source", "sha256", "seed")},
        "image size": model.preprocess.image_size,
    }


def load_as_asked(args: argparse.Namespace, device: Device, **changes: Any) -> LoadedModel:
    """load_model with the flags of add_model_arguments; `changes` are arguments of load_model that differ from them."""
    names = ("model_path", "dtype", "image_size", "resize", "random_weights", "trust_remote_code", "allow_unlocked")
    asked = {name: getattr(args, name) for name in names}
    asked["levers"] = tuple(lever for lever in LEVERS if lever not in args.without)
    return load_model(device, **asked | changes)


def load_from_args(args: argparse.Namespace, device: Device) -> LoadedModel:
    """load_as_asked, a log of what was loaded, and the decision where log and result of the run go."""
    log.info(f"Loading {MODEL_NAME} from {'random weights' if args.random_weights else args.model_path} ...")
    model = load_as_asked(args, device)
    settle(args, device.kind, is_trial(args, model))
    if tuning := getattr(args, "tuning", None):
        for what, here in what_is_tuned(model).items():
            if tuning["tuned_on"][what] != here:
                told = f"{tuning['file']} is of another {what}: {tuning['tuned_on'][what]}, not {here}"
                raise UsageError(f"--tuned: {told}; run again: python eval/tune.py --device {device.kind}")
        log.info(f"Tuned for {args.tuned} by {tuning['file']}: {json.dumps(tuning)}")
    log.info(f"Model loaded on {device.kind}, dtype={model.dtype} ({model.weights.label})")
    log.info(f"Parameters: {model.parameters:,} ({model.parameters / 1e6:.1f}M)")
    log.info(f"Levers: {', '.join(model.levers) or 'none'}")
    if model.name != HUB_ID:
        log.warning(f"This is not {MODEL_NAME} but {model.name}; no evidence for this bundle's page")
    if model.weights.note:
        note = model.weights.note.replace("looks", "look")
        log.warning(f"The weights {note}: every layer norm is as an initialisation leaves it")
    if model.missing_keys:
        log.warning(f"Missing from the checkpoint: {', '.join(model.missing_keys)}")
    state = {"missing": "missing from the checkpoint, seeded here", "untrained": "untrained, as an initialisation leaves it"}
    if model.pooler in state:
        told = "Its output is a random projection of the class token, not a learned feature"
        log.warning(f"Pooler: {state[model.pooler]}. {told}")
    return model


def answered(body: Callable[[], int], settle_log: Callable[[], None]) -> int:
    """The exit code of body(), or of what ends it, said in one line. settle_log opens the log's file before a traceback."""
    try:
        start_log()
        return body()
    except (UsageError, ModuleNotFoundError) as error:
        remedy = "" if isinstance(error, UsageError) else ". Run: pip install -r requirements.txt"
        log.error(f"error: {error}{remedy}")
        return 2
    except KeyboardInterrupt as error:
        log.error(str(error) or stopping.last_words)
        return 130
    except Exception as error:
        settle_log()
        told = f"{type(error).__name__}: {first_line(error)}"
        log.error(f"error: {told} (unforeseen; the traceback is in the log)", exc_info=True)
        return 70


def guarded(script: str, body: Callable[[], int]) -> int:
    """body() of a script that runs no model, or whatever ends it as one line and an exit code."""
    try:
        return answered(body, lambda: open_log(ROOT / "logs" / "trial" / f"{script}.log"))
    finally:
        stop_log()


def run_script(script: str, args: argparse.Namespace, body: Callable[[argparse.Namespace, Device], int]) -> int:
    """Open the device, run body(args, device), and turn whatever ends it into an exit code, one line, and what must be kept.

    A body calls load_from_args, which decides where the log goes; what ends before that is logged to logs/trial/.
    """
    args.script = script
    stopping.last_words = "stopped; nothing was saved"
    previous = stopping.listen()

    def run() -> int:
        try:
            apply_tuning(args)
            device = _open_as_asked(args)
            stopping.graceful = True
            return body(args, device)
        except Blocked as error:
            try:
                write_blocked(args, error)
            except UsageError as unwritten:
                log.error(f"error: {unwritten}")
            log.error(f"BLOCKED: {error}")
            return 3

    def settle_log() -> None:
        with suppress(UsageError):
            settle(args, args.device.partition(":")[0], trial=True)

    try:
        return answered(run, settle_log)
    finally:
        settle_log()
        stop_log()
        stopping.graceful = False
        for number, handler in previous.items():
            signal.signal(number, handler)


def _open_as_asked(args: argparse.Namespace) -> Device:
    device = open_device(args.device, args.allow_hf32, args.deterministic)
    if device.kind == "npu" and args.dtype == "float16" and os.environ.get("INF_NAN_MODE_FORCE_DISABLE") == "1":
        raise UsageError("INF_NAN_MODE_FORCE_DISABLE=1 lets float16 saturate unseen; unset it, or use --dtype float32")
    log.info(f"Device: {device.torch_device}, {device.name} ({device.reason})")
    if args.dtype == "float32":
        strict = "true float32 (no HF32, no TF32, erf GELU)"
        log.info(f"float32 arithmetic: {'rounded where the device can (HF32, TF32)' if args.allow_hf32 else strict}")
    return device


def add_feature_arguments(parser: argparse.ArgumentParser, images: str, output: str) -> None:
    """The flags about features that inference.py and embed.py share."""
    add = parser.add_argument_group("images and features").add_argument
    add("--image_path", nargs="+", required=True, metavar="PATH", help=images)
    add("--output", metavar="PATH", help=output)
    layers = "-1: the output, after the final norm (default); 1 to 24, or -2 to -24: as that layer leaves it"
    add("--layers", nargs="+", type=int, default=[-1], metavar="N", help=layers)
    add("--norm_layers", action="store_true", help="apply the final norm to these layers too (their names say so)")
    add("--save_patch_tokens", action="store_true", help="save all patch tokens too: 100 times the size")
    add("--save_pooler", action="store_true", help="save the pooler's output too: no learned feature unless it is trained")
    add("--feature_dtype", choices=DTYPES[:2], default="float32", help="how features are saved (default: %(default)s)")
    add("--batch_size", type=positive_int, metavar="N", help="images at once (default: 8 on the CPU, 64 elsewhere)")
    how = "graph: capture the forward pass, replay it (NPU, GPU)"
    add("--execution", choices=("eager", "graph"), default="eager", help=how)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add_feature_arguments(parser, "images, globs, folders", "NAME.npz for the features (embed.py writes folders)")
    parser.add_argument("--pca", metavar="FILE", help="draw each crop beside its patch tokens as colours: FILE.png or FILE.jpg")
    add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.endswith(".npz"):
        parser.error(f"--output {args.output!r}: the name must end in .npz; folders are written by embed.py")
    if args.pca is not None and Path(args.pca).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--pca {args.pca}: the name must end in .png or .jpg")
    return run_script("inference", args, run_few)


if __name__ == "__main__":
    sys.exit(main())
