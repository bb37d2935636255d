"""Features to files: what a part holds, the manifest, failures, and what is left to do.

In: the rows and features of a part's images. Out: part-NNNNN.npz, written whole or not at all. A part is a stretch of the
files, or a tar; of a tar that holds more than part_size images the last stretch has the part's name, and is written last, the
others are part-NNNNN-MMMM.npz. A part counts as made where its file is there and the photos are as they were.
"""

from __future__ import annotations

import errno
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import inference
import numpy as np
from inference import UsageError, log

from bulk import storage
from bulk.decoding import TEXTS, Row, size_and_mtime
from bulk.sources import ImageKey, Sources, index_tar

TAR_STEP = 10**9  # between the indices of two tars' first images: how many a tar holds is not known before it is read
PART_NAME = re.compile(r"part-(\d{5,})(?:-(\d{4,}))?\.npz", re.ASCII)
Features = dict[str, np.ndarray]  # by their names; a row for each image


class Stamp(NamedTuple):
    """A tar as it was when a part was made of it; nothing for files, whose rows say it."""

    tar: str = ""
    size: int = 0
    mtime: int = 0


NO_TAR = Stamp()


@dataclass(frozen=True)
class Part:
    """What one file holds: these images in this order, and the index of the first. `number` is that of the files of its tar."""

    number: int
    path: str
    images: list[ImageKey]
    first_index: int
    stamp: Stamp = NO_TAR


@dataclass(frozen=True)
class Layout:
    """Where parts are, how many images one holds, and what is saved of each image."""

    folder: str
    part_size: int
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    made_with: str = ""

    def path(self, number: int, stretch: int | None = None) -> str:
        return (
            f"{self.folder}/part-{number:05d}.npz" if stretch is None else f"{self.folder}/part-{number:05d}-{stretch:04d}.npz"
        )

    def no_features(self) -> Features:
        """Those of no images."""
        return {name: np.empty((0, *shape), np.float32) for name, shape in self.shapes.items()}


class Unit(NamedTuple):
    """What is made in one go, whoever makes it: a stretch of files, or a tar, whose images are not known before it is read."""

    number: int
    first_index: int
    images: list[ImageKey]
    tar: str = ""

    def parts(self, layout: Layout) -> Iterator[Part]:
        """What is left to make of it: one file, or more of a large tar. Raises UsageError or OSError for a damaged tar."""
        if self.tar:
            yield from self._parts_of_tar(layout)
        else:
            yield Part(self.number, layout.path(self.number), self.images, self.first_index)

    def _parts_of_tar(self, layout: Layout) -> Iterator[Part]:
        stamp = Stamp(*storage.entry_of(self.tar))
        images, notes = index_tar(self.tar)
        for note in notes:
            log.warning(f"{self.tar}: {note}")
        starts = range(0, max(1, len(images)), layout.part_size)
        for stretch, start in enumerate(starts):
            is_last = start == starts[-1]
            path = layout.path(self.number, None if is_last else stretch)
            if is_last or not is_made_of(path, stamp):
                keys = [images[at] for at in range(start, min(start + layout.part_size, len(images)))]
                yield Part(self.number, path, keys, self.first_index + start, stamp)
        for number, stretch, path in part_files(layout.folder):  # of a tar that held more
            if number == self.number and stretch is not None and stretch >= len(starts) - 1:
                storage.remove(path)


@dataclass
class Plan:
    """Which images go into which parts: one round of the manifest."""

    layout: Layout
    sources: Sources
    first_index: int = 0
    first_part: int = 0
    first_tar: int = 0
    changed: set[int] = field(default_factory=set)  # parts whose photos are not as they were

    @property
    def stretches_of_files(self) -> int:
        return math.ceil(len(self.sources.files) / self.layout.part_size)

    @property
    def numbers(self) -> range:
        """The numbers of its parts: those of files, then one for each tar."""
        return range(self.first_part, self.first_part + self.stretches_of_files + len(self.sources.tars))

    def is_of_files(self, number: int) -> bool:
        """Whether a part is a stretch of the files, and not of a tar."""
        return number - self.first_part < self.stretches_of_files

    def unit(self, number: int) -> Unit:
        place, files, size = number - self.first_part, self.sources.files, self.layout.part_size
        if self.is_of_files(number):
            start = place * size
            images = [files[at] for at in range(start, min(start + size, len(files)))]
            return Unit(number, self.first_index + start, images)
        which = place - self.stretches_of_files
        return Unit(number, (self.first_tar + which + 1) * TAR_STEP, [], self.sources.tars[which])

    def unfinished(self) -> list[int]:
        there = set(storage.names_in(self.layout.folder))
        paths = ((number, self.layout.path(number)) for number in self.numbers)
        return [number for number, path in paths if number in self.changed or path.rpartition("/")[2] not in there]

    def finished(self, part: Part) -> None:
        """A part's file is there."""
        if part.path == self.layout.path(part.number):
            self.changed.discard(part.number)

    def how_to_go_on(self) -> str:
        told = f"parts are in {self.layout.folder}"
        with suppress(UsageError):  # storage that does not answer, which may be why
            finished = len(self.numbers) - len(self.unfinished())
            told = f"{finished} of {len(self.numbers)} parts are finished in {self.layout.folder}"
        return f"{told}; run the same command again to go on"

    def batch_size(self, wanted: int) -> int:
        """No larger than what a part may hold."""
        size = self.layout.part_size
        return min(wanted, size if self.sources.tars else min(size, len(self.sources.files) or 1))


