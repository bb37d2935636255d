"""WebSSL-MAE-300M: turn any number of photos into features, in parts, on an Ascend NPU, a GPU or the CPU.

    python embed.py --image_path photos/ --output features/ --device npu --dtype float16
    python embed.py --image_path photos/ --output features/ --add
    torchrun --nproc_per_node 8 embed.py --image_path shards/ --output features/ --device npu

--image_path takes images, folders, globs, .txt lists of paths (those in a tar as shard.tar/name.jpg) and .tar files. A
part-NNNNN.npz holds a row for each image: index, path, features, size and mtime [ns] of its file, and caption, url and key from
img2dataset's tars. Failures stand beside (failed_index, failed_path, failed_reason) and together in failures.jsonl;
manifest.json says what made the parts. The same command goes on where a run stopped, whatever stopped it. --add takes paths
that no part holds, --retry_failed those that failed, both into further parts: a row keeps its index for ever.

A part with a file that the disk or the network does not give is left unwritten; the others are done, then the run ends with 2.
Any number of processes may run the same command at once, under torchrun or not: each takes parts that no other has begun, and
the last to end says what is left.

Exit codes: 0 done; 2 wrong usage, unusable input, or parts left unwritten; 3 BLOCKED: the device that was asked for cannot be
used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import marshal
import math
import mmap
import os
import shlex
import shutil
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import inference
import numpy as np
from inference import BadImage, Device, Encoder, LoadedModel, Preprocess, Unreadable, UsageError, log, rank_of, stopping, torch

TEXTS = ("caption", "url", "key")
TEXT_LIMIT = 4000  # characters of a caption: a part's column is as wide as its longest text
LOST_AFTER = 100  # files in a row whose folder is not there: a lost disk, not wrong lines
LOADER_TIMEOUT_S = 1800  # for one batch: nothing waits for ever
QUEUE_BYTES = 4 << 30  # of decoded batches that wait in memory
ENDING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}

Span = tuple[int, int]  # offset and size within a file
NOWHERE = (0, 0)
Features = dict[str, np.ndarray]  # by their names; a row for each image


# --- listing ---------------------------------------------------------------------------------------------------------


class ImageKey(NamedTuple):
    """One image: its place in the list, its name, where its bytes are, and where texts are that stand beside it in a tar."""

    index: int
    name: str
    tar_length: int = 0  # how much of the name is the path of a tar
    offset: int = 0
    size: int = -1
    json: Span = NOWHERE
    txt: Span = NOWHERE

    @property
    def file(self) -> str:
        return self.name[: self.tar_length] or self.name

    @property
    def folder(self) -> str:
        """What must be there for the image to be there: its folder, or its tar."""
        return self.file if self.tar_length else os.path.dirname(self.file) or "."


class ImageList:
    """Any number of images in order, each packed into about 50 bytes more than its name; members of tars into 100 more."""

    def __init__(self, packed: Iterable[bytes] = ()) -> None:
        self.packed = list(packed)
        self.ignored = 0

    def append(self, name: str, *in_tar: Any) -> None:
        """Add an image; `in_tar` are the fields of ImageKey behind the name."""
        self.packed.append(marshal.dumps((name, *in_tar)))

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, place: int) -> ImageKey:
        return ImageKey(place, *marshal.loads(self.packed[place]))

    def sha256(self) -> str:
        """Digest of all names in order."""
        digest = hashlib.sha256()
        for key in self:
            digest.update(os.fsencode(f"{key.name}\0"))
        return digest.hexdigest()


def list_images(arguments: Sequence[str]) -> ImageList:
    """All images that files, folders (recursively), glob patterns, .txt lists of paths and .tar files name, in a fixed order.

    Names that were given are taken whatever their suffix; in folders and tars, files without an image's suffix are counted in
    `ignored`. Raises UsageError where an argument names nothing or cannot be read, or where no image is found.
    """
    images = ImageList()
    inference.for_each_named(arguments, partial(_list_given, images))
    if not len(images):
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it ({images.ignored:,} other files ignored)")
    return images


def _list_given(images: ImageList, path: str) -> None:
    lower = path.lower()
    if os.path.isdir(path):
        for file in inference.walk_files(path):
            if file.lower().endswith(".tar") and os.path.isfile(file):
                _list_tar(images, file)
            elif inference.is_image_name(file):
                images.append(file)
            else:
                images.ignored += 1
    elif not lower.endswith((".tar", ".txt")):
        images.append(path)
    elif not os.path.isfile(path):  # a pipe would be waited for
        raise UsageError(f"--image_path {path}: not a regular file")
    elif lower.endswith(".tar"):
        _list_tar(images, path)
    else:
        _list_lines(images, path)


def _list_lines(images: ImageList, path: str) -> None:
    tars: dict[str, dict[str, tuple[Any, ...]]] = {}  # each is read once
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for name in (line.rstrip("\n") for line in lines):
            tar, _, member = name.partition(".tar/")
            tar += ".tar"
            if name.lower().endswith(".tar") and os.path.isfile(name):
                _list_tar(images, name)
            elif member and (tar in tars or os.path.isfile(tar)):
                if tar not in tars:
                    tars[tar] = dict(_read_tar(tar))
                if not tars[tar].get(member):
                    raise UsageError(f"{path}: {tar} has no member {member}, or it is a link or sparse")
                images.append(name, *tars[tar][member])
            elif name.strip():
                images.append(name)


def _list_tar(images: ImageList, path: str) -> None:
    refused = []
    for member, fields in _read_tar(path):
        if not inference.is_image_name(member):
            images.ignored += not member.lower().endswith((".json", ".txt"))
        elif fields:
            images.append(f"{path}/{member}", *fields)
        else:
            images.ignored += 1
            refused.append(member)
    if refused:
        log.warning(f"{path}: {len(refused):,} images that are links or sparse are ignored ({refused[0]} ...); unpack the tar")


def _read_tar(path: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of all members but folders, each with the fields of its ImageKey, none for links and the like.

    Raises UsageError where the tar is damaged: tarfile takes most damage for the end.
    """
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            infos = [info for info in tar.getmembers() if not info.isdir()]
            end = file.seek(tar.offset)  # type: ignore[attr-defined]
            rest = file.read(1 << 20)
        if len(rest) < 512 or rest.strip(b"\0"):
            raise tarfile.ReadError(f"cut or damaged at byte {end:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: not a whole tar ({error}); fetch it again") from error

    def stem(info: tarfile.TarInfo) -> tuple[str, str]:  # as webdataset has it
        folder, _, name = info.name.rpartition("/")
        return folder, name.partition(".")[0]

    for _, group in itertools.groupby(infos, key=stem):
        members = [(info, info.isreg() and not info.issparse()) for info in group]
        spans = {os.path.splitext(info.name)[1].lower(): (info.offset_data, info.size) for info, plain in members if plain}
        texts = (spans.get(".json", NOWHERE), spans.get(".txt", NOWHERE))
        for info, plain in members:
            yield info.name, (len(path), info.offset_data, info.size, *texts) if plain else ()


