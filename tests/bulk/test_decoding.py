"""Bytes to crops: what is known of an image, and what workers that die, hang or err do to a run."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import inference
import numpy as np
import pytest
from inference import BadImage, Preprocess, UsageError
from PIL import Image

from bulk import decoding, storage
from bulk.decoding import Decoder, default_num_workers, read_crop, size_and_mtime
from bulk.sources import ImageKey, index_tar, list_sources
from bulk.storage import Unreadable
from bulk_runs import PHOTO, make_tar
from conftest import SAMPLES

PREPROCESS = Preprocess(64, 64)
pytestmark = pytest.mark.usefixtures("no_waits")


def keys_of(folder: Path) -> list[ImageKey]:
    return list(list_sources([str(folder)]).files)


def in_batches(keys: list[ImageKey], size: int = 2) -> list[list[ImageKey]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


# --- one image ---


def test_size_and_time_are_the_file_s_and_of_a_member_its_own_size_and_the_tar_s_time(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    os.utime(tmp_path / "a.jpg", ns=(1, 1_700_000_000_123_456_789))
    tar = make_tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "1.jpg": b"12345"})
    os.utime(tar, ns=(1, 987_654_321))
    assert size_and_mtime(ImageKey(f"{tmp_path}/a.jpg")) == (len(PHOTO), 1_700_000_000_123_456_789)
    assert [size_and_mtime(key) for key in index_tar(str(tar)).images] == [(len(PHOTO), 987_654_321), (5, 987_654_321)]
    for gone in (ImageKey("nowhere.jpg"), ImageKey("no.tar/0.jpg", 6, 512, 5), ImageKey("nu\0ll.jpg"), ImageKey("x" * 5000)):
        assert size_and_mtime(gone) == (0, 0)


def test_a_member_has_the_time_that_its_tar_had_when_it_was_indexed(tmp_path):
    tar = make_tar(tmp_path / "a.tar", {"0.jpg": PHOTO})
    os.utime(tar, ns=(1, 1000))
    [key] = index_tar(str(tar)).images
    os.utime(tar, ns=(1, 2000))  # another is there by now, so that the row will be told to be of the one before
    assert size_and_mtime(key) == (len(PHOTO), 1000)


def test_what_is_known_of_an_image_goes_with_it(tmp_path):
    tar = make_tar(
        tmp_path / "a.tar", {"0.jpg": PHOTO, "0.txt": b"a cat", "1.jpg": PHOTO[:9000], "2.jpg": b"", "3.jpg": b"text"}
    )
    with Decoder(PREPROCESS, 4, 0) as decoder:
        [batch] = decoder.decode([list(index_tar(str(tar)).images)])
    assert [row.texts for row in batch.rows] == [{"caption": "a cat"}, {}, {}, {}]
    assert [row.size for row in batch.rows] == [len(PHOTO), 9000, 0, 4]
    assert [row.reason.partition(":")[0] for row in batch.rows] == [
        *("", "OSError", "empty file", "not an image that can be read (JPEG, PNG, WEBP, TIFF, GIF, BMP)")
    ]
    assert np.array_equal(batch.crops[0].numpy(), inference.crops_of([SAMPLES / "chelsea.jpg"], PREPROCESS)[0].numpy())
    assert batch.unreadable == ""


def test_a_photo_that_is_lost_with_its_folder_is_told_from_one_that_was_deleted(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.jpg").write_bytes(PHOTO)
    (tmp_path / "file").touch()
    expected = {
        "full/gone.jpg": False,
        "empty/gone.jpg": True,  # as a mount point without its disk
        "nowhere/gone.jpg": True,
        "file/gone.jpg": True,
        "full": False,
        "full/" + "x" * 300 + ".jpg": False,
    }
    keys = [ImageKey(f"{tmp_path}/{name}") for name in expected] + [
        ImageKey(f"{tmp_path}/no.tar/0.jpg", len(f"{tmp_path}/no.tar"), 512, 9)
    ]
    with Decoder(PREPROCESS, 7, 0) as decoder:
        [batch] = decoder.decode([keys])
    assert [row.folder_gone for row in batch.rows] == [*expected.values(), True]
    assert all(row.reason for row in batch.rows)


def test_a_file_that_the_disk_does_not_give_ends_its_batch(photos, monkeypatch):
    keys = keys_of(photos)[:4]
    real = storage.read

    def read(path, *span):
        if path.endswith("01.jpg"):
            raise Unreadable(f"{path}: Input/output error")
        return real(path, *span)

    monkeypatch.setattr(storage, "read", read)
    with Decoder(PREPROCESS, 2, 0) as decoder:
        first, second = decoder.decode(in_batches(keys))
    assert (first.unreadable, len(first.rows)) == (f"{keys[1].name}: Input/output error", 1)
    assert (second.unreadable, len(second.rows)) == ("", 2)


def test_a_caption_that_the_disk_does_not_give_is_no_empty_caption(tmp_path, monkeypatch):
    [key] = index_tar(str(make_tar(tmp_path / "a.tar", {"0.jpg": PHOTO, "0.txt": b"a cat"}))).images
    real = storage.read

    def read(path, offset=0, size=-1):
        if (offset, size) == key.txt:
            raise Unreadable(f"{path}: Input/output error")
        return real(path, offset, size)

    monkeypatch.setattr(storage, "read", read)
    with Decoder(PREPROCESS, 1, 0) as decoder:
        [batch] = decoder.decode([[key]])
    assert batch.unreadable == f"{tmp_path}/a.tar: Input/output error"


def test_a_lack_of_memory_is_no_bad_image(photos, monkeypatch):
    def short(*_given, **_more):
        raise MemoryError

    monkeypatch.setattr(Image, "open", short)
    key = keys_of(photos)[0]
    with Decoder(PREPROCESS, 1, 0) as decoder:
        [batch] = decoder.decode([[key]])
    assert (batch.unreadable, batch.rows) == (f"{key.name}: not enough memory to decode it", [])


# --- all of them ---


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_with_the_crops_that_one_process_makes(photos, monkeypatch, num_workers):
    keys, real = keys_of(photos), read_crop

    def uneven(key, preprocess):
        threading.Event().wait(0.05 if int(Path(key.name).stem) % 3 == 0 else 0)
        return real(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", uneven)
    with Decoder(PREPROCESS, 2, num_workers) as decoder:
        found = [(batch.rows, batch.crops.clone()) for batch in decoder.decode(in_batches(keys))]
    assert [len(rows) for rows, _ in found] == [2] * 11 + [1]
    assert [row.size for rows, _ in found for row in rows] == [size_and_mtime(key)[0] for key in keys]
    crops = np.concatenate([crops.numpy() for _, crops in found])
    assert np.array_equal(crops, inference.crops_of([key.name for key in keys], PREPROCESS).numpy())


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_crops_hold_until_two_more_batches_have_been_asked_for(photos, num_workers):
    keys = keys_of(photos)
    expected = inference.crops_of([key.name for key in keys], PREPROCESS).numpy()
    with Decoder(PREPROCESS, 1, num_workers) as decoder:
        held = []
        for place, batch in enumerate(decoder.decode(in_batches(keys, 1))):
            held = [*held, batch.crops][-3:]
            threading.Event().wait(0.02 if num_workers else 0)  # for workers to write over what they may
            for back, crops in enumerate(reversed(held)):
                assert np.array_equal(crops[0].numpy(), expected[place - back])


def test_no_more_is_asked_for_than_is_decoded(photos):
    asked = []

    def batches():
        for batch in in_batches(keys_of(photos)):
            asked.append(batch)
            yield batch

    for num_workers, ahead in ((0, 1), (2, 4)):
        asked.clear()
        with Decoder(PREPROCESS, 2, num_workers) as decoder:
            decoded = decoder.decode(batches())
            next(decoded)
            assert len(asked) == ahead
            next(decoded)
            assert len(asked) == ahead + 1
            assert len(list(decoded)) == 10


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("ahead", ["the same", "the same and less", "another", "other batches"])
def test_what_workers_begin_with_is_taken_where_it_is_asked_for_and_else_forgotten(photos, monkeypatch, num_workers, ahead):
    keys, log = keys_of(photos)[:15], multiprocessing.Array("i", 23)
    begun = {"the same": keys, "the same and less": keys[:2], "another": keys[::-1], "other batches": keys[:2] + keys[8:]}[
        ahead
    ]

    def counted(key, preprocess):
        with log.get_lock():
            log[int(Path(key.name).stem)] += 1
        return read_crop(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", counted)
    with Decoder(PREPROCESS, 2, num_workers) as decoder:
        decoder.begin(in_batches(begun))
        crops = np.concatenate([batch.crops.numpy().copy() for batch in decoder.decode(in_batches(keys))])
    assert np.array_equal(crops, inference.crops_of([key.name for key in keys], PREPROCESS).numpy())
    assert all(log[:15]) and (sum(log) == 15 or ahead in ("another", "other batches"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_who_has_nothing_at_the_moment_is_given_what_is_done_and_asked_again(photos, num_workers):
    first, *others = in_batches(keys_of(photos)[:6])
    found = []

    def batches():
        yield first
        while not found:  # it comes though no further one is asked for
            yield None
        yield from (None, None)
        yield from others

    with Decoder(PREPROCESS, 2, num_workers) as decoder:
        for batch in decoder.decode(batches()):
            found.append(batch)
    assert [len(batch.rows) for batch in found if batch] == [2, 2, 2]
    assert found[1] is None and found[-1] is not None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_images_are_an_empty_batch_and_no_batches_are_none(num_workers):
    with Decoder(PREPROCESS, 2, num_workers) as decoder:
        [batch] = decoder.decode([[]])
        assert (batch.rows, batch.crops.shape) == ([], (0, 64, 64, 3))
        assert list(decoder.decode([])) == []


def test_two_decoders_do_not_mix(photos):
    keys = keys_of(photos)[:6]
    small = Preprocess(32, 32)
    with Decoder(PREPROCESS, 2, 1) as one, Decoder(small, 2, 1) as other:
        pairs = list(zip(one.decode(in_batches(keys)), other.decode(in_batches(keys))))
        assert [(first.crops.shape[1], second.crops.shape[1]) for first, second in pairs] == [(64, 32)] * 3
        expected = inference.crops_of([key.name for key in keys[4:]], small)
        assert np.array_equal(pairs[-1][1].crops.numpy(), expected.numpy())


def test_too_little_memory_is_one_line(monkeypatch):
    def refuse(*_given):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UsageError, match="use a smaller --batch_size or --num_workers"):
        Decoder(PREPROCESS, 2, 0)


# --- workers ---


def left() -> list[multiprocessing.Process]:
    deadline = time.monotonic() + 10
    while (running := multiprocessing.active_children()) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return running


@pytest.mark.parametrize("when", ["while it is waited for", "while the device computes"])
def test_a_worker_that_is_killed_is_one_line(photos, monkeypatch, when):
    def deadly(key, preprocess):
        if key.name.endswith("05.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_crop(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", deadly)
    lost = r"a decoding worker was lost, most likely for lack of memory \(.*--num_workers"
    with pytest.raises(UsageError, match=lost), Decoder(PREPROCESS, 1, 2) as decoder:
        for _batch in decoder.decode(in_batches(keys_of(photos), 1)):
            threading.Event().wait(0.2 if when == "while the device computes" else 0)
    assert not left()


def test_a_worker_that_hangs_is_one_line_and_not_waited_for(photos, monkeypatch):
    def hanging(key, preprocess):
        threading.Event().wait(60 if key.name.endswith("05.jpg") else 0)
        return read_crop(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", hanging)
    monkeypatch.setattr(decoding, "TIMEOUT_S", 1)
    started = time.monotonic()
    hangs = "no image came for 1 s, as from a disk or network that hangs"
    with pytest.raises(UsageError, match=hangs), Decoder(PREPROCESS, 1, 2) as decoder:
        list(decoder.decode(in_batches(keys_of(photos), 1)))
    assert not left()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [TypeError("a mistake"), TimeoutError("a mistake"), BadImage("a mistake")])
def test_a_mistake_in_the_code_of_a_worker_comes_to_light(photos, monkeypatch, num_workers, error):
    def mistaken(key):
        raise error

    monkeypatch.setattr(decoding, "size_and_mtime", mistaken)
    with pytest.raises(type(error), match="a mistake"), Decoder(PREPROCESS, 2, num_workers) as decoder:
        list(decoder.decode(in_batches(keys_of(photos))))
    assert not left()


def test_workers_end_with_the_block_however_it_is_left(photos):
    with pytest.raises(KeyboardInterrupt), Decoder(PREPROCESS, 1, 2) as decoder:
        next(decoder.decode(in_batches(keys_of(photos), 1)))
        assert len(multiprocessing.active_children()) == 2
        raise KeyboardInterrupt
    assert not left()


def test_workers_leave_the_answer_to_signals_to_the_main_process(photos):
    with Decoder(PREPROCESS, 1, 2) as decoder:
        decoded = decoder.decode(in_batches(keys_of(photos), 1))
        next(decoded)
        for worker in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(worker.pid, number)
        assert len(list(decoded)) == 22


@pytest.mark.parametrize("how", ["no more processes", "they die"])
def test_workers_that_cannot_be_started_are_one_line_and_none_is_left(monkeypatch, how):
    fork, forks = os.fork, []

    def refuse():
        forks.append(None)
        if how == "they die":
            return fork() or os._exit(1)
        if len(forks) == 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(UsageError, match=r"3 decoding workers cannot be started \(.*\); use a smaller --num_workers"):
        Decoder(PREPROCESS, 1, 3)
    assert not left()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
def test_workers_end_by_themselves_when_the_main_process_is_killed(photos, monkeypatch):
    monkeypatch.setattr(decoding, "read_crop", lambda *_given: threading.Event().wait(600))  # they hang, too
    ours, theirs = multiprocessing.Pipe()

    def main_process() -> None:
        with Decoder(PREPROCESS, 1, 2) as decoder:
            theirs.send([worker.pid for worker in multiprocessing.active_children()])
            next(decoder.decode(in_batches(keys_of(photos), 1)))

    process = multiprocessing.get_context("fork").Process(target=main_process)
    process.start()
    assert ours.poll(30)
    workers = ours.recv()
    assert len(workers) == 2 and all(map(is_running, workers))
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert not any(map(is_running, workers))


def test_signals_are_heard_again_once_the_workers_are_there():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with Decoder(PREPROCESS, 1, 1):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.fixture
def memory(monkeypatch) -> Callable[[int], None]:
    """Sets how many GiB the machine has."""
    sysconf = os.sysconf

    def give(gib: int) -> None:
        monkeypatch.setattr(os, "sysconf", lambda name: (gib << 30) // 4096 if name == "SC_PHYS_PAGES" else sysconf(name))

    give(1024)
    return give


def test_photos_of_the_largest_size_in_all_workers_take_half_of_the_memory(memory, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)), raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150_000_000)  # --max_megapixels 300, of which each takes 1.8 GB
    assert default_num_workers("npu", 64, 224) == 16
    memory(32)
    assert default_num_workers("npu", 64, 224) == 9
    memory(2)
    assert default_num_workers("npu", 64, 224) == 1


def test_workers_fit_the_cores_the_ranks_and_memory(monkeypatch, memory):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(32), raising=False)
    assert default_num_workers("npu", 64, 224) == 16
    assert default_num_workers("npu", 512, 448) == 4
    assert default_num_workers("cpu", 8, 224) == 8  # the rest of the cores computes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers("npu", 64, 224) == 3
    assert default_num_workers("cpu", 8, 224) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert default_num_workers("npu", 64, 224) == 3


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_there_is_a_worker_however_few_cores_or_however_large_batches_are(kind, monkeypatch, memory):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0}, raising=False)
    assert default_num_workers(kind, 8, 224) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)), raising=False)
    assert default_num_workers(kind, 100_000, 1024) == 1


FAULTS = """
import resource
import numpy as np
from bulk import decoding
{first}

def turn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    photos = [np.ones(1 << 20, np.uint8) for _ in range(8)]
    del photos
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sorted(turn() for _ in range(20))[10])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_that_a_photo_leaves_is_kept_for_the_next():
    def faults(first: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(first=first)]
        return int(subprocess.run(command, cwd=inference.ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("decoding.keep_freed_memory()") < 100 < faults("")


def test_other_c_libraries_keep_their_own_ways(monkeypatch):
    monkeypatch.setattr(decoding.ctypes, "CDLL", lambda _name: object())
    decoding.keep_freed_memory()
