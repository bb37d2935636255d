"""embed.py on a Ray cluster: the same parts, made by as many devices as the cluster has.

    RAY_ADDRESS=auto python embed_cluster.py --image_path s3://bucket/shards/ --output s3://bucket/features/ --device npu
    python embed_cluster.py --image_path photos/ --output features/ --device cpu --workers 2

A worker for each device holds the model and makes one part after another, as embed.py does: same batches, same bits. What dies
is begun anew, on another node where its own is gone. The same command goes on where a run stopped. Without RAY_ADDRESS a
cluster of this machine alone is started, for trying. Code, weights and packages must be the same on all nodes, and lie at the
same paths; photos and output where all nodes reach them. Needs requirements-cluster.txt.

Exit codes: as embed.py's.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

import inference
from inference import UsageError, log

import embed
from bulk import levers, rounds
from bulk.decoding import Decoder, Row
from bulk.encoder import Encoder
from bulk.parts import Layout, Part, Plan, Unit, check_disk, find_changed
from bulk.sources import Sources, list_sources

RESOURCES = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
IN_FLIGHT = 2  # units of a worker: it decodes the next one while the one before computes
RETRIES = 3  # of a unit whose worker dies; Ray's own would be used up in seconds where the worker's node is gone
START_S = 600  # for all workers to have loaded the model, or for one to come back where all have died
SLOW_S = 60  # after which a worker with nothing to do makes what another one still has not made


class Opened(NamedTuple):
    """What a worker has loaded: on which node, what its parts hold, what all nodes must have the same, and if it is a trial."""

    node: str
    recipe: embed.Recipe
    same: dict[str, Any]
    is_trial: bool


class Maker(embed.Progress):
    """An actor with a device: makes one unit after another as embed.py does, in one run of its pipeline."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(1)
        self.args, self.model, self.pipeline, self.beginning = args, None, None, threading.Lock()
        self.feed: queue.Queue[Unit] = queue.Queue()
        self.waiting: dict[int, Future[tuple[int, int, str]]] = {}
        self.counts: dict[int, tuple[int, int]] = {}  # images and failures of what is being made

    def open(self) -> Opened:
        """Load the model."""
        import ray

        node = ray.util.get_node_ip_address()
        try:
            os.chdir(self.args.working_folder)  # at which relative paths begin
        except OSError as error:
            raise UsageError(
                f"node {node}: {self.args.working_folder}: {error.strerror}; it must be there on all nodes"
            ) from error
        inference.limit_megapixels(self.args)
        self.model = levers.load_as_asked(self.args, inference.open_as_asked(self.args))
        recipe = embed.recipe_of(self.args, self.model)
        files = sorted([*inference.ROOT.glob("*.py"), *inference.ROOT.glob("bulk/*.py")])
        code = {path.name: inference.sha256(path) for path in files}
        same = recipe.manifest["made_from"] | {"versions": recipe.manifest["versions"], "code": code}
        return Opened(node, recipe, same, inference.is_trial(self.args, self.model))

    def make(self, unit: Unit, layout: Layout, batch_size: int) -> tuple[int, int, str]:
        """Make a unit. Returns how many images it has and how many failed, or why it was given up."""
        with self.beginning:  # two are asked for at once
            if self.model is None:
                self.open()
            self.layout, made = layout, Future()
            self.waiting[unit.number] = made
            self.feed.put(unit)
            if self.pipeline is None:
                self.pipeline = threading.Thread(target=self._run, args=(batch_size,), daemon=True)
                self.pipeline.start()
        return made.result()

    def _run(self, batch_size: int) -> None:
        try:
            work = embed.Work(self.layout, self._units(), batch_size, self._gave_up)
            encoder = Encoder(self.model, tuple(self.layout.shapes), batch_size, self.args.execution)
            with Decoder(self.model.preprocess, batch_size, self.args.num_workers) as decoder:
                embed.make_parts(work, encoder, decoder, lambda: None, self, self._finished)
        except BaseException as error:
            if inference.is_lost(error):
                os._exit(1)  # a process whose device is lost computes nothing more: Ray begins another
            for made in self.waiting.values():
                made.set_exception(error)
            raise

    def _units(self) -> Iterator[Unit | None]:
        while True:
            try:
                yield self.feed.get(timeout=0.1)
            except queue.Empty:
                yield None

    def count(self, part: Part, first: int, rows: Sequence[Row]) -> None:
        images, failed = self.counts.get(part.number, (0, 0))
        self.counts[part.number] = images + len(rows), failed + sum(row.reason != "" for row in rows)

    def _finished(self, part: Part) -> None:
        if part.path == self.layout.path(part.number):
            self.waiting.pop(part.number).set_result((*self.counts.pop(part.number), ""))

    def _gave_up(self, number: int, reason: str) -> None:
        self.counts.pop(number, None)
        self.waiting.pop(number).set_result((0, 0, reason))


