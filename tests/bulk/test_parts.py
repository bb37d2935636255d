"""Features to files: what a part holds, stretches of tars, what changed under its name, failures, disks that are full."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from inference import UsageError

from bulk import parts
from bulk.decoding import Row, size_and_mtime
from bulk.parts import (
    Layout,
    Part,
    PartWriter,
    Plan,
    bytes_per_image,
    check_disk,
    clear_leftovers,
    find_changed,
    part_arrays,
    part_files,
    read_part,
    write_failures,
    write_part,
)
from bulk.sources import ImageKey, ImageList, Sources
from bulk_runs import contents, failures, make_tar

SHAPES = {"class_token": (4,)}


def plan_of(folder: Path, files: list[object] = (), tars: list[object] = (), **more: object) -> Plan:
    keys = [file if isinstance(file, ImageKey) else ImageKey(str(file)) for file in files]
    folder.mkdir(exist_ok=True)
    layout = {"part_size": 3, "shapes": SHAPES, "dtype": "float32", "made_with": ""}
    layout |= {name: more.pop(name) for name in layout.keys() & more}
    return Plan(Layout(str(folder), **layout), Sources(ImageList(keys), list(map(str, tars))), **more)


def parts_of(plan: Plan, number: int) -> Iterator[Part]:
    return plan.unit(number).parts(plan.layout)


def path_of(plan: Plan, number: int, stretch: int | None = None) -> Path:
    return Path(plan.layout.path(number, stretch))


def folder_of(plan: Plan) -> Path:
    return Path(plan.layout.folder)


def writer_of(plan: Plan, check: Callable[[], None] = lambda: None) -> PartWriter:
    return PartWriter(plan.layout, check, plan.finished)


def names_of(plan: Plan) -> list[str]:
    """Names of all part files, in the order of their rows."""
    return [Path(path).name for *_, path in part_files(plan.layout.folder)]


def told(logged: list[str]) -> str:
    return "\n".join(logged)


def rows_of(part: Part, *bad: int) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Features that are the index; those at the places of `bad` have failed."""
    made = []
    for place, key in enumerate(part.images):
        made.append(Row(*size_and_mtime(key), {}, "damaged" if place in bad else ""))
    index = np.arange(part.first_index, part.first_index + len(made), dtype=np.float32)
    return made, {"class_token": np.repeat(index[:, None], 4, 1)}


def make(plan: Plan, *numbers: int) -> list[str]:
    """Make these parts, or all that are unfinished; returns the names of the files that were written."""
    written = []
    for number in numbers or plan.unfinished():
        for part in parts_of(plan, number):
            write_part(part.path, part_arrays(plan.layout, part, [rows_of(part)]))
            written.append(Path(part.path).name)
        plan.finished(part)
    return written


@pytest.fixture
def three_files(tmp_path) -> list[Path]:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    return sorted(tmp_path.glob("*.jpg"))


def tar_of(path: Path, count: int, filling: bytes = b"photo") -> Path:
    return make_tar(path, {f"{number}.jpg": filling for number in range(count)})


