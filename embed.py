"""WebSSL-MAE-300M: turn any number of photos into features, in parts, on an Ascend NPU, a GPU or the CPU.

    python embed.py --image_path photos/ --output features/ --device npu --dtype float16
    python embed.py --image_path photos/ --output features/ --add
    torchrun --nproc_per_node 8 embed.py --image_path shards/ --output features/ --device npu

--image_path takes images, folders, globs, .txt lists of paths (those in a tar as shard.tar/name.jpg) and .tar files. A
part-NNNNN.npz holds a row for each image: index, path, features, size and mtime [ns] of its file, and caption, url and key from
img2dataset's tars, empty where there is none. Files come first, in parts of --part_size images, then each tar has a part of its
own, or several (part-NNNNN-MMMM.npz); an index is the place among the files, in the k-th tar k * 10^9 and its place there.
Failures stand beside (failed_index, failed_path, failed_reason) and together in failures.jsonl; manifest.json says what made
the parts. The same command goes on where a run stopped, whatever stopped it, and makes a part anew whose photos have changed.
--add takes what no part holds, --retry_failed what failed, both into further parts: a row keeps its index for ever.

A part with a file that the disk or the network does not give is left unwritten; the others are done, then the run ends with 2.
Under torchrun part k belongs to rank k modulo their number. One run at a time writes to a folder.

Exit codes: 0 done; 2 wrong usage, unusable input, or parts left unwritten; 3 BLOCKED: the device that was asked for cannot be
used; 70 an error nobody foresaw (its traceback is in the log); 130 stopped.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

import inference
import numpy as np
from inference import LoadedModel, UsageError, log

from bulk import levers, rounds, storage
from bulk.decoding import Batch, Decoder, Row, default_num_workers
from bulk.encoder import Encoder
from bulk.parts import (
    Features,
    Layout,
    Part,
    PartWriter,
    Plan,
    Unit,
    bytes_per_image,
    check_disk,
    clear_leftovers,
    find_changed,
    part_files,
    write_failures,
)
from bulk.rounds import Lease, RunLock, agree_on_round, command_as_typed, which_rank
from bulk.sources import ImageKey, Sources, list_sources

FORMAT = 2  # of parts and manifest: what another one began is not gone on with
PART_SIZE = 10_000
LOST_AFTER = 100  # files in a row whose folder is not there: a lost disk, not wrong lines


class Recipe(NamedTuple):
    """What decides what a part holds: all of it must be the same for a run to go on, but for what only tells who began."""

    shapes: dict[str, tuple[int, ...]]
    part_size: int
    batch_size: int
    made_with: str
    manifest: dict[str, Any]


def recipe_of(args: Namespace, model: LoadedModel) -> Recipe:
    """What the parts of a run hold. A part waits in memory until it is full: hence fewer images where features are large."""
    width = model.module.config.hidden_size
    patches = (model.preprocess.image_size // model.module.config.patch_size) ** 2
    names = inference.names_to_save(args, model)
    shapes = {name: (patches, width) if name == "patch_tokens" else (width,) for name in names}
    part_size = args.part_size or max(1, min(PART_SIZE, (1 << 28) // bytes_per_image(shapes, args.feature_dtype)))
    about = inference.provenance(model) | {"command": command_as_typed()}
    made_with = json.dumps(about["versions"] | {"device": model.device.name})
    made_from = {"format": FORMAT, "device": model.device.kind, "dtype": model.dtype_name}
    made_from |= {"image_size": model.preprocess.image_size, "part_size": part_size}
    made_from |= {"features": shapes, "feature_dtype": args.feature_dtype}
    fitting = ("allow_hf32", "deterministic", "levers", "model", "dimensions", "preprocess", "pooler", "weights")
    made_from |= {name: about.pop(name) for name in fitting}
    about["weights_path"] = made_from["weights"].pop("path", None)
    manifest = json.loads(json.dumps({"made_from": made_from, "rounds": []} | about))
    batch_size = args.batch_size or inference.default_batch_size(model.device.kind)
    return Recipe(shapes, part_size, batch_size, made_with, manifest)


def make_plan(args: Namespace, sources: Sources, recipe: Recipe, lock: RunLock | Lease) -> Plan:
    """Which parts are to be made of these sources. Raises UsageError where that does not fit what the folder holds."""
    layout = Layout(lock.folder, recipe.part_size, recipe.shapes, args.feature_dtype, recipe.made_with)
    plan = Plan(layout, sources)
    with lock.planning() as may_open:
        if may_open:
            clear_leftovers(lock.folder)
        agree_on_round(plan, recipe.manifest, args.add, args.retry_failed, may_open)
    return plan


def embed(args: Namespace, sources: Sources, model: LoadedModel, lock: RunLock | Lease, decoder: Decoder) -> int:
    """Write the parts that args.output lacks, those of this rank. Returns the exit code."""
    (rank, ranks), recipe = which_rank(), recipe_of(args, model)
    plan = make_plan(args, sources, recipe, lock)
    try:
        mine = plan.numbers[rank::ranks]
        find_changed(plan, mine)
        check_disk(plan)
        to_do = [number for number in plan.unfinished() if number in mine]
        batch_size = plan.batch_size(recipe.batch_size)
        told = f"{len(to_do)} of {len(plan.numbers)} parts to do; batch size {batch_size}, {args.execution}"
        log.info(f"Rank {rank} of {ranks}: {told}")
        work = Work(plan.layout, map(plan.unit, to_do), batch_size)
        if to_do:
            encoder = Encoder(model, tuple(plan.layout.shapes), batch_size, args.execution)
            make_parts(work, encoder, decoder, lock.check_folder, Progress(len(to_do)), plan.finished)
        lock.check_folder()
        if work.given_up and ranks > 1:
            lock.wait_for_others()
        finish(plan, work.given_up, rank)
    except UsageError as error:
        raise UsageError(f"{error}; {plan.how_to_go_on()}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {plan.how_to_go_on()}") from None
    return 0


class Work:
    """The units that are to be made: which images are decoded next, and which part a batch belongs to.

    A unit that is given up, for a file that cannot be read, is taken no further.
    """

    def __init__(
        self, layout: Layout, units: Iterable[Unit | None], batch_size: int, gave_up: Callable[[int, str], None] | None = None
    ) -> None:
        self.layout, self.units, self.batch_size, self.gave_up = layout, units, batch_size, gave_up
        self.asked: deque[tuple[Part, int]] = deque()  # of each batch that is being decoded: its part, and its place there
        self.given_up: dict[int, str] = {}  # with the reasons

    def batches(self) -> Iterator[list[ImageKey] | None]:
        """Lists of at most `batch_size` keys, never across two parts, so that a resumed run makes the same batches.

        None where there is no unit at the moment.
        """
        for unit in self.units:
            if unit is None:
                yield None
                continue
            try:
                for part in unit.parts(self.layout):
                    for first in range(0, max(1, len(part.images)), self.batch_size):
                        if unit.number in self.given_up:
                            break
                        self.asked.append((part, first))
                        yield part.images[first : first + self.batch_size]
            except UsageError as error:  # a tar that is damaged
                self.give_up(unit.number, str(error))
            except OSError as error:  # or gone
                self.give_up(unit.number, f"{error.filename or unit.tar}: cannot be read ({error.strerror or error})")

    def give_up(self, number: int, reason: str) -> None:
        if number not in self.given_up:
            self.given_up[number] = reason
            if self.gave_up:
                self.gave_up(number, reason)
            else:
                log.error(f"Part {number} is left unwritten: {reason}")


def make_parts(
    work: Work,
    encoder: Encoder,
    decoder: Decoder,
    check: Callable[[], None],
    progress: Progress,
    finished: Callable[[Part], None],
) -> None:
    """Decode and encode all batches; write each part when it is full, and call finished(part) then.

    check: see PartWriter. Raises UsageError if a part cannot be written.
    """
    lost = LostFolders()
    done: list[tuple[list[Row], Features]] = []
    full: list[tuple[Part, list[tuple[list[Row], Features]]]] = []
    with PartWriter(work.layout, check, finished) as writer:
        for made in compute(work, encoder, decoder.decode(work.batches())):
            if made is not None:
                part, first, rows, features = made
                lost.count(part.images[first:], rows)
                progress.count(part, first, rows)
                if first == 0:
                    done = []  # what a part has that was given up is forgotten
                done.append((rows, features))
                if first + len(rows) == len(part.images):
                    full.append((part, done))
            # While images in a row are nowhere a disk may be gone, and these are no failures; they are once no more come.
            while full and (made is None or not lost.in_a_row):
                writer.write(*full.pop(0))
            if made is None:
                writer.wait()
    log.info(f"{progress}")


def compute(
    work: Work, encoder: Encoder, decoded: Iterator[Batch | None]
) -> Iterator[tuple[Part, int, list[Row], Features] | None]:
    """Rows and features of each batch, with its part and its place there; they are fetched only after the next one is queued.

    None where no batch comes at the moment, and at the end.
    No more of a part once a file of it cannot be read. An image whose features are not numbers has failed.
    """
    queued = None
    for batch in itertools.chain(decoded, [None]):
        following = None
        if batch is not None:
            part, first = work.asked.popleft()
            if batch.unreadable:
                work.give_up(part.number, batch.unreadable)
            if part.number in work.given_up:
                continue
            fetch = encoder.submit(batch.crops) if batch.rows else work.layout.no_features
            following = part, first, batch.rows, fetch
        if queued:
            part, first, rows, fetch = queued
            features = fetch()
            with np.errstate(over="ignore"):  # what is too large for float16 becomes Inf, and is found below
                features |= {name: features[name].astype(work.layout.dtype) for name in work.layout.shapes}
            for row in np.flatnonzero(~inference.finite_rows(features)):
                rows[row] = rows[row]._replace(reason=rows[row].reason or "its features hold NaN or Inf")
            yield part, first, rows, features
        if batch is None:
            yield None
        queued = following


class LostFolders:
    """Counts images in a row that are not there, and their folder neither: so many are no wrong lines, but a lost disk."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._delivered: set[str] = set()

    def count(self, keys: Sequence[ImageKey], rows: Sequence[Row]) -> None:
        """Raises UsageError where they are too many, or a folder is gone that gave images before."""
        for key, row in zip(keys, rows):
            self.in_a_row = self.in_a_row + 1 if row.folder_gone else 0
            if self.in_a_row >= LOST_AFTER or (row.folder_gone and key.folder in self._delivered):
                lost = f"a lost disk or mount ({self.in_a_row} images in a row are not there)"
                raise UsageError(f"{key.folder} is gone or empty, {lost}")
            if not row.reason:
                self._delivered.add(key.folder)


