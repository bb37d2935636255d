"""WebSSL-MAE-300M: turn a photo, or a few, into features on an Ascend NPU, a GPU or the CPU.

    python inference.py --image_path photo.jpg --device npu
    python inference.py --image_path a.jpg b.png --output features.npz

The photos are run in batches, timed, and described in the log and in results/inference.json (results/inference_cpu.json and so
on for other devices). For folders of any size, lists and tars: embed.py. For a picture of the patch tokens: eval/pca.py.
From Python:

    model = load_model(open_device("npu"))
    arrays = features(model, ["photo.jpg"])

Exit codes: 0 done; 1 an evaluation (eval/) missed its bar; 2 wrong usage or unusable input; 3 BLOCKED: the device that was
asked for cannot be used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
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
import os
import platform
import re
import shlex
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.perf_counter()  # what a user waits for begins here
# torch >= 2.5 imports torch_npu by itself and fails where CANN is absent, even for a run on the CPU.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

ROOT = Path(__file__).resolve().parent

try:
    import numpy as np
    import torch
    from PIL import Image, TiffImagePlugin, UnidentifiedImageError
except ImportError as error:
    if ROOT not in Path(sys.argv[0]).resolve().parents:
        raise
    print(f"error: {error}. Run: pip install -r requirements.txt", file=sys.stderr)  # one of the bundle's own scripts
    raise SystemExit(2) from None

MODEL_NAME = "webssl-mae300m-full2b-224"
HUB_ID = f"facebook/{MODEL_NAME}"
HUB_COMMITS = {HUB_ID: "4655a0ac1726c206ba14d5ccb26758c62a4d03b0"}
DEFAULT_MODEL_PATH = f"weights/{MODEL_NAME}"
DTYPES = ("float32", "float16", "bfloat16")
SEED = 0

# Environment variables that change speed or results without a word.
SILENT_VARIABLES = (
    *("INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "OMP_NUM_THREADS"),
    *("PYTORCH_NPU_ALLOC_CONF", "ASCEND_LAUNCH_BLOCKING", "TORCH_NPU_USE_COMPATIBLE_IMPL", "ASCEND_RT_VISIBLE_DEVICES"),
)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"})
MAX_MEGAPIXELS = 300  # phones make photos of 200; six bytes for each pixel is what decoding takes
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")

log = logging.getLogger("webssl")


class UsageError(Exception):
    """Wrong usage or unusable input: exit code 2. The message is one line: what is wrong, where, what to do."""


class Blocked(Exception):
    """The device that was asked for cannot be used: exit code 3. What is missing, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # as they are: it may be raised again in another process
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}"


class DeviceLost(Exception):
    """The device has stopped computing, and what this process would compute is garbage: exit code 70, nothing is written."""


class BadImage(Exception):
    """This image cannot be decoded, whoever asks again."""


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
    if importlib.util.find_spec("torch_npu") is None:
        raise Blocked("torch_npu is not installed", "Run eval/env_check.py: it prints the line that installs what fits here")
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch_npu")
        if version.split(".")[:2] != torch.__version__.split(".")[:2]:
            reason = f"torch {torch.__version__} and torch_npu {version} do not go together"
            raise Blocked(reason, "Install the same version of both")
        if (version, platform.machine()) == ("2.14.0", "x86_64"):  # it ends the process, beside PyPI's torch of this version
            raise Blocked(
                "torch_npu 2.14.0 cannot be imported on x86_64", "Install a recommended pair: eval/env_check.py names it"
            )
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
        raise explain_npu(error, "torch_npu cannot be used") from error
    name = _first_use("npu", position, count, "npu-smi info, and that the container was given /dev/davinci*")
    return f"{name}, {STAND_IN}" if is_stand_in() else name


def _first_use(kind: str, position: int, count: int, check: str) -> str:
    """Allocate and compute once: a device that is listed may still be held by another process or have a failing driver."""
    label, variable = {"cuda": ("GPU", "CUDA_VISIBLE_DEVICES"), "npu": ("NPU", "ASCEND_RT_VISIBLE_DEVICES")}[kind]
    if not count:
        visible = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise Blocked(f"torch sees no {label}{visible}", f"Check {check}")
    if position >= count:
        within = f"; numbers count from 0 within {variable}={os.environ[variable]}" if variable in os.environ else ""
        raise Blocked(f"there is no {kind}:{position}: torch sees {count} {label}(s)", f"Use a number below {count}{within}")
    backend = torch.get_device_module(kind)
    try:
        backend.set_device(position)
        torch.zeros(1, device=f"{kind}:{position}").add_(1)
        backend.synchronize()
        return backend.get_device_name(position)
    except Exception as error:
        failed = f"{kind}:{position} is listed but fails at first use"
        raise (
            explain_npu(error, failed) if kind == "npu" else Blocked(f"{failed} ({first_line(error)})", f"Check {check}")
        ) from error


# --- what an NPU's errors mean ---------------------------------------------------------------------------------------