def later(path: Path) -> None:
    """Another time, as a file that was written again has; the clock may be too coarse for it."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


# --- which parts ---


def test_files_come_in_parts_of_one_size_and_the_last_is_short(tmp_path):
    plan = plan_of(tmp_path, [f"{number}.jpg" for number in range(7)], first_index=100, first_part=20)
    found = [part for number in plan.numbers for part in parts_of(plan, number)]
    assert [Path(part.path).name for part in found] == ["part-00020.npz", "part-00021.npz", "part-00022.npz"]
    assert [(part.number, part.first_index, len(part.images)) for part in found] == [(20, 100, 3), (21, 103, 3), (22, 106, 1)]
    assert [key.name for part in found for key in part.images] == [f"{number}.jpg" for number in range(7)]


def test_a_tar_is_a_part_and_a_large_one_has_stretches_of_which_the_last_has_its_name(tmp_path):
    tars = [tar_of(tmp_path / f"{count}.tar", count) for count in (3, 7, 0)]
    plan = plan_of(tmp_path / "out", ["a.jpg"], tars, first_tar=10, first_part=5)
    assert list(plan.numbers) == [5, 6, 7, 8]
    found = [
        (Path(part.path).name, part.first_index, len(part.images)) for number in plan.numbers for part in parts_of(plan, number)
    ]
    assert found == [
        ("part-00005.npz", 0, 1),
        ("part-00006.npz", 11 * 10**9, 3),
        ("part-00007-0000.npz", 12 * 10**9, 3),
        ("part-00007-0001.npz", 12 * 10**9 + 3, 3),
        ("part-00007.npz", 12 * 10**9 + 6, 1),
        ("part-00008.npz", 13 * 10**9, 0),
    ]


def test_a_tar_that_fills_its_stretches_has_no_empty_one(tmp_path):
    plan = plan_of(tmp_path / "out", tars=[tar_of(tmp_path / "a.tar", 6)])
    assert [(Path(part.path).name, len(part.images)) for part in parts_of(plan, 0)] == [
        ("part-00000-0000.npz", 3),
        ("part-00000.npz", 3),
    ]


def test_a_tar_is_done_when_its_last_stretch_is_and_made_stretches_stay(tmp_path):
    plan = plan_of(tmp_path / "out", tars=[tar_of(tmp_path / "a.tar", 7)])
    stretches = parts_of(plan, 0)
    for part in (next(stretches), next(stretches)):
        write_part(part.path, part_arrays(plan.layout, part, [rows_of(part)]))
    assert plan.unfinished() == [0]
    assert "0 of 1 parts are finished" in plan.how_to_go_on()
    assert make(plan) == ["part-00000.npz"]
    assert plan.unfinished() == []


@pytest.mark.parametrize("how", ["missing", "damaged", "of an older tar"])
def test_a_stretch_that_is_missing_damaged_or_of_an_older_tar_is_made_again(tmp_path, how):
    tar = tar_of(tmp_path / "a.tar", 7)
    plan = plan_of(tmp_path / "out", tars=[tar])
    make(plan)
    before, stretch = contents(folder_of(plan)), path_of(plan, 0, 1)
    if how == "missing":
        stretch.unlink()
    elif how == "damaged":
        stretch.write_bytes(stretch.read_bytes()[:-100])
    else:
        later(tar)
        part = list(parts_of(plan, 0))[1]
        write_part(part.path, part_arrays(plan.layout, part, [rows_of(part)]))
        os.utime(tar, ns=(1, tar.stat().st_mtime_ns - 1))
    (folder_of(plan) / "part-00000.npz").unlink()
    assert make(plan) == ["part-00000-0001.npz", "part-00000.npz"]
    assert contents(folder_of(plan)) == before


def test_a_stretch_that_is_missing_beside_a_finished_last_one_is_found(tmp_path):
    plan = plan_of(tmp_path / "out", tars=[tar_of(tmp_path / "a.tar", 7), tar_of(tmp_path / "b.tar", 7)])
    make(plan)
    path_of(plan, 1, 0).unlink()
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == [1]
    assert make(plan) == ["part-00001-0000.npz", "part-00001.npz"]
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == []


def test_foreign_files_in_the_folder_are_left_alone(tmp_path):
    plan = plan_of(tmp_path / "out", ["a.jpg"], [tar_of(tmp_path / "a.tar", 7)])
    foreign = ["part-x.npz", "part-00001-old.npz", "part-00001-0000-1.npz", "part-.npz", "part-1.npz", "part-00001 (1).npz"]
    foreign += [
        "part-00009-0001.npz.damaged",
        "part-00001.npz.npz",
        ".part-00000.npz.0123abcd.tmp",
        "part-０００００.npz",
        "part-00001-0000.npz~",
    ]
    for name in foreign:
        (folder_of(plan) / name).write_bytes(b"not ours")
    make(plan)
    names = ["part-00000.npz", "part-00001-0000.npz", "part-00001-0001.npz", "part-00001.npz"]
    assert names_of(plan) == names
    left = set(os.listdir(folder_of(plan))) - set(names)
    assert left == set(foreign)


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    order = ["part-00002.npz", "part-00010-0000.npz", "part-00010-0001.npz", "part-00010-10000.npz", "part-00010.npz"]
    order += ["part-99999.npz", "part-100000.npz"]
    for name in sorted(order):
        (tmp_path / name).touch()
    found = part_files(str(tmp_path))
    assert [path for *_, path in found] == [f"{tmp_path}/{name}" for name in order]
    assert [number for number, *_ in found] == [2, 10, 10, 10, 10, 99999, 100000]
    assert [stretch for _, stretch, _ in found] == [None, 0, 1, 10000, None, None, None]


# --- one part ---


def test_a_row_has_all_its_columns_and_a_failure_stands_beside(tmp_path, three_files):
    plan = plan_of(tmp_path / "out", three_files, made_with="versions")
    [part] = parts_of(plan, 0)
    made, features = rows_of(part, 1)
    made[0] = made[0]._replace(texts={"caption": "a cat", "key": "0001"})
    write_part(
        part.path,
        part_arrays(plan.layout, part, [(made[:2], {"class_token": features["class_token"][:2]}), rest_of(made, features)]),
    )
    with np.load(part.path) as found:
        assert {name: found[name].tolist() for name in found.files if name not in ("class_token", "mtime")} == {
            "index": [0, 2],
            "path": [str(three_files[0]), str(three_files[2])],
            "caption": ["a cat", ""],
            "url": ["", ""],
            "key": ["0001", ""],
            "size": [1, 1],
            "failed_index": [1],
            "failed_path": [str(three_files[1])],
            "failed_reason": ["damaged"],
            "tar": "",
            "tar_size": 0,
            "tar_mtime": 0,
            "made_with": "versions",
        }
        assert found["class_token"].tolist() == [[0] * 4, [2] * 4]
        assert found["mtime"].tolist() == [three_files[place].stat().st_mtime_ns for place in (0, 2)]
        assert {found[name].dtype for name in ("index", "size", "mtime", "failed_index")} == {np.dtype(np.int64)}


def rest_of(made: list[Row], features: dict[str, np.ndarray]) -> tuple[list[Row], dict[str, np.ndarray]]:
    return made[2:], {name: values[2:] for name, values in features.items()}


def test_a_part_of_no_images_and_one_of_nothing_but_failures_have_the_same_columns(tmp_path, three_files):
    plan = plan_of(tmp_path / "out", three_files)
    [part] = parts_of(plan, 0)
    empty = part_arrays(plan.layout, Part(1, "x.npz", [], 0), [([], plan.layout.no_features())])
    failed = part_arrays(plan.layout, part, [rows_of(part, 0, 1, 2)])
    whole = part_arrays(plan.layout, part, [rows_of(part)])
    for arrays in (empty, failed):
        assert list(arrays) == list(whole)
        assert [values.dtype.kind for values in arrays.values()] == [values.dtype.kind for values in whole.values()]
        assert arrays["class_token"].shape == (0, 4)
    assert (len(empty["failed_index"]), len(failed["failed_index"])) == (0, 3)


def test_names_that_are_no_text_are_kept_as_they_are(tmp_path):
    names = ["caf\udce9.jpg", "a\nb.jpg", "猫" * 80]
    plan = plan_of(tmp_path / "out", names)
    make(plan)
    [found] = read_part(str(path_of(plan, 0)), "path")
    assert found.tolist() == names


def test_text_is_compressed_and_one_long_path_changes_little(tmp_path):
    plan = plan_of(tmp_path / "out", [f"{number:0200}.jpg" for number in range(299)] + ["x" * 4000], part_size=300)
    make(plan)
    with zipfile.ZipFile(path_of(plan, 0)) as archive:
        kinds = {info.filename: info.compress_type for info in archive.infolist()}
    assert (kinds["path.npy"], kinds["class_token.npy"]) == (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)
    assert path_of(plan, 0).stat().st_size < 200_000


def test_a_part_is_written_whole_or_not_at_all(tmp_path, three_files, monkeypatch):
    plan = plan_of(tmp_path / "out", three_files)
    make(plan)
    before = contents(folder_of(plan))
    write, written = np.lib.format.write_array, []

    def full(file, values, **options):
        written.append(None)
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, values, **options)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(UsageError, match=r"part-00000\.npz: cannot be written \(No space left on device\)"):
        make(plan, 0)
    assert contents(folder_of(plan)) == before
    assert os.listdir(folder_of(plan)) == ["part-00000.npz"]


@pytest.mark.parametrize("damage", ["empty", "cut", "array", "no names", "text"])
def test_a_part_that_is_not_whole_is_put_aside_and_named(tmp_path, three_files, logged, damage):
    plan = plan_of(tmp_path / "out", three_files)
    make(plan)
    path, array, names = path_of(plan, 0), io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(names, other=np.zeros(3))
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": whole[:-900], "array": array.getvalue(), "no names": names.getvalue(), "text": b"x"}[damage]
    )
    assert read_part(str(path), "path") is None
    assert f"{path} is damaged (" in told(logged) and "put aside with .damaged behind its name, and made again" in told(logged)
    assert os.listdir(folder_of(plan)) == ["part-00000.npz.damaged"]
    assert plan.unfinished() == [0]


def test_whatever_byte_of_a_part_is_flipped_it_is_as_it_was_or_put_aside(tmp_path, three_files):
    plan = plan_of(tmp_path / "out", three_files)
    make(plan)
    path, names = path_of(plan, 0), ("index", "path", "class_token", "size", "mtime", "failed_path", "tar")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    expected = [values.tolist() for values in read_part(str(path), *names)]
    put_aside = 0
    for place in random.integers(0, len(whole), 300):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        found = read_part(str(path), *names)
        put_aside += found is None
        assert found is None or [values.tolist() for values in found] == expected
    assert put_aside > 30


def test_a_part_that_the_disk_does_not_give_is_not_put_aside(tmp_path, three_files, monkeypatch):
    plan = plan_of(tmp_path / "out", three_files)
    make(plan)

    def refuse(_path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UsageError, match=r"part-00000\.npz: cannot be read \(Input/output error\)"):
        read_part(str(path_of(plan, 0)), "path")
    assert path_of(plan, 0).exists()


def test_a_part_that_is_not_there_is_none(tmp_path):
    assert read_part(f"{tmp_path}/part-00000.npz", "path") is None


# --- what changed under its name ---


def test_nothing_is_made_again_where_nothing_changed(tmp_path, three_files, logged):
    plan = plan_of(tmp_path / "out", three_files, [tar_of(tmp_path / "a.tar", 7)])
    make(plan)
    find_changed(plan, plan.numbers)
    assert (plan.unfinished(), logged) == ([], [])


@pytest.mark.parametrize("how", ["longer", "later", "both"])
def test_a_photo_that_changed_is_named_and_its_part_is_made_again(tmp_path, three_files, logged, how):
    plan = plan_of(tmp_path / "out", three_files, part_size=1)
    make(plan)
    time = three_files[1].stat().st_mtime_ns
    if how != "later":
        three_files[1].write_bytes(b"more")
    os.utime(three_files[1], ns=(time, time + (how != "longer")))
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == [1]
    assert f"1 have changed, and their parts are made anew: {three_files[1]}" in told(logged)
    assert make(plan) == ["part-00001.npz"]
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == []


def test_a_photo_or_a_tar_that_is_gone_has_not_changed(tmp_path, three_files, logged):
    tar = tar_of(tmp_path / "a.tar", 7)
    plan = plan_of(tmp_path / "out", three_files, [tar])
    make(plan)
    three_files[1].unlink()
    tar.unlink()
    find_changed(plan, plan.numbers)
    assert (plan.unfinished(), logged) == ([], [])


def test_a_photo_that_failed_is_left_to_retry_failed(tmp_path, three_files):
    plan = plan_of(tmp_path / "out", three_files)
    [part] = parts_of(plan, 0)
    write_part(part.path, part_arrays(plan.layout, part, [rows_of(part, 1)]))
    three_files[1].write_bytes(b"good now")
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == []


@pytest.mark.parametrize(("now", "names"), [(7, 3), (4, 2), (2, 1), (13, 5)])
def test_a_tar_that_was_replaced_is_made_again_with_the_stretches_it_has_now(tmp_path, logged, now, names):
    tar = tar_of(tmp_path / "a.tar", 7)
    plan = plan_of(tmp_path / "out", tars=[tar, tar_of(tmp_path / "b.tar", 1)])
    make(plan)
    tar_of(tar, now, b"other")
    later(tar)
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == [0]
    assert f"1 have changed, and their parts are made anew: {tar}" in told(logged)
    assert len(make(plan)) == names
    found = [read_part(path, "index", "size") for number, _, path in part_files(plan.layout.folder) if number == 0]
    assert np.concatenate([index for index, _ in found]).tolist() == list(range(10**9, 10**9 + now))
    assert {size for _, sizes in found for size in sizes.tolist()} == {5}
    assert len(found) == names
    find_changed(plan, plan.numbers)
    assert plan.unfinished() == []


def test_many_changes_are_counted_and_a_few_named(tmp_path, logged):
    files = [tmp_path / f"{number}.jpg" for number in range(8)]
    for file in files:
        file.write_bytes(b"x")
    plan = plan_of(tmp_path / "out", files)
    make(plan)
    for file in files:
        file.write_bytes(b"xx")
    find_changed(plan, plan.numbers)
    assert told(logged).count("jpg") == 5 and "8 have changed" in told(logged) and logged[-1].endswith(" and 3 more")


# --- writing ---


def test_parts_are_written_one_behind_the_other_and_waited_for(tmp_path, three_files, monkeypatch):
    plan, begun, release = plan_of(tmp_path / "out", three_files, part_size=1), [], threading.Event()
    write = parts.write_part

    def slow(path, arrays):
        begun.append(Path(path).name)
        release.wait(10)
        write(path, arrays)

    monkeypatch.setattr(parts, "write_part", slow)
    made = [part for number in plan.numbers for part in parts_of(plan, number)]
    with writer_of(plan) as writer:
        writer.write(made[0], [rows_of(made[0])])
        threading.Timer(0.2, release.set).start()
        writer.write(made[1], [rows_of(made[1])])  # waits for the first
        assert contents(folder_of(plan)).keys() >= {"part-00000.npz"}
    assert begun == ["part-00000.npz", "part-00001.npz"]
    assert plan.unfinished() == [2]


def test_a_part_that_cannot_be_written_ends_the_run_at_the_latest_with_the_block(tmp_path, three_files, monkeypatch):
    plan = plan_of(tmp_path / "out", three_files)
    [part] = parts_of(plan, 0)
    monkeypatch.setattr(parts, "write_part", lambda *_given: (_ for _ in ()).throw(UsageError("cannot be written")))
    with pytest.raises(UsageError, match="cannot be written"), writer_of(plan) as writer:
        writer.write(part, [rows_of(part)])
    with pytest.raises(KeyboardInterrupt), writer_of(plan) as writer:  # which is told, and not what follows
        writer.write(part, [rows_of(part)])
        raise KeyboardInterrupt


def test_a_folder_that_is_gone_is_told_before_what_could_not_be_written(tmp_path, three_files):
    plan = plan_of(tmp_path / "out", three_files)
    [part] = parts_of(plan, 0)

    def check() -> None:
        raise UsageError("it was deleted")

    with pytest.raises(UsageError, match="it was deleted"), writer_of(plan, check) as writer:
        writer.write(part, [rows_of(part)])
    assert contents(folder_of(plan)) == {}


def test_a_folder_that_goes_while_a_part_is_written_is_told_too(tmp_path, three_files, monkeypatch):
    plan = plan_of(tmp_path / "out", three_files)
    [part] = parts_of(plan, 0)
    gone = []

    def write(path, arrays) -> None:
        gone.append(path)
        raise UsageError("cannot be written")

    def check() -> None:
        if gone:
            raise UsageError("it was deleted")

    monkeypatch.setattr(parts, "write_part", write)
    with pytest.raises(UsageError, match="it was deleted"), writer_of(plan, check) as writer:
        writer.write(part, [rows_of(part)])


def test_of_a_tar_that_changes_while_it_is_read_nothing_is_written(tmp_path):
    tar = tar_of(tmp_path / "a.tar", 7)
    plan = plan_of(tmp_path / "out", tars=[tar])
    stretches = parts_of(plan, 0)
    first, second = next(stretches), next(stretches)
    with pytest.raises(UsageError, match=r"a\.tar changed while it was read"), writer_of(plan) as writer:
        writer.write(first, [rows_of(first)])
        writer.write(first, [rows_of(first)])
        later(tar)
        writer.write(second, [rows_of(second)])
    assert list(contents(folder_of(plan))) == ["part-00000-0000.npz"]
    assert make(plan) == ["part-00000-0000.npz", "part-00000-0001.npz", "part-00000.npz"]


# --- the disk ---


def test_the_disk_that_an_image_takes_is_that_of_its_features():
    shapes = {"class_token": (1024,), "patch_tokens": (196, 1024)}
    assert bytes_per_image(shapes, "float32") == 2 * bytes_per_image(shapes, "float16") == 4 * 197 * 1024


def test_too_little_disk_is_said_with_what_helps(tmp_path, monkeypatch, logged):
    plan = plan_of(
        tmp_path / "out", [f"{number}.jpg" for number in range(1000)], part_size=100, shapes={"patch_tokens": (196, 1024)}
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 850_000_000))
    check_disk(plan)
    assert "10 parts to write, 0.803 GB needed and 0.850 GB free" in told(logged)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 800_000_000))
    with pytest.raises(UsageError, match=r"0\.803 GB needed and 0\.800 GB free; make room, .* or use --feature_dtype float16"):
        check_disk(plan)
    for number in range(5):
        path_of(plan, number).touch()
    check_disk(plan)  # half of it is there


# --- failures ---


def record(
    folder: Path, name: str, good: dict[str, int] | None = None, bad: dict[str, int] | None = None, made_with: str = ""
) -> None:
    good, bad = good or {}, bad or {}
    arrays = {"index": list(good.values()), "failed_index": list(bad.values())}
    texts = {"path": list(good), "failed_path": list(bad), "failed_reason": ["damaged"] * len(bad)}
    texts = {column: np.array(values, str) for column, values in texts.items()}
    np.savez(
        folder / name, **{column: np.array(values, np.int64) for column, values in arrays.items()}, **texts, made_with=made_with
    )


def test_failures_of_all_parts_are_gathered(tmp_path):
    record(tmp_path, "part-00000.npz", {"a.jpg": 0}, {"b\n.jpg": 1, "caf\udce9.jpg": 2})
    record(tmp_path, "part-00001-0000.npz", {"c.jpg": 3}, {"d.jpg": 4})
    assert write_failures(str(tmp_path)) == 3
    expected = [("b\n.jpg", 1), ("caf\udce9.jpg", 2), ("d.jpg", 4)]
    assert failures(tmp_path) == [{"index": index, "path": path, "reason": "damaged"} for path, index in expected]


def test_the_last_part_to_hold_an_image_counts_whatever_its_number(tmp_path):
    record(tmp_path, "part-99999.npz", {"b.jpg": 1}, {"a.jpg": 0})
    record(tmp_path, "part-100000.npz", {"a.jpg": 2})
    assert write_failures(str(tmp_path)) == 0
    record(tmp_path, "part-100001.npz", {"c.jpg": 4}, {"a.jpg": 3})
    assert write_failures(str(tmp_path)) == 1
    assert [failure["index"] for failure in failures(tmp_path)] == [3]


def test_what_a_killed_run_left_of_parts_is_cleared_away(tmp_path):
    (tmp_path / "part-00000.npz").touch()
    for name in (".part-00000.npz.0123abcd.tmp", ".part-00007-0001.npz.0123abcd.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    clear_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "part-00000.npz"]


def test_nothing_but_failures_is_no_success(tmp_path):
    record(tmp_path, "part-00000.npz", {}, {"a.jpg": 0})
    with pytest.raises(UsageError, match=r"not one of these images gave features: see failures\.jsonl"):
        write_failures(str(tmp_path))
    assert len(failures(tmp_path)) == 1


def test_parts_of_other_versions_are_named(tmp_path, logged):
    record(tmp_path, "part-00000.npz", {"a.jpg": 0}, made_with='{"pillow": "11"}')
    record(tmp_path, "part-00001.npz", {"b.jpg": 1}, made_with='{"pillow": "11"}')
    write_failures(str(tmp_path))
    assert logged == []
    record(tmp_path, "part-00002.npz", {"c.jpg": 2}, made_with='{"pillow": "99"}')
    write_failures(str(tmp_path))
    makers = 'from part-00000.npz: {"pillow": "11"}; from part-00002.npz: {"pillow": "99"}'
    assert f"The parts were not all made with the same versions and device: {makers}" in told(logged)


def test_a_damaged_part_among_finished_ones_is_no_success(tmp_path):
    record(tmp_path, "part-00000.npz", {"a.jpg": 0})
    (tmp_path / "part-00001.npz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"part-00001\.npz was damaged"):
        write_failures(str(tmp_path))
    assert not (tmp_path / "failures.jsonl").exists()
