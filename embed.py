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
Under torchrun, which ends or restarts all ranks when one fails, such a rank first waits until all have done their share.

Exit codes: 0 done; 2 wrong usage, unusable input, or parts left unwritten; 3 BLOCKED: the device that was asked for cannot be
used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import tarfile
import time
import uuid
import zipfile
import zlib
from argparse import Namespace
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePath
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


# --- listing ---------------------------------------------------------------------------------------------------------


class ImageKey(NamedTuple):
    """One image: its place in the list, its name, where its bytes are (a file, or a stretch of a tar), and texts beside it."""

    index: int
    name: str
    file: str
    offset: int = 0
    size: int = -1
    json: Span = NOWHERE
    txt: Span = NOWHERE

    @property
    def folder(self) -> str:
        """What must be there for the image to be there: its folder, or its tar."""
        return self.file if self.size >= 0 else os.path.dirname(self.file) or "."


class ImageList:
    """Names of any number of images, in order, in about 32 bytes an image more than the names (64 where texts come along)."""

    def __init__(self) -> None:
        self.ignored = 0
        self._names = bytearray()
        self._ends = array("q", [0])
        self._file_lengths = array("q")  # how much of the name is the path of the file: all of it, but for a member of a tar
        self._spans = {"image": array("q"), "json": array("q"), "txt": array("q")}  # in pairs; of texts as far as there are any

    def append(self, name: str, file: str | None = None) -> None:
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._file_lengths.append(len(os.fsencode(name if file is None else file)))
        self._spans["image"].extend((0, -1))

    def locate(self, index: int, *spans: Span) -> None:
        """Say where in its tar an image lies, and where its json and txt do."""
        for numbers, span in zip(self._spans.values(), spans, strict=True):
            if span != NOWHERE:
                numbers.frombytes(bytes(numbers.itemsize * max(0, 2 * index + 2 - len(numbers))))
                numbers[2 * index : 2 * index + 2] = array("q", span)

    def __len__(self) -> int:
        return len(self._file_lengths)

    def __getitem__(self, index: int) -> ImageKey:
        name = bytes(self._names[self._ends[index] : self._ends[index + 1]])
        file = name[: self._file_lengths[index]]
        image, *texts = (tuple(numbers[2 * index : 2 * index + 2]) or NOWHERE for numbers in self._spans.values())
        return ImageKey(index, os.fsdecode(name), os.fsdecode(file), *image, *texts)

    def subset(self, places: Iterable[int]) -> ImageList:
        """Some of the images, as a list of their own."""
        chosen = ImageList()
        for index, key in enumerate(self[place] for place in places):
            chosen.append(key.name, key.file)
            chosen.locate(index, (key.offset, key.size), key.json, key.txt)
        return chosen

    @property
    def has_texts(self) -> bool:
        return bool(self._spans["json"] or self._spans["txt"])

    @property
    def mean_name_bytes(self) -> float:
        return len(self._names) / max(1, len(self))

    def sha256(self) -> str:
        """Digest of all names in order."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()


def list_images(arguments: Sequence[str]) -> ImageList:
    """All images that files, folders (recursively), glob patterns, .txt lists of paths and .tar files name, in a fixed order.

    Names that were given are taken whatever their suffix; in folders and tars, files without an image's suffix are counted in
    `ignored`. Raises UsageError where an argument names nothing or cannot be read, or where no image is found.
    """
    images = ImageList()
    for argument in arguments:
        try:
            if os.path.exists(argument):
                matches = [argument]
            elif "**" in argument:
                matches = _deep_glob(argument)
            else:
                matches = sorted(glob.glob(argument))
            for match in matches:
                _list_given(images, match)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--image_path {argument}: cannot be read ({error})") from error
        if not matches:
            raise UsageError(f"--image_path {argument}: no such file or folder")
    if not len(images):
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it ({images.ignored:,} other files ignored)")
    return images


def _deep_glob(pattern: str) -> list[str]:
    """Files that a glob with ** names; glob.glob would list one anew for each way that a circle of links leads to it."""
    base, _, rest = pattern.partition("**")
    roots = glob.glob(base) if base else ["."]
    if not rest.strip("/*"):
        return sorted(roots)
    found = {os.path.normpath(path) for root in roots for path in inference.walk_files(root)}
    return sorted(path for path in found if PurePath(path).match(rest.strip("/")))


def _list_given(images: ImageList, path: str) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        _list_folder(images, path)
    elif path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UsageError(
            f"--image_path {path}: a compressed tar cannot be read out of order; unpack it, or make it a plain .tar"
        )
    elif suffix not in (".txt", ".tar"):
        images.append(path)
    elif not os.path.isfile(path):  # a pipe would be waited for
        raise UsageError(f"--image_path {path}: not a regular file")
    elif suffix == ".tar":
        _list_tar(images, path)
    else:
        _list_lines(images, path)


def _list_folder(images: ImageList, folder: str) -> None:
    for path in inference.walk_files(folder):
        if path.lower().endswith(".tar") and os.path.isfile(path):
            _list_tar(images, path)
        elif inference.is_image_name(path):
            images.append(path)
        else:
            images.ignored += 1


def _list_lines(images: ImageList, path: str) -> None:
    members: dict[str, array] = defaultdict(lambda: array("q"))  # places by tar, each of which is read once, at the end
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
        for line in lines:
            name = line.rstrip("\r\n")
            tar = name.partition(".tar/")[0] + ".tar"
            if name.lower().endswith(".tar") and os.path.isfile(name):
                _list_tar(images, name)
            elif ".tar/" in name and (tar in members or os.path.isfile(tar)):
                members[tar].append(len(images))
                images.append(name, tar)
            elif name.strip():
                images.append(name)
    for tar, places in members.items():
        found = {info.name: spans for info, spans in _members(tar)}
        for place in places:
            member = images[place].name[len(tar) + 1 :]
            if not found.get(member):
                raise UsageError(f"{path}: {tar} has no member {member}, or it is a link or sparse")
            images.locate(place, *found[member])


def _list_tar(images: ImageList, path: str) -> None:
    refused = []
    for info, spans in _members(path):
        if not inference.is_image_name(info.name):
            images.ignored += not info.name.lower().endswith((".json", ".txt"))
        elif spans:
            images.append(f"{path}/{info.name}", path)
            images.locate(len(images) - 1, *spans)
        else:
            images.ignored += 1
            refused.append(info.name)
    if refused:
        log.warning(f"{path}: {len(refused):,} images that are links or sparse are ignored ({refused[0]} ...); unpack the tar")


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, tuple[Span, ...]]]:
    """Members but folders, each with where it, its json and its txt lie (by its stem); () for links and the like."""

    def stem(info: tarfile.TarInfo) -> tuple[str, str]:  # as webdataset has it
        folder, _, name = info.name.rpartition("/")
        return folder, name.partition(".")[0]

    for _, group in itertools.groupby(_headers(path), key=stem):
        infos = [(info, info.isreg() and not info.issparse()) for info in group if not info.isdir()]
        spans = {os.path.splitext(info.name)[1].lower(): (info.offset_data, info.size) for info, plain in infos if plain}
        texts = spans.get(".json", NOWHERE), spans.get(".txt", NOWHERE)
        yield from ((info, ((info.offset_data, info.size), *texts) if plain else ()) for info, plain in infos)


def _headers(path: str) -> Iterator[tarfile.TarInfo]:
    """All headers of a tar. Raises UsageError naming it where it is damaged: tarfile takes most damage for the end."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or a tar of millions of members stays in memory
                yield info
            end = tar.offset  # type: ignore[attr-defined]
        with open(path, "rb") as file:
            file.seek(end)
            rest = file.read(512)
            if len(rest) < 512:
                raise tarfile.ReadError("it is cut: the block that ends an archive is missing")
            while rest:
                if rest.strip(b"\0"):
                    raise tarfile.ReadError(f"a damaged header at byte {end:,}")
                rest = file.read(1 << 20)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: not a whole tar ({error}); fetch it again") from error


