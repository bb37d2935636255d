"""Bulk runs: what the parts hold, that nothing is lost whatever stops a run, memory, several processes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, TESTS, TINY, script_environment
from inference import BadImage, ImageKey, Unreadable
from PIL import Image

SIZE = TINY["hidden_size"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """23 different small photographs."""
    folder = tmp_path_factory.mktemp("photos")
    originals = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp]*g"))]
    for number in range(23):
        image = originals[number % len(originals)]
        image.resize((90 + 3 * number, 80 + 2 * number)).save(folder / f"{number:02d}.jpg", quality=90)
    return folder


@pytest.fixture
def bulk(run, tiny_folder, photos, tmp_path):
    """Run in parts of 5, batches of 2: five parts of 23 photos, the last one short, the last batch of each too."""

    def run_bulk(*flags, images=photos, output=tmp_path / "out"):
        common = ("--model_path", tiny_folder, "--device", "cpu", "--part_size", 5, "--batch_size", 2, "--num_workers", 0)
        done = run("--image_path", images, "--output", output, *common, *flags)
        done.parts = sorted(Path(output).glob("part-*.npz"))
        return done

    return run_bulk


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.npz"))}


def broken_copy(photos: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(photos, folder)
    for name in names:
        data = (photos / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return folder


def test_a_row_is_one_image_with_its_place_path_and_features(bulk, photos, tiny):
    done = bulk()
    assert done.code == 0
    assert [path.name for path in done.parts] == [f"part-0000{number}.npz" for number in range(5)]
    rows = [np.load(path) for path in done.parts]
    assert np.concatenate([part["index"] for part in rows]).tolist() == list(range(23))
    paths = np.concatenate([part["path"] for part in rows]).tolist()
    assert paths == sorted(str(path) for path in photos.iterdir())
    for part in rows:
        assert (part["class_token"].dtype, part["class_token"].shape) == (np.float32, (len(part["index"]), SIZE))
        for path, class_token, mean in zip(part["path"], part["class_token"], part["mean_patch_token"], strict=True):
            crop = torch.from_numpy(inference.read_crop(ImageKey(0, path, path, 0, -1), tiny.preprocess).copy())[None]
            hidden = inference.forward(tiny, crop)[0][0].numpy()
            assert class_token == pytest.approx(hidden[0], abs=1e-5)
            assert mean == pytest.approx(hidden[1:].mean(0), abs=1e-5)


def test_decoding_in_workers_changes_nothing(bulk, tmp_path):
    bulk(output=tmp_path / "here")
    bulk("--num_workers", 2, output=tmp_path / "workers")
    assert contents(tmp_path / "here") == contents(tmp_path / "workers")


def test_a_broken_image_costs_itself_alone_and_is_listed(bulk, photos, tmp_path):
    whole = bulk(output=tmp_path / "whole")
    broken = broken_copy(photos, tmp_path / "photos", "03.jpg", "22.jpg")
    done = bulk(images=broken, output=tmp_path / "out")
    assert (done.code, len(done.parts)) == (0, 5)
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(failure["index"], failure["path"]) for failure in failures] == [(3, str(broken / "03.jpg")), (22, str(broken / "22.jpg"))]
    assert all(failure["reason"].startswith("OSError: ") for failure in failures)
    first, reference = np.load(done.parts[0]), np.load(whole.parts[0])
    assert first["index"].tolist() == [0, 1, 2, 4]
    assert np.array_equal(first["class_token"], reference["class_token"][[0, 1, 2, 4]])
    assert first["failed_index"].tolist() == [3]
    assert np.load(done.parts[4])["class_token"].shape == (2, SIZE)
    assert "23 images in " in done.log and " 2 failed; waited for reading " in done.log


def test_nan_features_are_a_failure_of_their_image(bulk, monkeypatch, tmp_path):
    forward, seen = inference.forward, []

    def poisoned(model, crops):
        hidden, pooler = forward(model, crops)
        hidden = hidden.clone()
        seen.append(len(crops))
        if len(seen) == 3:  # places 4 of part 0
            hidden[0, 0, 0] = float("inf")
        return hidden, pooler

    monkeypatch.setattr(inference, "forward", poisoned)
    bulk()
    failures = (tmp_path / "out" / "failures.jsonl").read_text()
    assert [json.loads(line)["index"] for line in failures.splitlines()] == [4]
    assert "its features hold NaN or Inf" in failures


def test_a_run_without_a_single_feature_is_not_a_success(bulk, photos, tmp_path):
    broken = broken_copy(photos, tmp_path / "photos", *os.listdir(photos))
    done = bulk(images=broken)
    assert done.code == 2
    assert "not one of these images gave features" in done.terminal


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"class_token": (SIZE,), "mean_patch_token": (SIZE,)}),
        (["--save_patch_tokens"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "patch_tokens": (16, SIZE)}),
        (["--save_pooler"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "pooler_output": (SIZE,)}),
    ],
)
def test_what_is_saved_is_what_was_asked_for(bulk, flags, expected):
    part = np.load(bulk(*flags).parts[0])
    known = {"index", "path", "failed_index", "failed_path", "failed_reason"}
    assert {name: part[name].shape[1:] for name in part.files if name not in known} == expected


def test_features_can_be_saved_in_half(bulk, tmp_path):
    full, half = (np.load(bulk("--feature_dtype", kind, output=tmp_path / kind).parts[0]) for kind in ("float32", "float16"))
    assert half["class_token"].dtype == np.float16
    assert np.array_equal(half["class_token"], full["class_token"].astype(np.float16))


def test_the_manifest_says_what_made_the_parts(bulk, photos, tiny_folder, tmp_path):
    bulk()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made_from = manifest["made_from"]
    assert made_from["image_list_sha256"] == inference.list_images([str(photos)]).sha256()
    assert made_from["weights"]["sha256"] == {"model.safetensors": inference._sha256(tiny_folder / "model.safetensors")}
    assert (made_from["images"], made_from["part_size"], manifest["parts"]) == (23, 5, 5)
    assert (made_from["dtype"], made_from["image_size"], made_from["feature_dtype"]) == ("float32", 64, "float32")
    assert set(manifest["versions"]) == {"python", "torch", "torch_npu", "transformers", "numpy", "pillow"}


# --- nothing lost ---


def test_the_same_command_again_keeps_what_is_there_and_does_the_rest(bulk, tmp_path):
    done = bulk()
    before, times = contents(tmp_path / "out"), {path: path.stat().st_mtime_ns for path in done.parts}
    for part in (1, 4):
        done.parts[part].unlink()
    again = bulk()
    assert contents(tmp_path / "out") == before
    assert [path.stat().st_mtime_ns == times[path] for path in again.parts] == [True, False, True, True, False]
    assert "2 of 5 parts to do" in again.log
    assert "0 images in " in bulk().log


def test_leftovers_of_a_killed_run_are_cleared_away(bulk, tmp_path):
    bulk()
    (tmp_path / "out" / "part-00002.npz").unlink()
    (tmp_path / "out" / ".part-00002.npz.0123abcd.tmp").write_bytes(b"half a part")
    bulk()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--part_size", 6], "part_size (5, now 6)"),
        (["--dtype", "float16"], 'dtype ("float32", now "float16")'),
        (["--feature_dtype", "float16"], "feature_dtype"),
        (["--image_size", 32], "image_size (64, now 32)"),
        (["--save_patch_tokens"], "features"),
        (["--allow_hf32"], "allow_hf32 (false, now true)"),
        (["--model_path", "native"], "weights"),
        (["--image_path", str(SAMPLES)], "images (23, now 6)"),
    ],
)
def test_a_command_that_does_not_fit_the_manifest_is_refused(bulk, tiny_native, tmp_path, flags, named):
    before = contents(tmp_path / "out") if bulk().code == 0 else None
    done = bulk(*[tiny_native if flag == "native" else flag for flag in flags])
    assert done.code == 2
    assert f"out: begun with another {named}" in done.terminal.splitlines()[-1] or "another pooler" in done.terminal
    assert contents(tmp_path / "out") == before


def test_parts_without_a_manifest_are_left_alone(bulk, tmp_path):
    bulk()
    (tmp_path / "out" / "manifest.json").unlink()
    done = bulk()
    assert done.code == 2
    assert "it holds parts but no manifest.json" in done.terminal


SLOW = """
import sys, time
import inference