def stamp_of(tar: str) -> Stamp:
    return Stamp(tar, *size_and_mtime(ImageKey(tar)))


def bytes_per_image(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


# --- one part ---


def part_arrays(layout: Layout, part: Part, batches: list[tuple[list[Row], Features]]) -> Features:
    """What a part's file holds: a row for each image that has features, and the failures beside."""
    rows = [row for rows, _ in batches for row in rows]
    good = np.array([not row.reason for row in rows], bool)
    index = np.arange(part.first_index, part.first_index + len(rows), dtype=np.int64)
    path = np.array([key.name for key in part.images], str)
    features = {name: np.concatenate([found[name] for _, found in batches]) for name in layout.shapes}
    return {
        "index": index[good],
        "path": path[good],
        **{name: np.array([row.texts.get(name, "") for row in rows], str)[good] for name in TEXTS},
        **{name: values[good].astype(layout.dtype) for name, values in features.items()},
        "size": np.array([row.size for row in rows], np.int64)[good],
        "mtime": np.array([row.mtime for row in rows], np.int64)[good],
        "failed_index": index[~good],
        "failed_path": path[~good],
        "failed_reason": np.array([row.reason for row in rows], str)[~good],
        "tar": np.array(part.stamp.tar),
        "tar_size": np.array(part.stamp.size),
        "tar_mtime": np.array(part.stamp.mtime),
        "made_with": np.array(layout.made_with),
    }


def write_part(path: str, arrays: Features) -> None:
    """Write a part as .npz. Text is compressed: numpy pads it to the longest. Raises UsageError where it cannot be written."""
    with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED if values.dtype.kind == "U" else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


class PartWriter:
    """Writes parts in a thread of its own, one behind the other; leaving the block waits for the last.

    check is called before and after each: what it raises says more than what could not be written. finished(part) is called
    behind each.
    """

    def __init__(self, layout: Layout, check: Callable[[], None], finished: Callable[[Part], None]) -> None:
        self.layout, self.check, self.finished = layout, check, finished
        self._pool, self._writing = ThreadPoolExecutor(1), None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        self._pool.shutdown()
        if self._writing and kind is None:
            self._writing.result()

    def write(self, part: Part, batches: list[tuple[list[Row], Features]]) -> None:
        """Begin to write a part when the one before is written. Raises UsageError where that could not be."""
        self.wait()
        self._writing = self._pool.submit(self._write, part, batches)

    def wait(self) -> None:
        """Until the part before is written. Raises UsageError where that could not be."""
        if self._writing:
            self._writing.result()

    def _write(self, part: Part, batches: list[tuple[list[Row], Features]]) -> None:
        self.check()
        if part.stamp.tar and stamp_of(part.stamp.tar) not in (part.stamp, Stamp(part.stamp.tar)):  # gone, or no answer
            raise UsageError(f"{part.stamp.tar} changed while it was read")
        try:
            write_part(part.path, part_arrays(self.layout, part, batches))
        finally:
            self.check()
        self.finished(part)


def read_part(path: str, *names: str) -> list[np.ndarray] | None:
    """Arrays of a part; None if there is none. One that is damaged is put aside and named."""
    damage = (ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        with storage.opened(path) as file, np.load(file) as arrays:
            return [arrays[name] for name in names]
    except FileNotFoundError:
        return None
    except (OSError, *damage) as error:
        # EINVAL is NumPy's, for a place that is not in the file; but s3fs has it for a token that has expired
        if isinstance(error, OSError) and (error.errno != errno.EINVAL or storage.is_remote(path)):
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
        storage.move(path, f"{path}.damaged")
        log.warning(
            f"{path} is damaged ({inference.first_line(error)}): put aside with .damaged behind its name, and made again"
        )
        return None


def part_files(folder: str) -> list[tuple[int, int | None, str]]:
    """Number, stretch and path of each part file, in the order of their rows: of a tar's, the one without a stretch last."""
    found = (PART_NAME.fullmatch(name) for name in storage.names_in(folder))
    files = [(int(name[1]), int(name[2]) if name[2] else None, f"{folder}/{name[0]}") for name in found if name]
    return sorted(files, key=lambda file: (file[0], math.inf if file[1] is None else file[1]))


def is_made_of(path: str, stamp: Stamp) -> bool:
    """Whether a part is there and was made of this tar as it is now."""
    found = read_part(path, "tar", "tar_size", "tar_mtime")
    return found is not None and Stamp(*(value.item() for value in found)) == stamp


# --- all parts ---


def find_changed(plan: Plan, numbers: Iterable[int]) -> None:
    """Compare the photos of finished parts with what they were: parts with one that changed are to be made anew, and said.

    A photo that is gone has not changed.
    """
    all_changed: list[str] = []
    for number in numbers:
        of_files = plan.is_of_files(number)
        arrays = ("path", "size", "mtime") if of_files else ("tar", "tar_size", "tar_mtime", "index", "failed_index")
        found = read_part(plan.layout.path(number), *arrays)
        if found is None:
            continue
        values = [array.tolist() for array in found]
        if of_files:
            path, size, mtime = values
            then = dict(zip(path, zip(size, mtime)))
            images = plan.unit(number).images
            pairs = [(key.name, then[key.name], size_and_mtime(key)) for key in images if key.name in then]
        else:
            tar, *stamp, index, failed_index = values
            pairs = [(tar, tuple(stamp), stamp_of(tar)[1:])]
            before = min([*index, *failed_index], default=0) % TAR_STEP // plan.layout.part_size
            if any(read_part(plan.layout.path(number, stretch), "tar") is None for stretch in range(before)):
                plan.changed.add(number)
        changed = [name for name, before, now in pairs if now not in (before, (0, 0))]
        if changed:
            plan.changed.add(number)
            all_changed += changed
    if all_changed:
        log.warning(f"{len(all_changed):,} have changed, and their parts are made anew: {some_of(all_changed)}")


def some_of(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def check_disk(plan: Plan) -> None:
    """Log what the unfinished parts will need. Raises UsageError where the disk has less. Tars count when they are read."""
    unfinished, layout = plan.unfinished(), plan.layout
    each = bytes_per_image(layout.shapes, layout.dtype) + 100  # for what stands beside the features; text is compressed
    of_files = list(filter(plan.is_of_files, unfinished))
    needed, free = each * min(len(of_files) * layout.part_size, len(plan.sources.files)), storage.free_bytes(layout.folder)
    told = f"{needed / 1e9:,.3f} GB needed" + ("" if free is None else f" and {free / 1e9:,.3f} GB free")
    log.info(f"Output: {len(unfinished)} parts to write, {told} in {layout.folder}")
    if free is not None and needed > free:
        raise UsageError(f"--output {layout.folder}: {told}; make room, save less, or use --feature_dtype float16")


def clear_leftovers(folder: str) -> None:
    """Remove what a killed run left of parts. For when no other rank writes yet."""
    for name in storage.names_in(folder):
        if re.fullmatch(r"\.part-.*\.tmp", name):
            storage.remove(f"{folder}/{name}")


def write_failures(folder: str) -> int:
    """Gather the failures of all parts, but for what a later part holds, in failures.jsonl; returns how many there are.

    Raises UsageError if there is nothing but failures.
    """
    failures: dict[str, dict[str, Any]] = {}
    makers: dict[str, str] = {}
    rows = 0
    for _number, _stretch, path in part_files(folder):
        found = read_part(path, "path", "failed_index", "failed_path", "failed_reason", "made_with")
        if found is None:
            raise UsageError(f"{path} was damaged")
        names, *failed, made_with = (values.tolist() for values in found)
        rows += len(names)
        makers.setdefault(made_with, path.rpartition("/")[2])
        for name in failures.keys() & set(names) if failures else ():
            del failures[name]
        failures |= {name: {"index": index, "path": name, "reason": reason} for index, name, reason in zip(*failed)}
    with storage.replacing(f"{folder}/failures.jsonl") as file:
        file.write("".join(json.dumps(failure) + "\n" for failure in failures.values()).encode())
    if len(makers) > 1:
        listed = "; ".join(f"from {name}: {made_with}" for made_with, name in makers.items())
        log.warning(f"The parts were not all made with the same versions and device: {listed}")
    if not rows:
        raise UsageError("not one of these images gave features: see failures.jsonl for the reasons")
    return len(failures)