class Progress:
    """Counts images, and says every half minute how far the run is."""

    def __init__(self, parts: int) -> None:
        self.parts, self.begun, self.images, self.failed = parts, 0, 0, 0
        self.started = self.said = time.monotonic()
        self._number: int | None = None

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.images:,} images in {seconds:.1f} s: {self.images / seconds:.2f} img/s, {self.failed:,} failed"

    def count(self, part: Part, first: int, rows: Sequence[Row]) -> None:
        """Rows that are computed, from place `first` of a part on."""
        self.begun += part.number != self._number
        self._number = part.number
        self.images += len(rows)
        self.failed += sum(row.reason != "" for row in rows)
        if time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            done = self.begun - 1 + ((first + len(rows)) / len(part.images) if part.images else 1)
            left = (self.said - self.started) * (self.parts / done - 1) / 3600
            log.info(f"{self}; {done:.1f} of {self.parts} parts, {left:.1f} h left")


def finish(plan: Plan, given_up: Collection[int], rank: int) -> None:
    """Write failures.jsonl if all parts are there, whoever made them. Raises UsageError where files could not be read."""
    if given_up:
        raise UsageError(f"{len(given_up)} parts are left unwritten because files could not be read")
    folder, count = plan.layout.folder, len(plan.numbers)
    if left := plan.unfinished():
        log.info(f"Rank {rank} is done; {len(left)} parts are left to the others")
    else:
        failures = write_failures(folder)
        told = f"All {count} parts are" if count else "There is nothing to add: all parts are"
        log.info(f"{told} in {folder}; {failures:,} images failed (failures.jsonl)")