# --- decoding, in processes of its own -------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is known of an image beside its features; if it failed, why, and whether its folder or tar is not there either."""

    size: int
    mtime: int
    texts: dict[str, str]
    reason: str = ""
    folder_gone: bool = False


@dataclass
class Batch:
    """What a worker returns: a row for each image from place `first` on, or which file the disk did not give; and its crops,
    uint8 [n, H, W, 3], anything where an image failed, which wait in memory that is shared with the workers."""

    first: int
    rows: list[Row] = field(default_factory=list)
    unreadable: str = ""
    crops: Any = None


class _Crops:
    """Makes batches in DataLoader's workers. It knows no paths: the sampler sends them, so that no worker holds the list."""

    def __init__(self, preprocess: Preprocess, buffers: np.ndarray) -> None:
        self.preprocess, self.buffers = preprocess, buffers

    def __getitem__(self, task: tuple[int, list[ImageKey]]) -> Batch:
        number, keys = task
        batch = Batch(keys[0].index)
        for crop, key in zip(self.buffers[number % len(self.buffers)], keys):
            row = Row(*size_and_mtime(key), {})
            try:
                crop[:] = read_crop(key, self.preprocess)
                row = row._replace(texts=read_texts(key))
            except BadImage as error:
                if isinstance(error.__cause__, MemoryError):
                    batch.unreadable = f"{key.name}: not enough memory to decode it"
                    break
                row = row._replace(reason=str(error), folder_gone=_is_folder_gone(key, error))
            except Unreadable as error:
                batch.unreadable = str(error)
                break
            batch.rows.append(row)
        return batch


