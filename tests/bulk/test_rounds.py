"""Which parts are to be made: manifest.json's rounds, --add and --retry_failed, one run at a time, ranks."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import inference
import numpy as np
import pytest
from inference import UsageError
from PIL import Image

from bulk import rounds
from bulk.rounds import RunLock, which_rank
from bulk.sources import list_sources
from bulk_runs import broken_copy, column, contents, failing, failures, make_tar, rows
from conftest import SAMPLES, TINY

pytestmark = pytest.mark.usefixtures("no_waits", "one_thread")


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# --- the manifest ---


def test_the_manifest_says_what_made_the_parts(bulk, photos, tiny_folder, tmp_path):
    bulk()
    manifest = manifest_of(tmp_path / "out")
    made_from, steps = manifest["made_from"], manifest["rounds"]
    assert made_from["weights"]["sha256"]["model.safetensors"] == inference.sha256(tiny_folder / "model.safetensors")
    told = {name: made_from[name] for name in ("format", "device", "dtype", "image_size", "deterministic", "part_size")}
    expected = {"format": 2, "device": "cpu", "dtype": "float32", "image_size": 64, "deterministic": True, "part_size": 5}
    assert told == expected
    assert made_from["features"] == {"class_token": [TINY["hidden_size"]], "mean_patch_token": [TINY["hidden_size"]]}
    listed = list_sources([str(photos)]).sha256()
    assert [
        (step["images"], step["tars"], step["parts"], step["first_index"], step["image_list_sha256"]) for step in steps
    ] == [(23, 0, 5, 0, listed)]
    assert manifest["versions"].keys() == {"python", "torch", "torch_npu", "transformers", "numpy", "pillow"}


def test_the_manifest_has_the_command_to_repeat(bulk, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed.py", "--image_path", str(photos), "--output", "a b"])
    bulk()
    manifest = manifest_of(tmp_path / "out")
    expected = f"python embed.py --image_path {photos} --output 'a b'"
    assert manifest["command"] == manifest["rounds"][0]["command"] == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--part_size", 6], "part_size (5, now 6)"),
        (["--dtype", "float16"], 'dtype ("float32", now "float16")'),
        (["--feature_dtype", "float16"], "feature_dtype"),
        (["--image_size", 32], "image_size (64, now 32)"),
        (["--save_patch_tokens"], "features"),
        (["--layers", 1], "features"),
        (["--allow_hf32"], "allow_hf32 (false, now true)"),
        (["--without", "folded_patches"], "levers"),
        (["--model_path", "other"], "weights"),
        (["--image_path", str(SAMPLES)], "list of images (23, now 6); --add takes those that no part holds"),
    ],
)
def test_a_command_that_does_not_fit_the_manifest_is_refused(bulk, tiny_folder, tmp_path, changes, named):
    if "other" in changes:
        from safetensors.torch import load_file, save_file

        changes = ["--model_path", tmp_path / "other"]
        shutil.copytree(tiny_folder, tmp_path / "other")
        tensors = load_file(tiny_folder / "model.safetensors")
        tensors["layernorm.bias"] = tensors["layernorm.bias"] + 1
        save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    before = contents(tmp_path / "out") if bulk().code == 0 else None
    done = bulk(*changes)
    assert done.code == 2
    assert f"out: begun with another {named}" in done.last
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("old", ["format 1", "no format"])
def test_a_folder_that_an_older_format_began_is_refused_in_one_line(bulk, tmp_path, old):
    bulk()
    manifest = manifest_of(tmp_path / "out")
    del manifest["made_from"]["format"]
    manifest["made_from"] |= {"format": 1} if old == "format 1" else {}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path / "out")
    for flags in ((), ("--add",), ("--retry_failed",)):
        done = bulk(*flags)
        assert done.code == 2
        then = "1" if old == "format 1" else "null"
        assert f"out: begun with another format ({then}, now 2); repeat the first command" in done.last
        assert done.last.endswith("or use another folder")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"rounds": 1}'])
def test_a_damaged_manifest_is_one_line(bulk, tmp_path, text):
    bulk()
    (tmp_path / "out" / "manifest.json").write_text(text)
    done = bulk()
    assert done.code == 2
    assert re.match(rf"error: {tmp_path}/out/manifest\.json: (the manifest cannot be read|not the manifest)", done.last)


def test_a_manifest_of_which_nothing_was_made_holds_nobody_up(bulk, tmp_path):
    bulk("--image_size", 32)
    for path in (tmp_path / "out").glob("part-*.npz"):
        path.unlink()
    assert bulk().code == 0
    assert len(manifest_of(tmp_path / "out")["rounds"]) == 1


def test_another_kind_of_device_does_not_go_on(npu, bulk, tmp_path):
    bulk()
    done = bulk("--device", "npu")
    assert done.code == 2
    assert 'out: begun with another device ("cpu", now "npu")' in done.last


def test_parts_without_a_manifest_are_left_alone(bulk, tmp_path):
    bulk()
    (tmp_path / "out" / "manifest.json").unlink()
    done = bulk()
    assert done.code == 2
    assert "it holds parts but no manifest.json" in done.terminal


# --- folders that grow ---


def test_a_run_in_two_steps_has_the_rows_of_one(bulk, photos, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for name in ("03.jpg", "07.jpg", "11.jpg", "12.jpg", "13.jpg", "14.jpg", "20.jpg"):
        shutil.copy2(photos / name, folder)
    bulk(images=folder)
    before = contents(tmp_path / "out")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    refused = bulk(images=folder)
    assert refused.code == 2 and "--add takes those that no part holds" in refused.last
    done = bulk("--add", images=folder)
    assert (done.code, len(done.parts)) == (0, 2 + 4)
    assert {name: contents(tmp_path / "out")[name] for name in before} == before
    bulk(images=folder, output=tmp_path / "whole")
    whole, ours = rows(tmp_path / "whole"), rows(tmp_path / "out")
    assert ours.keys() == whole.keys() and len(ours) == 23
    assert all(np.allclose(ours[path], whole[path], atol=1e-5) for path in whole)
    assert column(tmp_path / "out", "index") == list(range(23))
    again = bulk("--add", images=folder)
    assert (again.code, len(again.parts)) == (0, 6)
    assert "There is nothing to add: all parts are in" in again.log
    assert len(manifest_of(tmp_path / "out")["rounds"]) == 2


def test_added_parts_go_on_where_they_stopped_and_may_follow_an_unfinished_run(bulk, photos, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for number in range(12):
        shutil.copy2(photos / f"{number:02d}.jpg", folder)
    bulk(images=folder).parts[1].unlink()
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    done = bulk("--add", images=folder)
    assert len(rows(tmp_path / "out")) == 23
    before = contents(tmp_path / "out")
    done.parts[-2].unlink()
    again = bulk("--add", images=folder)
    assert "1 of 4 parts to do" in again.log
    assert contents(tmp_path / "out") == before


def test_failures_are_done_again_in_further_parts(bulk, photos, tmp_path):
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg", "21.jpg")
    bulk(images=folder)
    shutil.copy2(photos / "03.jpg", folder)
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    done = bulk("--retry_failed", images=folder)
    assert (done.code, len(done.parts)) == (0, 6)
    assert f"1 have changed since their rows were made, which stay; --add makes further ones: {folder}/08.jpg" in done.log
    assert len(rows(tmp_path / "out")) == 22
    assert [failure["path"] for failure in failures(tmp_path / "out")] == [f"{folder}/21.jpg"]
    shutil.copy2(photos / "21.jpg", folder)
    assert bulk("--retry_failed", images=folder).code == 0
    assert rows(tmp_path / "out").keys() == {str(path) for path in folder.iterdir()}
    assert failures(tmp_path / "out") == []
    assert np.load(tmp_path / "out" / "part-00006.npz")["index"].tolist() == [25]
    done = bulk(images=folder)
    assert (done.code, f"{tmp_path}/out: repeat the last command, or use --add; it was: python " in done.last) == (2, True)


def test_add_takes_no_failures_and_both_flags_take_both(bulk, photos, tmp_path):
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg")
    (folder / "22.jpg").rename(tmp_path / "22.jpg")
    bulk(images=folder)
    (tmp_path / "22.jpg").rename(folder / "22.jpg")
    shutil.copy2(photos / "03.jpg", folder)
    bulk("--add", images=folder)
    assert column(tmp_path / "out", "path")[21:] == [f"{folder}/22.jpg"]
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    bulk("--add", "--retry_failed", images=folder)
    assert column(tmp_path / "out", "path")[22:] == [f"{folder}/03.jpg", f"{folder}/08.jpg"]


def test_a_photo_that_changed_gets_a_further_row_and_the_old_one_stays(bulk, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    bulk(images=folder)
    before = contents(tmp_path / "out")
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    (folder / "09.jpg").unlink()  # has not changed
    done = bulk("--add", images=folder)
    assert done.code == 0
    assert f"1 have changed since their rows were made, and get further ones: {folder}/08.jpg" in done.log
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    added = np.load(tmp_path / "out" / "part-00005.npz")
    assert (added["path"].tolist(), added["index"].tolist()) == ([f"{folder}/08.jpg"], [23])
    expected = inference.crops_of([folder / "08.jpg"], inference.Preprocess(64, 64))
    assert added["size"].tolist() == [(folder / "08.jpg").stat().st_size] and expected.shape == (1, 64, 64, 3)
    again = bulk("--add", images=folder)
    assert (again.code, contents(tmp_path / "out")) == (0, after)
    assert "have changed" not in again.log


def test_a_photo_of_a_list_that_is_gone_has_not_changed(bulk, photos, tmp_path):
    listing, folder = tmp_path / "list.txt", shutil.copytree(photos, tmp_path / "photos")
    listing.write_text(f"{folder}/00.jpg\n{folder}/01.jpg\n")
    bulk(images=listing)
    (folder / "01.jpg").unlink()
    listing.write_text(f"{folder}/00.jpg\n{folder}/01.jpg\n{folder}/02.jpg\n")
    done = bulk("--add", images=listing)
    assert (done.code, "have changed" in done.log) == (0, False)
    assert column(tmp_path / "out", "path") == [f"{folder}/{name}.jpg" for name in ("00", "01", "02")]


def test_add_takes_new_tars_whole_and_changed_ones_again(bulk, photos, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    photo = {f"{number}.jpg": (photos / f"{number:02d}.jpg").read_bytes() for number in range(7)}
    make_tar(folder / "b.tar", photo)
    bulk(images=folder)
    before = contents(tmp_path / "out")
    assert list(before) == ["part-00000-0000.npz", "part-00000.npz"]
    make_tar(folder / "a.tar", {"new.jpg": photo["0.jpg"]})
    bulk("--add", images=folder)
    assert column(tmp_path / "out", "index")[7:] == [2 * 10**9]
    make_tar(folder / "b.tar", dict(list(photo.items())[:2]))
    done = bulk("--add", images=folder)
    assert f"1 have changed since their rows were made, and get further ones: {folder}/b.tar" in done.log
    assert column(tmp_path / "out", "index")[8:] == [3 * 10**9, 3 * 10**9 + 1]
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == 4
    assert bulk("--add", images=folder).code == 0 and contents(tmp_path / "out") == after
    (folder / "c.tar").write_bytes((folder / "b.tar").read_bytes())
    (folder / "00.jpg").write_bytes(photo["0.jpg"])
    bulk("--add", images=folder)
    assert column(tmp_path / "out", "index")[10:] == [0, 4 * 10**9, 4 * 10**9 + 1]


def test_of_a_tar_that_was_begun_add_takes_the_rest(bulk, photos, tmp_path):
    tar = make_tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(photos.iterdir())[:12]})
    bulk(images=tar)
    (tmp_path / "out" / "part-00000.npz").unlink()
    (tmp_path / "out" / "part-00000-0001.npz").unlink()
    assert bulk("--add", images=[tar, photos / "20.jpg"]).code == 0
    expected = [f"{tar}/{number:02d}.jpg" for number in range(12)] + [f"{photos}/20.jpg"]
    assert sorted(column(tmp_path / "out", "path")) == sorted(expected)


def test_what_failed_in_a_tar_is_done_again_from_the_tar(bulk, photos, tmp_path):
    members = {path.name: path.read_bytes() for path in sorted(photos.iterdir())[:7]}
    tar = make_tar(tmp_path / "a.tar", members | {"03.jpg": members["03.jpg"][:999]})
    bulk(images=tar)
    assert [failure["path"] for failure in failures(tmp_path / "out")] == [f"{tar}/03.jpg"]
    make_tar(tar, members)
    done = bulk("--retry_failed", images=tar)
    assert (done.code, failures(tmp_path / "out")) == (0, [])
    part = np.load(tmp_path / "out" / "part-00001.npz")
    assert (part["path"].tolist(), part["index"].tolist()) == ([f"{tar}/03.jpg"], [0])
    assert "which stay; --add makes further ones" in done.log


# --- one run at a time ---


@contextmanager
def another(body, *given) -> Iterator[multiprocessing.connection.Connection]:
    """Run body(pipe, *given) in a process of its own meanwhile; it has said that it is there."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=body, args=(theirs, *given))
    process.start()
    try:
        assert ours.poll(30) and ours.recv() == "there"
        yield ours
        process.join(30)
    finally:
        process.kill()
        process.join()


