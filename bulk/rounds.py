"""Which parts are to be made in a folder: manifest.json's rounds, what --add and --retry_failed leave, one run at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import inference
import numpy as np
from inference import UsageError, log

from bulk import storage
from bulk.decoding import size_and_mtime
from bulk.parts import Plan, Stamp, part_files, read_part, some_of, stamp_of
from bulk.sources import ImageKey, Sources, index_tar

PLANNING_S = 3600  # for rank 0 to list millions of files
LEASE_S = 45  # without a change, after which a run that writes to object storage counts as dead


def agree_on_round(plan: Plan, manifest: dict[str, Any], add: bool, retry_failed: bool, may_open: bool) -> None:
    """Set what `plan` is to do: the last round's work, as manifest.json has it, or a new round's, which is written there.

    manifest["made_from"] must be the same for a run to go on; the rest tells who began. `may_open`: no other rank does it.
    Raises UsageError saying what does not fit.
    """
    folder, path = plan.layout.folder, f"{plan.layout.folder}/manifest.json"
    begun_with, go_back = f"--output {folder}: begun with another", "repeat the first command (manifest.json has it)"
    has_parts, begun = bool(part_files(folder)), read_manifest(path)
    if begun is not None and (has_parts or not may_open):  # else nothing would be lost
        for name, value in manifest["made_from"].items():
            then = begun.get("made_from", {}).get(name)
            if then != value:
                told = f"({json.dumps(then):.200}, now {json.dumps(value):.200})"
                raise UsageError(f"{begun_with} {name} {told}; {go_back} or use another folder")
        manifest = begun
    elif has_parts:
        raise UsageError(f"--output {folder}: it holds parts but no manifest.json; use an empty or new folder")
    rounds, sources = manifest["rounds"], plan.sources
    if rounds:
        last = rounds[-1]
        _begin_behind(plan, rounds[:-1], sources, add, retry_failed)
        is_last = plan.sources.sha256() == last["image_list_sha256"]
        if is_last and not (may_open and (add or retry_failed) and not plan.unfinished()):
            return
        if not (add or retry_failed):
            if len(rounds) > 1:
                raise UsageError(f"--output {folder}: repeat the last command, or use --add; it was: {last['command']}")
            told = f"({last['images'] + last['tars']:,}, now {len(sources.files) + len(sources.tars):,})"
            told += "; --add takes those that no part holds"
            raise UsageError(f"{begun_with} list of images {told}; or {go_back}, or use another folder")
        if not may_open:
            raise UsageError(f"--output {folder}: rank 0 has begun with another list of images; start all ranks anew")
        if changed := _begin_behind(plan, rounds, sources, add, retry_failed):
            what = "and get further ones" if add else "which stay; --add makes further ones"
            log.warning(f"{len(changed):,} have changed since their rows were made, {what}: {some_of(changed)}")
    if plan.numbers:
        made = {"first_index": plan.first_index, "first_part": plan.first_part, "first_tar": plan.first_tar}
        made |= {"images": len(plan.sources.files), "tars": len(plan.sources.tars), "parts": len(plan.numbers)}
        made |= {"image_list_sha256": plan.sources.sha256(), "command": command_as_typed(), "time_utc": inference.utc_now()}
        rounds.append(made)
        with storage.replacing(path) as file:
            file.write((json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(path: str) -> dict[str, Any] | None:
    """What manifest.json says; None where there is none. Raises UsageError where it is damaged or cannot be read."""
    try:
        with storage.opened(path) as file:
            manifest = json.loads(file.read())
        if isinstance(manifest.get("rounds"), list):
            return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: the manifest cannot be read ({inference.first_line(error)})") from error
    raise UsageError(f"{path}: not the manifest of a bulk run")


def command_as_typed() -> str:
    """With its whole paths, to be repeated: the manifest is the user's own, and not published."""
    return shlex.join(["python", *sys.argv])


def _begin_behind(plan: Plan, rounds: list[dict[str, Any]], sources: Sources, add: bool, retry_failed: bool) -> list[str]:
    """Let a plan begin behind these rounds, with what their parts leave of `sources`. Returns what has changed since."""
    for name, what in (("first_index", "images"), ("first_part", "parts"), ("first_tar", "tars")):
        setattr(plan, name, sum(made[what] for made in rounds))
    plan.sources, changed = _Held(plan).what_is_left_of(sources, add, retry_failed) if rounds else (sources, [])
    return changed