def drive(args: Namespace, sources: Sources, lock: rounds.RunLock | rounds.Lease) -> int:
    """Start the workers, let them make all parts, and return the exit code."""
    makers = start(args, RESOURCES[args.device])
    first = open_all(makers)
    inference.settle(args, args.device, first.is_trial)
    plan = embed.make_plan(args, sources, first.recipe, lock)
    try:
        find_changed(plan, plan.numbers)
        check_disk(plan)
        batch_size = plan.batch_size(first.recipe.batch_size)
        told = f"{len(plan.unfinished())} of {len(plan.numbers)} parts to do"
        log.info(f"{told}; {len(makers)} workers, batch size {batch_size}, {args.execution}")
        given_up = make_all(makers, first, plan, batch_size, lock.check_folder)
        if not given_up and (left := plan.unfinished()):
            told = f"{len(left)} parts that workers have written are not in {plan.layout.folder}"
            raise UsageError(f"{told}: it must be the same folder on all nodes")
        embed.finish(plan, given_up, 0)
    except UsageError as error:
        raise UsageError(f"{error}; {plan.how_to_go_on()}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {plan.how_to_go_on()}") from None
    return 0


def start(args: Namespace, resource: str) -> list[Any]:
    """A worker for each device. Raises UsageError where the cluster has too few."""
    import ray

    there = ray.cluster_resources()
    count = args.workers or (1 if resource == "CPU" else int(there.get(resource, 0)))
    if not 0 < count <= there.get(resource, 0):
        had = ", ".join(f"{name}: {amount:g}" for name, amount in sorted(there.items()) if ":" not in name)
        raise UsageError(f"the cluster has too few {resource}s for {max(count, 1)} workers; it has {had}")
    able = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
    of_a_node = min(node.get("CPU", 0) // (count if resource == "CPU" else node[resource]) for node in able)
    cores = max(1, int(min(of_a_node, there.get("CPU", 0) // count)))
    args.num_workers = max(1, min(16, cores - 1)) if args.num_workers is None else args.num_workers
    needs = {"num_cpus": min(cores, 1 + args.num_workers), "num_gpus": int(resource == "GPU")}
    needs |= {"resources": {resource: 1}} if resource not in ("CPU", "GPU") else {}
    lives = {"max_restarts": -1, "max_concurrency": 2 * IN_FLIGHT}
    return [ray.remote(**lives, **needs)(Maker).remote(args) for _ in range(count)]


def answer(of: Any) -> Any:
    """What a worker gave; what it raised is raised as it was there, and not with its traceback for a message."""
    import ray

    try:
        return ray.get(of)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def open_all(makers: list[Any]) -> Opened:
    """Let all workers load the model. Raises UsageError where some cannot, or differ from the first."""
    import ray

    opening = [maker.open.options(max_task_retries=RETRIES).remote() for maker in makers]
    waiting, deadline = opening, time.monotonic() + START_S
    while waiting and time.monotonic() < deadline:
        ready, waiting = ray.wait(waiting, timeout=1)  # a short one, for a Ctrl-C
        for one in ready:
            try:
                answer(one)
            except ray.exceptions.RayActorError as error:
                raise UsageError(f"a worker died while it loaded the model ({inference.first_line(error)})") from error
    if waiting:
        raise UsageError(f"{len(waiting)} of {len(opening)} workers did not start in {START_S} s; use fewer --workers")
    first, *others = map(answer, opening)
    for other in others:
        require_same(first, other)
    first.recipe.manifest["command"] = rounds.command_as_typed()
    return first


def require_same(first: Opened, other: Opened) -> None:
    """Raises UsageError that names node and difference where a worker is not as the first one is."""
    now, then = other.same, first.same
    told = [f"{name} ({differing(now[name], then[name])})" for name in then if now[name] != then[name]]
    if told:
        raise UsageError(f"node {other.node} has other {', other '.join(told)} than node {first.node}")


def differing(found: Any, expected: Any) -> str:
    """What of two values differs, in a few words."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        return ", ".join(f"{name} {differing(found.get(name), expected.get(name))}" for name in names[:3])
    return f"{found!r:.80}, not {expected!r:.80}"


def make_all(makers: list[Any], first: Opened, plan: Plan, batch_size: int, check: Callable[[], None]) -> dict[int, str]:
    """Let the workers make what is to be done. Returns the parts that were given up, with the reasons."""
    import ray
    from tqdm import tqdm

    left, under_way, resting, given_up = deque(plan.unfinished()), {}, {}, {}
    deaths, images, failures, started = Counter(), 0, 0, time.monotonic()
    heard = started

    def begin(maker: Any, number: int) -> None:
        under_way[maker.make.remote(plan.unit(number), plan.layout, batch_size)] = maker, number, time.monotonic()

    with tqdm(total=len(left), unit="part") as bar:
        while left or under_way:
            for maker in (maker for maker in makers if maker not in resting.values()):
                busy = sum(other is maker for other, *_ in under_way.values())
                for _ in range(min(IN_FLIGHT - busy, len(left))):
                    begin(maker, left.popleft())
                if not busy and not left:
                    numbers = [number for _, number, since in under_way.values() if time.monotonic() - since > SLOW_S]
                    begin(maker, min(numbers, key=numbers.count)) if numbers else None
            check()
            for ended in ray.wait([*under_way, *resting], timeout=1)[0]:
                heard = time.monotonic()
                if ended in resting:  # begun anew, perhaps elsewhere
                    require_same(first, answer(ended))
                    del resting[ended]
                    continue
                maker, number, _ = under_way.pop(ended)
                try:
                    counts = answer(ended)
                except ray.exceptions.RayActorError:
                    if maker not in resting.values():
                        resting[maker.open.options(max_task_retries=-1).remote()] = maker
                    deaths[number] += 1
                    if any(other == number for _, other, _ in under_way.values()):
                        continue  # another worker is making it
                    if deaths[number] <= RETRIES:
                        left.appendleft(number)
                        continue
                    counts = 0, 0, f"its worker died {deaths[number]} times"
                under_way = {ref: what for ref, what in under_way.items() if what[1] != number}
                if deaths[number] and number in left:
                    left.remove(number)
                images, failures = images + counts[0], failures + counts[1]
                if counts[2]:
                    given_up[number] = counts[2]
                    log.error(f"Part {number} is left unwritten: {counts[2]}")
                else:
                    plan.changed.discard(number)
                bar.update()
            if len(resting) == len(makers) and time.monotonic() - heard > START_S:
                raise UsageError(f"all workers died, and none was begun anew in {START_S} s")
            bar.set_postfix_str(f"{images / (time.monotonic() - started):.2f} img/s, {failures:,} failed")
    return given_up


@contextmanager
def cluster() -> Iterator[None]:
    """Ray, at RAY_ADDRESS or begun here. Raises UsageError where there is none."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address and address not in ("auto", "local") and "://" not in address:  # Ray itself would try for ten minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), 20).close()
        ray.init(**({} if address else {"include_dashboard": False}), logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"RAY_ADDRESS={address}: there is no cluster, or it is another token's ({error})") from error
    signal.signal(signal.SIGTERM, at_sigterm)  # ray.init() has put its own in its place
    try:
        yield
    finally:
        ray.shutdown()


def run(args: Namespace) -> int:
    """The body of the script."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error}. Run: pip install -r requirements-cluster.txt") from error
    args.working_folder = os.getcwd()
    with rounds.lock(embed.output_folder(args), 0, 1) as lock:  # before anything that takes time
        sources = list_sources(args.image_path)
        log.info(f"{sources}")
        with cluster():
            return drive(args, sources, lock)


def make_parser(description: str | None = __doc__) -> inference.ArgumentParser:
    parser = embed.make_parser(description)
    parser.add_argument(
        "--workers", type=inference.positive_int, metavar="N", help="devices to use (default: all of the cluster)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = embed.parse(parser, argv)
    if args.device not in RESOURCES:
        parser.error(f"--device {args.device}: name the kind of device that each worker gets: npu, cuda or cpu")
    return inference.run_script("embed_cluster", args, run)


if __name__ == "__main__":
    inference.leave(main())
