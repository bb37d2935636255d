"""What ends a run from outside: signals, kill -9, lost workers, torchrun. Nothing is lost, and the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import embed
from bulk import decoding, parts
from bulk.decoding import read_crop
from bulk.encoder import Encoder
from bulk.rounds import RunLock
from bulk_runs import column, contents, failing, failures
from conftest import ROOT, script_environment

pytestmark = pytest.mark.usefixtures("no_waits", "one_thread")


@pytest.fixture
def start(tmp_path, bulk_flags, photos):
    """Start a run that waits for `seconds` at each batch, in a process group of its own; go on when its first part is there."""
    running = []

    def child(arguments: list[str], terminal: Path, seconds: float) -> None:
        os.setsid()
        os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        submit = Encoder.submit
        Encoder.submit = lambda encoder, crops: threading.Event().wait(seconds) or submit(encoder, crops)
        os._exit(embed.main(arguments))

    def start_run(output: Path, seconds: float = 0.2, first: str = "part-00000.npz") -> multiprocessing.Process:
        arguments = ["--image_path", photos, "--output", output, *bulk_flags, "--num_workers", 2]
        arguments += ["--output_log", tmp_path / "slow.log"]
        given = (list(map(str, arguments)), tmp_path / "terminal", seconds)
        process = multiprocessing.get_context("fork").Process(target=child, args=given)
        process.start()
        running.append(process)
        deadline = time.monotonic() + 60
        while not (output / first).exists():
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "terminal").read_text()
            time.sleep(0.01)
        return process

    yield start_run
    for process in running:
        process.kill()
        process.join()


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


# --- from outside ---


def test_a_second_run_is_refused_while_the_first_is_alive(start, bulk, tmp_path):
    process = start(tmp_path / "out")
    for flags in ((), ("--add",)):
        done = bulk(*flags)
        assert done.code == 2
        assert done.last == f"error: --output {tmp_path}/out: another run writes to it; wait for it, or use another folder"
    process.join(60)
    assert process.exitcode == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
def test_after_kill_9_the_workers_end_and_the_same_command_goes_on_at_once(start, bulk, tmp_path):
    process = start(tmp_path / "killed")
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.join()
    survived = contents(tmp_path / "killed")
    assert 1 <= len(survived) < 5
    assert bulk("--num_workers", 1, output=tmp_path / "killed").code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert wait_for(lambda: not any(map(is_running, workers)), 10)


@pytest.mark.parametrize("how", ["SIGINT", "SIGINT to all", "SIGTERM to all", "SIGHUP to all", "twice"])
def test_a_stopped_run_says_how_to_go_on(start, tmp_path, how):
    process = start(tmp_path / "stopped")
    name = "SIGINT" if how == "twice" else how.split()[0]
    if how.endswith("all"):
        os.killpg(process.pid, getattr(signal, name))
    else:
        os.kill(process.pid, getattr(signal, name))
    if how == "twice":
        os.kill(process.pid, signal.SIGTERM)
    assert wait_for(lambda: process.exitcode is not None)
    terminal = (tmp_path / "terminal").read_text()
    finished = len(contents(tmp_path / "stopped"))
    assert process.exitcode == 130, terminal
    last = terminal.splitlines()[-1]
    assert last == f"stopped; {finished} of 5 parts are finished in {tmp_path}/stopped; run the same command again to go on"
    assert "Traceback" not in terminal and "killed by signal" not in terminal


def interrupt(real: Callable, calls: int) -> Callable:
    """The same function, which gets a Ctrl-C at this call of it."""
    made = []

    def interrupted(*given, **more):
        made.append(None)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **more)

    return interrupted


MOMENTS = {
    "while images are listed": (embed, "list_sources", 1, "stopped; nothing was saved"),
    "while it is planned": (embed, "agree_on_round", 1, "stopped; nothing was saved"),
    "while photos are compared": (embed, "find_changed", 1, "stopped; 0 of 5 parts are finished in "),
    "before the first batch": (Encoder, "submit", 1, "stopped; 0 of 5 parts are finished in "),
    "within a part": (Encoder, "submit", 5, "stopped; "),
    "while photos are decoded": (decoding, "read_crop", 13, "stopped; "),
    "at the end": (embed, "finish", 1, "stopped; 5 of 5 parts are finished in "),
    "while failures are gathered": (embed, "write_failures", 1, "stopped; 5 of 5 parts are finished in "),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_whenever_ctrl_c_comes_it_is_one_line_and_the_same_command_goes_on(bulk, monkeypatch, tmp_path, moment):
    place, name, calls, said = moment
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupt(getattr(place, name), calls))
        done = bulk()
    assert (done.code, done.last.startswith(said)) == (130, True), done.terminal
    assert "Traceback" not in done.terminal
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert failures(tmp_path / "out") == []


def test_a_part_that_is_being_written_when_ctrl_c_comes_is_written_whole(bulk, monkeypatch, tmp_path):
    write = parts.write_part

    def slow(path, arrays):
        if path.endswith("part-00001.npz"):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)
        write(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_part", slow)
        done = bulk()
    assert (done.code, [path.name for path in done.parts]) == (130, ["part-00000.npz", "part-00001.npz"])
    assert done.last.startswith("stopped; 2 of 5 parts are finished")


# --- workers ---


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_worker_that_is_lost_is_one_line(bulk, monkeypatch, tmp_path, how):
    def deadly(key, preprocess):
        if key.name.endswith("12.jpg"):
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else threading.Event().wait(60)
        return read_crop(key, preprocess)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_crop", deadly)
        patch.setattr(decoding, "TIMEOUT_S", 1 if how == "hangs" else 60)
        done = bulk("--num_workers", 1)
    assert done.code == 2, done.terminal
    lost = "a decoding worker was lost, most likely for lack of memory ("
    assert done.last.startswith(f"error: {'no image came for 1 s, as from a disk or network' if how == 'hangs' else lost}")
    assert done.last.endswith("run the same command again to go on")
    assert wait_for(lambda: not multiprocessing.active_children(), 10)  # none is left
    assert bulk("--num_workers", 1).code == 0
    assert column(tmp_path / "out", "index") == list(range(23))


def test_a_mistake_in_the_code_is_no_lost_worker(bulk, monkeypatch):
    def mistaken(key):
        raise TypeError("a mistake")

    monkeypatch.setattr(decoding, "size_and_mtime", mistaken)
    done = bulk("--num_workers", 1)
    assert (done.code, "TypeError: a mistake (unforeseen; the traceback is in the log)" in done.terminal) == (70, True)
    assert "in mistaken" in done.log


# --- torchrun ---


def troubled_rank(arguments: list[str], folder: Path) -> None:
    """Rank 1 is killed at its first start, and slow at its second; rank 0 waits until it is there. 12.jpg cannot be read."""
    rank = os.environ["RANK"]
    if (rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    submit = Encoder.submit

    def slow(encoder, crops):
        if rank == "1":
            (folder / "there").touch()
        while rank == "0" and not (folder / "there").exists():
            threading.Event().wait(0.05)
        threading.Event().wait(0.5 if rank == "1" else 0)
        return submit(encoder, crops)

    Encoder.submit = slow
    sys.exit(embed.main(arguments))


def torchrun(arguments: list[str], folder: Path) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork", "max_restarts": 1}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", **options)
    elastic_launch(config, troubled_rank)(arguments, folder)


def test_torchrun_brings_a_killed_rank_back_and_no_spoiled_part_ends_the_others(
    bulk, bulk_flags, photos, monkeypatch, tmp_path
):
    flags = ["--image_path", photos, "--output", tmp_path / "out", *bulk_flags, "--output_log", tmp_path / "ranks.log"]
    with monkeypatch.context() as patch:
        failing(patch, lambda path: path.endswith("12.jpg"))
        process = multiprocessing.get_context("fork").Process(target=torchrun, args=(list(map(str, flags)), tmp_path))
        process.start()
        process.join(90)
    log = (tmp_path / "ranks.log").read_text()
    assert process.exitcode == 1, log
    assert "Part 2 is left unwritten" in log
    assert log.count("Rank 1 of 2") == 1
    assert sorted(contents(tmp_path / "out")) == [f"part-0000{part}.npz" for part in (0, 1, 3, 4)], log
    assert log.count("1 parts are left unwritten because files could not be read; 4 of 5 parts are finished") == 1
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert failures(tmp_path / "out") == []


def test_ranks_that_wait_for_each_other_do_not_do_so_for_ever(tmp_path):
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        with RunLock(str(tmp_path), 1, 2) as lock:
            theirs.send("there")
            theirs.recv()
            lock.wait_for_others()

    process = multiprocessing.get_context("fork").Process(target=other)
    with RunLock(str(tmp_path), 0, 2) as lock:
        process.start()
        assert ours.poll(30) and ours.recv() == "there"
        started = time.monotonic()
        threading.Timer(0.5, ours.send, ["go on"]).start()
        lock.wait_for_others()
        assert time.monotonic() - started > 0.4
    process.join(30)
    assert process.exitcode == 0


def test_a_run_by_its_command_line_from_another_folder_is_the_same(bulk, bulk_flags, photos, tmp_path):
    command = [sys.executable, ROOT / "embed.py", "--image_path", photos, "--output", "out", *bulk_flags, "--num_workers", 2]
    command += ["--output_log", "embed.log"]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path / "elsewhere",
        env=script_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("All 5 parts are in out; 0 images failed (failures.jsonl)")
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "elsewhere" / "out") == contents(tmp_path / "whole")