# What errors of torch_npu 2.9 to 2.14 and CANN 8.5 to 9.1 mean: a pattern, the reason, what to do; the first that fits. Codes:
# CANN's rt_error_codes.h.
NPU_ERRORS = (
    (
        r"(\S+): cannot allocate memory in static TLS block",
        "a library asks for thread-local memory after others have taken it",
        "Load it first: LD_PRELOAD={0} python ...",
    ),
    (
        r"(libc\+\+\S*): cannot open shared object file",
        "libc++ is missing, which this CANN needs",
        "Install it: apt install libc++1, or dnf install libcxx",
    ),
    (
        r"lib(ascend|hccl|acl|ge_|graph|op|runtime|nnopbase|register|error_manager|tdt|hcomm|msprof)\S*: cannot open shared",
        "CANN is not installed or not set up",
        "Install CANN, then run: source /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: .../ascend-toolkit/set_env.sh)",
    ),
    (
        r"(\S+\.so\S*): cannot open shared object file",
        "a library of the system is missing",
        "Install the package that has {0}",
    ),
    (
        r"Two accelerators",
        "torch_npu cannot work beside a CUDA build of torch on a machine with a GPU",
        "Install the CPU build of torch",
    ),
    (
        r"undefined symbol",
        "torch_npu does not fit this torch or this CANN",
        "Install a recommended pair: eval/env_check.py names it",
    ),
    (
        r"No module named 'torch_npu\._C'|cannot import name '_C'|compiled for Python|PyInit__C",
        "this torch_npu is built for another Python",
        "Install the wheel for this Python: eval/env_check.py names it",
    ),
    (
        r"HwHiAiUser|(?i:permission denied)[^\n]*davinci|davinci[^\n]*(?i:permission denied)",
        "this user may not open the device",
        "Join the driver's group and log in anew: sudo usermod -aG HwHiAiUser $USER",
    ),
    (
        r"(?i)driver[^\n]*(?:too old|not match|mismatch|incompatible)|version[^\n]*driver[^\n]*(?:low|old)",
        "the driver is too old for this CANN",
        "Update driver and firmware: npu-smi info names the driver, CANN's release notes what it needs",
    ),
    (
        r"\b500001\b",
        "CANN's compiler cannot start",
        "Check numpy<2, decorator, attrs, psutil, scipy, protobuf, sympy, cffi; the log is below ~/ascend/log",
    ),
    (
        r"\b107001\b",
        "CANN knows no device of this number",
        "Numbers count from 0 within ASCEND_RT_VISIBLE_DEVICES; npu-smi info lists the devices",
    ),
    (
        r"\b207004\b",
        "CANN finds no device",
        "Check npu-smi info, and that the container was given /dev/davinci*, davinci_manager, devmm_svm and hisi_hdc",
    ),
    (
        r"\b507033\b",
        "CANN cannot start the device",
        "Check npu-smi info for a device in alarm or in use, and that driver and CANN fit; the log is below ~/ascend/log",
    ),
    (
        r"\b507899\b",
        "the driver reports an error of its own",
        "Check npu-smi info, that driver and CANN fit, and that a container has davinci_manager, devmm_svm and hisi_hdc",
    ),
)


STAND_IN = "stand-in for CANN"  # tests/cann: what runs on it computes on the CPU, and is no evidence for an NPU


def is_stand_in() -> bool:
    """Whether torch_npu runs over the stand-in for CANN, which exports a symbol that CANN has not."""
    with suppress(OSError):
        return hasattr(ctypes.CDLL("libascendcl.so"), "standin_for_cann")
    return False


def explain_npu(error: BaseException, otherwise: str) -> Blocked:
    """What an error of torch_npu or CANN means, and what to do about it, as far as that is known."""
    for pattern, reason, what_to_do in NPU_ERRORS:
        if found := re.search(pattern, str(error)):
            return Blocked(f"{reason} ({first_line(error)})", what_to_do.format(*found.groups()))
    return Blocked(
        f"{otherwise} ({first_line(error)})", "What that means is not known here; CANN's own log is below ~/ascend/log"
    )


# --- a device in use: precision, memory, time ------------------------------------------------------------------------


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


