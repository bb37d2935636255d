"""--decode fast: other code for the same picture, at a smaller scale where a JPEG has one, and never mixed with exact."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import Preprocess, UsageError, crop_uint8, decode
from PIL import Image

import embed
from bulk import levers
from conftest import SAMPLES, TINY_PREPROCESS

PHOTOS = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".jpg", ".png"))
EXACT = Preprocess()
FAST = dataclasses.replace(EXACT, decode="fast")


def jpeg(size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.open(SAMPLES / "hubble_deep_field.jpg").convert(mode).resize(size).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def crops_by_both(image: Image.Image, exact: Preprocess = EXACT) -> tuple[np.ndarray, np.ndarray]:
    fast = dataclasses.replace(exact, decode="fast")
    return tuple(crop_uint8(image, preprocess).astype(int) for preprocess in (exact, fast))


# --- resizing ---


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
@pytest.mark.parametrize("resize", inference.RESIZES)
def test_a_photo_that_is_not_scaled_is_within_a_grey_level_of_exact(path, resize):
    exact, fast = crops_by_both(decode(path.read_bytes()), EXACT.resized(resize=resize))
    off = np.abs(exact - fast)
    assert exact.shape == fast.shape == (224, 224, 3)
    assert (off > 0).mean() < 0.015
    assert off.max() <= 1 or (off > 1).mean() < 1e-4


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (224, 224), (225, 223), (100, 900), (900, 100), (31, 217), (640, 480)])
def test_images_of_any_shape_give_the_crop_of_exact(size, resample):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    for image in (noise, noise.convert("L")):
        exact, fast = crops_by_both(image, dataclasses.replace(EXACT, resample=resample))
        assert exact.shape == fast.shape == (224, 224, 3)
        assert np.abs(exact - fast).max() <= 2 and (exact != fast).mean() < 0.02


def test_a_grey_image_has_three_equal_channels():
    crop = crop_uint8(decode(jpeg((300, 240), "L")), FAST)
    assert crop.shape == (224, 224, 3) and (crop == crop[..., :1]).all()
    assert crop.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_strip_is_cut_before_it_is_resized_as_exact_has_it(size):
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    exact, fast = crops_by_both(strip)
    assert np.array_equal(exact, fast)


@pytest.mark.parametrize(
    ("name", "fits"), [("NEAREST", False), ("LANCZOS", False), ("BOX", False), ("HAMMING", False), ("BICUBIC", True)]
)
def test_a_filter_that_has_no_fast_way_is_refused(name, fits):
    preprocess = dataclasses.replace(EXACT, resample=int(Image.Resampling[name]))
    assert preprocess.resized(decode="exact").decode == "exact"
    if fits:
        assert preprocess.resized(decode="fast").decode == "fast"
        return
    with pytest.raises(UsageError, match=rf"^--decode fast: not for this checkpoint's filter \({name}\)$"):
        preprocess.resized(decode="fast")


# --- decoding at a smaller scale ---


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((896, 896), (448, 448)),
        ((895, 1200), (895, 1200)),
        ((1200, 896), (600, 448)),
        ((1792, 2400), (448, 600)),
        ((1791, 2400), (896, 1200)),
        ((4000, 3584), (500, 448)),
        ((7168, 7168), (896, 896)),  # an eighth is the least
        ((300, 200), (300, 200)),
    ],
    ids=str,
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_twice_the_target(size, scaled):
    assert FAST.least_edge == 448
    data = jpeg(size, "L" if max(size) > 3000 else "RGB")  # a third of the work
    assert decode(data, FAST.least_edge).size == scaled
    assert decode(data, EXACT.least_edge).size == size


def test_twice_the_target_is_of_what_the_photo_is_resized_to():
    assert FAST.resized(448).least_edge is None  # exact again: it is asked for anew
    assert EXACT.resized(448, decode="fast").least_edge == 896
    assert EXACT.resized(resize="256", decode="fast").least_edge == 512
    assert EXACT.resized(96, "squash", "fast").least_edge == 192
    assert dataclasses.replace(FAST, resize=(70, 90)).least_edge == 180
    assert EXACT.least_edge is None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_scaled_photo_shows_the_same_upright_picture(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg((1500, 1200), mode, exif=exif)
    image = decode(data, FAST.least_edge)
    assert image.size == ((750, 600) if orientation == 1 else (600, 750))
    assert image.mode == ("L" if mode == "L" else "RGB")
    off = np.abs(crop_uint8(decode(data), EXACT).astype(int) - crop_uint8(image, FAST))
    assert off.mean() < 1.0


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_other_formats_have_no_smaller_scale(format):
    buffer = io.BytesIO()
    Image.open(SAMPLES / "chelsea.jpg").resize((1000, 900)).save(buffer, format)
    assert decode(buffer.getvalue(), FAST.least_edge).size == (1000, 900)


def test_a_picture_from_python_is_taken_as_it_is():
    """It was opened by somebody else, who may not expect another size of it."""
    picture = Image.open(io.BytesIO(jpeg((1800, 1800))))
    found = inference.crops_of([picture], FAST)
    assert picture.size == (1800, 1800)
    assert torch.equal(found[0], torch.from_numpy(crop_uint8(decode(jpeg((1800, 1800))), FAST)))


# --- where it is asked for ---


@pytest.fixture
def described(tmp_path, tiny_folder):
    def write(**changes) -> str:
        folder = shutil.copytree(tiny_folder, tmp_path / "described")
        (folder / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS | changes))
        return str(folder)

    return write


def test_what_was_asked_for_is_in_the_result_and_in_the_features(run, tiny_folder, tmp_path):
    (tmp_path / "large.jpg").write_bytes(jpeg((2000, 1800)))
    flags = (
        "--image_path",
        tmp_path / "large.jpg",
        "--model_path",
        tiny_folder,
        "--device",
        "cpu",
        "--output",
        tmp_path / "f.npz",
    )
    found = {}
    for way in ("exact", "fast"):
        done = run(*flags, "--decode", way)
        assert (done.code, done.result["preprocess"]["decode"]) == (0, way)
        found[way] = np.load(tmp_path / "f.npz")["class_token"]
    assert 0 < np.linalg.norm(found["fast"] - found["exact"]) < 0.05 * np.linalg.norm(found["exact"])
    assert run(*flags).result["preprocess"]["decode"] == "exact"
    preprocess = inference.read_preprocess(tiny_folder, 64).resized(decode="fast")
    expected = inference.crops_of([tmp_path / "large.jpg"], preprocess)
    assert torch.equal(expected[0], torch.from_numpy(crop_uint8(decode(jpeg((2000, 1800)), 128), preprocess)))


def test_a_checkpoint_whose_filter_has_no_fast_way_is_one_line(run, described):
    done = run("--image_path", PHOTOS[0], "--model_path", described(resample=1), "--device", "cpu", "--decode", "fast")
    assert (done.code, done.result) == (2, None)
    assert done.terminal.splitlines()[-1] == "error: --decode fast: not for this checkpoint's filter (LANCZOS)"


def test_an_unknown_way_to_decode_is_refused(run):
    done = run("--image_path", PHOTOS[0], "--decode", "faster")
    assert (done.code, "argument --decode: invalid choice: 'faster'" in done.terminal) == (2, True)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_one_folder_never_holds_features_of_both_ways(run, tiny_folder, tmp_path):
    flags = ["--image_path", SAMPLES, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "features"]
    flags += ["--num_workers", 0]
    assert run(*flags, "--decode", "fast", main=embed.main, name="embed").code == 0
    before = written(tmp_path / "features")
    assert json.loads(before["manifest.json"])["made_from"]["preprocess"]["decode"] == "fast"
    for more in ([], ["--add"], ["--retry_failed"]):
        done = run(*flags, *more, main=embed.main, name="embed")
        assert done.code == 2
        assert "decode" in done.terminal.splitlines()[-1] and "Traceback" not in done.terminal
    assert written(tmp_path / "features") == before


def test_a_bulk_run_decodes_as_inference_does(run, tiny_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(2000, 1800), (300, 200)]):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(size))
    flags = ["--image_path", tmp_path / "photos", "--model_path", tiny_folder, "--device", "cpu", "--decode", "fast"]
    assert run(*flags, "--output", tmp_path / "f.npz").code == 0
    more = ["--output", tmp_path / "features", "--num_workers", 0, "--without", *levers.DEFAULT_LEVERS]
    assert run(*flags, *more, main=embed.main, name="embed").code == 0
    few, [part] = np.load(tmp_path / "f.npz"), (tmp_path / "features").glob("part-*.npz")
    assert np.array_equal(few["class_token"], np.load(part)["class_token"])
