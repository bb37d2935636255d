"""Bytes to crops, in worker processes.

In: lists of at most batch_size ImageKeys. Out, in the same order: a Batch for each, with its crops, uint8 [n, H, W, 3], and a
Row for each image that says what is known of it beside its features, or why it failed.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import mmap
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import inference
import numpy as np
import torch
from inference import BadImage, Preprocess, UsageError
from PIL import Image

from bulk import storage
from bulk.sources import NOWHERE, ImageKey
from bulk.storage import Unreadable

TEXTS = ("caption", "url", "key")
TEXT_LIMIT = 4000  # characters of a caption: a part's column is as wide as its longest text
TIMEOUT_S = 1800  # for one batch: nothing waits for ever
QUEUE_BYTES = 4 << 30  # of decoded batches that wait in memory
PIXEL_BYTES = 6  # of a photo while it is decoded: as it is, and as RGB
END = object()
ENDING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class Row(NamedTuple):
    """What is known of an image beside its features; if it failed, why, and whether its folder or tar is not there either."""

    size: int  # in bytes
    mtime: int  # in ns, of the file or of the tar
    texts: dict[str, str]
    reason: str = ""
    folder_gone: bool = False


@dataclass
class Batch:
    """A row for each image, or which file the disk did not give; and the crops, anything where an image failed."""

    rows: list[Row] = field(default_factory=list)
    unreadable: str = ""
    crops: Any = None


class Decoder:
    """Worker processes that decode, forked here, best before a device is opened; with num_workers 0 this process does.

    Crops wait in memory that the workers share. Raises UsageError where there is too little of it.
    """

    def __init__(self, preprocess: Preprocess, batch_size: int, num_workers: int) -> None:
        self.num_workers = num_workers
        self._ahead: deque[tuple[list[ImageKey], int, Future[Batch]]] = deque()
        # As many batches as are under way: two for each worker, and those in other hands. Memory that is shared by a fork is no
        # file in /dev/shm, of which a container may have 64 MB.
        shape = (2 * num_workers + 3, batch_size, preprocess.image_size, preprocess.image_size, 3)
        try:
            buffers = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        except OSError as error:
            raise UsageError(
                "too little memory for the images under way; use a smaller --batch_size or --num_workers"
            ) from error
        self._work = _WORKS[id(self)] = _Work(preprocess, buffers)
        self._slots = itertools.cycle(range(len(buffers)))
        self._pool = None
        if num_workers:
            self._pool = ProcessPoolExecutor(num_workers, get_context("fork"), _start_worker, (os.getpid(),))
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until workers have their own handlers
            try:
                self._pool.submit(os.getpid).result()  # with it all workers are started
            except (OSError, BrokenProcessPool) as error:
                self.__exit__()
                told = f"{num_workers} decoding workers cannot be started ({inference.first_line(error)})"
                raise UsageError(f"{told}; use a smaller --num_workers") from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pool is not None:
            for worker in list((self._pool._processes or {}).values()):
                worker.kill()  # one that hangs in a read would be waited for
            self._pool.shutdown(cancel_futures=True)

    def begin(self, batches: Iterable[list[ImageKey]]) -> None:
        """Let the workers begin with what decode() will most likely be given first."""
        if self._pool:
            for keys, slot in zip(itertools.islice(batches, 2 * self.num_workers), self._slots):
                self._ahead.append((keys, slot, self._submit(slot, keys)))

    def _start(self, keys: list[ImageKey]) -> tuple[int, int, Future[Batch] | Batch]:
        if self._ahead and self._ahead[0][0] == keys:
            _, slot, made = self._ahead.popleft()
            return slot, len(keys), made
        while self._ahead:  # it was not: their slots are free once they are done
            _result(self._ahead.popleft()[2])
        slot = next(self._slots)
        return slot, len(keys), self._submit(slot, keys)

    def decode(self, batches: Iterable[list[ImageKey] | None]) -> Iterator[Batch | None]:
        """A Batch for each list of keys; its crops hold until two more have been asked for.

        A None among `batches` says that there is nothing at the moment, and comes back as one once all is done until then.

        Raises UsageError where a worker is lost, or where no batch comes for TIMEOUT_S.
        """
        under_way: deque[tuple[int, int, Future[Batch] | Batch]] = deque()
        for keys in itertools.chain(batches, itertools.repeat(END)):
            if isinstance(keys, list):
                under_way.append(self._start(keys))
                if len(under_way) < max(1, 2 * self.num_workers):
                    continue
            if not under_way:
                if keys is END:
                    return
                yield None
                continue
            slot, count, made = under_way.popleft()
            batch = made if isinstance(made, Batch) else _result(made)
            batch.crops = torch.from_numpy(self._work.buffers[slot, :count])
            yield batch

    def _submit(self, slot: int, keys: list[ImageKey]) -> Future[Batch] | Batch:
        if self._pool is None:
            return self._work.decode(slot, keys)
        try:
            return self._pool.submit(_decode, id(self), slot, keys)
        except BrokenProcessPool as error:  # told when its turn comes: what was decoded before is good
            lost: Future[Batch] = Future()
            lost.set_exception(error)
            return lost


def _result(future: Future[Batch]) -> Batch:
    if not wait([future], TIMEOUT_S).done:
        raise UsageError(f"no image came for {TIMEOUT_S} s, as from a disk or network that hangs")
    try:
        return future.result()
    except BrokenProcessPool as error:
        reason = f"most likely for lack of memory ({inference.first_line(error)}); use a smaller --num_workers"
        raise UsageError(f"a decoding worker was lost, {reason}") from error


def default_num_workers(kind: str, batch_size: int, image_size: int) -> int:
    """Enough processes to keep up with the device, with no more than QUEUE_BYTES of batches waiting in memory, and half of the
    machine's memory taken should each decode the largest photo that --max_megapixels allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= inference.rank_of("LOCAL_WORLD_SIZE", 1)
    workers = cores // 4 if kind == "cpu" else min(16, cores - 1)
    largest = 2 * (Image.MAX_IMAGE_PIXELS or 1) * PIXEL_BYTES  # Pillow refuses twice its limit
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(1, min(workers, QUEUE_BYTES // (3 * batch_size * image_size * image_size * 3), room // largest))


# --- in a worker ---


class _Work:
    """What a worker needs to know: how to crop, and where crops are put."""

    def __init__(self, preprocess: Preprocess, buffers: np.ndarray) -> None:
        self.preprocess, self.buffers = preprocess, buffers

    def decode(self, slot: int, keys: list[ImageKey]) -> Batch:
        batch = Batch()
        for crop, key in zip(self.buffers[slot], keys):
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


_WORKS: WeakValueDictionary[int, _Work] = WeakValueDictionary()  # a worker finds its Decoder's where the fork left it


def _start_worker(parent: int) -> None:
    # Signals reach every process of a terminal or a job; the main process alone answers, and its workers end with it.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # those of the main process are not here after a fork
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def keep_freed_memory() -> None:
    """Have glibc keep what a photo leaves for the next one: fetching new pages costs a sixth of a small photo's decoding.

    Its own thresholds adapt to what is freed, at times only after many photos. Other C libraries stay as they are.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD (malloc.h), the largest that it takes
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _decode(decoder: int, slot: int, keys: list[ImageKey]) -> Batch:
    return _WORKS[decoder].decode(slot, keys)


def read_crop(key: ImageKey, preprocess: Preprocess) -> np.ndarray:
    """Read, decode, resize and crop one image: uint8 [image_size, image_size, 3]. Raises BadImage or Unreadable."""
    data = storage.read(key.file, key.offset, key.size)
    return inference.crop_uint8(inference.decode(data, preprocess.least_edge), preprocess)


def size_and_mtime(key: ImageKey) -> tuple[int, int]:
    """Bytes and ns by which a change is told: of a member of a tar its own size, and the tar's time. (0, 0): not there."""
    if key.mtime:
        return key.size, key.mtime
    with suppress(OSError, ValueError):
        entry = storage.entry_of(key.file)
        return key.size if key.tar_length else entry.size, entry.mtime
    return 0, 0


def read_texts(key: ImageKey) -> dict[str, str]:
    """caption, url and key from the members beside an image, as img2dataset writes them."""
    texts: dict[str, str] = {}
    if key.txt != NOWHERE:
        texts["caption"] = storage.read(key.file, *key.txt).decode("utf-8", "replace").rstrip("\n")
    if key.json != NOWHERE:
        with suppress(ValueError, AttributeError, RecursionError):  # damaged: the image is none the worse for it
            fields = json.loads(storage.read(key.file, *key.json))
            texts |= {name: str(fields[name]) for name in TEXTS if fields.get(name) is not None}
    return {name: text[:TEXT_LIMIT] for name, text in texts.items()}


def _is_folder_gone(key: ImageKey, error: BadImage) -> bool:
    """Whether the folder of a file that was not found is gone too, or empty as a mount point is without its disk."""
    if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
        return False
    if storage.is_remote(key.folder):  # which has no mounts to lose
        return False
    try:
        with os.scandir(key.folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True