def with_hidden(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it hides."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, says that memory ran out.

    torch_npu 2.9.0 raises a plain RuntimeError, later ones torch.OutOfMemoryError; the CPU's allocator has words of its own.
    """
    words = re.compile(r"out of memory|allocate memory|create a memory")
    return any(
        isinstance(one, (torch.OutOfMemoryError, MemoryError)) or (isinstance(one, RuntimeError) and words.search(str(one)))
        for one in with_hidden(error)
    )


# What torch_npu raises, once, when a launch in its queue has failed. After it every operator is dropped in silence.
QUEUE_FAILED = re.compile(r"Inner error (?:is reported as above|happened)")


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, says that the device's queue has failed."""
    return any(isinstance(one, DeviceLost) or QUEUE_FAILED.search(str(one)) for one in with_hidden(error))


def raise_if_lost(error: BaseException) -> None:
    """Raises DeviceLost for such an error: no retry then, no fallback, no next point."""
    if isinstance(error, DeviceLost):
        raise error
    if is_lost(error):
        raise DeviceLost(what_lost_means(error)) from error


def what_lost_means(error: BaseException | None = None) -> str:
    """A line for the user: what happened, what it means, what to do.

    The operator is what torch_npu says was at work when its queue failed, which need not be the one that was called.
    """
    if isinstance(error, DeviceLost):
        return str(error)
    found = re.search(r"current working operator name is (\w+)", "".join(traceback.format_exception(error)) if error else "")
    told = f"{found[1] if found else 'an operator'} failed on the device, after which torch_npu computes nothing more"
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        told += "; with TASK_QUEUE_ENABLE=2 that may be for lack of memory: use a smaller --batch_size, or TASK_QUEUE_ENABLE=1"
    return f"{told}; run the same command again, and if it fails again with ASCEND_LAUNCH_BLOCKING=1 to see where"


def require_computing(device: Device) -> None:
    """Raises DeviceLost unless the device computes: what was computed before this is no garbage then, either."""
    number = float(np.random.default_rng().integers(1 << 20))
    if (torch.tensor([number]).to(device.torch_device) + 1).cpu().item() != number + 1:
        let_it_tell(device)
        raise DeviceLost(what_lost_means())


def halved(batch_size: int, device: Device) -> int:
    """Half a batch that did not fit into memory, whose reserve is given back. Raises UsageError for a batch of one."""
    if device.kind != "cpu":
        torch.get_device_module(device.torch_device).empty_cache()
    if batch_size <= 1:
        raise UsageError(f"out of memory on {device.torch_device} with a single image: use --dtype float16, or free the device")
    log.warning(f"Out of memory on {device.torch_device} with batch size {batch_size}: going on with {batch_size // 2}")
    return batch_size // 2


def too_little_memory(device: Device) -> UsageError:
    return UsageError(f"{device.torch_device} has too little memory for the model; try --dtype float16")


def default_batch_size(kind: str) -> int:
    """Large enough to keep a device of this kind busy, small enough for any of them; larger gains little."""
    return 8 if kind == "cpu" else 64


def synchronize(device: Device) -> None:
    """Wait until the device has finished all that was queued on it (at once on the CPU)."""
    torch.get_device_module(device.torch_device).synchronize()


def let_it_tell(device: Device, seconds: float = 10) -> None:
    """Raise what torch_npu has kept to itself of a device that has stopped computing, which may also never answer."""
    raised: list[RuntimeError] = []

    def wait() -> None:
        try:
            torch.get_device_module(device.torch_device).synchronize(device.torch_device)
        except RuntimeError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(seconds)
    if raised:
        raise raised[0]


def time_once(device: Device, run: Callable[[], Any]) -> float:
    """Seconds from a synchronised device until all that `run` queues on it is done."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A device's tensor on the host; half precision becomes float32."""
    return tensor.cpu().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


# --- the model and its weights ---------------------------------------------------------------------------------------


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
    """A ViT in eval mode on its device. `pooler` is "trained", "untrained", "missing" (then seeded here) or "none".

    `lean`: another way to compute what the module computes, by `levers` (bulk/levers.py).
    """

    module: torch.nn.Module
    device: Device
    dtype: torch.dtype
    preprocess: Preprocess
    weights: Weights
    parameters: int
    missing_keys: list[str]
    pooler: str
    name: str
    levers: tuple[str, ...] = ()
    lean: Any = None

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


def load_model(
    device: Device,
    model_path: str = DEFAULT_MODEL_PATH,
    dtype: str = "float32",
    image_size: int | None = None,
    resize: str = "crop",
    decode: str = "exact",
    random_weights: bool = False,
    trust_remote_code: bool = False,
    allow_unlocked: bool = False,
    exact_gelu: bool = True,
) -> LoadedModel:
    """Load a ViT through transformers and put it on `device` in eval mode.

    model_path: a folder in transformers' layout, or a hub id. dtype: one of DTYPES. image_size: side of the square input in
    pixels, a multiple of the patch size; None takes the checkpoint's own. resize: one of RESIZES; decode: of DECODES.
    exact_gelu=False leaves torch_npu's tanh GELU. Raises UsageError for anything that cannot be loaded whole, and for files
    whose hash is not the one that locked_models.md records.
    """
    import_transformers(device.kind)
    wanted, missing = getattr(torch, dtype), []
    if random_weights:
        module, weights, preprocess = _random_model(wanted), Weights("random", seed=SEED), Preprocess()
        name = identify(module.config)
    else:
        checkpoint = _read_folder(find_weights(model_path), wanted, trust_remote_code)
        hashes = sha256_in_background(checkpoint.files)
        module, missing = _build(checkpoint, wanted, model_path)
        preprocess, name = checkpoint.preprocess, identify(module.config)
        weights = Weights("checkpoint", model_path, files=hashes, note="looks untrained" if _looks_untrained(module) else None)
        check_lock(name, weights, allow_unlocked)
    pooler = _settle_pooler(module, missing)
    preprocess = preprocess.resized(image_size, resize, decode)
    _resize_position_embeddings(module, preprocess.image_size)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    module = module.eval().requires_grad_(False)
    try:
        if device.kind == "npu" and exact_gelu:
            put_exact_gelu(module)
        module = module.to(device.torch_device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise too_little_memory(device) from error
    return LoadedModel(module, device, wanted, preprocess, weights, parameters, missing, pooler, name)


def load_as_asked(args: argparse.Namespace, device: Device, **changes: Any) -> LoadedModel:
    """load_model with the flags of add_model_arguments; `changes` are arguments of load_model that differ from them."""
    names = ("model_path", "dtype", "image_size", "resize", "decode", "random_weights", "trust_remote_code", "allow_unlocked")
    asked = {name: getattr(args, name) for name in names}
    return load_model(device, **asked | changes)


# --- a checkpoint: where it is, and whether it is the right one ------------------------------------------------------


def is_default_path(model_path: str) -> bool:
    return model_path.rstrip("/") == DEFAULT_MODEL_PATH


def local_path(model_path: str) -> Path:
    """Where `model_path` is looked for before the hub is asked: the default one in the bundle, wherever a script is run."""
    return ROOT / model_path if is_default_path(model_path) else Path(model_path).expanduser()


def find_weights(model_path: str) -> Path:
    """Local folder of `model_path`, downloaded where it is a hub id. Raises UsageError if there is none."""
    path = local_path(model_path)
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        convert = f"python weights/convert_native.py {shlex.quote(model_path)} {DEFAULT_MODEL_PATH}"
        what = f"convert Meta's native file once ({convert})" if path.suffix == ".pth" else "name its folder"
        raise UsageError(f"--model_path {model_path}: a file, where a folder in transformers' layout is wanted; {what}")
    if is_default_path(model_path):
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
            f"ModelScope into {DEFAULT_MODEL_PATH} (see weights/README.md); (3) weights/convert_native.py with Meta's native "
            "file. To try everything without the weights: --random_weights"
        ) from error


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


# --- transformers, whatever lies beside it ---------------------------------------------------------------------------

NEEDED = ("transformers", "torch", "numpy", "PIL", "huggingface_hub", "safetensors", "tokenizers")


def import_transformers(kind: str) -> None:
    """Import what the loader needs of transformers, for a kind of device.

    It imports whatever it finds, such as a torch_npu without CANN, or a torchvision that is not for this torch, and fails with
    it. What is not needed is hidden from it, with a warning. Raises UsageError naming a package that is needed and is broken,
    ModuleNotFoundError for one that is not there.
    """
    hidden = {"torch_npu"} if kind != "npu" and "torch_npu" not in sys.modules else set()
    while True:
        try:
            with _hiding(hidden):
                import transformers
                from transformers import AutoImageProcessor, ViTModel  # noqa: F401
            break
        except Exception as error:
            while under := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
                error = under
            if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
                raise error
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            names = re.findall(r"/(?:site|dist)-packages/(\w+)", "\n".join(files)) or ["transformers"]
            name = next((name for name in reversed(names) if name != "torch"), "torch")
            told = f"{_with_version(name)} cannot be imported beside torch {torch.__version__} ({first_line(error)})"
            if name in (*NEEDED, *hidden):
                log.info("".join(traceback.format_exception(error)).strip())
                raise UsageError(f"{told}; install what goes together: pip install -r requirements.txt") from error
            log.warning(f"{told}: going on without it")
            hidden.add(name)
            for module in [module for module in sys.modules if module.partition(".")[0] == "transformers"]:
                del sys.modules[module]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _hiding(names: set[str]) -> Iterator[None]:
    """Let packages look as if they were not installed, and leave no trace of it."""
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def _with_version(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.packages_distributions().get(name, [name])[0]
        return f"{name} {importlib.metadata.version(distribution)}"
    return name


# --- a checkpoint: what is in it -------------------------------------------------------------------------------------


@dataclass
class _Checkpoint:
    """What was read of a checkpoint before any model is built; the tensors go by the hub's names."""

    model_class: Any
    config: Any
    state_dict: dict[str, torch.Tensor]
    files: list[Path]
    preprocess: Preprocess


POOLER_KEYS = ["pooler.dense.bias", "pooler.dense.weight"]


def read_description(location: Path, trust_remote_code: bool) -> tuple[Any, Any, Preprocess]:
    """Class and configuration of a checkpoint's model, and its pre-processing: all but the weights."""
    if not (location / "config.json").is_file():
        raise UsageError(f"--model_path {location}: no config.json in it; a folder in transformers' layout is wanted")
    model_class, config = _read_config(location, trust_remote_code)
    return model_class, config, read_preprocess(location, config.image_size, trust_remote_code)


def _read_folder(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> _Checkpoint:
    model_class, config, preprocess = read_description(folder, trust_remote_code)
    files = _safetensors_files(folder)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= _read_safetensors(file, dtype)
    described = [folder / name for name in ("config.json", *PREPROCESS_FILES) if (folder / name).is_file()]
    return _Checkpoint(model_class, config, state_dict, described + files, preprocess)


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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises UsageError naming the file where it is anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {what} cannot be read ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: {what} is not a JSON object")
    return data


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
            raise UsageError(
                f"{folder}: {name} is missing; only safetensors files are read (for Meta's .pth: weights/convert_native.py)"
            )
    return [folder / name for name in names]


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
        raise UsageError(f"{path}: {damage_of(path)} ({first_line(error)}); fetch the file again") from error


def _in_dtype(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise UsageError(f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')} values, not floating-point weights")
    return tensor.to(dtype)


def damage_of(path: Path) -> str:
    """What a file of weights that cannot be read looks like."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run git lfs pull"
    return "empty" if not start else "truncated or damaged"


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


# --- random weights, the pooler, other input sizes -------------------------------------------------------------------


def _random_model(dtype: torch.dtype) -> torch.nn.Module:
    """The exact architecture with seeded weights: matrices uniform with transformers' standard deviation (initializer_range).

    A uniform distribution is drawn in a third of the time that transformers' own initialisation takes.
    """
    from transformers import ViTConfig, ViTModel

    _, width, layers, heads, patch_size = CARDS[0]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config = ViTConfig(**shape, image_size=224, patch_size=patch_size, layer_norm_eps=1e-6)
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


# --- pre-processing --------------------------------------------------------------------------------------------------

RESIZES = ("crop", "squash", "256")
DECODES = ("exact", "fast")
warnings.filterwarnings("ignore", "The given buffer is not writable")  # Pillow's bytes, which torch only reads
FAST_FILTERS = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop to a square, scale, normalise. The defaults are the official demo's (facebookresearch/webssl).

    resize: length of the short edge, or (height, width). resample: Pillow's number of the filter. decode: "exact" gives the
    pixels of transformers' PIL processor; "fast" resizes by torch and decodes a JPEG at a smaller scale: see crop_uint8.
    """

    resize: int | tuple[int, int] = 224
    image_size: int = 224
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    decode: str = "exact"

    @property
    def least_edge(self) -> int | None:
        """How short the short edge of a decoded photo may be: twice what it is resized to; None for as it is."""
        return None if self.decode == "exact" else 2 * (self.resize if isinstance(self.resize, int) else max(self.resize))

    def resized(self, image_size: int | None = None, resize: str = "crop", decode: str = "exact") -> Preprocess:
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
        if decode == "fast" and self.resample not in FAST_FILTERS:
            raise UsageError(f"--decode fast: not for this checkpoint's filter ({Image.Resampling(self.resample).name})")
        if decode == "fast" and (edges if isinstance(edges, int) else min(edges)) < size:
            raise UsageError("--decode fast: not for a checkpoint whose crop is larger than what it is cut from")
        return dataclasses.replace(self, resize=edges, image_size=size, decode=decode)


PREPROCESS_FILES = ("preprocessor_config.json", "processor_config.json")

UNDERSTOOD = {
    *("size", "crop_size", "do_center_crop", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb"),
    *("resample", "rescale_factor", "image_mean", "image_std", "image_processor_type", "_processor_class"),
}


def read_preprocess(folder: Path, image_size: int, trust_remote_code: bool = False) -> Preprocess:
    """What transformers' own image processor reads in `folder`; the defaults for `image_size` where it has no file to read.

    crop_uint8 and normalize then give what that processor gives. Raises UsageError naming what does not fit.
    """
    found = [name for name in PREPROCESS_FILES if (folder / name).is_file()]
    if not found:
        preprocess = Preprocess().resized(image_size)
        log.warning(f"{folder} has no {PREPROCESS_FILES[0]}: the official demo's pre-processing is taken, {preprocess}")
        return preprocess
    where = " and ".join(str(folder / name) for name in found)
    processor = _image_processor(folder, where, trust_remote_code)

    def of(name: str) -> Any:
        return getattr(processor, name, None)

    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not of(name):
            raise UsageError(f"{where}: {name} is {of(name)}, which is not supported")
    edges, crop = dict(of("size") or {}), dict(of("crop_size") or {})
    final = crop if of("do_center_crop") else edges
    if not final.get("height") or final["height"] != final.get("width"):
        raise UsageError(f"{where}: size {edges} and crop_size {crop} do not give a square, which is not supported")
    resize = edges.get("shortest_edge") or (edges.get("height"), edges.get("width"))
    numbers = {name: of(name) for name in ("resample", "rescale_factor", "image_mean", "image_std")}
    try:
        resample, factor = int(numbers["resample"]), float(numbers["rescale_factor"])
        colours = [tuple(map(float, numbers[name])) for name in ("image_mean", "image_std")]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: not numbers as they should be: {numbers}") from error
    preprocess = Preprocess(resize, final["height"], resample, factor, *colours)
    _prove_preprocess(preprocess, processor, where)
    return preprocess


def _image_processor(folder: Path, where: str, trust_remote_code: bool) -> Any:
    """transformers' image processor with the PIL back end, which is the reference and needs no torchvision."""
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top 5.17 asks for torchvision

    pil = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    asked = pil | {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        return AutoImageProcessor.from_pretrained(folder, **asked)
    except Exception as error:
        raise UsageError(f"{where}: transformers cannot read the pre-processing ({first_line(error)})") from error


def _prove_preprocess(preprocess: Preprocess, processor: Any, where: str) -> None:
    """Compare with the processor on noise with odd edges. Raises UsageError naming the fields that may differ."""
    try:
        height, width = preprocess.image_size // 2 + 13, preprocess.image_size + 31
        noise = Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (height | 1, width | 1, 3), np.uint8))
        theirs = processor(noise, return_tensors="np")["pixel_values"]
        ours = normalize(torch.tensor(crop_uint8(noise, preprocess))[None], preprocess).numpy()
        difference = np.abs(ours - theirs).max() if ours.shape == theirs.shape else f"{theirs.shape} for {ours.shape}"
    except Exception as error:
        raise UsageError(f"{where}: cannot be used ({first_line(error)})") from error
    if isinstance(difference, str) or not difference < 1e-5:
        fields = sorted(set(processor.to_dict()) - UNDERSTOOD) or ["image_processor_type", "size"]
        told = ", ".join(f"{name}={getattr(processor, name, None)}" for name in fields)
        raise UsageError(f"{where}: {type(processor).__name__} gives other pixels than this bundle ({difference}): {told}")


def crop_uint8(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Resize and centre crop an image to uint8 [image_size, image_size, 3].

    "exact": bit for bit as transformers' PIL processor does. "fast": as its torchvision processors do, off by a grey level in
    less than one value of a hundred, seldom by two.
    """
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
    elif preprocess.decode == "fast":
        # Strided as a batch of one: by [None] torch would not see that channels are last, and would rearrange them twice.
        pixels = torch.frombuffer(image.tobytes(), dtype=torch.uint8).view(1, height, width, -1).permute(0, 3, 1, 2)
        way = {"mode": FAST_FILTERS[resample], "antialias": True}
        pixels = torch.nn.functional.interpolate(pixels, (new_height, new_width), **way).permute(0, 2, 3, 1)[0]
        return pixels[top : top + size, left : left + size].expand(size, size, 3).numpy()
    elif width > height and isinstance(preprocess.resize, int):
        # Pillow resizes rows first, then columns: those that the crop drops need not take part in the second pass.
        image = image.resize((new_width, height), resample).crop((left, 0, left + size, height))
        image = image.resize((size, new_height), resample).crop((0, top, size, top + size))
    else:
        image = image.resize((new_width, new_height), resample).crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"))


@lru_cache
def _mean_and_std(preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept on the device: a graph's capture cannot copy them there."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device) for values in (preprocess.mean, preprocess.std))
    return mean, std


def normalize(crops: torch.Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 crops [N, H, W, 3] on any device to pixel values [N, 3, H, W] of dtype, with transformers' own arithmetic."""
    mean, std = _mean_and_std(preprocess, crops.device, dtype)
    return (crops.permute(0, 3, 1, 2).to(dtype) * preprocess.rescale_factor - mean) / std


# --- photos ----------------------------------------------------------------------------------------------------------


def is_image_name(path: str) -> bool:
    """Whether a name has the suffix of an image; the shadow that a Mac writes beside each file on other disks is none."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(path).startswith("._")


# Which systems fill with thumbnails, or with what was deleted.
SYSTEM_FOLDERS = re.compile(r"@eadir|__macosx|#recycle|\$recycle\.bin|\.(thumbnails|thumb|trash(es|-\d+)?)", re.IGNORECASE)


def _files_below(folder: str) -> list[str]:
    """Sorted paths of the files in a folder and below, less those in folders that a system fills."""
    below = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(str(Path(folder, path)) for path in below if not any(map(SYSTEM_FOLDERS.fullmatch, path.parent.parts)))


def find_images(arguments: Sequence[str]) -> list[str]:
    """Paths of the images that files, globs and folders name, in a fixed order. Raises UsageError where one names nothing."""
    paths: list[str] = []
    for argument in arguments:
        found = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if "**" in argument and argument not in found:  # which names what is in a folder beside the folder
            found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise UsageError(f"--image_path {argument}: no such file or folder")
        for path in found:
            if path.lower().endswith((".txt", ".tar")) and path == argument:
                raise UsageError(f"--image_path {path}: lists and tars are for embed.py, which takes --output FOLDER/")
            inside = _files_below(path) if os.path.isdir(path) else [path]
            paths += inside if inside == [argument] else filter(is_image_name, inside)
    if not paths:
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it")
    return paths


def read_photo(photo: str | Path | Image.Image, least_edge: int | None = None) -> Image.Image:
    """The decoded image of a path, or a PIL image made alike. Raises UsageError naming one that cannot be read."""
    try:
        if isinstance(photo, Image.Image):
            return decode(photo)
        mode = os.stat(photo).st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise BadImage("a folder, not an image" if stat.S_ISDIR(mode) else "not a regular file")
        return decode(Path(photo).read_bytes(), least_edge)
    except (OSError, ValueError) as error:
        raise UsageError(f"{photo}: {getattr(error, 'strerror', None) or error}") from error
    except BadImage as error:
        raise UsageError(f"{photo}: {error}") from error


def crops_of(photos: Sequence[str | Path | Image.Image], preprocess: Preprocess) -> torch.Tensor:
    """uint8 crops [N, image_size, image_size, 3] of paths or PIL images. Raises UsageError naming one that cannot be read."""
    return torch.from_numpy(np.stack([crop_uint8(read_photo(photo, preprocess.least_edge), preprocess) for photo in photos]))


# EXIF orientation to what turns the picture upright (the numbers: TIFF 6.0, tag 274).
UPRIGHT = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))


RAISED_BY = "--max_megapixels raises it, in Python PIL.Image.MAX_IMAGE_PIXELS"


def decode(data: bytes | Image.Image, least_edge: int | None = None) -> Image.Image:
    """An image in RGB or L, upright (EXIF), its first frame if it is animated, from a file's bytes. Raises BadImage.

    least_edge: a JPEG is decoded at the smallest scale (1/2, 1/4, 1/8) that leaves its short edge so many pixels.
    """
    if data == b"":
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large or untidy, but readable: not worth a line on the terminal for each image
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) if isinstance(data, bytes) else data
            if least_edge:
                image.draft(image.mode, tuple(edge * least_edge // min(image.size) for edge in image.size))
            image.load()
            orientation = None
            with suppress(Exception):  # damaged EXIF costs the orientation, not the photo
                orientation = image.getexif().get(0x0112)
            upright = _to_rgb_or_grey(image)
            return upright.transpose(Image.Transpose(UPRIGHT[orientation])) if orientation in UPRIGHT else upright
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(_tiff_bands(data) or f"not an image that can be read ({', '.join(IMAGE_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6  # Pillow warns from the number on, and refuses twice of it
        raise BadImage(f"more pixels than the limit of {limit:.0f} megapixels; {RAISED_BY}") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _tiff_bands(data: Any) -> str | None:
    """What is unusual about a TIFF that Pillow does not know; None for anything else."""
    with suppress(Exception):
        directory, file = TiffImagePlugin.ImageFileDirectory_v2(data[:8]), io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        bands, bits = directory[277], directory[258]  # TIFF 6.0: SamplesPerPixel, BitsPerSample
        return f"a TIFF of {bands} bands of {'/'.join(map(str, sorted(set(bits))))} bits: no picture in colours or grey"
    return None


def _to_rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_from_16_bits(image)
    if image.mode == "F":
        raise BadImage("floating-point grey, whose black and white are not defined")
    if image.format == "BMP" and image.mode == "RGBA" and image.getextrema()[3] == (0, 0):
        return image.convert("RGB")  # a fourth byte that nobody set, which viewers ignore
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


# --- the forward pass and its features -------------------------------------------------------------------------------


class ExactGelu(torch.nn.Module):
    """GELU by erf: on an NPU torch's own is the tanh approximation whatever it is asked for (op-plugin, npu_gelu)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return sys.modules["torch_npu"].npu_gelu(values, approximate="none")


def put_exact_gelu(module: torch.nn.Module) -> None:
    """Exchange transformers' GELU, which on an NPU is the tanh approximation."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if type(part).__name__ == "GELUActivation":
                setattr(parent, name, ExactGelu())


class Outputs(NamedTuple):
    """last_hidden_state [N, 1 + patches, D], pooler_output [N, D] or None, and by number what layers leave, before the norm."""

    hidden: torch.Tensor
    pooler: torch.Tensor | None
    layers: dict[str, torch.Tensor]


def layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The encoder's layers in order, which have other places in transformers 4 and 5; none for a checkpoint's own code."""
    return [part for part in module.modules() if type(part).__name__ == "ViTLayer"]


def forward(model: LoadedModel, crops: torch.Tensor, layers: Sequence[str] = ()) -> Outputs:
    """Run uint8 crops [N, H, W, 3] on the model's device. `layers`: numbers from 1, "_normed" behind for after the norm."""
    with torch.inference_mode():
        if model.lean is not None:
            return model.lean.forward(model, crops, layers)
        module, pixels = model.module, pixel_values(model, crops)
        if not layers:
            output = module(pixel_values=pixels)
            return Outputs(output.last_hidden_state, getattr(output, "pooler_output", None), {})
        # Layer by layer: what transformers offers for it hangs hooks on a model that another thread may be using.
        tokens, kept = module.embeddings(pixels), {}
        for number, layer in enumerate(layers_of(module), 1):
            left = layer(tokens)
            tokens = left[0] if isinstance(left, tuple) else left
            kept |= {str(number): tokens} if str(number) in layers else {}
            kept |= {f"{number}_normed": module.layernorm(tokens)} if f"{number}_normed" in layers else {}
        hidden = module.layernorm(tokens)
        return Outputs(hidden, None if module.pooler is None else module.pooler(hidden), kept)


def pixel_values(model: LoadedModel, crops: torch.Tensor) -> torch.Tensor:
    """Normalised pixels [N, 3, H, W] in the model's dtype; half precision begins after they are normalised."""
    wide = torch.promote_types(model.dtype, torch.float32)
    return normalize(crops, model.preprocess, wide).to(model.dtype).contiguous()


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

JUDGED = FEATURES[:2]


def check_features(model: LoadedModel, names: Sequence[str]) -> None:
    """Raises UsageError naming a feature that this model does not have."""
    count = model.module.config.num_hidden_layers
    for name in names:
        kind, _, layer = name.partition("_layer_")
        if layer and not layers_of(model.module):
            raise UsageError(f"{name}: the code that came with this checkpoint has no layers that are known here")
        layers = map(str, range(1, count + 1)) if kind in FEATURES[:3] else ()
        if kind not in FEATURES or (layer and layer.removesuffix("_normed") not in layers):
            known = f"{', '.join(FEATURES)}, or _layer_1 to _layer_{count} behind one of the first three"
            raise UsageError(f"{name}: no such feature; use {known}")


def feature_of(name: str, outputs: Outputs) -> torch.Tensor:
    """A feature by its name: class_token or mean_patch_token [N, D], with _layer_NUMBER behind for a layer's, and so on."""
    kind, _, layer = name.partition("_layer_")
    tokens = outputs.layers[layer] if layer else outputs.hidden
    if kind == "class_token":
        return tokens[:, 0]
    if kind == "mean_patch_token":
        return tokens[:, 1:].mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    if kind == "patch_tokens":
        return tokens[:, 1:]
    if kind == "hidden_norm":
        return tokens.float().norm(dim=-1).mean(1)
    return outputs.pooler if kind == "pooler_output" else outputs.pooler.float().norm(dim=-1)


def device_features(model: LoadedModel, crops: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Queue crops of the device: the features `names`, and the output's class and mean patch token for finite_rows."""
    layers = tuple(dict.fromkeys(name.partition("_layer_")[2] for name in names if "_layer_" in name))
    with torch.inference_mode():
        outputs = forward(model, crops, layers)
        return {name: feature_of(name, outputs) for name in dict.fromkeys((*names, *JUDGED))}


def host_features(
    model: LoadedModel, crops: torch.Tensor, names: Sequence[str], batch_size: int
) -> tuple[dict[str, np.ndarray], int]:
    """device_features of crops on the host, batch by batch, as arrays, and the batch size that the device's memory allowed.

    Raises DeviceLost where the device has stopped computing.
    """
    while True:
        try:
            found = []
            for batch in crops.split(batch_size):
                values = device_features(model, batch.to(model.device.torch_device), names)
                found.append({name: to_numpy(value) for name, value in values.items()})
            require_computing(model.device)
            return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}, batch_size
        except Exception as error:
            raise_if_lost(error)
            if not is_out_of_memory(error):
                raise
        # Only here has the error let go of what the attempt allocated.
        batch_size = halved(min(batch_size, len(crops)), model.device)


def finite_rows(found: dict[str, np.ndarray]) -> np.ndarray:
    """bool [N]: whether all features of an image are numbers; a NaN or Inf in any token reaches the mean patch token."""
    return np.all([np.isfinite(values).all(tuple(range(1, values.ndim))) for values in found.values()], 0)


def require_finite(found: dict[str, np.ndarray], names: Sequence[str], model: LoadedModel) -> None:
    """Raises UsageError naming the first image whose features hold NaN or Inf."""
    finite = finite_rows(found)
    if not finite.all():
        hint = "the weights may be damaged" if model.dtype_name == "float32" else "try --dtype float32"
        name = names[int(np.argmin(finite))]
        raise UsageError(f"{name}: its features in {model.dtype_name} hold NaN or Inf; nothing was saved; {hint}")


# --- one photo or a few ----------------------------------------------------------------------------------------------


def features(
    model: LoadedModel,
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
    names: Sequence[str] = JUDGED,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Features of photos (paths or PIL images) as arrays by name, a row for each photo; `names` are what feature_of takes.

    Raises UsageError naming a photo that cannot be read, or whose features are not numbers.
    """
    photos = _photos_of(images)
    if not photos:
        raise UsageError("no photos were given")
    check_features(model, names)
    crops = crops_of(photos, model.preprocess)
    found, _ = host_features(model, crops, names, batch_size or default_batch_size(model.device.kind))
    require_finite(found, [str(photo) for photo in photos], model)
    return {name: found[name] for name in names}


def _photos_of(images: Any) -> list[str | Path | Image.Image]:
    """What features() takes, as a list. Raises UsageError for anything else, which would pass for a path made of digits."""
    photo = (str, Path, Image.Image)
    several = isinstance(images, Iterable) and not isinstance(images, (*photo, bytes, Mapping, np.ndarray, torch.Tensor))
    photos = list(images) if several else [images]
    for given in photos:
        if not isinstance(given, photo):
            raise UsageError(f"{type(given).__name__}: no photo; paths and PIL images are taken, one or a list of them")
    return photos


def run_few(args: argparse.Namespace) -> int:
    """Run all images in this process, time the forward pass, log and save what came out. Returns the exit code."""
    device, paths = open_as_asked(args), find_images(args.image_path)
    if len(paths) > 1000:
        log.warning(f"{len(paths):,} images at once: embed.py decodes in parallel and can go on after an interruption")
    model = load_from_args(args, device)
    log.info(f"Loading image: {paths[0]}" if len(paths) == 1 else f"Loading {len(paths):,} images")
    crops = crops_of(paths, model.preprocess)
    saved = names_to_save(args, model)
    names = [*saved, "hidden_norm", *(["pooler_norm"] if model.pooler != "none" else [])]
    batch_size = min(args.batch_size or default_batch_size(device.kind), len(paths))
    log.info(f"Input shape: {(len(paths), 3, *crops.shape[1:3])}")
    log.info("Warming up ...")
    found, batch_size = host_features(model, crops, names, batch_size)
    log.info(f"First features after {time.perf_counter() - STARTED:.2f} s")
    require_finite(found, paths, model)
    log.info("Running inference ...")
    times = time_batch(model, crops[:batch_size], names)
    require_computing(device)
    result = describe_few(model, paths, found, batch_size, times)
    log_few(model, result)
    if args.output:
        with np.errstate(over="ignore"):
            arrays = {name: found[name].astype(args.feature_dtype) for name in saved}
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise UsageError(f"features over 65504 do not fit into {args.feature_dtype}; use --feature_dtype float32")
        with replacing(Path(args.output)) as file:
            np.savez(file, index=np.arange(len(paths)), path=np.array(paths), **arrays)
        log.info(f"Features saved to {args.output} ({model.weights.label})")
    write_result(args, result | provenance(model))
    return 0


def time_batch(model: LoadedModel, crops: torch.Tensor, names: Sequence[str]) -> list[float]:
    """Seconds of a batch from crops on the device to its features there, for three to ten runs within three seconds."""
    batch, times = crops.to(model.device.torch_device), []
    while len(times) < 3 or (len(times) < 10 and sum(times) < 3.0):
        times.append(time_once(model.device, lambda: device_features(model, batch, names)))
    return times


def names_to_save(args: argparse.Namespace, model: LoadedModel) -> list[str]:
    """Features that the flags ask for: patch tokens only on request for their size, the pooler because it is seldom trained."""
    if args.save_pooler and model.pooler == "none":
        raise UsageError("--save_pooler: this model has no pooler")
    kinds = list(JUDGED)
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


# --- the log ---------------------------------------------------------------------------------------------------------

LOG_LAYOUT = logging.Formatter("%(asctime)s [%(levelname)s] %(message)s")


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


# --- results ---------------------------------------------------------------------------------------------------------


def result_name(name: str, kind: str) -> str:
    """An NPU's results have the deliverables' names, those of another device carry its name: inference, inference_cpu."""
    return name if kind == "npu" else f"{name}_{kind}"


def settle(args: argparse.Namespace, kind: str, trial: bool) -> None:
    """Decide where log and result of a run go, and open the log: results/ and logs/, or their trial/ folders.

    --output_log and --results_dir are obeyed to the letter. args.script is the script's name for them. Raises UsageError where
    they cannot be written.
    """
    name = result_name(args.script, kind)
    folder = "trial" if trial else "."
    args.results = Path(args.results_dir) if args.results_dir else ROOT / "results" / folder
    rank = f"_rank{rank_of('RANK', 0)}" if rank_of("RANK", 0) else ""
    open_log(Path(args.output_log) if args.output_log else ROOT / "logs" / folder / f"{name}{rank}.log")
    if not args.script.startswith("embed"):
        require_writable(args.results)


def require_writable(folder: Path) -> None:
    """Raises UsageError, before anything is computed, where a result cannot be written: a read-only bundle, as in an image."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    problem = "" if os.access(there, os.W_OK) else "no right to write there, or a read-only disk"
    if problem or not os.path.isdir(there):
        told = problem or "Not a directory"
        raise UsageError(f"{folder}: results cannot be written ({told}); name another folder with --results_dir")


def is_trial(args: argparse.Namespace, model: LoadedModel) -> bool:
    """Whether a run's outcome is no evidence: not the card's weights and not --publish, or less than what is on record."""
    if STAND_IN in model.device.name:
        log.warning(f"This is a {STAND_IN}: no NPU, and no evidence for one")
        return True
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
    if args.script.startswith("embed") or (args.results_dir and record and record.get("status") != "BLOCKED"):
        return
    data = {"status": "BLOCKED", "device": kind, "reason": reason, "what_to_do": blocked.remedy}
    write_result(args, data | {"dtype": args.dtype} | run_provenance())


# --- what a result says of its making --------------------------------------------------------------------------------


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


def provenance(model: LoadedModel) -> dict[str, Any]:
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


# --- flags -----------------------------------------------------------------------------------------------------------


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
    add("--model_path", default=DEFAULT_MODEL_PATH, help="folder or hub id (default: %(default)s, else the hub)")
    add("--device", type=device_spec, default="auto", help="auto (an NPU, else a GPU, else the CPU), cpu, cuda[:N], npu[:N]")
    add("--dtype", choices=DTYPES, default="float32", help="arithmetic of the model (default: %(default)s)")
    add("--image_size", type=positive_int, metavar="PIXELS", help="side of the input (default: the checkpoint's, 224)")
    ways = "crop: the checkpoint's way; squash: no crop; 256: short edge 256, crop"
    add("--resize", choices=RESIZES, default="crop", help=ways)
    speed = "exact: transformers' pixels; fast: a grey level off here and there (default: %(default)s)"
    add("--decode", choices=DECODES, default="exact", help=speed)
    add("--allow_hf32", action="store_true", help="let float32 be rounded (HF32, TF32): faster, 1000 times less exact")
    add("--deterministic", action="store_true", help="the same bits on every run on an NPU, at some cost (embed.py: always)")
    add("--random_weights", action="store_true", help="seeded random weights: to try the pipeline and its speed")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a checkpoint: only if you trust it")
    add("--allow_unlocked", action="store_true", help="accept files whose sha256 is not the one in locked_models.md")
    add("--publish", action="store_true", help="write the outcome of random or other weights to results/ all the same")
    add("--output_log", metavar="FILE", help="append the log to FILE (default: logs/, for a trial logs/trial/)")
    add("--results_dir", metavar="DIR", help="folder for the JSON result (default: results/, for a trial results/trial/)")


def add_feature_arguments(parser: argparse.ArgumentParser, images: str, output: str) -> None:
    """The flags about features that inference.py, embed.py and embed_cluster.py share."""
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
    most = "refuse images of more pixels (default: %(default)s)"
    add("--max_megapixels", type=positive_int, default=MAX_MEGAPIXELS, metavar="N", help=most)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add_feature_arguments(parser, "images, globs, folders", "NAME.npz for the features (embed.py writes folders)")
    add_model_arguments(parser)
    return parser


# --- running a script ------------------------------------------------------------------------------------------------


def load_from_args(args: argparse.Namespace, device: Device) -> LoadedModel:
    """load_as_asked, a log of what was loaded, and the decision where log and result of the run go."""
    log.info(f"Loading {MODEL_NAME} from {'random weights' if args.random_weights else args.model_path} ...")
    model = load_as_asked(args, device)
    settle(args, device.kind, is_trial(args, model))
    log.info(f"Model loaded on {device.kind}, dtype={model.dtype} ({model.weights.label})")
    log.info(f"Parameters: {model.parameters:,} ({model.parameters / 1e6:.1f}M)")
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


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, by a KeyboardInterrupt; what is ignored stays so, as nohup has it.

    A signal that follows within seconds, as torchrun's SIGTERM upon a Ctrl-C, does not disturb what the first has begun to end.
    """
    stopped_at = [-math.inf]

    def stop(_signal: int, _frame: object) -> None:
        if time.monotonic() - stopped_at[0] > 5:
            stopped_at[0] = time.monotonic()
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_lost: list[BaseException] = []  # what said that the device has stopped computing, for good in this process


def answered(body: Callable[[], int], settle_log: Callable[[], None]) -> int:
    """The exit code of body(), or of what ends it, said in one line. settle_log opens the log's file before a traceback."""
    try:
        with stoppable():
            start_log()
            return body()
    except (UsageError, ModuleNotFoundError) as error:
        remedy = "" if isinstance(error, UsageError) else ". Run: pip install -r requirements.txt"
        log.error(f"error: {error}{remedy}")
        return 2
    except KeyboardInterrupt as error:
        log.error(str(error) or "stopped; nothing was saved")
        return 130
    except Exception as error:
        settle_log()
        told = f"{type(error).__name__}: {first_line(error)} (unforeseen; the traceback is in the log)"
        if is_lost(error):
            _lost.append(error)
            told = what_lost_means(error)
        log.error(f"error: {told}", exc_info=True)
        return 70


def leave(code: int) -> None:
    """End the process; where the device is lost without torch_npu's exit handler, which may wait for it for ever."""
    if _lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def guarded(script: str, body: Callable[[], int], last_words: str = "stopped; nothing was saved") -> int:
    """body() of a script that runs no model, or whatever ends it as one line and an exit code."""

    def run() -> int:
        try:
            return body()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(last_words) from None

    try:
        return answered(run, lambda: open_log(ROOT / "logs" / "trial" / f"{script}.log"))
    finally:
        stop_log()


def limit_megapixels(args: argparse.Namespace) -> None:
    """Let this process, and what it forks, obey --max_megapixels."""
    Image.MAX_IMAGE_PIXELS = getattr(args, "max_megapixels", MAX_MEGAPIXELS) * 500_000  # Pillow refuses twice of it


def run_script(script: str, args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """Run body(args), and turn whatever ends it into an exit code, one line, and what must be kept.

    A body calls open_as_asked, then load_from_args, which decides where the log goes; what ends before that is logged to
    logs/trial/.
    """
    args.script = script
    limit_megapixels(args)

    def run() -> int:
        try:
            return body(args)
        except Blocked as error:
            _lost.extend([error] if is_lost(error) else [])
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


def open_as_asked(args: argparse.Namespace) -> Device:
    """open_device with the flags of add_model_arguments, and a log of what was opened."""
    device = open_device(args.device, args.allow_hf32, args.deterministic)
    if device.kind == "npu" and args.dtype == "float16" and os.environ.get("INF_NAN_MODE_FORCE_DISABLE") == "1":
        raise UsageError("INF_NAN_MODE_FORCE_DISABLE=1 lets float16 saturate unseen; unset it, or use --dtype float32")
    log.info(f"Device: {device.torch_device}, {device.name} ({device.reason})")
    if args.dtype == "float32":
        strict = "true float32 (no HF32, no TF32, erf GELU)"
        log.info(f"float32 arithmetic: {'rounded where the device can (HF32, TF32)' if args.allow_hf32 else strict}")
    return device


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.endswith(".npz"):
        parser.error(f"--output {args.output!r}: the name must end in .npz; folders are written by embed.py")
    return run_script("inference", args, run_few)


if __name__ == "__main__":
    leave(main())