# --- decoding, in processes of its own -------------------------------------------------------------------------------


class Failure(NamedTuple):
    """An image without features. `lost` is the folder (or tar) that is not there either, "" where it is."""

    place: int
    name: str
    reason: str
    lost: str = ""


@dataclass
class Batch:
    """What a worker returns: crops uint8 [n, H, W, 3] of the places from `first` on, black where an image failed."""

    first: int
    crops: Any
    failures: list[Failure] = field(default_factory=list)
    unreadable: str = ""
    folders: set[str] = field(default_factory=set)  # that gave an image
    stats: list[Span] = field(default_factory=list)  # size and mtime of each file
    texts: list[dict[str, str]] = field(default_factory=list)

    def pin_memory(self) -> Batch:  # DataLoader's thread calls it
        self.crops = torch.as_tensor(self.crops).pin_memory()
        return self


class _Crops:
    """Makes batches in DataLoader's workers. It knows no paths: the sampler sends them, so that no worker holds the list."""

    def __init__(self, preprocess: Preprocess, shares: bool) -> None:
        self.preprocess, self.shares = preprocess, shares

    def __getitem__(self, keys: list[ImageKey]) -> Batch:
        size = self.preprocess.image_size
        crops = np.zeros((len(keys), size, size, 3), np.uint8)
        batch = Batch(keys[0].index, torch.from_numpy(crops) if self.shares else crops)
        for row, key in enumerate(keys):
            batch.stats.append(size_and_mtime(key))
            batch.texts.append({})
            try:
                crops[row] = read_crop(key, self.preprocess)
                batch.texts[-1] |= read_texts(key)
                batch.folders.add(key.folder)
            except BadImage as error:
                if isinstance(error.__cause__, MemoryError):
                    batch.unreadable = f"{key.name}: not enough memory to decode it"
                    break
                batch.failures.append(Failure(key.index, key.name, str(error), _lost_folder(key, error)))
            except Unreadable as error:
                batch.unreadable = str(error)
                break
        return batch