def hold(pipe, folder: Path, rank: int = 0, ranks: int = 1) -> None:
    with RunLock(str(folder), rank, ranks):
        pipe.send("there")
        pipe.recv()


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        ((0, 1), (0, 1), True),
        ((0, 1), (1, 2), True),
        ((1, 2), (0, 1), True),
        ((1, 2), (1, 2), True),
        ((1, 2), (1, 4), True),
        ((1, 2), (0, 2), False),
        ((0, 2), (1, 2), False),
    ],
)
def test_one_run_at_a_time_writes_to_a_folder_and_ranks_of_one_are_one(tmp_path, theirs, ours, refused):
    with another(hold, tmp_path, *theirs) as pipe:
        if refused:
            with pytest.raises(
                UsageError, match=rf"--output {tmp_path}: another run writes to it; wait for it, or use another f"
            ):
                RunLock(str(tmp_path), *ours)
        else:
            with RunLock(str(tmp_path), *ours):
                pass
        pipe.send("go")
    with RunLock(str(tmp_path), *ours):  # and then it may
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    def die(pipe) -> None:
        RunLock(str(tmp_path), 0, 1)
        pipe.send("there")
        os.kill(os.getpid(), 9)

    with another(die):
        pass
    with RunLock(str(tmp_path), 0, 1):
        pass