class _Held:
    """What the parts before a plan's hold: digests of rows' names, and of names with size and time; tars; failures."""

    def __init__(self, plan: Plan) -> None:
        self.tars: dict[str, list[Stamp]] = {}  # those that are whole
        self.begun: set[str] = set()
        failed: list[str] = []
        names, stamps = [], []
        for number, stretch, path in part_files(plan.layout.folder):
            arrays = ("path", "size", "mtime", "failed_path", "tar", "tar_size", "tar_mtime")
            found = read_part(path, *arrays) if number < plan.first_part else None
            if found is None:
                continue
            rows, failures, stamp = found[:3], found[3], Stamp(*(value.item() for value in found[4:]))
            names.append(_digests(rows[0].tolist()))
            stamps.append(_digests(map(_stamped, *(values.tolist() for values in rows))))
            failed += failures.tolist()
            if stamp.tar and stretch is not None:
                self.begun.add(stamp.tar)
            elif stamp.tar:
                self.tars.setdefault(stamp.tar, []).append(stamp)
        self.names, self.stamps = (np.concatenate([np.empty(0, np.uint64), *digests]) for digests in (names, stamps))
        self.stamps.sort()
        self.failed = {name for name, held in zip(failed, self.has(failed)) if not held}

    def has(self, names: list[str]) -> np.ndarray:
        return np.isin(_digests(names), self.names)

    def has_changed(self, key: ImageKey) -> bool:
        """Whether an image that is held is there, and no row is of it as it is now."""
        size, mtime = size_and_mtime(key)
        [digest] = _digests([_stamped(key.name, size, mtime)])
        place = np.searchsorted(self.stamps, digest)
        return mtime != 0 and not (place < len(self.stamps) and self.stamps[place] == digest)

    def what_is_left_of(self, sources: Sources, add: bool, retry_failed: bool) -> tuple[Sources, list[str]]:
        """What --add takes (what no part holds, or not as it is now) and --retry_failed (what failed); and what has changed."""
        left, changed = Sources(left_out=sources.left_out), []

        def is_wanted(key: ImageKey, held: bool, is_changed: bool = False) -> bool:
            failed = key.name in self.failed
            return (retry_failed and failed) or (add and (is_changed or not (held or failed)))

        for key, held in zip(sources.files, np.isin(_digests(key.name for key in sources.files), self.names)):
            is_changed = held and self.has_changed(key)
            changed += [key.name] if is_changed else []
            if is_wanted(key, held, is_changed):
                left.files.append(*key)
        for tar in sources.tars:
            stamp, made = stamp_of(tar), self.tars.get(tar, [])
            is_changed = bool(made) and stamp.mtime != 0 and stamp not in made
            changed += [tar] if is_changed else []
            if add and (is_changed or not (made or tar in self.begun)):
                left.tars.append(tar)
            elif (add and not made) or (retry_failed and any(name.startswith(f"{tar}/") for name in self.failed)):
                images = list(index_tar(tar).images)
                for key, held in zip(images, self.has([key.name for key in images])):
                    if is_wanted(key, held or bool(made)):
                        left.files.append(*key)
        return left, changed


def _stamped(name: str, size: int, mtime: int) -> str:
    return f"{name}\0{size}\0{mtime}"


def _digests(texts: Iterable[str]) -> np.ndarray:
    """A number for each text: ten million paths themselves would fill the memory."""
    hashes = (hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(value, "little") for value in hashes), np.uint64)


# --- one run at a time ---


class RunLock:
    """Lets one run at a time into a folder; the ranks of a torchrun count as one. POSIX locks, which die with their process,
    and which decoding workers do not inherit: rank r holds byte r, a run of one process all bytes.
    """

    def __init__(self, folder: str, rank: int = 0, ranks: int = 1) -> None:
        self.folder, self.rank = folder, rank
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"--output {folder}: the folder cannot be made or written ({error.strerror})") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1 if ranks > 1 else 0, rank)
        except (BlockingIOError, PermissionError) as error:
            os.close(self._file)
            raise UsageError(in_use(folder)) from error
        except OSError as error:
            log.warning(f"{folder}: no locks there ({error.strerror}); see to it that no other run writes to it")
        if rank == 0:
            os.ftruncate(self._file, 0)  # what a run before has written there

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._file)

    @contextmanager
    def planning(self) -> Iterator[bool]:
        """Rank 0 of a torchrun plans first, the others after it. Gives whether this rank may begin a new round."""
        run, follows = _name_of_run(), "TORCHELASTIC_RUN_ID" in os.environ and self.rank > 0
        deadline = time.monotonic() + PLANNING_S
        while follows and os.fsdecode(os.pread(self._file, 10_000, 0)) != run:
            if time.monotonic() > deadline:
                raise UsageError(f"--output {self.folder}: rank 0 has not begun within {PLANNING_S} s; start all ranks anew")
            time.sleep(0.1)
        yield not follows
        try:
            os.pwrite(self._file, b"" if follows else os.fsencode(run), 0)
        except OSError as error:
            raise UsageError(f"{self.folder}/.lock: cannot be written ({error.strerror})") from error

    def wait_for_others(self) -> None:
        """Until no other rank is at work: torchrun ends them all when one ends with an error."""
        with suppress(OSError):  # no locks there
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self.rank)  # two that wait for each other would do so for ever
            fcntl.lockf(self._file, fcntl.LOCK_EX)

    def check_folder(self) -> None:
        """Raises UsageError if the folder is not there any more."""
        with suppress(OSError):
            if os.path.samestat(os.stat(f"{self.folder}/.lock"), os.fstat(self._file)):
                return
        raise UsageError(f"--output {self.folder}: it was deleted, moved or unmounted during the run")