submit = inference.Encoder.submit
def slow(encoder, crops):
    time.sleep(0.05)
    return submit(encoder, crops)
inference.Encoder.submit = slow
if __name__ == "__main__":
    sys.exit(inference.main())
"""


@pytest.fixture
def start(tmp_path, tiny_folder, photos):
    """Start a slow bulk run as a process of its own and wait until its first part is there."""

    def start_run(output: Path) -> subprocess.Popen:
        (tmp_path / "slow.py").write_text(SLOW)
        common = ["--model_path", tiny_folder, "--device", "cpu", "--part_size", 5, "--batch_size", 2, "--num_workers", 1]
        flags = ["--image_path", photos, "--output", output, "--output_log", tmp_path / "slow.log", *common]
        command = [sys.executable, str(tmp_path / "slow.py"), *map(str, flags)]
        process = subprocess.Popen(command, env=script_environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (output / "part-00000.npz").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        return process

    return start_run


def test_after_kill_9_the_same_command_ends_as_if_nothing_had_happened(start, bulk, tmp_path):
    process = start(tmp_path / "killed")
    process.kill()
    process.communicate()
    survived = contents(tmp_path / "killed")
    assert 1 <= len(survived) < 5
    bulk("--num_workers", 1, output=tmp_path / "killed")
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(start, tmp_path, how):
    process = start(tmp_path / "stopped")
    process.send_signal(how)
    _, terminal = process.communicate(timeout=60)
    finished = len(contents(tmp_path / "stopped"))
    assert process.returncode == 130
    assert terminal.splitlines()[-1] == (
        f"stopped; {finished} of 5 parts are finished in {tmp_path}/stopped; run the same command again to go on"
    )
    assert "Traceback" not in terminal


def test_a_full_disk_is_one_line_and_finished_parts_stay(bulk, monkeypatch, tmp_path):
    savez, written = np.savez, []

    def full(file, **arrays):
        written.append(file)
        if len(written) == 3:
            file.write(b"half a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    done = bulk()
    assert done.code == 2
    path = tmp_path / "out" / "part-00002.npz"
    assert done.terminal.splitlines()[-1] == (
        f"error: {path}: cannot be written (No space left on device); "
        f"2 of 5 parts are finished in {tmp_path}/out; run the same command again to go on"
    )
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "part-00000.npz", "part-00001.npz"]


def test_too_little_disk_is_refused_before_anything_is_computed(bulk, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    done = bulk()
    assert done.code == 2
    assert "needed and 0.000 GB free; make room" in done.terminal
    assert not list((tmp_path / "out").iterdir())


def test_the_disk_that_is_needed_is_told_and_about_right(bulk, tmp_path):
    done = bulk("--save_patch_tokens")
    told = float(done.log.split("5 parts to write, ")[1].split(" GB needed")[0])
    taken = sum(path.stat().st_size for path in done.parts) / 1e9
    assert told == pytest.approx(taken, rel=0.1, abs=0.001)


def test_an_output_that_cannot_be_made_is_named(bulk, tmp_path):
    (tmp_path / "file").touch()
    done = bulk(output=tmp_path / "file" / "out")
    assert done.code == 2
    assert done.terminal.splitlines()[-1].startswith(f"error: --output {tmp_path}/file/out: the folder cannot be made (")


def test_a_worker_killed_by_the_system_is_one_line(bulk, monkeypatch, tmp_path):
    read_crop = inference.read_crop

    def deadly(key, preprocess):
        if key.index == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_crop(key, preprocess)

    monkeypatch.setattr(inference, "read_crop", deadly)
    done = bulk("--num_workers", 1)
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert last.startswith("error: a decoding worker was lost, most likely for lack of memory (DataLoader worker")
    assert last.endswith("run the same command again to go on")


def test_a_file_that_the_disk_does_not_give_leaves_its_part_for_later(bulk, monkeypatch, tmp_path):
    read_bytes, broken = inference.read_bytes, True

    def flaky(key):
        if broken and key.index == 6:
            raise Unreadable(f"{key.name}: Input/output error")
        return read_bytes(key)

    monkeypatch.setattr(inference, "read_bytes", flaky)
    done = bulk()
    assert done.code == 2
    assert [path.name for path in done.parts] == ["part-00000.npz", "part-00002.npz", "part-00003.npz", "part-00004.npz"]
    assert "Part 1 is left unwritten: " in done.log and "06.jpg: Input/output error (tried three times)" in done.log
    assert done.terminal.splitlines()[-1].endswith("4 of 5 parts are finished in " + str(tmp_path / "out") + "; run the same command again to go on")
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    broken = False
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_error_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"data")
    real_open, failures, waits = open, [], []

    def flaky(*arguments, **options):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return real_open(*arguments, **options)

    monkeypatch.setattr("builtins.open", flaky)
    monkeypatch.setattr(time, "sleep", waits.append)
    key = ImageKey(0, str(path), str(path), 0, -1)
    assert inference.read_bytes(key) == b"data"
    assert len(waits) == 2
    failures.append(-99)
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(Unreadable, match=r"photo\.jpg: Stale file handle"):
        inference.read_bytes(key)


def test_a_missing_file_is_recorded_and_a_missing_folder_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    gone = str(tmp_path / "gone.jpg")
    with pytest.raises(BadImage, match="No such file"):
        inference.read_bytes(ImageKey(0, gone, gone, 0, -1))
    unmounted = str(tmp_path / "mount" / "gone.jpg")
    with pytest.raises(Unreadable, match="No such file"):
        inference.read_bytes(ImageKey(0, unmounted, unmounted, 0, -1))


def test_a_member_cut_off_from_its_tar_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size = 10_000
        tar.addfile(info, io.BytesIO(bytes(10_000)))
    key = inference.list_images([str(path)])[0]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(Unreadable, match="shorter than it was"):
        inference.read_bytes(key)


def test_recorded_failures_can_be_redone_from_the_list(bulk, photos, tmp_path):
    broken = broken_copy(photos, tmp_path / "photos", "03.jpg", "22.jpg")
    bulk(images=broken)
    for name in ("03.jpg", "22.jpg"):
        shutil.copy(photos / name, broken / name)
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    (tmp_path / "redo.txt").write_text("".join(json.loads(line)["path"] + "\n" for line in lines))
    redone = bulk(images=tmp_path / "redo.txt", output=tmp_path / "redone")
    assert np.load(redone.parts[0])["path"].tolist() == [str(broken / "03.jpg"), str(broken / "22.jpg")]


# --- devices, memory, graphs ---


def test_out_of_memory_in_a_bulk_run_halves_the_batch_and_changes_nothing_else(npu, bulk, monkeypatch, tmp_path):
    expected = bulk("--device", "npu", "--batch_size", 16, "--part_size", 20, output=tmp_path / "roomy")
    load_model = inference.load_model

    def load_and_limit(*arguments):
        model = load_model(*arguments)
        npu.memory.limit = npu.memory.allocated + 1_500_000
        return model

    monkeypatch.setattr(inference, "load_model", load_and_limit)
    done = bulk("--device", "npu", "--batch_size", 16, "--part_size", 20, output=tmp_path / "tight")
    assert done.code == 0
    assert "[WARNING] Out of memory on npu:0 with batch size 16: going on with 8" in done.log
    for part, reference in zip(done.parts, expected.parts, strict=True):
        values, exact = np.load(part)["class_token"], np.load(reference)["class_token"]
        assert np.linalg.norm(values - exact) < 5e-6 * np.linalg.norm(exact)


def test_a_bulk_run_by_graph_equals_eager(npu, bulk, tmp_path):
    eager, graph = (bulk("--device", "npu", "--execution", kind, output=tmp_path / kind) for kind in ("eager", "graph"))
    for part, reference in zip(graph.parts, eager.parts, strict=True):
        values, exact = np.load(part)["class_token"], np.load(reference)["class_token"]
        assert np.linalg.norm(values - exact) < 1e-6 * np.linalg.norm(exact)


def test_workers_are_as_many_as_shared_memory_allows(npu, monkeypatch):
    usage = namedtuple("usage", "total used free")
    device = inference.open_device("npu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(32))
    for free, workers in ((10**12, 16), (1 << 28, 6), (1 << 26, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free, 0, free))
        assert inference.default_num_workers(device, 64, 224) == workers


# --- several processes ---


def test_parts_are_shared_out_and_the_number_of_ranks_may_change(bulk, monkeypatch, tmp_path):
    whole = bulk(output=tmp_path / "whole")
    assert whole.code == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    first = bulk(output=tmp_path / "shared")
    assert [path.name for path in first.parts] == ["part-00001.npz", "part-00004.npz"]
    assert not (tmp_path / "shared" / "failures.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    bulk(output=tmp_path / "shared")
    monkeypatch.setenv("RANK", "1")
    bulk(output=tmp_path / "shared")
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert (tmp_path / "shared" / "failures.jsonl").exists()


DYING = """
import os, signal, sys
import inference

