"""WebSSL-MAE-300M: turn any number of photos into features, in parts, on an Ascend NPU, a GPU or the CPU.

    python embed.py --image_path photos/ --output features/ --device npu --dtype float16
    python embed.py --image_path photos/ --output features/ --add
    torchrun --nproc_per_node 8 embed.py --image_path shards/ --output features/ --device npu

--image_path takes images, folders, globs, .txt lists of paths (tar/member too) and plain .tar files. Each part-NNNNN.npz holds
rows: index, path, features, size and mtime of the file, and of img2dataset's tars caption, url and key; failures stand beside
them (failed_index, failed_path, failed_reason) and together in failures.jsonl. manifest.json says what made the parts. The
same command goes on where a run stopped, whatever stopped it. --add takes paths that no part holds, --retry_failed the failed
ones again, both into further parts: a row keeps its index for ever. One run at a time writes to a folder.

A part with a file that the disk or the network does not give is left unwritten. The run goes on with the others and ends with
exit code 2; under torchrun such a rank first waits until every other rank has done its share, so that torchrun, which ends or
restarts all ranks when one fails, finds nothing left to interrupt.

Exit codes: 0 done; 2 wrong usage, unusable input or parts left unwritten; 3 BLOCKED: the device that was asked for cannot be
used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import fnmatch
import glob
import hashlib
import io
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import inference
import numpy as np
from inference import BadImage, Device, Encoder, LoadedModel, Preprocess, Unreadable, UsageError, log, rank_of, stopping, torch

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXTS = ("caption", "url", "key")
TEXT_LIMIT = 4000  # characters of a caption: a part's column is as wide as its longest text
LOST_AFTER = 100  # paths in a row whose folder is not there: a lost mount, not wrong lines
LOADER_TIMEOUT_S = 1800  # for one batch: nothing waits for ever
QUEUE_BYTES = 4 << 30  # decoded batches that a process lets wait in memory

Span = tuple[int, int]  # offset and size within a file


# --- listing ---------------------------------------------------------------------------------------------------------


class ImageKey(NamedTuple):
    """One image: its place in the list, its name, where its bytes are (a file, or a stretch of a tar), and texts beside it."""

    index: int
    name: str
    file: str
    offset: int = 0
    size: int = -1
    json: Span = (0, 0)
    txt: Span = (0, 0)

    @property
    def folder(self) -> str:
        """What must be there for the image to be there: its folder, or its tar."""
        return os.path.dirname(self.file) or "." if self.size < 0 else self.file


class ImageList:
    """Names of any number of images, in order, in about 32 bytes an image more than the names themselves."""

    def __init__(self) -> None:
        self.ignored = 0
        self._names = bytearray()
        self._ends = array("q", [0])
        self._file_lengths = array("q")  # how much of the name is the path of the file: all of it, but for a member of a tar
        self._spans = {"image": array("q"), "json": array("q"), "txt": array("q")}  # two numbers an image; texts only where any

    def append(self, name: str, file: str | None = None) -> None:
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._file_lengths.append(len(os.fsencode(name if file is None else file)))
        self._spans["image"].extend((0, -1))

    def place(self, index: int, image: Span, json: Span, txt: Span) -> None:
        """Say where in its tar an image lies, and its texts ((0, 0): it has none)."""
        for kind, span in (("image", image), ("json", json), ("txt", txt)):
            if span != (0, 0):
                spans = self._spans[kind]
                spans.frombytes(bytes(8 * max(0, 2 * index + 2 - len(spans))))
                spans[2 * index : 2 * index + 2] = array("q", span)

    def __len__(self) -> int:
        return len(self._file_lengths)

    def __getitem__(self, index: int) -> ImageKey:
        name = bytes(self._names[self._ends[index] : self._ends[index + 1]])
        file = name[: self._file_lengths[index]]
        image, json, txt = (tuple(spans[2 * index : 2 * index + 2]) or (0, 0) for spans in self._spans.values())
        return ImageKey(index, os.fsdecode(name), os.fsdecode(file), *image, json, txt)

    def subset(self, places: Iterable[int]) -> ImageList:
        """Some of the images, as a list of their own."""
        chosen = ImageList()
        for index, key in enumerate(self[place] for place in places):
            chosen.append(key.name, key.file)
            chosen.place(index, (key.offset, key.size), key.json, key.txt)
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
        before = len(images) + images.ignored
        try:
            if os.path.exists(argument):
                _list_given(images, argument)
            elif "**" in argument:
                _list_deep(images, argument)
            elif glob.has_magic(argument):
                for match in sorted(glob.glob(argument)):
                    _list_given(images, match)
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--image_path {argument}: cannot be read ({error})") from error
        if len(images) + images.ignored == before and not os.path.exists(argument):
            raise UsageError(f"--image_path {argument}: no such file or folder")
    if not len(images):
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it ({images.ignored:,} other files ignored)")
    return images


def _list_given(images: ImageList, path: str) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        for found in inference.walk_files(path):
            _list_found(images, found)
    elif path.lower().endswith(COMPRESSED):
        raise UsageError(
            f"--image_path {path}: a compressed tar cannot be read out of order; unpack it or make it a plain .tar"
        )
    elif suffix not in (".txt", ".tar"):
        images.append(path)
    elif not os.path.isfile(path):
        raise UsageError(f"--image_path {path}: not a regular file")
    elif suffix == ".tar":
        _list_tar(images, path)
    else:
        _list_lines(images, path)


def _list_found(images: ImageList, path: str) -> None:
    if path.lower().endswith(".tar") and os.path.isfile(path):
        _list_tar(images, path)
    elif inference.is_image_name(path):
        images.append(path)
    else:
        images.ignored += 1


def _list_deep(images: ImageList, pattern: str) -> None:
    """A glob with **: glob.glob would list a file once for each way that a loop of links leads to it."""
    base, _, rest = pattern.partition("**")
    wanted = ("**" + rest).split("/")
    hidden = any(part.startswith(".") for part in wanted)
    folder, name = os.path.split(base)  # "photos/a**" has a name before the stars
    wanted[0] = name + wanted[0]
    for root in sorted(glob.glob(folder)) if folder else ["."]:
        for path in inference.walk_files(root):
            parts = os.path.relpath(path, root).split(os.sep)
            if not hidden and any(part.startswith(".") for part in parts):
                continue
            path = path if folder else os.path.relpath(path)
            if wanted[-1] != "**" and _matches(parts, wanted):
                _list_given(images, path)
            elif (
                any(_matches(parts[:depth], wanted) for depth in range(len(parts)))
                or wanted[-1] == "**"
                and _matches(parts, wanted)
            ):
                _list_found(images, path)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _list_lines(images: ImageList, path: str) -> None:
    members: dict[str, array] = defaultdict(lambda: array("q"))  # of each tar; looked up at the end, so that each is read once
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
        for line in lines:
            name = line.rstrip("\r\n")
            stem, separator, _ = name.partition(".tar/")
            tar = f"{stem}.tar"
            if name.lower().endswith(".tar") and os.path.isfile(name):
                _list_tar(images, name)
            elif separator and (tar in members or os.path.isfile(tar)):
                members[tar].append(len(images))
                images.append(name, tar)
            elif name.strip():
                images.append(name)
    for tar, places in members.items():
        found = {info.name: (info, beside) for info, beside in _members(tar) if info is not None}
        for place in places:
            member = images[place].name[len(tar) + 1 :]
            if member not in found or not _is_plain(found[member][0]):
                raise UsageError(f"{path}: {tar} has no member {member}" + (" that is a plain file" if member in found else ""))
            _place(images, place, *found[member])


def _list_tar(images: ImageList, path: str) -> None:
    odd = []
    for info, beside in _members(path):
        if not inference.is_image_name(info.name):
            images.ignored += not _is_text(info, beside)
        elif _is_plain(info):
            images.append(f"{path}/{info.name}", path)
            _place(images, len(images) - 1, info, beside)
        else:
            images.ignored += 1
            odd.append(info.name)
    if odd:
        log.warning(f"{path}: {len(odd):,} links or sparse members are ignored ({odd[0]} ...); unpack the tar to have them")


def _place(images: ImageList, place: int, info: tarfile.TarInfo, beside: dict[str, tarfile.TarInfo]) -> None:
    json, txt = ((beside[kind].offset_data, beside[kind].size) if kind in beside else (0, 0) for kind in (".json", ".txt"))
    images.place(place, (info.offset_data, info.size), json, txt)


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


def _is_text(info: tarfile.TarInfo, beside: dict[str, tarfile.TarInfo]) -> bool:
    """Whether a member is carried along with an image."""
    return info in beside.values() and any(inference.is_image_name(other) for other in beside)


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, dict[str, tarfile.TarInfo]]]:
    """Members of a tar that are files or links, each with the plain members of the same stem beside it, by suffix."""

    def stem(info: tarfile.TarInfo) -> tuple[str, str]:  # as webdataset and img2dataset name a sample
        folder, _, name = info.name.rpartition("/")
        return folder, name.partition(".")[0]

    for _, group in itertools.groupby(_headers(path), key=stem):
        group = [info for info in group if not info.isdir()]
        beside = {os.path.splitext(info.name)[1].lower(): info for info in group if _is_plain(info)} if len(group) < 100 else {}
        yield from ((info, beside) for info in group)


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
    """An image without features. `lost`: the folder (or tar) that is not there, "" where it is."""

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
    stats: list[Span] = field(default_factory=list)  # size and mtime [ns] of each file
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
            try:
                batch.stats.append(_size_and_mtime(key))
                batch.texts.append(_read_texts(key))
                crops[row] = read_crop(key, self.preprocess)
                batch.folders.add(key.folder)
            except BadImage as error:
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


def _size_and_mtime(key: ImageKey) -> Span:
    if key.size >= 0:
        return key.size, 0
    try:
        status = os.stat(key.file)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return -1, 0


def _read_texts(key: ImageKey) -> dict[str, str]:
    """caption, url and key from the members beside an image, as img2dataset writes them."""
    texts: dict[str, str] = {}
    if key.txt != (0, 0):
        texts["caption"] = inference.read_bytes(key.file, *key.txt).decode("utf-8", "replace").rstrip("\n")
    if key.json != (0, 0):
        try:
            fields = json.loads(inference.read_bytes(key.file, *key.json))
            texts |= {name: str(fields[name]) for name in TEXTS if fields.get(name) is not None}
        except (ValueError, AttributeError, RecursionError):
            pass  # the image is none the worse for it
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


def decoding_loader(model: LoadedModel, batches: KeyBatches, num_workers: int | None) -> DataLoader:
    """Gives a Batch for each list of keys, decoded in `num_workers` processes (None: by the cores there are)."""
    size = model.preprocess.image_size
    if num_workers is None:
        num_workers = default_num_workers(model.device, batches.batch_size, size)
    batch_bytes = batches.batch_size * size * size * 3
    return torch.utils.data.DataLoader(
        _Crops(model.preprocess, shares_memory(num_workers, batch_bytes)),
        batch_size=None,  # the sampler gives whole batches
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        pin_memory=inference.can_pin_memory(model.device),
        timeout=LOADER_TIMEOUT_S if num_workers else 0,
    )


def default_num_workers(device: Device, batch_size: int, image_size: int) -> int:
    """Enough processes to keep up with the device, and no more than QUEUE_BYTES of batches waiting in memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= rank_of("LOCAL_WORLD_SIZE", 1)
    workers = cores // 4 if device.kind == "cpu" else min(16, cores - 1)
    return max(1, min(workers, QUEUE_BYTES // (3 * batch_size * image_size * image_size * 3)))


def shares_memory(num_workers: int, batch_bytes: int) -> bool:
    """Whether /dev/shm has room, for all ranks of this host, for the batches that wait there (a container may have 64 MiB).

    Else batches come through pipes, which is slower and needs no room: a worker that finds none would be waited for in vain.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return sys.platform == "darwin"
    waiting = 4 * num_workers * batch_bytes * rank_of("LOCAL_WORLD_SIZE", 1)  # two a worker, one in use, one in the making
    if waiting > free:
        log.info(
            f"/dev/shm has {gigabytes(free)} free of the {gigabytes(waiting)} that batches may take: they go through pipes"
        )
    return waiting <= free


def _as_it_is(batch: Batch) -> Batch:
    return batch


ENDING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


def _start_worker(_worker: int) -> None:
    # They reach every process of a terminal or a job; the main process alone answers, and its workers end with it.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


# --- what a run writes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """A run: which images, in parts of how many, and what is written where. `images` are those of the last round of additions;
    part k holds places (k - first_part) * part_size and on, and a row's index is its place plus first_index."""

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

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    def part_of(self, place: int) -> int:
        return self.first_part + place // self.part_size

    def unfinished(self) -> list[int]:
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [part for part in self.parts if self.path(part).name not in there]

    def how_to_go_on(self) -> str:
        finished = len(self.parts) - len(self.unfinished())
        return f"{finished} of {len(self.parts)} parts are finished in {self.folder}; run the same command again to go on"

    @property
    def bytes_per_image(self) -> float:
        values = sum(math.prod(shape) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize
        return values + 24 + self.images.mean_name_bytes  # index, size, mtime; names are written compressed


class _Rows:
    """The rows of one part while it is being filled."""

    def __init__(self, bulk: Bulk, part: int) -> None:
        self.bulk, self.part, self.places = bulk, part, bulk.places(part)
        self.values = {name: np.zeros((len(self.places), *shape), bulk.dtype) for name, shape in bulk.shapes.items()}
        self.failures: list[Failure] = []
        self.stats: list[Span] = []
        self.texts: list[dict[str, str]] = []

    @property
    def full(self) -> bool:
        return len(self.stats) == len(self.places)

    def add(self, batch: Batch, features: dict[str, np.ndarray]) -> int:
        """Add a batch; returns how many of its images failed."""
        rows = slice(batch.first - self.places.start, batch.first - self.places.start + len(batch.crops))
        failures = {failure.place: failure for failure in batch.failures}
        for row in np.flatnonzero(~features["finite"]):
            place = batch.first + int(row)
            failures.setdefault(place, Failure(place, self.bulk.images[place].name, "its features hold NaN or Inf"))
        for name, values in self.values.items():
            values[rows] = features[name]
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
    """Write one part as .npz, and clear away what a killed run left of it. Texts are compressed: numpy pads them to the longest."""
    with inference.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED if values.dtype.kind == "U" else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def read_part(path: Path, *names: str) -> list[np.ndarray] | None:
    """Some arrays of a part. One that is damaged or none of ours is named and put aside, to be made again: None."""
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        put_aside(path, f"damaged ({inference.first_line(error)})")
        return None


def put_aside(path: Path, why: str) -> None:
    os.replace(path, f"{path}.damaged")
    log.warning(f"{path} is {why}: put aside as {path.name}.damaged, and made again")


# --- one run at a time in a folder, and what its parts are made from --------------------------------------------------


class FolderLock:
    """The ranks of one run hold a folder together; strangers are refused. A POSIX lock: it dies with its process, and decoding
    workers do not inherit it. The file has the run's name, and below it the ranks that have done their share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.rank, self.ranks = folder, name_of_run(), *my_rank()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"--output {folder}: the folder cannot be made or written ({error.strerror})") from error

    def __enter__(self) -> FolderLock:
        for _ in range(10):
            if self._lock(fcntl.LOCK_EX):
                os.ftruncate(self.file, 0)
                os.write(self.file, f"{self.run}\n".encode())
            if self._lock(fcntl.LOCK_SH) and self._lines()[0] == self.run:
                return self
            self._lock(fcntl.LOCK_UN)
            time.sleep(0.1)  # perhaps another rank was just taking it
        holder = self._lines()[0]
        os.close(self.file)
        raise UsageError(f"--output {self.folder}: another run ({holder}) is writing to it; wait for it, or use another folder")

    def __exit__(self, *_error: object) -> None:
        os.close(self.file)

    def _lock(self, how: int) -> bool:
        try:
            fcntl.lockf(self.file, how | fcntl.LOCK_NB, 1, 0)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            log.warning(f"{self.folder}: no locks there ({error.strerror}); see to it that no other run writes to it")
        return True

    def _lines(self) -> list[str]:
        return os.pread(self.file, 1 << 20, 0).decode(errors="replace").splitlines() or [""]

    @contextmanager
    def one_rank_at_a_time(self) -> Iterator[None]:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, 1)
        except OSError:
            pass  # said already
        yield
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, 1)

    def check_folder(self) -> None:
        """Raises UsageError if the folder is not there any more."""
        try:
            there = os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(self.file))
        except OSError:
            there = False
        if not there:
            raise UsageError(f"--output {self.folder}: it was deleted, moved or unmounted while the run went on")

    def mark_done(self) -> None:
        os.write(self.file, f"rank {self.rank} is done\n".encode())

    def wait_for_others(self) -> None:
        """Wait until all ranks have done their share, or no other has been there for two minutes."""
        alone_since = None
        while len(set(self._lines()[1:])) < self.ranks:
            alone = self._lock(fcntl.LOCK_EX)
            self._lock(fcntl.LOCK_SH)
            alone_since = (alone_since or time.monotonic()) if alone else None
            if alone_since is not None and time.monotonic() - alone_since > 120:
                return
            time.sleep(0.5)


def my_rank() -> tuple[int, int]:
    """Rank and number of ranks. Raises UsageError where only one of them is set, or they make no sense."""
    given = [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)]
    rank, ranks = rank_of("RANK", 0), rank_of("WORLD_SIZE", 1)
    if len(given) == 1 or rank >= ranks:
        found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in ("RANK", "WORLD_SIZE"))
        raise UsageError(
            f"the environment has {found}: both are wanted, RANK below WORLD_SIZE; unset them, or start with torchrun"
        )
    return rank, ranks


def name_of_run() -> str:
    """The same for all ranks of a run and for nobody else."""
    get = os.environ.get
    if my_rank()[1] == 1:
        return f"process {os.getpid()} on {platform.node()}, {uuid.uuid4().hex[:8]}"
    launcher = [get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    one_host = get("LOCAL_WORLD_SIZE") == get("WORLD_SIZE")
    return " ".join(["ranks", *launcher, get("SLURM_JOB_ID", ""), platform.node() if one_host else ""])


def make_manifest(args: Namespace, model: LoadedModel, shapes: dict[str, tuple[int, ...]], part_size: int) -> dict[str, Any]:
    """What makes the features. All of `made_from` must be the same for a run to go on; the rest tells who began it."""
    weights = {key: value for key, value in model.weights.describe().items() if key != "path"}
    made_from = {
        "part_size": part_size,
        "features": {name: list(shape) for name, shape in shapes.items()},
        "feature_dtype": args.feature_dtype,
        "device": model.device.kind,
        "dtype": model.dtype_name,
        "allow_hf32": model.device.allow_hf32,
        "deterministic": model.device.deterministic,
        "levers": list(model.levers),
        "image_size": model.preprocess.image_size,
        "preprocess": dataclasses.asdict(model.preprocess),
        "model": model.name.rpartition("/")[2],
        "pooler": model.pooler,
        "weights": weights,
    }
    about = {"weights_label": model.weights.label, "device_name": model.device.name, "versions": inference.versions()}
    return json.loads(json.dumps({"made_from": made_from, **about, "rounds": []}))


def agree_on_round(
    args: Namespace, images: ImageList, lock: FolderLock, manifest: dict[str, Any]
) -> tuple[ImageList, int, int]:
    """The images of this run with first index and first part: those of the last round in manifest.json, or of a new one.

    Raises UsageError saying what does not fit.
    """
    folder, path = lock.folder, lock.folder / "manifest.json"
    if path.exists():
        begun = inference.read_json(path, "the manifest")
        require_same(folder, begun.get("made_from", {}), manifest["made_from"])
        manifest = begun
    elif any(folder.glob("part-*.npz")):
        raise UsageError(f"--output {folder}: it holds parts but no manifest.json; use an empty or new folder")
    rounds = manifest["rounds"]
    last = rounds[-1] if rounds else {"first_index": 0, "first_part": 0, "images": 0, "parts": 0}
    wanted = wanted_images(args, images, folder, last["first_part"]) if rounds else images
    if rounds and wanted.sha256() == last["image_list_sha256"]:
        finished = all((folder / f"part-{last['first_part'] + part:05d}.npz").exists() for part in range(last["parts"]))
        if last["run"] == lock.run or not (args.retry_failed and finished):
            last["run"] = lock.run
            inference.write_json(path, manifest)
            return wanted, last["first_index"], last["first_part"]
    if rounds and (last["run"] == lock.run or not (args.add or args.retry_failed)):
        raise UsageError(
            f"--output {folder}: begun with another list of images ({last['images']:,}, now {len(images):,}); --add takes those "
            "that no part holds; else repeat the first command (manifest.json has it) or use another folder"
        )
    start, part = last["first_index"] + last["images"], last["first_part"] + last["parts"]
    if rounds:
        wanted = wanted_images(args, images, folder, part, name_changed=True)
    if len(wanted):
        made = {"images": len(wanted), "image_list_sha256": wanted.sha256(), "first_index": start, "first_part": part}
        made |= {"parts": -(-len(wanted) // manifest["made_from"]["part_size"]), "run": lock.run}
        rounds.append(made | {"command": inference.command_line(), "time_utc": inference.utc_now()})
        inference.write_json(path, manifest)
    return wanted, start, part


def require_same(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 200 else text[:197] + "..."

    for key, value in now.items():
        if begun.get(key) != value:
            raise UsageError(
                f"--output {folder}: begun with another {key} ({short(begun.get(key))}, now {short(value)}); "
                "repeat the first command (manifest.json has it) or use another folder"
            )


def _digests(names: Iterable[str]) -> np.ndarray:
    """A number for each name: ten million names as text would fill the memory."""
    return np.fromiter(
        (int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little") for name in names), np.uint64
    )


def wanted_images(args: Namespace, images: ImageList, folder: Path, before: int, name_changed: bool = False) -> ImageList:
    """Of `images`, those that --add and --retry_failed ask for, given the parts numbered below `before`."""
    if not before and not args.retry_failed:
        return images
    held, failed, sizes, mtimes = ([np.empty(0, np.uint64)] for _ in range(4))
    for path in sorted(folder.glob("part-*.npz")):
        if (
            path.name < f"part-{before:05d}.npz"
            and (found := read_part(path, "path", "failed_path", "size", "mtime")) is not None
        ):
            held.append(_digests(found[0]))
            failed.append(_digests(found[1]))
            sizes.append(found[2].astype(np.uint64))
            mtimes.append(found[3].astype(np.uint64))
    held, sizes, mtimes = np.concatenate(held), np.concatenate(sizes), np.concatenate(mtimes)
    mine = _digests(key.name for key in images)
    is_held = np.isin(mine, held)
    is_failed = np.isin(mine, np.concatenate(failed)) & ~is_held
    if name_changed and len(held):
        order = np.argsort(held)
        rows = order[np.searchsorted(held, mine[is_held], sorter=order)]
        pairs = zip(np.flatnonzero(is_held), sizes[rows], mtimes[rows])
        changed = [images[place].name for place, size, mtime in pairs if _size_and_mtime(images[place]) != (size, mtime)]
        if changed:
            log.warning(
                f"{len(changed):,} files have changed since their features were made ({', '.join(changed[:5])}); they stay"
            )
    nothing = np.zeros(len(images), bool)
    wanted = (~is_held & ~is_failed if args.add else nothing) | (is_failed if args.retry_failed else nothing)
    return images.subset(np.flatnonzero(wanted))


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
        try:
            loader = decoding_loader(model, batches, args.num_workers)
            log.info(
                f"Rank {lock.rank} of {lock.ranks}: {len(batches.parts)} of {len(bulk.parts)} parts to do; batch size "
                f"{batches.batch_size}, {loader.num_workers} decoding workers, {args.execution}"
            )
            started = time.perf_counter()
            totals = encode_parts(lock, bulk, encoder, loader, batches)
            return finish(lock, bulk, batches, totals, time.perf_counter() - started)
        except UsageError as error:
            raise UsageError(f"{error}; {bulk.how_to_go_on()}") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # it may come up anywhere, from the handler of SIGCHLD
                raise
            raise UsageError(f"{_worker_lost(error)}; {bulk.how_to_go_on()}") from error


def plan(args: Namespace, images: ImageList, model: LoadedModel, lock: FolderLock) -> Bulk:
    """Work out what the parts hold. A part is held in memory until it is written: hence fewer images where features are large."""
    width = model.module.config.hidden_size
    patches = (model.preprocess.image_size // model.module.config.patch_size) ** 2
    names = inference.names_to_save(args, model)
    shapes = {name: (patches, width) if name == "patch_tokens" else (width,) for name in names}
    row_bytes = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(args.feature_dtype).itemsize
    part_size = args.part_size or max(1, min(10_000, (1 << 28) // row_bytes))
    manifest = make_manifest(args, model, shapes, part_size)
    images, first_index, first_part = agree_on_round(args, images, lock, manifest)
    made_with = json.dumps(inference.versions() | {"device": model.device.name})
    made_from = hashlib.sha256(json.dumps(manifest["made_from"]).encode()).hexdigest()
    return Bulk(images, lock.folder, part_size, shapes, args.feature_dtype, first_index, first_part, made_with, made_from)


def my_share(bulk: Bulk, lock: FolderLock) -> list[int]:
    """The parts that this rank has to do. One that is there but is not whole, or not of this run, is to be made again."""
    unfinished, share = set(bulk.unfinished()), []
    for part in bulk.parts[lock.rank :: lock.ranks]:
        if part not in unfinished:
            first, last = (bulk.first_index + place for place in (bulk.places(part)[0], bulk.places(part)[-1]))
            found = read_part(bulk.path(part), "index", "failed_index", "made_from")
            if (
                found is not None
                and found[2] == bulk.made_from
                and (*sorted([*found[0], *found[1]]),) == (*range(first, last + 1),)
            ):
                continue
            if found is not None:
                put_aside(bulk.path(part), "of another run")
        share.append(part)
    return share


def encode_parts(lock: FolderLock, bulk: Bulk, encoder: Encoder, loader: DataLoader, batches: KeyBatches) -> Totals:
    """Run all batches through the encoder and write each part when it is full. Raises UsageError if a part cannot be written."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    totals, lost = Totals(), _LostMount()
    rows: _Rows | None = None
    full: list[_Rows] = []
    total = sum(len(bulk.places(part)) for part in batches.parts)
    with logging_redirect_tqdm([log]), progress_bar(total, lock.rank == 0) as progress, _Writer(lock, bulk, totals) as writer:
        for batch, features in _one_ahead(loader, encoder, batches, totals):
            part = bulk.part_of(batch.first)
            if features is None:
                rows = None
                continue
            lost.look(batch)
            rows = _Rows(bulk, part) if rows is None else rows
            totals.failed += rows.add(batch, features)
            totals.images += len(batch.crops)
            progress.set_postfix(failed=totals.failed, refresh=False)
            progress.update(len(batch.crops))
            if rows.full:
                full.append(rows)
                rows = None
            if not lost.in_a_row:  # else the mount may be gone, and what looks like failures is none
                writer.write(full)
        writer.write(full)
    return totals


class _LostMount:
    """Tells a disk that is gone from a wrong line in a list."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.delivered: set[str] = set()

    def look(self, batch: Batch) -> None:
        """Raises UsageError where a folder is gone that gave images before, or too many in a row are not there."""
        self.delivered |= batch.folders
        lost = {failure.place: failure for failure in batch.failures if failure.lost}
        for place in range(batch.first, batch.first + len(batch.crops)):
            self.in_a_row = self.in_a_row + 1 if place in lost else 0
            if place in lost and (lost[place].lost in self.delivered or self.in_a_row >= LOST_AFTER):
                raise UsageError(
                    f"{lost[place].lost} is gone or empty ({self.in_a_row} files in a row are not found): mount it again, or mend "
                    "the list; the part in hand is not written"
                )


class _Writer:
    """Writes parts one by one, while the next is computed."""

    def __init__(self, lock: FolderLock, bulk: Bulk, totals: Totals) -> None:
        self.lock, self.bulk, self.totals = lock, bulk, totals
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: Any, *_error: object) -> None:
        self.pool.shutdown(wait=True)
        if kind is None:
            self._wait()

    def write(self, full: list[_Rows]) -> None:
        while full:
            self._wait()
            self.writing = self.pool.submit(self._write, full.pop(0))

    def _wait(self) -> None:
        with self.totals.waiting_for("writing"):
            if self.writing is not None:
                self.writing.result()

    def _write(self, rows: _Rows) -> None:
        self.lock.check_folder()
        write_part(self.bulk.path(rows.part), rows.arrays())
        stopping.last_words = f"stopped; {self.bulk.how_to_go_on()}"


def _one_ahead(loader: DataLoader, encoder: Encoder, batches: KeyBatches, totals: Totals) -> Iterator[tuple[Batch, Any]]:
    """Batches with their features, each fetched from the device only after the next one is queued there. Without features:
    a batch of a part that is given up."""
    bulk = batches.bulk
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until workers have their own handlers
    try:
        iterator = _reading(lambda: iter(loader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    previous: tuple[Batch, Callable[[], dict[str, np.ndarray]]] | None = None
    while True:
        with totals.waiting_for("reading"):
            batch = _reading(lambda: next(iterator, None))
        wait = None
        if batch is not None:
            part = bulk.part_of(batch.first)
            if batch.unreadable and part not in batches.given_up:
                batches.given_up[part] = batch.unreadable
                log.error(f"Part {part} is left unwritten: {batch.unreadable}")
            if part in batches.given_up:
                wait = dict  # nothing is computed
        with totals.waiting_for("computing"):
            if batch is not None and wait is None:
                wait = encoder.submit(torch.as_tensor(batch.crops))
            features = previous[1]() if previous is not None else None
        if previous is not None:
            yield previous[0], None if bulk.part_of(previous[0].first) in batches.given_up else features
        if batch is None:
            return
        previous = (batch, wait)


def _reading(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught"):  # an error that a worker raised
            raise
        raise _worker_lost(error) from error


def _worker_lost(error: BaseException) -> UsageError:
    return UsageError(
        f"a decoding worker was lost, most likely for lack of memory ({inference.first_line(error)}); use a smaller --num_workers"
    )


def finish(lock: FolderLock, bulk: Bulk, batches: KeyBatches, totals: Totals, seconds: float) -> int:
    """Write failures.jsonl once all parts are there, and say how the run went. Returns the exit code."""
    lock.check_folder()
    if not bulk.unfinished():
        with lock.one_rank_at_a_time():
            failures = write_failures(bulk)
        log.info(f"All {len(bulk.parts)} parts are in {bulk.folder}; {failures:,} images failed (failures.jsonl)")
    waited = ", ".join(f"{stage} {value:.1f} s" for stage, value in totals.waited.items())
    rate = totals.images / seconds
    log.info(f"{totals.images:,} images in {seconds:.1f} s: {rate:.2f} img/s, {totals.failed:,} failed; waited for {waited}")
    lock.mark_done()
    spoiled = batches.given_up or totals.images and totals.failed == totals.images
    if spoiled:
        lock.wait_for_others()
    if batches.given_up:
        raise UsageError(f"{len(batches.given_up)} parts are left unwritten because files could not be read")
    if spoiled:
        raise UsageError("not one of these images gave features: see failures.jsonl or the log for the reasons")
    return 0


def write_failures(bulk: Bulk) -> int:
    """Gather the failures of all parts, but for what a later part holds, into failures.jsonl; returns how many there are."""
    failures: dict[str, dict[str, Any]] = {}
    makers: dict[str, str] = {}
    for path in sorted(bulk.folder.glob("part-*.npz")):
        found = read_part(path, "path", "failed_index", "failed_path", "failed_reason", "made_with")
        if found is None:
            raise UsageError(f"{path} is damaged")
        names, *failed, made_with = (values.tolist() for values in found)
        makers.setdefault(made_with, path.name)
        for mended in failures.keys() & set(names) if failures else ():
            del failures[mended]
        for index, name, reason in zip(*failed):
            failures[name] = {"index": index, "path": name, "reason": reason}
    with inference.replacing(bulk.folder / "failures.jsonl") as file:
        file.write("".join(json.dumps(failure) + "\n" for failure in failures.values()).encode())
    if len(makers) > 1:
        listed = "; ".join(f"from {name}: {made_with}" for made_with, name in makers.items())
        log.warning(f"Not all parts were made with the same versions and device: {listed}")
    return len(failures)


def check_disk(bulk: Bulk) -> None:
    """Log what the unfinished parts will need. Raises UsageError where the disk has less."""
    unfinished = bulk.unfinished()
    needed = bulk.bytes_per_image * sum(len(bulk.places(part)) for part in unfinished)
    free = shutil.disk_usage(bulk.folder).free
    log.info(f"Output: {len(unfinished)} parts to write, {gigabytes(needed)} needed, {gigabytes(free)} free in {bulk.folder}")
    if needed > free:
        raise UsageError(
            f"--output {bulk.folder}: {gigabytes(needed)} needed and {gigabytes(free)} free; "
            "make room, save less, or use --feature_dtype float16"
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


class _LogLines(io.StringIO):
    """Makes log lines of what tqdm writes, where there is no terminal to draw a bar on."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info(text.strip())
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


# --- command line ----------------------------------------------------------------------------------------------------


def run(args: Namespace, device: Device) -> int:
    my_rank()
    images = list_images(args.image_path)
    log.info(f"{len(images):,} images, {images.ignored:,} other files ignored")
    return embed(args, images, inference.load_from_args(args, device))


def make_parser() -> inference.ArgumentParser:
    parser = inference.ArgumentParser(__doc__)
    inference.add_feature_arguments(parser, "images, folders, globs, .txt lists of paths, .tar files", "folder for the parts; the same command goes on where a run stopped")
    group = parser.add_argument_group("parts")
    group.add_argument("--num_workers", type=int, metavar="N", help="decoding processes (default: by the cores there are)")
    group.add_argument(
        "--part_size",
        type=inference.positive_int,
        metavar="N",
        help="images in a part (default: 10000, fewer where features are large)",
    )
    group.add_argument("--add", action="store_true", help="write what no part holds yet as further parts")
    group.add_argument(
        "--retry_failed", action="store_true", help="try failed images again; what mends goes into further parts"
    )
    inference.add_model_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.output or args.output.endswith(".npz"):
        parser.error(
            f"--output {args.output or repr('')}: a folder is wanted (inference.py writes the features of a few to NAME.npz)"
        )
    if args.num_workers is not None and not 0 <= args.num_workers <= 1000:
        parser.error("--num_workers: 0 (decode in this process) to 1000")
    args.deterministic = True
    return inference.run_script("embed", args, run)


if __name__ == "__main__":
    sys.exit(main())