def read_crop(key: ImageKey, preprocess: Preprocess) -> np.ndarray:
    """Read, decode, resize and crop one image: uint8 [image_size, image_size, 3]. Raises BadImage or Unreadable."""
    return inference.crop_uint8(inference.decode(inference.read_bytes(key.file, key.offset, key.size)), preprocess)


def _is_folder_gone(key: ImageKey, error: BadImage) -> bool:
    """Whether the folder of a file that was not found is gone too, or empty as a mount point is without its disk."""
    if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
        return False
    try:
        with os.scandir(key.folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def size_and_mtime(key: ImageKey) -> Span:
    """Of a member of a tar its size and 0: the tar may grow."""
    if key.tar_length:
        return key.size, 0
    with suppress(OSError, ValueError):
        status = os.stat(key.file)
        return status.st_size, status.st_mtime_ns
    return NOWHERE


def read_texts(key: ImageKey) -> dict[str, str]:
    """caption, url and key from the members beside an image, as img2dataset writes them."""
    texts: dict[str, str] = {}
    if key.txt != NOWHERE:
        texts["caption"] = inference.read_bytes(key.file, *key.txt).decode("utf-8", "replace").rstrip("\n")
    if key.json != NOWHERE:
        with suppress(ValueError, AttributeError, RecursionError):  # damaged: the image is none the worse for it
            fields = json.loads(inference.read_bytes(key.file, *key.json))
            texts |= {name: str(fields[name]) for name in TEXTS if fields.get(name) is not None}
    return {name: text[:TEXT_LIMIT] for name, text in texts.items()}


class KeyBatches:
    """The sampler: lists of at most `batch_size` keys, never across two parts, so that a resumed run makes the same batches."""

    def __init__(self, bulk: Bulk, parts: Iterable[int], batch_size: int) -> None:
        self.bulk, self.parts, self.batch_size = bulk, parts, batch_size
        self.given_up: set[int] = set()

    def __iter__(self) -> Iterator[list[ImageKey]]:
        for part in self.parts:
            places = self.bulk.places(part)
            for first in places[:: self.batch_size]:
                if part in self.given_up:
                    break
                yield [self.bulk.images[place] for place in range(first, min(first + self.batch_size, places.stop))]


def decoding_loader(model: LoadedModel, batches: KeyBatches, num_workers: int | None) -> Iterator[Batch]:
    """Gives a Batch for each list of keys, decoded in `num_workers` processes (None: by the cores there are).

    Raises UsageError where a worker is lost, or where no batch comes for LOADER_TIMEOUT_S.
    """
    size, pins = model.preprocess.image_size, inference.can_pin_memory(model.device)
    if num_workers is None:
        num_workers = default_num_workers(model.device, batches.batch_size, size)
    log.info(f"{num_workers} decoding workers")
    # As many batches as are under way: two for each worker, and those in other hands. Memory that is shared by a fork is no
    # file in /dev/shm, of which a container may have 64 MB.
    shape = (2 * num_workers + 3, batches.batch_size, size, size, 3)
    try:
        buffers = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
    except OSError as error:
        raise UsageError("too little memory for the images under way; use a smaller --batch_size or --num_workers") from error
    loader = torch.utils.data.DataLoader(
        _Crops(model.preprocess, buffers),
        batch_size=None,  # the sampler gives whole batches
        sampler=enumerate(batches),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if num_workers else None,
        timeout=2 if num_workers else 0,  # it looks whether its workers live each time
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until workers have their own handlers
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if num_workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises a dead worker's error in whatever runs
    try:
        for buffer in itertools.cycle(buffers):
            batch = _next_batch(iterator, num_workers)
            if batch is None:
                return
            batch.crops = torch.from_numpy(buffer[: len(batch.rows)])
            if pins:
                batch.crops = batch.crops.pin_memory()
            yield batch
    finally:
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()  # one that hangs in a read would be waited for, as they ignore SIGTERM


def _next_batch(iterator: Iterator[Batch], num_workers: int) -> Batch | None:
    deadline = time.monotonic() + LOADER_TIMEOUT_S
    while num_workers:
        try:
            return next(iterator, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if str(error).startswith("Caught"):  # an error in the worker's own code
                raise
            if "DataLoader timed out" not in str(error):
                reason = f"most likely for lack of memory ({inference.first_line(error)}); use a smaller --num_workers"
                raise UsageError(f"a decoding worker was lost, {reason}") from error
            if time.monotonic() > deadline:
                raise UsageError(f"no image came for {LOADER_TIMEOUT_S} s, as from a disk or network that hangs") from error
    return next(iterator, None)


def default_num_workers(device: Device, batch_size: int, image_size: int) -> int:
    """Enough processes to keep up with the device, and no more than QUEUE_BYTES of batches waiting in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= rank_of("LOCAL_WORLD_SIZE", 1)
    workers = cores // 4 if device.kind == "cpu" else min(16, cores - 1)
    return max(1, min(workers, QUEUE_BYTES // (3 * batch_size * image_size * image_size * 3)))


def _start_worker(_worker: int) -> None:
    # Signals reach every process of a terminal or a job; the main process alone answers, and its workers end with it.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """Which images, in parts of how many, and what is written where: part first_part + k has places k * part_size and on, and a
    row's index is its place plus first_index. made_with is written into each part."""

    images: ImageList
    folder: Path
    part_size: int
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    first_index: int = 0
    first_part: int = 0
    made_with: str = ""

    @property
    def parts(self) -> range:
        return range(self.first_part, self.first_part + math.ceil(len(self.images) / self.part_size))

    def places(self, part: int) -> range:
        start = (part - self.first_part) * self.part_size
        return range(start, min(start + self.part_size, len(self.images)))

    def part_of(self, place: int) -> int:
        return self.first_part + place // self.part_size

    def unfinished(self) -> list[int]:
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [part for part in self.parts if part_path(self.folder, part).name not in there]

    def how_to_go_on(self) -> str:
        finished = len(self.parts) - len(self.unfinished())
        return f"{finished} of {len(self.parts)} parts are finished in {self.folder}; run the same command again to go on"


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.npz"


def bytes_per_image(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def part_arrays(bulk: Bulk, part: int, batches: list[tuple[list[Row], Features]]) -> Features:
    """What a part's file holds: a row for each image that has features, and the failures beside."""
    rows = [row for rows, _ in batches for row in rows]
    good = np.array([not row.reason for row in rows])
    index = np.array(bulk.places(part), np.int64) + bulk.first_index
    path = np.array([bulk.images[place].name for place in bulk.places(part)])
    texts = TEXTS if any(row.texts for row in rows) else ()
    return {
        "index": index[good],
        "path": path[good],
        **{name: np.array([row.texts.get(name, "") for row in rows])[good] for name in texts},
        **{name: np.concatenate([features[name] for _, features in batches])[good] for name in bulk.shapes},
        "size": np.array([row.size for row in rows], np.int64)[good],
        "mtime": np.array([row.mtime for row in rows], np.int64)[good],
        "failed_index": index[~good],
        "failed_path": path[~good],
        "failed_reason": np.array([row.reason for row in rows])[~good],
        "made_with": np.array(bulk.made_with),
    }


def write_part(lock: FolderLock, bulk: Bulk, part: int, batches: list[tuple[list[Row], Features]]) -> None:
    """Write a part as .npz, and clear away what a killed run left of it. Text is compressed: numpy pads it to the longest.

    Raises UsageError where it cannot be written or the folder is gone.
    """
    path = part_path(bulk.folder, part)
    lock.check_folder()
    try:
        with inference.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, values in part_arrays(bulk, part, batches).items():
                info = zipfile.ZipInfo(f"{name}.npy")
                info.compress_type = zipfile.ZIP_DEFLATED if values.dtype.kind == "U" else zipfile.ZIP_STORED
                with archive.open(info, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
    finally:
        lock.check_folder()  # a folder that goes meanwhile says more than what could not be written
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    stopping.last_words = f"stopped; {bulk.how_to_go_on()}"


def read_part(path: Path, *names: str) -> list[np.ndarray] | None:
    """Arrays of a part; None if there is none. One that is damaged is put aside and named."""
    damage = (ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except FileNotFoundError:
        return None
    except (OSError, *damage) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # NumPy's, for a place that is not in the file
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
        os.replace(path, f"{path}.damaged")
        log.warning(f"{path} is damaged ({inference.first_line(error)}): put aside as {path.name}.damaged, and made again")
        return None


# --- sharing a folder, and what is to be done in it ------------------------------------------------------------------


class FolderLock:
    """Lets processes share the work in a folder by locks on bytes of a file. POSIX locks: they die with their process, and
    decoding workers do not inherit them. Byte 0: works here; 1: plans, or counts what is there; part + 2: makes that part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lockable = folder, True
        self.rank, self.ranks = which_rank()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"--output {folder}: the folder cannot be made or written ({error.strerror})") from error

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.file)

    def _lock(self, how: int, byte: int) -> bool:
        try:
            if self.lockable:
                fcntl.lockf(self.file, how, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self.lockable = False
            log.warning(f"{self.folder}: no locks there ({error.strerror}); see to it that no other run writes to it")
        return True

    def start_work(self) -> None:
        """From now on this process works here; one that still waits for its turn to plan does not."""
        self._lock(fcntl.LOCK_SH, 0)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        self._lock(fcntl.LOCK_EX, 1)
        yield
        self._lock(fcntl.LOCK_UN, 1)

    def is_alone(self, then: int = fcntl.LOCK_SH) -> bool:
        """Whether no other process works here. LOCK_UN for `then`: nor does this one from now on."""
        alone = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, 0)
        self._lock(then, 0)
        return alone

    def claim(self, part: int) -> bool:
        """Whether this process may make a part: no other does, or, where there are no locks, it is in its share."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, part + 2) and (self.lockable or part % self.ranks == self.rank)

    def check_folder(self) -> None:
        """Raises UsageError if the folder is not there any more."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(self.file)):
                return
        raise UsageError(f"--output {self.folder}: it was deleted, moved or unmounted during the run")


def which_rank() -> tuple[int, int]:
    """Rank and number of ranks. Raises UsageError where the environment has only one of them, or they make no sense."""
    get, rank, ranks = os.environ.get, rank_of("RANK", 0), rank_of("WORLD_SIZE", 1)
    if bool(get("RANK")) != bool(get("WORLD_SIZE")) or rank >= ranks:
        found = f"RANK={get('RANK', '')} and WORLD_SIZE={get('WORLD_SIZE', '')}"
        raise UsageError(f"the environment has {found}: unset both, or start with torchrun, which sets RANK below WORLD_SIZE")
    return rank, ranks


def plan(args: Namespace, images: ImageList, model: LoadedModel, lock: FolderLock) -> Bulk:
    """Work out what the parts hold. A part waits in memory until it is full: hence fewer images where features are large.

    In manifest.json all of "made_from" must be the same for a run to go on; the rest tells who began it.
    """
    width = model.module.config.hidden_size
    patches = (model.preprocess.image_size // model.module.config.patch_size) ** 2
    names = inference.names_to_save(args, model)
    shapes = {name: (patches, width) if name == "patch_tokens" else (width,) for name in names}
    part_size = args.part_size or max(1, min(10_000, (1 << 28) // bytes_per_image(shapes, args.feature_dtype)))
    about = inference.provenance(args, model) | {"command": command_as_typed()}
    made_with = json.dumps(about["versions"] | {"device": model.device.name})
    made_from = {"device": model.device.kind, "dtype": model.dtype_name, "image_size": model.preprocess.image_size}
    made_from |= {"part_size": part_size, "features": shapes, "feature_dtype": args.feature_dtype}
    fitting = ("allow_hf32", "deterministic", "levers", "model", "dimensions", "preprocess", "pooler", "weights")
    made_from |= {name: about.pop(name) for name in fitting}
    about["weights_path"] = made_from["weights"].pop("path", None)
    manifest = json.loads(json.dumps({"made_from": made_from, "rounds": []} | about))
    images, first_index, first_part = agree_on_round(args, images, lock, manifest)
    return Bulk(images, lock.folder, part_size, shapes, args.feature_dtype, first_index, first_part, made_with)


def command_as_typed() -> str:
    """With its whole paths, to be repeated: the manifest is the user's own, and not published."""
    return shlex.join(["python", *sys.argv])


def agree_on_round(
    args: Namespace, images: ImageList, lock: FolderLock, manifest: dict[str, Any]
) -> tuple[ImageList, int, int]:
    """The images to do with their first index and first part: the last round's in manifest.json, or a new round's.

    Raises UsageError saying what does not fit.
    """
    folder, path = lock.folder, lock.folder / "manifest.json"
    begun_with, go_back = f"--output {folder}: begun with another", "repeat the first command (manifest.json has it)"
    has_parts = any(folder.glob("part-*.npz"))
    if path.exists() and (has_parts or not lock.is_alone()):  # else nothing would be lost
        begun = inference.read_json(path, "the manifest")
        for name, value in manifest["made_from"].items():
            then = begun.get("made_from", {}).get(name)
            if then != value:
                told = f"({json.dumps(then):.200}, now {json.dumps(value):.200})"
                raise UsageError(f"{begun_with} {name} {told}; {go_back} or use another folder")
        manifest = begun
    elif has_parts:
        raise UsageError(f"--output {folder}: it holds parts but no manifest.json; use an empty or new folder")
    rounds = manifest["rounds"]
    index, part = (sum(made[what] for made in rounds) for what in ("images", "parts"))
    if rounds:
        last = rounds[-1]
        its_parts = (part_path(folder, number) for number in range(last["first_part"], part))
        if not (args.retry_failed and lock.is_alone() and all(path.exists() for path in its_parts)):
            images_then = wanted_images(args, images, folder, last["first_part"])
            if images_then.sha256() == last["image_list_sha256"]:
                return images_then, last["first_index"], last["first_part"]
        if not (args.add or args.retry_failed):
            if last["first_part"]:
                raise UsageError(f"--output {folder}: repeat the last command, or use --add; it was: {last['command']}")
            told = f"({last['images']:,}, now {len(images):,}); --add takes those that no part holds"
            raise UsageError(f"{begun_with} list of images {told}; or {go_back}, or use another folder")
        if not lock.is_alone():
            raise UsageError(f"--output {folder}: another run writes to it; wait, or use another folder")
        images = wanted_images(args, images, folder, part)
    if len(images):
        made = {"first_index": index, "first_part": part, "images": len(images), "image_list_sha256": images.sha256()}
        made["parts"] = math.ceil(len(images) / manifest["made_from"]["part_size"])
        rounds.append(made | {"command": command_as_typed(), "time_utc": inference.utc_now()})
        inference.write_json(path, manifest)
    return images, index, part


def wanted_images(args: Namespace, images: ImageList, folder: Path, before: int) -> ImageList:
    """Those of `images` that --add and --retry_failed ask for, given the parts numbered below `before`. Names changed files."""
    if not before:
        return images

    def recorded(*names: str) -> Iterator[tuple[Any, ...]]:
        for path in (part_path(folder, part) for part in range(before)):
            yield from zip(*(read_part(path, *names) or ()))

    mine = _digests(key.name for key in images)
    rows = recorded("path", "size", "mtime")
    held = _digests(text for row in rows for text in (row[0], "{}\0{}\0{}".format(*row))).reshape(-1, 2)
    is_held = np.isin(mine, held[:, 0])
    is_failed = np.isin(mine, _digests(name for (name,) in recorded("failed_path"))) & ~is_held
    there = np.flatnonzero(is_held)
    now = _digests("{}\0{}\0{}".format(images[place].name, *size_and_mtime(images[place])) for place in there)
    changed = [images[place].name for place in there[~np.isin(now, held[:, 1])]]
    if changed:
        log.warning(f"{len(changed):,} files have changed since their rows were made, which stay: {', '.join(changed[:5])}")
    wanted = args.add & ~is_held & ~is_failed | args.retry_failed & is_failed
    return ImageList(images.packed[place] for place in np.flatnonzero(wanted))


def _digests(texts: Iterable[str]) -> np.ndarray:
    """A number for each text: ten million paths themselves would fill the memory."""
    hashes = (hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(value, "little") for value in hashes), np.uint64)


# --- the run ---------------------------------------------------------------------------------------------------------


def embed(args: Namespace, images: ImageList, model: LoadedModel) -> int:
    """Write the parts that args.output lacks, sharing them with whoever else does. Returns the exit code."""
    with FolderLock(Path(args.output)) as lock:
        with lock.one_at_a_time():
            bulk = plan(args, images, model, lock)
            lock.start_work()
            parts = claimed_parts(bulk, lock)
        stopping.last_words = f"stopped; {bulk.how_to_go_on()}"
        batch_size = args.batch_size or inference.default_batch_size(model.device)
        batches = KeyBatches(bulk, parts, min(batch_size, bulk.part_size, len(bulk.images) or 1))
        check_disk(bulk)
        encoder = Encoder(model, tuple(bulk.shapes), batches.batch_size, args.execution, bulk.dtype)
        to_do = f"{len(bulk.unfinished())} of {len(bulk.parts)} parts to do"
        log.info(f"Rank {lock.rank} of {lock.ranks}: {to_do}; batch size {batches.batch_size}, {args.execution}")
        try:
            encode_parts(lock, encoder, decoding_loader(model, batches, args.num_workers), batches)
            finish(lock, batches)
        except UsageError as error:
            raise UsageError(f"{error}; {bulk.how_to_go_on()}") from error
    return 0


def claimed_parts(bulk: Bulk, lock: FolderLock) -> Iterator[int]:
    """The parts to be made here: of this rank's share, then of the others', those that nobody has begun by then."""
    for part in bulk.parts[lock.rank :: lock.ranks]:
        read_part(part_path(bulk.folder, part), "index")  # a damaged one is put aside
    by_share = sorted(bulk.parts, key=lambda part: (part - bulk.first_part) % lock.ranks != lock.rank)
    return (part for part in by_share if lock.claim(part) and not part_path(bulk.folder, part).exists())


def check_disk(bulk: Bulk) -> None:
    """Log what the unfinished parts will need. Raises UsageError where the disk has less."""
    unfinished = bulk.unfinished()
    each = bytes_per_image(bulk.shapes, bulk.dtype) + 100  # for what stands beside the features; text is compressed
    needed, free = each * sum(len(bulk.places(part)) for part in unfinished), shutil.disk_usage(bulk.folder).free
    told = f"{needed / 1e9:,.3f} GB needed and {free / 1e9:,.3f} GB free"
    log.info(f"Output: {len(unfinished)} parts to write, {told} in {bulk.folder}")
    if needed > free:
        raise UsageError(f"--output {bulk.folder}: {told}; make room, save less, or use --feature_dtype float16")


def encode_parts(lock: FolderLock, encoder: Encoder, loader: Iterator[Batch], batches: KeyBatches) -> None:
    """Run all batches through the encoder; write each part when it is full. Raises UsageError if a part cannot be written."""
    bulk, rows, full = batches.bulk, [], []
    to_do = sum(len(bulk.places(part)) for part in bulk.unfinished()) / lock.ranks
    delivered: set[str] = set()
    writing: Future | None = None
    images = failed = lost = 0
    started = told = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        for batch, features in compute(loader, encoder, batches):
            lost = count_lost(bulk, batch, delivered, lost)
            for row in np.flatnonzero(~features["finite"]):
                reason = batch.rows[row].reason or "its features hold NaN or Inf"
                batch.rows[row] = batch.rows[row]._replace(reason=reason)
            images += len(batch.rows)
            failed += sum(row.reason != "" for row in batch.rows)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                rate = images / (told - started)
                left = max(0, to_do - images) / rate / 3600
                log.info(f"{images:,} of {to_do:,.0f} images, {rate:.1f} img/s, {left:.1f} h left, {failed:,} failed")
            places = bulk.places(bulk.part_of(batch.first))
            if batch.first == places.start:
                rows = []  # those of a part that was given up are forgotten
            rows.append((batch.rows, features))
            if batch.first + len(batch.rows) == places.stop:
                full.append((bulk.part_of(batch.first), rows))
            while full and not lost:  # else a disk may be gone, and these are no failures
                if writing:
                    writing.result()
                writing = pool.submit(write_part, lock, bulk, *full.pop(0))
        if writing:
            writing.result()
        for part in full:
            write_part(lock, bulk, *part)
    seconds = time.monotonic() - started
    log.info(f"{images:,} images in {seconds:.1f} s: {images / seconds:.2f} img/s, {failed:,} failed")


def compute(loader: Iterator[Batch], encoder: Encoder, batches: KeyBatches) -> Iterator[tuple[Batch, Features]]:
    """Batches with their features, each fetched from the device only after the next one is queued there; no more of a part once
    a file of it cannot be read."""
    queued = None
    for batch in itertools.chain(loader, [None]):
        part = batches.bulk.part_of(batch.first) if batch else None
        if batch and batch.unreadable and part not in batches.given_up:
            batches.given_up.add(part)
            log.error(f"Part {part} is left unwritten: {batch.unreadable}")
        if part in batches.given_up:
            continue
        following = (batch, encoder.submit(batch.crops)) if batch else None
        if queued:
            yield queued[0], queued[1]()
        queued = following


def count_lost(bulk: Bulk, batch: Batch, delivered: set[str], lost: int) -> int:
    """How many images in a row, up to the end of `batch`, are not there and their folder neither.

    Raises UsageError where they are too many for wrong lines in a list, or their folder gave images before.
    """
    for place, row in enumerate(batch.rows, batch.first):
        folder = bulk.images[place].folder
        lost = lost + 1 if row.folder_gone else 0
        if lost >= LOST_AFTER or (row.folder_gone and folder in delivered):
            raise UsageError(f"{folder} is gone or empty, a lost disk or mount ({lost} images in a row are not there)")
        if not row.reason:
            delivered.add(folder)
    return lost


def finish(lock: FolderLock, batches: KeyBatches) -> None:
    """Write failures.jsonl if all parts are there. Raises UsageError where they are not and nobody is left to make them."""
    bulk = batches.bulk
    lock.check_folder()
    with lock.one_at_a_time():
        unfinished = bulk.unfinished()
        if not unfinished:
            failures = write_failures(bulk.folder)
            log.info(f"All {len(bulk.parts)} parts are in {bulk.folder}; {failures:,} images failed (failures.jsonl)")
        elif lock.is_alone(then=fcntl.LOCK_UN) and (lock.lockable or batches.given_up):
            why = "files could not be read" if batches.given_up else "another process ended early, or could not read files"
            raise UsageError(f"{len(unfinished)} parts are left unwritten because {why}")


def write_failures(folder: Path) -> int:
    """Gather the failures of all parts, but for what a later part holds, in failures.jsonl; returns how many there are.

    Raises UsageError if there is nothing but failures.
    """
    failures: dict[str, dict[str, Any]] = {}
    makers: dict[str, str] = {}
    rows = 0
    for path in sorted(folder.glob("part-*.npz"), key=lambda path: (len(path.name), path.name)):
        found = read_part(path, "path", "failed_index", "failed_path", "failed_reason", "made_with")
        if found is None:
            raise UsageError(f"{path.name} was damaged")
        names, *failed, made_with = (values.tolist() for values in found)
        rows += len(names)
        makers.setdefault(made_with, path.name)
        for name in failures.keys() & set(names) if failures else ():
            del failures[name]
        failures |= {name: {"index": index, "path": name, "reason": reason} for index, name, reason in zip(*failed)}
    with inference.replacing(folder / "failures.jsonl") as file:
        file.write("".join(json.dumps(failure) + "\n" for failure in failures.values()).encode())
    if len(makers) > 1:
        listed = "; ".join(f"from {name}: {made_with}" for made_with, name in makers.items())
        log.warning(f"The parts were not all made with the same versions and device: {listed}")
    if not rows:
        raise UsageError("not one of these images gave features: see failures.jsonl for the reasons")
    return len(failures)


# --- command line ----------------------------------------------------------------------------------------------------


def run(args: Namespace, device: Device) -> int:
    """The body of the script."""
    which_rank()  # before anything that takes time
    images = list_images(args.image_path)
    log.info(f"{len(images):,} images, {images.ignored:,} other files ignored")
    return embed(args, images, inference.load_from_args(args, device))


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    listed = "images, folders, globs, .txt lists of paths, .tar files"
    inference.add_feature_arguments(parser, listed, "folder for the parts; the same command goes on where a run stopped")
    add = parser.add_argument_group("parts").add_argument
    add("--num_workers", type=int, metavar="N", help="decoding processes, 0 for none (default: by the cores there are)")
    size = "images in a part (default: 10000, fewer where their features are large)"
    add("--part_size", type=inference.positive_int, metavar="N", help=size)
    add("--add", action="store_true", help="write what no part holds as further parts")
    add("--retry_failed", action="store_true", help="do failed images again, as further parts")
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.output or args.output.endswith(".npz"):
        parser.error(f"--output {args.output or repr('')}: a folder is wanted (for a few images, inference.py writes NAME.npz)")
    if args.num_workers is not None and not 0 <= args.num_workers <= 1000:
        parser.error("--num_workers: a number from 0 (decode in this process) to 1000 is wanted")
    args.deterministic = True
    return inference.run_script("embed", args, run)


if __name__ == "__main__":
    sys.exit(main())