def test_a_second_run_is_refused_in_one_line_and_leaves_the_first_alone(bulk, tmp_path):
    done = bulk()
    done.parts[1].unlink()
    before = contents(tmp_path / "out")
    with another(hold, tmp_path / "out") as pipe:
        for flags in ((), ("--add",), ("--retry_failed",)):
            refused = bulk(*flags)
            assert (refused.code, contents(tmp_path / "out")) == (2, before)
            assert (
                refused.last == f"error: --output {tmp_path}/out: another run writes to it; wait for it, or use another folder"
            )
        pipe.send("go")
    assert bulk().code == 0


def test_where_no_locks_are_it_is_said_once(bulk, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    done = bulk()
    assert (done.code, len(done.parts)) == (0, 5)
    assert done.log.count("no locks there (No locks available); see to it that no other run writes to it") == 1


@pytest.mark.parametrize("how", ["under a file", "read-only"])
def test_an_output_that_cannot_be_made_is_named(tmp_path, monkeypatch, how):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "out" if how == "under a file" else tmp_path
    if how == "read-only":

        def refuse(*_arguments):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match=rf"--output {folder}: the folder cannot be made or written \((Not a dir|Read-only)"):
        RunLock(str(folder), 0, 1)


def test_a_disk_that_fills_up_while_it_is_planned_is_one_line(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    no_space = r"cannot be written \(No space left"
    with RunLock(str(tmp_path), 0, 1) as lock, pytest.raises(UsageError, match=no_space), lock.planning():
        pass


def test_a_folder_that_is_another_now_is_told(tmp_path):
    with RunLock(f"{tmp_path}/out", 0, 1) as lock:
        lock.check_folder()
        (tmp_path / "out").rename(tmp_path / "moved")
        with pytest.raises(UsageError, match=r"out: it was deleted, moved or unmounted during the run"):
            lock.check_folder()
        with pytest.raises(UsageError, match="it was deleted"):  # a new one in its place is not the same
            RunLock(f"{tmp_path}/out", 0, 1).__exit__()
            lock.check_folder()


# --- ranks ---


@pytest.mark.parametrize(("rank", "ranks"), [("1", None), (None, "2"), ("2", "2"), ("x", "2")])
def test_half_an_environment_of_torchrun_is_refused(bulk, monkeypatch, rank, ranks):
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    done = bulk()
    assert (done.code, done.parts) == (2, [])
    assert "RANK" in done.last and "torchrun" in done.last


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert which_rank() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert which_rank() == (3, 8)


def test_part_k_belongs_to_rank_k_modulo_ranks_whose_number_may_change(bulk, monkeypatch, tmp_path):
    assert bulk(output=tmp_path / "whole").code == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    first = bulk(output=tmp_path / "shared")
    assert (first.code, [path.name for path in first.parts]) == (0, ["part-00001.npz", "part-00004.npz"])
    assert "[INFO]" not in first.terminal and "[INFO]" in first.log
    assert "Rank 1 is done; 3 parts are left to the others" in first.log
    assert not (tmp_path / "shared" / "failures.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert bulk(output=tmp_path / "shared").code == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert (tmp_path / "shared" / "failures.jsonl").exists()


@pytest.fixture
def as_rank(monkeypatch):
    """Make the environment that of a rank of a torchrun on one host, as torch 2.9 starts it: alike from run to run."""

    def set_environment(rank: int, launch: str, restart: int = 0) -> None:
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": 29500}
        variables |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": restart}
        variables |= {
            "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_{launch}/none_{launch}/attempt_{restart}/{rank}/error.json"
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def plan_as_rank_0(folder: Path) -> None:
    with RunLock(str(folder), 0, 2) as lock, lock.planning() as may_open:
        assert may_open


@pytest.mark.parametrize("before", ["nothing", "another run", "a restart before"])
def test_other_ranks_plan_only_after_rank_0_of_their_own_run(tmp_path, as_rank, monkeypatch, before):
    monkeypatch.setattr(rounds, "PLANNING_S", 1)
    if before != "nothing":
        as_rank(0, launch="old")
        plan_as_rank_0(tmp_path)
    launch, restart = ("old", 1) if before == "a restart before" else ("new", 0)
    as_rank(1, launch, restart)
    with RunLock(str(tmp_path), 1, 2) as lock:
        with pytest.raises(UsageError, match=r"rank 0 has not begun within 1 s; start all ranks anew"), lock.planning():
            pass
        as_rank(0, launch, restart)
        plan_as_rank_0(tmp_path)  # its lock is another byte
        as_rank(1, launch, restart)
        with lock.planning() as may_open:
            assert not may_open


@pytest.fixture
def as_rank_of_two_hosts(as_rank, monkeypatch):
    monkeypatch.setattr(rounds, "PLANNING_S", 1)

    def set_environment(*given, **more) -> None:
        as_rank(*given, **more)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    return set_environment


def test_on_two_hosts_a_rank_0_that_is_there_takes_back_what_a_run_before_wrote(tmp_path, as_rank_of_two_hosts):
    as_rank_of_two_hosts(0, launch="old")
    plan_as_rank_0(tmp_path)
    as_rank_of_two_hosts(0, launch="new")
    with RunLock(str(tmp_path), 0, 2), RunLock(str(tmp_path), 1, 2) as lock:
        as_rank_of_two_hosts(1, launch="new")
        with pytest.raises(UsageError, match="rank 0 has not begun"), lock.planning():
            pass


@pytest.mark.parametrize("restart", [0, 1])
def test_on_two_hosts_whose_folders_differ_ranks_know_their_rank_0(tmp_path, as_rank_of_two_hosts, restart):
    as_rank_of_two_hosts(0, launch="on one host")
    plan_as_rank_0(tmp_path)
    as_rank_of_two_hosts(1, launch="on another", restart=restart)
    with RunLock(str(tmp_path), 1, 2) as lock:
        if restart:
            with pytest.raises(UsageError, match="rank 0 has not begun"), lock.planning():
                pass
        else:
            with lock.planning() as may_open:
                assert not may_open


def test_a_rank_0_that_fails_lets_nobody_plan(tmp_path, as_rank, monkeypatch):
    monkeypatch.setattr(rounds, "PLANNING_S", 1)
    as_rank(0, launch="new")
    with RunLock(str(tmp_path), 0, 2) as lock, pytest.raises(UsageError, match="no"), lock.planning():
        raise UsageError("no")
    as_rank(1, launch="new")
    with RunLock(str(tmp_path), 1, 2) as lock, pytest.raises(UsageError, match="rank 0 has not begun"), lock.planning():
        pass


def test_a_rank_waits_until_rank_0_has_planned(tmp_path, as_rank):
    as_rank(1, launch="new")
    planned, waiting = [], threading.Event()

    def wait() -> None:
        with RunLock(str(tmp_path), 1, 2) as lock:
            waiting.set()
            with lock.planning():
                planned.append("rank 1")

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(10)
    time.sleep(0.2)
    planned.append("rank 0")
    as_rank(0, launch="new")
    plan_as_rank_0(tmp_path)
    thread.join(10)
    assert planned == ["rank 0", "rank 1"]


def test_ranks_add_and_retry_what_rank_0_has_planned(bulk, photos, as_rank, tmp_path):
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg", "04.jpg", "05.jpg", "06.jpg", "07.jpg", "08.jpg")
    bulk(images=folder)
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    for rank in (0, 1):
        as_rank(rank, launch="new")
        assert bulk("--retry_failed", images=folder).code == 0
        assert len(contents(tmp_path / "out")) == 6 + rank
    assert len(manifest_of(tmp_path / "out")["rounds"]) == 2
    assert (len(rows(tmp_path / "out")), failures(tmp_path / "out")) == (23, [])


def test_what_fails_again_is_no_new_round_to_the_next_rank(bulk, photos, as_rank, tmp_path):
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg", "04.jpg")
    bulk(images=folder)
    shutil.copy2(photos / "03.jpg", folder)
    for rank in (0, 1):
        as_rank(rank, launch="new")
        assert bulk("--retry_failed", images=folder).code == 0
    assert [step["images"] for step in manifest_of(tmp_path / "out")["rounds"]] == [23, 2]


@pytest.mark.parametrize("wrote", ["parts", "nothing"])
def test_a_rank_that_lists_other_images_than_rank_0_is_refused(bulk, photos, as_rank, monkeypatch, tmp_path, wrote):
    as_rank(0, launch="new")
    with monkeypatch.context() as patch:
        failing(patch, lambda path: wrote == "nothing")
        assert len(bulk().parts) == (3 if wrote == "parts" else 0)
    as_rank(1, launch="new")
    shutil.copy(photos / "00.jpg", tmp_path / "more.jpg")
    done = bulk("--add", images=[photos, tmp_path / "more.jpg"])
    assert done.code == 2
    assert "rank 0 has begun with another list of images; start all ranks anew" in done.last