# --- command line ---


def output_folder(args: Namespace) -> str:
    """--output in one way of writing."""
    folder = storage.as_named(args.output)
    return folder.rstrip("/") if storage.is_remote(folder) else str(Path(folder))


def run(args: Namespace) -> int:
    """The body of the script."""
    rank, ranks = which_rank()
    with rounds.lock(output_folder(args), rank, ranks) as lock:  # before anything that takes time
        here = args.random_weights or os.path.isdir(inference.local_path(args.model_path))
        device = inference.open_as_asked(args) if args.device == "auto" or not here else None  # else workers are forked first
        sources = list_sources(args.image_path)
        log.info(f"{sources}")
        kind = device.kind if device else args.device.partition(":")[0]
        with decoder_for(args, kind) as decoder:
            if not part_files(lock.folder):
                decoder.begin(first_batches(args, kind, sources, rank))
            model = levers.load_from_args(args, device or inference.open_as_asked(args))
            return embed(args, sources, model, lock, decoder)


def preprocess_as_asked(args: Namespace) -> inference.Preprocess:
    """The pre-processing that a model will have which is loaded by these flags, long before it is loaded."""
    inference.import_transformers(args.device.partition(":")[0])
    if args.random_weights:
        found = inference.Preprocess()
    else:
        _, _, found = inference.read_description(inference.find_weights(args.model_path), args.trust_remote_code)
    return found.resized(args.image_size, args.resize, args.decode)


