"""embed.py as a whole: what the parts hold, what is left unwritten, and that the same command goes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import time
from collections import namedtuple
from multiprocessing.reduction import ForkingPickler

import inference
import numpy as np
import pytest
import torch
from inference import DeviceLost
from PIL import Image
from torch.multiprocessing.reductions import reduce_tensor

import embed
from bulk import decoding
from bulk.decoding import Decoder, read_crop
from bulk.encoder import Encoder
from bulk.parts import Layout, Unit
from bulk.sources import ImageKey
from bulk_runs import PHOTO, broken_copy, column, contents, failing, failures, make_tar, rows
from conftest import SAMPLES, TINY

SIZE = TINY["hidden_size"]
TOLD = {"index", "path", "caption", "url", "key", "size", "mtime", "failed_index", "failed_path", "failed_reason", "made_with"}
TOLD |= {"tar", "tar_size", "tar_mtime"}
pytestmark = pytest.mark.usefixtures("no_waits", "one_thread")


# --- what the parts hold ---


def test_a_row_is_one_image_with_its_place_path_and_features(bulk, photos, tiny, tmp_path):
    done = bulk()
    assert done.code == 0, done.terminal
    assert [path.name for path in done.parts] == [f"part-0000{number}.npz" for number in range(5)]
    parts = [np.load(path) for path in done.parts]
    assert column(tmp_path / "out", "index") == list(range(23))
    assert column(tmp_path / "out", "path") == sorted(str(path) for path in photos.iterdir())
    for part in parts:
        assert (part["class_token"].dtype, part["class_token"].shape) == (np.float32, (len(part["index"]), SIZE))
        for path, class_token, mean in zip(part["path"], part["class_token"], part["mean_patch_token"], strict=True):
            hidden = inference.forward(tiny, inference.crops_of([path], tiny.preprocess)).hidden[0].numpy()
            assert class_token == pytest.approx(hidden[0], abs=1e-5)
            assert mean == pytest.approx(hidden[1:].mean(0), abs=1e-5)


def test_decoding_in_workers_changes_nothing_and_sends_no_crops(bulk, request, tmp_path):
    bulk(output=tmp_path / "here")
    request.addfinalizer(lambda: ForkingPickler.register(torch.Tensor, reduce_tensor))
    request.addfinalizer(lambda: ForkingPickler._extra_reducers.pop(np.ndarray, None))
    for kind in (torch.Tensor, np.ndarray):  # a container may have 64 MB of shared memory
        ForkingPickler.register(kind, lambda _value: pytest.fail("crops were sent"))
    assert bulk("--num_workers", 2, output=tmp_path / "workers").code == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "workers")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], {"class_token": (SIZE,), "mean_patch_token": (SIZE,)}),
        (["--save_patch_tokens"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "patch_tokens": (16, SIZE)}),
        (["--save_pooler"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "pooler_output": (SIZE,)}),
        (["--layers", 2], {"class_token_layer_2": (SIZE,), "mean_patch_token_layer_2": (SIZE,)}),
    ],
)
def test_what_is_saved_is_what_was_asked_for(bulk, asked, expected):
    part = np.load(bulk(*asked).parts[0])
    assert {name: part[name].shape[1:] for name in part.files if name not in TOLD} == expected
    assert set(part.files) - set(expected) == TOLD


def test_features_can_be_saved_in_half(bulk, tmp_path):
    full, half = (np.load(bulk("--feature_dtype", kind, output=tmp_path / kind).parts[0]) for kind in ("float32", "float16"))
    assert half["class_token"].dtype == np.float16
    assert np.array_equal(half["class_token"], full["class_token"].astype(np.float16))


def test_captions_come_along_from_a_tar_and_every_part_has_their_columns(bulk, photos, tmp_path):
    fields = {"caption": "a tabby cat", "url": "https://example.org/cat.jpg", "key": "000120001", "status": "success"}
    members = {
        "0.jpg": PHOTO,
        "0.json": json.dumps(fields).encode(),
        "0.txt": b"worse",
        "1.jpg": PHOTO,
        "1.txt": "猫\n".encode(),
    }
    tar = make_tar(tmp_path / "a.tar", members | {"2.jpg": PHOTO})
    assert bulk(images=[photos / "00.jpg", tar]).code == 0
    assert column(tmp_path / "out", "path") == [f"{photos}/00.jpg", f"{tar}/0.jpg", f"{tar}/1.jpg", f"{tar}/2.jpg"]
    assert column(tmp_path / "out", "index") == [0, 10**9, 10**9 + 1, 10**9 + 2]
    assert column(tmp_path / "out", "caption") == ["", "a tabby cat", "猫", ""]
    assert column(tmp_path / "out", "url") == ["", "https://example.org/cat.jpg", "", ""]
    assert column(tmp_path / "out", "key") == ["", "000120001", "", ""]
    assert column(tmp_path / "out", "size") == [(photos / "00.jpg").stat().st_size, *[len(PHOTO)] * 3]


def test_what_a_tar_holds_has_the_features_that_it_has_unpacked(bulk, photos, tmp_path):
    tar = make_tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(photos.iterdir())})
    done = bulk(images=tar)
    assert [path.name for path in done.parts] == [*(f"part-00000-000{stretch}.npz" for stretch in range(4)), "part-00000.npz"]
    bulk(output=tmp_path / "unpacked")
    assert np.array_equal(column(tmp_path / "out", "class_token"), column(tmp_path / "unpacked", "class_token"))


def test_what_stands_in_path_can_be_given_back_in_a_list(bulk, photos, tmp_path):
    folder = tmp_path / "laion.tar"
    folder.mkdir()
    make_tar(folder / "X.TAR", {f"a/{path.name}": path.read_bytes() for path in sorted(photos.iterdir())[:3]})
    shutil.copy(photos / "07.jpg", folder)
    bulk(images=folder)
    (tmp_path / "list.txt").write_text("\n".join(column(tmp_path / "out", "path")))
    bulk(images=tmp_path / "list.txt", output=tmp_path / "again")
    for name in ("path", "size", "mtime", "key"):
        assert column(tmp_path / "again", name) == column(tmp_path / "out", name)
    assert np.allclose(column(tmp_path / "again", "class_token"), column(tmp_path / "out", "class_token"), atol=1e-5)
    assert column(tmp_path / "again", "index") == [0, 1, 2, 3]


def test_what_is_said_of_a_tar_is_said_with_its_name(bulk, photos, tmp_path):
    tar = make_tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "0.seg.png": PHOTO})
    done = bulk(images=tar)
    assert (
        f"[WARNING] {tar}: 1 images beside one of the same key are left out (0.seg.png ...); a list can name them" in done.log
    )


def test_an_empty_tar_is_a_part_of_no_rows(bulk, photos, tmp_path):
    empty = make_tar(tmp_path / "a.tar", {"notes.md": b"no photo"})
    done = bulk(images=[photos / "00.jpg", empty])
    assert (done.code, len(done.parts)) == (0, 2), done.terminal
    part = np.load(done.parts[1])
    assert (part["class_token"].shape, part["path"].shape, part["failed_path"].shape) == ((0, SIZE), (0,), (0,))
    assert bulk(images=[photos / "00.jpg", empty]).code == 0
    done = bulk(images=empty, output=tmp_path / "nothing else")
    assert (done.code, "not one of these images gave features" in done.last) == (2, True)


def test_names_that_are_no_text_go_all_the_way(bulk, tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    names = ["a\nb.jpg", "caf\udce9.jpg", "猫.jpg", "x" * 251 + ".jpg"]
    for name in names:
        (folder / name).write_bytes(PHOTO)
    (folder / "\udcff.jpg").write_bytes(b"")
    done = bulk(images=folder)
    assert done.code == 0, done.terminal
    assert set(column(tmp_path / "out", "path")) == {f"{folder}/{name}" for name in names}
    assert [(failure["path"], failure["reason"]) for failure in failures(tmp_path / "out")] == [
        (f"{folder}/\udcff.jpg", "empty file")
    ]
    before = contents(tmp_path / "out")
    Image.open(SAMPLES / "chelsea.jpg").save(folder / "caf\udce9.jpg")
    for flags in ((), ("--add",), ("--add", "--retry_failed")):
        assert bulk(*flags, images=folder).code == 0
    assert contents(tmp_path / "out") != before


# --- failures of images ---


def test_all_counts_of_a_run_over_a_mixed_folder_agree(bulk, photos, tmp_path):
    folder = broken_copy(photos, tmp_path / "set", "03.jpg", "22.jpg")
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text("a caption\n")
        path.with_suffix(".json").write_text("{}")
    done = bulk(images=f"{folder}/*")
    assert re.findall(r"([\d,]+) (?:images )?failed", done.log) == ["2", "2"]
    assert len(failures(tmp_path / "out")) == 2
    assert "23 images, 46 other files ignored" in done.log and "23 images in " in done.log


def test_a_broken_image_costs_itself_alone_and_is_listed(bulk, photos, tmp_path):
    whole = bulk(output=tmp_path / "whole")
    broken = broken_copy(photos, tmp_path / "photos", "03.jpg", "22.jpg")
    done = bulk(images=broken, output=tmp_path / "out")
    assert (done.code, len(done.parts)) == (0, 5)
    found = failures(tmp_path / "out")
    assert [(failure["index"], failure["path"]) for failure in found] == [(3, f"{broken}/03.jpg"), (22, f"{broken}/22.jpg")]
    assert all(failure["reason"].startswith("OSError: ") for failure in found)
    first, reference = np.load(done.parts[0]), np.load(whole.parts[0])
    assert first["index"].tolist() == [0, 1, 2, 4]
    assert np.array_equal(first["class_token"], reference["class_token"][[0, 1, 2, 4]])
    assert first["size"].tolist() == [(broken / f"{number:02d}.jpg").stat().st_size for number in (0, 1, 2, 4)]
    assert first["failed_index"].tolist() == [3]
    assert np.load(done.parts[4])["class_token"].shape == (2, SIZE)
    assert "23 images in " in done.log and " 2 failed" in done.log


@pytest.mark.parametrize(("broken", "reason"), [((), "its features hold NaN or Inf"), (("04.jpg",), "OSError: ")])
def test_features_that_are_no_numbers_are_a_failure_of_their_image(bulk, photos, monkeypatch, tmp_path, broken, reason):
    forward, seen = inference.forward, []

    def poisoned(*given):
        outputs = forward(*given)
        hidden = outputs.hidden.clone()
        seen.append(len(hidden))
        if len(seen) == 3:  # place 4, alone in the last batch of part 0
            hidden[0, 0, 0] = float("inf")
        return outputs._replace(hidden=hidden)

    monkeypatch.setattr(inference, "forward", poisoned)
    bulk(images=broken_copy(photos, tmp_path / "photos", *broken))
    [failure] = failures(tmp_path / "out")
    assert (failure["index"], failure["reason"].startswith(reason)) == (4, True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_too_large_for_what_they_are_saved_in_are_a_failure_too(bulk, monkeypatch, tmp_path, recwarn, dtype):
    forward, seen = inference.forward, []

    def large(*given):
        outputs = forward(*given)
        seen.append(None)
        return outputs._replace(hidden=outputs.hidden * (1e6 if len(seen) == 3 else 1))

    monkeypatch.setattr(inference, "forward", large)
    done = bulk("--feature_dtype", dtype)
    assert done.code == 0
    assert [failure["index"] for failure in failures(tmp_path / "out")] == ([4] if dtype == "float16" else [])
    assert np.isfinite(column(tmp_path / "out", "class_token")).all()
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]


def test_a_run_without_a_single_feature_is_not_a_success(bulk, photos, tmp_path):
    done = bulk(images=broken_copy(photos, tmp_path / "photos", *os.listdir(photos)))
    assert done.code == 2
    assert "not one of these images gave features" in done.terminal


def test_wrong_lines_cost_only_themselves(bulk, photos, tmp_path):
    good = sorted(map(str, photos.iterdir()))
    wrong = ["/nowhere/at/all.jpg", "/nowhere/at/once.jpg", "https:/example.org/a.jpg", f" {good[0]}", f"{photos}/gone.jpg"]
    wrong += [str(photos), f"{good[1]}/x.jpg", "x" * 5000]
    lines = [line for pair in itertools.zip_longest(good, wrong) for line in pair if line]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    started = time.monotonic()
    done = bulk(images=tmp_path / "list.txt")
    assert done.code == 0
    assert time.monotonic() - started < 20
    assert rows(tmp_path / "out").keys() == set(good)
    assert {failure["path"] for failure in failures(tmp_path / "out")} == set(wrong)


# --- nothing lost, nothing made twice ---


def test_the_same_command_again_keeps_what_is_there_and_does_the_rest(bulk, tmp_path):
    done = bulk()
    before, times = contents(tmp_path / "out"), {path: path.stat().st_mtime_ns for path in done.parts}
    for part in (1, 4):
        done.parts[part].unlink()
    (tmp_path / "out" / ".part-00001.npz.0123abcd.tmp").write_bytes(b"half a part")
    again = bulk()
    assert contents(tmp_path / "out") == before
    assert [path.stat().st_mtime_ns == times[path] for path in again.parts] == [True, False, True, True, False]
    assert "2 of 5 parts to do" in again.log
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert "0 of 5 parts to do" in bulk().log


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_photos_that_changed_are_named_and_their_parts_made_anew(bulk, photos, tmp_path, finished):
    folder = shutil.copytree(photos, tmp_path / "photos")
    done = bulk(images=folder)
    before = contents(tmp_path / "out")
    if not finished:
        done.parts[3].unlink()
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    (folder / "11.jpg").unlink()
    (folder / "11.jpg").symlink_to(photos / "12.jpg")
    again = bulk(images=folder)
    assert (again.code, f"All 5 parts are in {tmp_path}/out; 0 images failed" in again.log) == (0, True)
    assert f"[WARNING] 2 have changed, and their parts are made anew: {folder}/08.jpg, {folder}/11.jpg" in again.log
    after = contents(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == ["part-00001.npz", "part-00002.npz"]
    bulk(images=folder, output=tmp_path / "whole")
    assert after == contents(tmp_path / "whole")
    done = bulk(images=folder)
    assert "have changed" not in done.log and "0 of 5 parts to do" in done.log


def test_a_part_that_was_to_be_made_anew_stays_to_be_so_when_the_run_stops(bulk, photos, monkeypatch, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    bulk(images=folder)
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    with monkeypatch.context() as patch:
        failing(patch, lambda path: path.endswith("09.jpg"))
        done = bulk(images=folder)
    assert (done.code, "4 of 5 parts are finished" in done.last) == (2, True)
    assert "1 of 5 parts to do" in bulk(images=folder).log
    bulk(images=folder, output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("count", [12, 4, 23])
def test_a_tar_that_was_replaced_is_made_anew(bulk, photos, tmp_path, count):
    tar, data = tmp_path / "a.tar", [path.read_bytes() for path in sorted(photos.iterdir())]
    make_tar(tar, {f"{number}.jpg": data[number] for number in range(12)})
    bulk(images=tar)
    make_tar(tar, {f"{number}.jpg": data[-number] for number in range(count)})
    done = bulk(images=tar)
    assert (done.code, f"1 have changed, and their parts are made anew: {tar}" in done.log) == (0, True)
    bulk(images=tar, output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert column(tmp_path / "out", "size") == [len(data[-number]) for number in range(count)]


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_a_part_that_is_not_whole_is_named_and_made_again(bulk, tmp_path, damage):
    done = bulk()
    before, path = contents(tmp_path / "out"), done.parts[1]
    path.write_bytes(b"" if damage == "empty" else before[path.name][:-900])
    again = bulk()
    assert again.code == 0
    assert f"{path} is damaged (" in again.log and "put aside with .damaged behind its name" in again.log
    assert contents(tmp_path / "out") == before
    assert "1 of 5 parts to do" in again.log


def test_parts_of_other_versions_are_named_at_the_end(bulk, monkeypatch):
    done = bulk()
    assert "not all made with the same" not in done.log
    done.parts[3].unlink()
    real = inference.versions
    monkeypatch.setattr(inference, "versions", lambda: real() | {"pillow": "99.0"})
    again = bulk()
    assert again.code == 0
    assert "[WARNING] The parts were not all made with the same versions and device: from part-00000.npz: " in again.log
    assert "from part-00003.npz: {" in again.log and '"pillow": "99.0"' in again.log


def test_a_full_disk_is_one_line_and_finished_parts_stay(bulk, monkeypatch, tmp_path):
    write, written = np.lib.format.write_array, []

    def full(file, values, **options):
        written.append(file)
        if len(written) == 2 * 16 + 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, values, **options)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    done = bulk()
    assert done.code == 2
    path = tmp_path / "out" / "part-00002.npz"
    assert done.last == (
        f"error: {path}: cannot be written (No space left on device); "
        f"2 of 5 parts are finished in {tmp_path}/out; run the same command again to go on"
    )
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "manifest.json", "part-00000.npz", "part-00001.npz"]


def test_too_little_disk_is_refused_before_anything_is_computed(bulk, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    done = bulk()
    assert done.code == 2
    assert "needed and 0.000 GB free; make room" in done.terminal
    assert not done.parts
    monkeypatch.undo()
    assert bulk("--feature_dtype", "float16").code == 0  # what it advises


def test_the_disk_that_is_needed_is_told(bulk, tmp_path):
    (tmp_path / "list.txt").write_text(f"{SAMPLES}/chelsea.jpg\n" * 300)
    done = bulk("--part_size", 300, "--batch_size", 50, images=tmp_path / "list.txt")
    told = float(done.log.split("1 parts to write, ")[1].split(" GB needed")[0])
    assert told * 1e9 == pytest.approx(done.parts[0].stat().st_size, rel=0.2, abs=600_000)


def test_a_blocked_run_leaves_no_result_since_it_would_have_none(bulk, no_torch_npu, tmp_path):
    done = bulk("--device", "npu")
    assert (done.code, done.last.startswith("BLOCKED: torch_npu is not installed")) == (3, True)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_device_that_is_lost_ends_the_run_and_what_is_written_is_good(bulk, monkeypatch, tmp_path):
    submit, calls = Encoder.submit, itertools.count()

    def lost(encoder, crops):
        if next(calls) == 8:  # in the third part
            raise DeviceLost("an operator failed on the device")
        return submit(encoder, crops)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "_lost", [])  # it is so for good in a process, but not for the tests behind
        patch.setattr(Encoder, "submit", lost)
        done = bulk()
    assert (done.code, "error: an operator failed on the device" in done.terminal) == (70, True)
    assert [path.name for path in done.parts] == ["part-00000.npz", "part-00001.npz"]
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_an_output_folder_that_goes_is_no_success(bulk, monkeypatch, tmp_path, how):
    def gone(key, preprocess):
        if key.name.endswith("21.jpg"):
            os.rename(tmp_path / "out", tmp_path / "moved")  # at once, where rmtree may race with a part that is being written
            if how == "deleted":
                shutil.rmtree(tmp_path / "moved", ignore_errors=True)
        return read_crop(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", gone)
    done = bulk()
    assert done.code == 2
    assert "it was deleted, moved or unmounted during the run" in done.last
    assert "All 5 parts" not in done.log


def test_an_output_folder_that_goes_when_all_is_done_is_no_success_either(bulk, monkeypatch, tmp_path):
    bulk()
    batch_size = embed.Plan.batch_size  # is asked for once it is known what is to be done
    move = lambda *given: os.rename(tmp_path / "out", tmp_path / "moved") or batch_size(*given)
    monkeypatch.setattr(embed.Plan, "batch_size", move)
    done = bulk()
    assert (done.code, "it was deleted, moved or unmounted during the run" in done.last) == (2, True)


# --- sizes ---


@pytest.mark.parametrize(("each", "size"), [(8192, 10_000), (1 << 20, 256), (1 << 30, 1)])
def test_a_part_holds_fewer_images_where_their_features_are_large(bulk, bulk_flags, monkeypatch, tmp_path, each, size):
    place = bulk_flags.index("--part_size")
    del bulk_flags[place : place + 2]
    monkeypatch.setattr(embed, "bytes_per_image", lambda shapes, dtype: each)
    monkeypatch.setattr(embed, "check_disk", lambda plan: None)
    bulk(images=SAMPLES / "chelsea.jpg")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["made_from"]["part_size"] == size


def test_a_batch_is_no_larger_than_what_there_is(bulk, photos, monkeypatch, tmp_path):
    done = bulk("--batch_size", 999999999)
    assert (done.code, "batch size 5, eager" in done.log) == (0, True)
    assert "batch size 1, eager" in bulk("--batch_size", 8, images=photos / "00.jpg", output=tmp_path / "one").log

    def refuse(*_given):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    done = bulk(output=tmp_path / "more")
    assert (done.code, "use a smaller --batch_size or --num_workers" in done.last) == (2, True)


def test_how_far_the_run_is_is_said_every_half_minute(bulk, photos, monkeypatch, tmp_path):
    now = itertools.count(step=40)
    monkeypatch.setattr(embed.time, "monotonic", lambda: next(now))
    empty = make_tar(tmp_path / "a.tar", {})
    done = bulk("--num_workers", 0, images=[empty, make_tar(tmp_path / "b.tar", {"0.jpg": (photos / "00.jpg").read_bytes()})])
    assert done.code == 0, done.terminal
    assert "0 images in " in done.log and " of 2 parts, " in done.log and " h left" in done.log


# --- usage ---


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", ""], "--output '': a folder is wanted"),
        (["--output", "f.npz"], "--output f.npz: a folder is wanted (for a few images, inference.py writes NAME.npz)"),
        (["--num_workers", "-1"], "--num_workers: a number from 0 (decode in this process) to 1000 is wanted"),
        (["--num_workers", "1001"], "--num_workers: a number from 0"),
        (["--part_size", "0"], "'0' is not a whole number from 1"),
        (["--execution", "fast"], "argument --execution: invalid choice: 'fast'"),
        (["--image_path"], "argument --image_path: expected at least one argument"),
    ],
)
def test_wrong_flags_are_one_line_and_2(bulk, flags, said):
    done = bulk(*flags)
    assert (done.code, said in done.terminal, done.terminal.count("\n")) == (2, True, 1)


def test_an_output_that_cannot_be_made_is_named(bulk, tmp_path):
    (tmp_path / "file").touch()
    done = bulk(output=tmp_path / "file" / "out")
    assert done.code == 2
    assert done.last.startswith(f"error: --output {tmp_path}/file/out: the folder cannot be made or written (")


def test_graphs_are_refused_on_the_cpu(bulk):
    done = bulk("--execution", "graph")
    assert done.code == 2
    assert done.last.startswith(
        "error: --execution graph: the CPU has no graphs to capture; use it with cuda or npu; 0 of 5 parts"
    )


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_run_on_an_npu_gives_what_the_cpu_gives(whole_captures, bulk, tmp_path, execution):
    bulk(output=tmp_path / "cpu")
    assert bulk("--device", "npu", "--execution", execution, output=tmp_path / "npu").code == 0
    found, expected = (np.array(column(tmp_path / kind, "class_token")) for kind in ("npu", "cpu"))
    assert np.linalg.norm(found - expected) < 5e-6 * np.linalg.norm(expected)
    assert column(tmp_path / "npu", "path") == column(tmp_path / "cpu", "path")


def test_a_part_is_finished_while_nobody_knows_whether_more_will_come(tiny, tiny_folder, photos, tmp_path):
    """A worker of a cluster is asked for one part after another: its last one may end in photos that are nowhere."""
    flags = ["--image_path", "x", "--output", str(tmp_path), "--model_path", str(tiny_folder), "--device", "cpu"]
    args = embed.parse(embed.make_parser(), flags)
    args.script = "embed"
    recipe = embed.recipe_of(args, tiny)
    layout = Layout(str(tmp_path), 10, recipe.shapes, "float32", recipe.made_with)
    images = [*map(ImageKey, map(str, sorted(photos.iterdir())[:3])), ImageKey("/nowhere/a.jpg")]
    finished = []

    def units():
        yield Unit(0, 0, images)
        for _ in range(300):
            if finished:
                return
            time.sleep(0.02)
            yield None
        pytest.fail("not written until the end")

    encoder = Encoder(tiny, tuple(recipe.shapes), 2)
    with Decoder(tiny.preprocess, 2, 0) as decoder:
        embed.make_parts(embed.Work(layout, units(), 2), encoder, decoder, lambda: None, embed.Progress(1), finished.append)
    assert len(np.load(tmp_path / "part-00000.npz")["path"]) == 3