def _name_of_run() -> str:
    """What all ranks of a torchrun share, and no other has: up to torch 2.9 its names may be the same each time, but not the
    folder of its ranks' error files, which each host has for itself.
    """
    get, names = os.environ.get, ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    folder = os.path.dirname(os.path.dirname(get("TORCHELASTIC_ERROR_FILE", "")))
    return "/".join([*(get(name, "") for name in names), folder if get("LOCAL_WORLD_SIZE") == get("WORLD_SIZE") else ""])


class Lease:
    """RunLock for object storage, which has no locks: a file whose content changes as long as its run lives.

    A run that was not heard of for LEASE_S may have lost it to another one, and finds that out before it writes.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.path, self._run = folder, f"{folder}/.lock", uuid.uuid4().hex
        try:
            before = self._read()
            if before is not None:
                log.info(f"{self.path} is there: looking for {LEASE_S} s whether its run is alive")
                time.sleep(LEASE_S)
                if self._read() not in (before, None):
                    raise UsageError(in_use(folder))
            try:
                self._write()
            except UsageError as error:
                raise UsageError(f"--output {folder}: {error}") from error
            time.sleep(LEASE_S / 45)  # of two that begin at once the later one has it
            if not self._is_ours():
                raise UsageError(in_use(folder))
        except OSError as error:
            told = error.strerror or inference.first_line(error)
            raise UsageError(f"--output {folder}: it cannot be read ({told})") from error
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _read(self) -> str | None:
        with suppress(FileNotFoundError):
            return storage.read_whole(self.path).decode(errors="replace")
        return None

    def _is_ours(self) -> bool:
        found = self._read()
        return found is None or found.startswith(self._run)

    def _write(self) -> None:
        with storage.replacing(self.path) as file:
            file.write(f"{self._run} {time.time_ns()}".encode())

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_S / 3):
            with suppress(OSError, UsageError):  # it is tried again, and parts that cannot be written say so
                if self._is_ours():
                    self._write()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._keeper.join(LEASE_S)
        with suppress(OSError):
            if self._is_ours():
                storage.remove(self.path)

    @contextmanager
    def planning(self) -> Iterator[bool]:
        """As RunLock.planning, for a run of one process."""
        yield True

    def check_folder(self) -> None:
        """Raises UsageError if another run has it by now. What is gone there cannot be told from what is empty."""
        with suppress(OSError):
            if not self._is_ours():
                raise UsageError(f"--output {self.folder}: another run has taken it over, as this one did not answer in time")


def lock(folder: str, rank: int, ranks: int) -> RunLock | Lease:
    """The lock of an output folder. Raises UsageError where another run has it, or where it cannot be written."""
    if not storage.is_remote(folder):
        return RunLock(folder, rank, ranks)
    if ranks > 1:
        raise UsageError(f"--output {folder}: torchrun's ranks share a folder of this machine; use embed_cluster.py")
    return Lease(folder)


def in_use(folder: str) -> str:
    return f"--output {folder}: another run writes to it; wait for it, or use another folder"


def which_rank() -> tuple[int, int]:
    """Rank and number of ranks. Raises UsageError where the environment has only one of them, or they make no sense."""
    get, rank, ranks = os.environ.get, inference.rank_of("RANK", 0), inference.rank_of("WORLD_SIZE", 1)
    if bool(get("RANK")) != bool(get("WORLD_SIZE")) or rank >= ranks:
        found = f"RANK={get('RANK', '')} and WORLD_SIZE={get('WORLD_SIZE', '')}"
        raise UsageError(f"the environment has {found}: unset both, or start with torchrun, which sets RANK below WORLD_SIZE")
    return rank, ranks