def read_crop(key: ImageKey, preprocess: Preprocess) -> np.ndarray:
    """Read, decode, resize and crop one image: uint8 [image_size, image_size, 3]. Raises BadImage or Unreadable."""
    return inference.crop_uint8(inference.decode(inference.read_bytes(key.file, key.offset, key.size)), preprocess)


def _lost_folder(key: ImageKey, error: BadImage) -> str:
    """The folder of a file that was not found, where that is gone too, or empty as a mount point is without its disk."""
    if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
        return ""
    try:
        with os.scandir(key.folder) as entries:
            return "" if next(entries, None) else key.folder
    except OSError:
        return key.folder


def size_and_mtime(key: ImageKey) -> Span:
    """Of a member of a tar its size and 0: the tar may grow."""
    if key.size >= 0:
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


def decoding_loader(model: LoadedModel, batches: KeyBatches, num_workers: int | None) -> Iterator[Batch]:
    """Gives a Batch for each list of keys, decoded in `num_workers` processes (None: by the cores there are).

    Raises UsageError where a worker is lost, or where no batch comes for LOADER_TIMEOUT_S.
    """
    size = model.preprocess.image_size
    if num_workers is None:
        num_workers = default_num_workers(model.device, batches.batch_size, size)
    loader = torch.utils.data.DataLoader(
        _Crops(model.preprocess, shares_memory(num_workers, batches.batch_size * size * size * 3)),
        batch_size=None,  # the sampler gives whole batches
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=inference.can_pin_memory(model.device),
        timeout=2 if num_workers else 0,  # it looks whether its workers live each time
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until workers have their own handlers
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if num_workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises a dead worker's error in whatever runs
    while (batch := _next_batch(iterator, num_workers)) is not None:
        yield batch


def _next_batch(iterator: Iterator[Batch], num_workers: int) -> Batch | None:
    deadline = time.monotonic() + LOADER_TIMEOUT_S
    while num_workers:
        try:
            return next(iterator, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if str(error).startswith("Caught"):  # an error in the worker's own code
                raise
            if "DataLoader timed out" not in str(error) or time.monotonic() > deadline:
                reason = f"most likely for lack of memory ({inference.first_line(error)}); use a smaller --num_workers"
                raise UsageError(f"a decoding worker was lost, {reason}") from error
    return next(iterator, None)


def default_num_workers(device: Device, batch_size: int, image_size: int) -> int:
    """Enough processes to keep up with the device, and no more than QUEUE_BYTES of batches waiting in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= rank_of("LOCAL_WORLD_SIZE", 1)
    workers = cores // 4 if device.kind == "cpu" else min(16, cores - 1)
    return max(1, min(workers, QUEUE_BYTES // (3 * batch_size * image_size * image_size * 3)))


def shares_memory(num_workers: int, batch_bytes: int) -> bool:
    """Whether /dev/shm has room for the batches that wait there, those of all ranks of this host (a container may have 64 MiB).

    Else they come through pipes, which takes longer and needs no room: a worker that finds none is waited for in vain.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return False
    waiting = 4 * num_workers * batch_bytes * rank_of("LOCAL_WORLD_SIZE", 1)  # two for each worker, and those in other hands
    if waiting > free:
        log.info(f"/dev/shm has {gigabytes(free)} of the {gigabytes(waiting)} that batches may take: they go through pipes")
    return waiting <= free


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(_worker: int) -> None:
    # Signals reach every process of a terminal or a job; the main process alone answers, and its workers end with it.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """Which images, in parts of how many, and what is written where: part first_part + k has places k * part_size and on, and a
    row's index is its place plus first_index. made_with and made_from are written into each part."""

    images: ImageList
    folder: Path
    part_size: int
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    first_index: int = 0
    first_part: int = 0
    made_with: str = ""
    made_from: str = ""

    @property
    def parts(self) -> range:
        return range(self.first_part, self.first_part - (-len(self.images) // self.part_size))

    def places(self, part: int) -> range:
        start = (part - self.first_part) * self.part_size
        return range(start, min(start + self.part_size, len(self.images)))

    def part_of(self, place: int) -> int:
        return self.first_part + place // self.part_size

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    def unfinished(self) -> list[int]:
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [part for part in self.parts if self.path(part).name not in there]

    def how_to_go_on(self) -> str:
        finished = len(self.parts) - len(self.unfinished())
        return f"{finished} of {len(self.parts)} parts are finished in {self.folder}; run the same command again to go on"

    @property
    def bytes_per_image(self) -> float:
        values = sum(math.prod(shape) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize
        return values + 24 + self.images.mean_name_bytes  # index, size, mtime; names are compressed


class _Rows:
    """The rows of one part while it is being filled."""

    def __init__(self, bulk: Bulk, part: int) -> None:
        self.bulk, self.part, self.places = bulk, part, bulk.places(part)
        self.values = {name: np.zeros((len(self.places), *shape), bulk.dtype) for name, shape in bulk.shapes.items()}
        self.failures: list[Failure] = []
        self.stats: list[Span] = []
        self.texts: list[dict[str, str]] = []

    def add(self, batch: Batch, features: dict[str, np.ndarray]) -> int:
        """Add a batch; returns how many of its images failed."""
        start = batch.first - self.places.start
        failures = {failure.place: failure for failure in batch.failures}
        for row in np.flatnonzero(~features["finite"]):
            place = batch.first + int(row)
            failures.setdefault(place, Failure(place, self.bulk.images[place].name, "its features hold NaN or Inf"))
        for name, values in self.values.items():
            values[start : start + len(batch.crops)] = features[name]
        self.failures += [failures[place] for place in sorted(failures)]
        self.stats += batch.stats
        self.texts += batch.texts
        return len(failures)

    def arrays(self) -> dict[str, np.ndarray]:
        """What the part's file holds: a row for each image that has features, and the failures beside."""
        failed = np.array([failure.place for failure in self.failures], np.int64)
        places = np.setdiff1d(np.arange(self.places.start, self.places.stop), failed)
        rows = places - self.places.start
        stats = np.array(self.stats, np.int64)[rows]
        texts = TEXTS if self.bulk.images.has_texts else ()
        return {
            "index": places + self.bulk.first_index,
            "path": np.array([self.bulk.images[place].name for place in places], dtype=str),
            **{name: np.array([self.texts[row].get(name, "") for row in rows], dtype=str) for name in texts},
            **{name: values[rows] for name, values in self.values.items()},
            "size": stats[:, 0],
            "mtime": stats[:, 1],
            "failed_index": failed + self.bulk.first_index,
            "failed_path": np.array([failure.name for failure in self.failures], dtype=str),
            "failed_reason": np.array([failure.reason for failure in self.failures], dtype=str),
            "made_with": np.array(self.bulk.made_with),
            "made_from": np.array(self.bulk.made_from),
        }


def write_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a part as .npz and clear away what a killed run left of it. Text is compressed: numpy pads it to the longest."""
    with inference.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED if values.dtype.kind == "U" else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def read_part(path: Path, *names: str) -> list[np.ndarray] | None:
    """Arrays of a part. One that is damaged or none of ours is named and put aside: None."""
    damage = (ValueError, KeyError, EOFError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except damage as error:
        put_aside(path, f"damaged ({inference.first_line(error)})")
        return None


def put_aside(path: Path, why: str) -> None:
    os.replace(path, f"{path}.damaged")
    log.warning(f"{path} is {why}: put aside as {path.name}.damaged, and made again")


# --- one run at a time in a folder -----------------------------------------------------------------------------------


class FolderLock:
    """Lets the ranks of one run share a folder and keeps strangers out. A POSIX lock: it dies with its process, and decoding
    workers do not inherit it. In the file stand the run's name and the ranks that have done their share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.ranks, self.run = which_rank()
        self.lockable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"--output {folder}: the folder cannot be made or written ({error.strerror})") from error

    def __enter__(self) -> FolderLock:
        for _ in range(10):
            if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) and self._lines()[0] != self.run:
                os.ftruncate(self.file, 0)
                os.write(self.file, f"{self.run}\n".encode())
            if self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB) and self._lines()[0] == self.run:
                return self
            self._lock(fcntl.LOCK_UN)
            time.sleep(0.1)  # perhaps another rank was just taking it
        raise UsageError(f"--output {self.folder}: another run ({self._lines()[0]}) writes to it; wait, or use another folder")

    def __exit__(self, *_error: object) -> None:
        os.close(self.file)

    def _lock(self, how: int, byte: int = 0) -> bool:
        try:
            if self.lockable:
                fcntl.lockf(self.file, how, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self.lockable = False
            log.warning(f"{self.folder}: no locks there ({error.strerror}); see to it that no other run writes to it")
        return True

    def _lines(self) -> list[str]:
        return os.pread(self.file, 1 << 20, 0).decode(errors="replace").splitlines() or [""]

    @contextmanager
    def one_rank_at_a_time(self) -> Iterator[None]:
        self._lock(fcntl.LOCK_EX, byte=1)
        yield
        self._lock(fcntl.LOCK_UN, byte=1)

    def check_folder(self) -> None:
        """Raises UsageError if the folder is not there any more."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(self.file)):
                return
        raise UsageError(f"--output {self.folder}: it was deleted, moved or unmounted during the run")

    def mark_done(self) -> None:
        os.write(self.file, f"rank {self.rank} is done\n".encode())

    def wait_for_others(self) -> None:
        """Wait until all ranks have done their share, or no other has been there for two minutes."""
        others_seen = time.monotonic()
        while len(set(self._lines()[1:])) < self.ranks and time.monotonic() < others_seen + 120:
            if not self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
                others_seen = time.monotonic()
            self._lock(fcntl.LOCK_SH)
            time.sleep(0.5)


def which_rank() -> tuple[int, int, str]:
    """Rank, number of ranks, and a name of the run: the same for all its ranks and for nobody else.

    Raises UsageError where the environment has only one of RANK and WORLD_SIZE, or they make no sense.
    """
    get, rank, ranks = os.environ.get, rank_of("RANK", 0), rank_of("WORLD_SIZE", 1)
    if bool(get("RANK")) != bool(get("WORLD_SIZE")) or rank >= ranks:
        found = f"RANK={get('RANK', '')} and WORLD_SIZE={get('WORLD_SIZE', '')}"
        raise UsageError(f"the environment has {found}: unset both, or start with torchrun, which sets RANK below WORLD_SIZE")
    if ranks == 1:
        return rank, ranks, f"process {os.getpid()} on {platform.node()}, {uuid.uuid4().hex[:8]}"
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")
    host = platform.node() if get("LOCAL_WORLD_SIZE") == get("WORLD_SIZE") else ""
    return rank, ranks, " ".join(["ranks", *(get(name, "") for name in names), host])


def make_manifest(args: Namespace, model: LoadedModel, shapes: dict[str, tuple[int, ...]], part_size: int) -> dict[str, Any]:
    """What makes the features. All of `made_from` must be the same for a run to go on; the rest tells who began it."""
    about = inference.provenance(args, model)
    made_from = {"device": model.device.kind, "dtype": model.dtype_name, "image_size": model.preprocess.image_size}
    made_from |= {"part_size": part_size, "features": shapes, "feature_dtype": args.feature_dtype}
    fitting = ("allow_hf32", "deterministic", "levers", "model", "dimensions", "preprocess", "pooler", "weights")
    made_from |= {name: about.pop(name) for name in fitting}
    about["weights_path"] = made_from["weights"].pop("path", None)
    return json.loads(json.dumps({"made_from": made_from, "rounds": []} | about))


def agree_on_round(
    args: Namespace, images: ImageList, lock: FolderLock, manifest: dict[str, Any]
) -> tuple[ImageList, int, int]:
    """The images to do with their first index and first part: the last round's in manifest.json, or a new round's.

    Raises UsageError saying what does not fit.
    """
    folder, path = lock.folder, lock.folder / "manifest.json"
    if path.exists():
        manifest = _check_manifest(folder, inference.read_json(path, "the manifest"), manifest)
    elif any(folder.glob("part-*.npz")):
        raise UsageError(f"--output {folder}: it holds parts but no manifest.json; use an empty or new folder")
    wanted, rounds = images, manifest["rounds"]
    last = rounds[-1] if rounds else {"first_index": 0, "first_part": 0, "images": 0, "parts": 0}
    start, part = last["first_index"] + last["images"], last["first_part"] + last["parts"]
    if rounds:
        wanted = wanted_images(args, images, folder, last["first_part"])
        names = {f"part-{number:05d}.npz" for number in range(last["first_part"], part)}
        to_retry = args.retry_failed and names <= set(os.listdir(folder)) and last["run"] != lock.run
        if wanted.sha256() == last["image_list_sha256"] and not to_retry:
            last["run"] = lock.run
            inference.write_json(path, manifest)
            return wanted, last["first_index"], last["first_part"]
        if last["run"] == lock.run or not (args.add or args.retry_failed):
            raise UsageError(
                f"--output {folder}: begun with another list of images ({last['images']:,}, now {len(images):,}); --add takes "
                "those that no part holds; or repeat the first command (manifest.json has it), or use another folder"
            )
        wanted = wanted_images(args, images, folder, part)
    if len(wanted):
        made = {"first_index": start, "first_part": part, "images": len(wanted), "image_list_sha256": wanted.sha256()}
        made |= {"parts": -(-len(wanted) // manifest["made_from"]["part_size"]), "run": lock.run}
        rounds.append(made | {"command": inference.command_line(), "time_utc": inference.utc_now()})
        inference.write_json(path, manifest)
    return wanted, start, part


def _check_manifest(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    for name, value in now["made_from"].items():
        before = begun.get("made_from", {}).get(name)
        if before != value:
            texts = [text if len(text) <= 200 else text[:197] + "..." for text in map(json.dumps, (before, value))]
            raise UsageError(
                f"--output {folder}: begun with another {name} ({texts[0]}, now {texts[1]}); repeat the first command "
                "(manifest.json has it) or use another folder"
            )
    return begun


def wanted_images(args: Namespace, images: ImageList, folder: Path, before: int) -> ImageList:
    """Those of `images` that --add and --retry_failed ask for, given the parts numbered below `before`. Names changed files."""
    if not before and not args.retry_failed:
        return images
    none = np.empty(0, np.uint64)
    held, failed, states = [none], [none], [none]
    for part in range(before):
        path = folder / f"part-{part:05d}.npz"
        found = read_part(path, "path", "failed_path", "size", "mtime") if path.exists() else None
        if found is not None:
            held.append(_digests(found[0]))
            failed.append(_digests(found[1]))
            states.append(_digests(map("{}\0{}\0{}".format, found[0], *found[2:])))
    mine = _digests(key.name for key in images)
    is_held = np.isin(mine, np.concatenate(held))
    is_failed = np.isin(mine, np.concatenate(failed)) & ~is_held
    there = np.flatnonzero(is_held)
    now = _digests("{}\0{}\0{}".format(images[place].name, *size_and_mtime(images[place])) for place in there)
    changed = [images[place].name for place in there[~np.isin(now, np.concatenate(states))]]
    if changed:
        log.warning(f"{len(changed):,} files have changed since their rows were made, which stay: {', '.join(changed[:5])}")
    wanted = is_failed if args.retry_failed else np.zeros(len(images), bool)
    return images.subset(np.flatnonzero(wanted | ~is_held & ~is_failed if args.add else wanted))


def _digests(names: Iterable[str]) -> np.ndarray:
    """A number for each name: ten million names themselves would fill the memory."""
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(value, "little") for value in hashes), np.uint64)


# --- the run ---------------------------------------------------------------------------------------------------------


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


def embed(args: Namespace, images: ImageList, model: LoadedModel) -> int:
    """Write the parts that args.output lacks, or this rank's share of them. Returns the exit code."""
    with FolderLock(Path(args.output)) as lock:
        with lock.one_rank_at_a_time():
            bulk = plan(args, images, model, lock)
        stopping.last_words = f"stopped; {bulk.how_to_go_on()}"
        batches = KeyBatches(bulk, my_share(bulk, lock), args.batch_size or inference.default_batch_size(model.device))
        check_disk(bulk)
        encoder = Encoder(model, tuple(bulk.shapes), batches.batch_size, args.execution, bulk.dtype)
        workers = args.num_workers
        if workers is None:
            workers = default_num_workers(model.device, batches.batch_size, model.preprocess.image_size)
        log.info(
            f"Rank {lock.rank} of {lock.ranks}: {len(batches.parts)} of {len(bulk.parts)} parts to do; batch size "
            f"{batches.batch_size}, {workers} decoding workers, {args.execution}"
        )
        started = time.perf_counter()
        try:
            totals = encode_parts(lock, encoder, decoding_loader(model, batches, workers), batches)
            return finish(lock, batches, totals, time.perf_counter() - started)
        except UsageError as error:
            raise UsageError(f"{error}; {bulk.how_to_go_on()}") from error


def plan(args: Namespace, images: ImageList, model: LoadedModel, lock: FolderLock) -> Bulk:
    """Work out what the parts hold. A part waits in memory until it is full: hence fewer images where features are large."""
    width = model.module.config.hidden_size
    patches = (model.preprocess.image_size // model.module.config.patch_size) ** 2
    names = inference.names_to_save(args, model)
    shapes = {name: (patches, width) if name == "patch_tokens" else (width,) for name in names}
    row_bytes = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(args.feature_dtype).itemsize
    part_size = args.part_size or max(1, min(10_000, (1 << 28) // row_bytes))
    manifest = make_manifest(args, model, shapes, part_size)
    images, first_index, first_part = agree_on_round(args, images, lock, manifest)
    made_from = hashlib.sha256(json.dumps(manifest["made_from"], sort_keys=True).encode()).hexdigest()
    made_with = json.dumps(manifest["versions"] | {"device": model.device.name})
    return Bulk(images, lock.folder, part_size, shapes, args.feature_dtype, first_index, first_part, made_with, made_from)


def my_share(bulk: Bulk, lock: FolderLock) -> list[int]:
    """The parts that this rank has to do. One that is there but is not whole, or not of this run, is to be made again."""
    unfinished, share = set(bulk.unfinished()), []
    for part in bulk.parts[lock.rank :: lock.ranks]:
        if part not in unfinished:
            found = read_part(bulk.path(part), "index", "failed_index", "made_from")
            if found is not None:
                indices = np.sort(np.concatenate(found[:2])) - bulk.first_index
                if found[2] == bulk.made_from and np.array_equal(indices, bulk.places(part)):
                    continue
                put_aside(bulk.path(part), "of another run")
        share.append(part)
    return share


def encode_parts(lock: FolderLock, encoder: Encoder, loader: Iterator[Batch], batches: KeyBatches) -> Totals:
    """Run all batches through the encoder; write each part when it is full. Raises UsageError if a part cannot be written."""
    totals, bulk = Totals(), batches.bulk
    progress = log_progress(totals, sum(len(bulk.places(part)) for part in batches.parts))
    rows: _Rows | None = None
    full: list[_Rows] = []
    writing: list[Future] = []
    delivered: set[str] = set()
    lost = 0

    def write_full() -> None:
        with totals.waiting_for("writing"):
            while full:
                if writing:
                    writing.pop().result()
                writing.append(pool.submit(_finish_part, lock, full.pop(0)))

    with ThreadPoolExecutor(1) as pool:
        for batch, features in _one_ahead(loader, encoder, batches, totals):
            if features is None:
                rows = None
                continue
            lost = count_lost(batch, delivered, lost)
            rows = rows or _Rows(bulk, bulk.part_of(batch.first))
            totals.failed += rows.add(batch, features)
            totals.images += len(batch.crops)
            next(progress)
            if len(rows.stats) == len(rows.places):
                full.append(rows)
                rows = None
            if not lost:  # else a disk may be gone, and these are no failures
                write_full()
        write_full()
        with totals.waiting_for("writing"):
            if writing:
                writing.pop().result()
    return totals


def count_lost(batch: Batch, delivered: set[str], lost: int) -> int:
    """How many images in a row, up to the end of `batch`, are not there and their folder neither.

    Raises UsageError where they are too many for wrong lines in a list, or their folder gave images before.
    """
    delivered |= batch.folders
    gone = {failure.place: failure.lost for failure in batch.failures if failure.lost}
    for place in range(batch.first, batch.first + len(batch.crops)):
        lost = lost + 1 if place in gone else 0
        if lost >= LOST_AFTER or gone.get(place) in delivered:
            raise UsageError(f"{gone[place]} is gone or empty, a lost disk or mount ({lost} images in a row are not there)")
    return lost


def _finish_part(lock: FolderLock, rows: _Rows) -> None:
    lock.check_folder()
    try:
        write_part(rows.bulk.path(rows.part), rows.arrays())
    finally:
        lock.check_folder()  # a folder that goes meanwhile says more than what could not be written
    stopping.last_words = f"stopped; {rows.bulk.how_to_go_on()}"


def _one_ahead(
    loader: Iterator[Batch], encoder: Encoder, batches: KeyBatches, totals: Totals
) -> Iterator[tuple[Batch, dict[str, np.ndarray] | None]]:
    """Batches with their features, each fetched from the device only after the next one is queued there; None for the features
    of a part that is given up."""
    part_of, given_up = batches.bulk.part_of, batches.given_up
    previous: tuple[Batch, Callable[[], dict[str, np.ndarray]] | None] | None = None
    while True:
        with totals.waiting_for("reading"):
            batch = next(loader, None)
        if batch is not None and batch.unreadable and part_of(batch.first) not in given_up:
            given_up[part_of(batch.first)] = batch.unreadable
            log.error(f"Part {part_of(batch.first)} is left unwritten: {batch.unreadable}")
        with totals.waiting_for("computing"):
            wanted = batch is not None and part_of(batch.first) not in given_up
            fetch = encoder.submit(torch.as_tensor(batch.crops)) if wanted else None
            features = previous[1]() if previous is not None and previous[1] is not None else None
        if previous is not None:
            yield previous[0], features if part_of(previous[0].first) not in given_up else None
        if batch is None:
            return
        previous = (batch, fetch)


def log_progress(totals: Totals, total: int) -> Iterator[None]:
    """Logs, every half minute at most, how far the run is; advance it after each batch."""
    started = last = time.monotonic()
    while True:
        now = time.monotonic()
        if now - last > 30:
            last, rate = now, totals.images / (now - started)
            left = timedelta(seconds=round((total - totals.images) / rate))
            log.info(f"{totals.images:,} of {total:,} images, {rate:.1f} img/s, {left} left, {totals.failed:,} failed")
        yield


def finish(lock: FolderLock, batches: KeyBatches, totals: Totals, seconds: float) -> int:
    """Write failures.jsonl once all parts are there, and say how the run went. Returns the exit code."""
    bulk = batches.bulk
    lock.check_folder()
    if not bulk.unfinished():
        with lock.one_rank_at_a_time():
            failures = write_failures(bulk)
        log.info(f"All {len(bulk.parts)} parts are in {bulk.folder}; {failures:,} images failed (failures.jsonl)")
    waited = ", ".join(f"{stage} {value:.1f} s" for stage, value in totals.waited.items())
    rate = totals.images / seconds
    log.info(f"{totals.images:,} images in {seconds:.1f} s: {rate:.2f} img/s, {totals.failed:,} failed; waited for {waited}")
    lock.mark_done()
    useless = totals.images > 0 and totals.failed == totals.images
    if batches.given_up or useless:
        lock.wait_for_others()
    if batches.given_up:
        raise UsageError(f"{len(batches.given_up)} parts are left unwritten because files could not be read")
    if useless:
        raise UsageError("not one of these images gave features: see failures.jsonl or the log for the reasons")
    return 0


def write_failures(bulk: Bulk) -> int:
    """Gather the failures of all parts, but for what a later part holds, in failures.jsonl; returns how many there are."""
    failures: dict[str, dict[str, Any]] = {}
    makers: dict[str, str] = {}
    for path in sorted(bulk.folder.glob("part-*.npz")):
        found = read_part(path, "path", "failed_index", "failed_path", "failed_reason", "made_with")
        if found is None:
            raise UsageError(f"{path.name} was damaged")
        names, *failed, made_with = (values.tolist() for values in found)
        makers.setdefault(made_with, path.name)
        for name in failures.keys() & set(names) if failures else ():
            del failures[name]
        failures |= {name: {"index": index, "path": name, "reason": reason} for index, name, reason in zip(*failed)}
    with inference.replacing(bulk.folder / "failures.jsonl") as file:
        file.write("".join(json.dumps(failure) + "\n" for failure in failures.values()).encode())
    if len(makers) > 1:
        listed = "; ".join(f"from {name}: {made_with}" for made_with, name in makers.items())
        log.warning(f"The parts were not all made with the same versions and device: {listed}")
    return len(failures)


def check_disk(bulk: Bulk) -> None:
    """Log what the unfinished parts will need. Raises UsageError where the disk has less."""
    unfinished = bulk.unfinished()
    needed = bulk.bytes_per_image * sum(len(bulk.places(part)) for part in unfinished)
    free = shutil.disk_usage(bulk.folder).free
    log.info(f"Output: {len(unfinished)} parts to write, {gigabytes(needed)} needed, {gigabytes(free)} free in {bulk.folder}")
    if needed > free:
        advice = "make room, save less, or use --feature_dtype float16"
        raise UsageError(f"--output {bulk.folder}: {gigabytes(needed)} needed and {gigabytes(free)} free; {advice}")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


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