def decoder_for(args: Namespace, kind: str) -> Decoder:
    """Decoding workers for a kind of device."""
    preprocess, batch_size = preprocess_as_asked(args), args.batch_size or inference.default_batch_size(kind)
    batch_size, size = min(batch_size, args.part_size or batch_size), preprocess.image_size
    workers = default_num_workers(kind, batch_size, size) if args.num_workers is None else args.num_workers
    log.info(f"{workers} decoding workers")
    return Decoder(preprocess, batch_size, workers)


def first_batches(args: Namespace, kind: str, sources: Sources, rank: int) -> Iterator[list[ImageKey]]:
    """Most likely the first batches of a new run: workers may begin with them while the model is loaded."""
    size, files = args.part_size or PART_SIZE, sources.files
    batch_size = min(args.batch_size or inference.default_batch_size(kind), size, len(files) or 1)
    stop = min((rank + 1) * size, len(files))
    for first in range(rank * size, stop, batch_size):
        yield [files[place] for place in range(first, min(first + batch_size, stop))]


def make_parser(description: str | None = __doc__) -> inference.ArgumentParser:
    parser = inference.ArgumentParser(description)
    listed = "images, folders, globs, .txt lists of paths, .tar files"
    inference.add_feature_arguments(parser, listed, "folder for the parts; the same command goes on where a run stopped")
    add = parser.add_argument_group("parts").add_argument
    how = "graph: capture the forward pass, replay it (NPU, GPU)"
    add("--execution", choices=("eager", "graph"), default="eager", help=how)
    add("--num_workers", type=int, metavar="N", help="decoding processes, 0 for none (default: by the cores there are)")
    size = "images in a part (default: 10000, fewer where their features are large)"
    add("--part_size", type=inference.positive_int, metavar="N", help=size)
    add("--add", action="store_true", help="write what no part holds as further parts")
    add("--retry_failed", action="store_true", help="do failed images again, as further parts")
    levers.add_lever_arguments(parser)
    inference.add_model_arguments(parser)
    return parser


def parse(parser: inference.ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The arguments, of which those of a bulk run make sense."""
    args = parser.parse_args(argv)
    if not args.output or args.output.endswith(".npz"):
        parser.error(f"--output {args.output or repr('')}: a folder is wanted (for a few images, inference.py writes NAME.npz)")
    if args.num_workers is not None and not 0 <= args.num_workers <= 1000:
        parser.error("--num_workers: a number from 0 (decode in this process) to 1000 is wanted")
    args.deterministic = True
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return inference.run_script("embed", parse(make_parser(), argv), run)


if __name__ == "__main__":
    inference.leave(main())