write_part = inference.write_part
def die_once(path, arrays):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and path.name == "part-00003.npz":
        os.kill(os.getpid(), signal.SIGKILL)
    write_part(path, arrays)
inference.write_part = die_once
if __name__ == "__main__":
    sys.exit(inference.main())
"""


def test_torchrun_brings_a_killed_rank_back_and_nothing_is_lost(bulk, tiny_folder, photos, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    common = ["--model_path", tiny_folder, "--device", "cpu", "--part_size", 5, "--batch_size", 2, "--num_workers", 0]
    flags = ["--image_path", photos, "--output", tmp_path / "shared", "--output_log", tmp_path / "ranks.log", *common]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    environment = script_environment(PYTHONPATH=f"{ROOT}:{TESTS}", OMP_NUM_THREADS="1")
    command = [*torchrun, str(tmp_path / "dying.py"), *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    bulk(output=tmp_path / "whole")
    shared, whole = contents(tmp_path / "shared"), contents(tmp_path / "whole")
    assert shared.keys() == whole.keys()
    for name in whole:
        with np.load(tmp_path / "shared" / name) as ours, np.load(tmp_path / "whole" / name) as reference:
            assert ours["path"].tolist() == reference["path"].tolist()
            assert ours["class_token"] == pytest.approx(reference["class_token"], abs=1e-5)
    assert (tmp_path / "shared" / "failures.jsonl").read_text() == ""
