"""pca.py: photos beside their patch tokens as colours, and the result from which the page's picture is drawn."""

from __future__ import annotations

import os
import re
import shutil
import sys

import inference
import numpy as np
import pytest
from PIL import Image

import evidence
import pca
import pictures
from conftest import SAMPLES

PHOTOS = [SAMPLES / "chelsea.jpg", SAMPLES / "coffee.jpg"]


@pytest.fixture
def draw(run, tiny_folder):
    def run_pca(*flags, photos=PHOTOS):
        return run("--image_path", *photos, "--model_path", tiny_folder, "--device", "cpu", *flags, main=pca.main, name="pca")

    return run_pca


# --- the arithmetic ---


def test_principal_components_are_those_of_the_covariance():
    tokens = np.random.default_rng(0).normal(size=(2, 30, 8)) * np.arange(1, 9)
    projected, explained = pca.principal_components(tokens)
    flat = tokens.reshape(-1, 8)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    expected = (flat - flat.mean(0)) @ vectors[:, ::-1][:, :3]
    assert np.abs(projected.reshape(-1, 3)) == pytest.approx(np.abs(expected))
    assert explained == pytest.approx(100 * values[::-1][:3].sum() / values.sum())
    mirrored, _ = pca.principal_components(tokens[:, ::-1])
    assert mirrored[:, ::-1] == pytest.approx(projected)  # the sign does not depend on the order


def test_colours_compare_between_images_and_need_no_variance():
    tokens = np.random.default_rng(0).normal(size=(2, 16, 8)) * np.arange(1, 9)
    colours, explained = pca.patch_colours(tokens)
    projected, expected = pca.principal_components(tokens)
    low, high = np.percentile(projected.reshape(-1, 3), (1, 99), axis=0)
    assert colours.reshape(2, 16, 3) == pytest.approx(255 * np.clip((projected - low) / (high - low), 0, 1), abs=0.5)
    assert explained == expected
    flat, explained = pca.patch_colours(np.ones((1, 16, 8)))
    assert (flat.tolist(), explained) == (np.zeros((1, 4, 4, 3)).tolist(), 0.0)


# --- the picture ---


def test_the_picture_shows_the_crop_beside_the_colours_of_the_result(draw, tmp_path):
    done = draw("--output", tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (944, 1032)
    for place, colours in enumerate(pca.colours_of(done.result)):
        top = 60 + 486 * place
        crop = inference.crop_uint8(Image.open(PHOTOS[place]), inference.Preprocess(64, 64))
        resized = Image.fromarray(crop).resize((448, 448), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(picture.crop((16, top, 16 + 448, top + 448))), np.asarray(resized))
        blocks = np.asarray(picture.crop((480, top, 480 + 448, top + 448))).reshape(4, 112, 4, 112, 3)
        assert (blocks == colours[:, None, :, None]).all()  # one colour for each of the 4x4 patches
        assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 8


def test_the_colours_are_those_of_the_models_patch_tokens(draw, tiny):
    result = draw().result
    tokens = inference.features(tiny, PHOTOS, ["patch_tokens"])["patch_tokens"]
    colours, explained = pca.patch_colours(tokens)
    assert np.abs(pca.colours_of(result).astype(int) - colours).max() <= 1
    assert result["explained_variance_percent"] == pytest.approx(explained, rel=1e-4)


@pytest.mark.parametrize(("name", "format"), [("p.png", "PNG"), ("p.PNG", "PNG"), ("p.jpg", "JPEG"), ("p.JPEG", "JPEG")])
def test_a_picture_has_the_format_of_its_name(draw, tmp_path, name, format):
    assert draw("--output", tmp_path / name).code == 0
    assert Image.open(tmp_path / name).format == format


@pytest.mark.parametrize(
    ("source", "said"), [("random", "random weights: the colours mean nothing"), ("checkpoint", "patch tokens")]
)
def test_a_picture_of_random_weights_says_so(source, said):
    result = {"weights": {"source": source}, "model": "m", "dtype": "float32", "device_name": "d"}
    assert pca.heading(result | {"explained_variance_percent": 50.0}) == [
        "m, float32 on d",
        f"{said}; first 3 principal components, 50.0% of the variance",
    ]


def test_of_a_long_path_the_end_is_shown():
    crops, colours = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8)
    names = ("a" * 200 + "/photo.jpg", "b" * 50 + "a" * 200 + "/photo.jpg", "a" * 200 + "/other.jpg", "photo.jpg")
    one, longer, other, short = (pca.draw(crops, colours, [name], []).tobytes() for name in names)
    assert one == longer
    assert len({one, other, short}) == 3


def test_a_photo_of_one_patch_has_a_colour(draw, tmp_path):
    done = draw("--image_size", 16, "--output", tmp_path / "p.png", photos=PHOTOS[:1])
    assert (done.code, done.result["colours_hex"]) == (0, ["000000"])


# --- the result ---


def test_the_result_says_what_it_is_of_and_how_it_was_made(draw):
    done = draw()
    assert done.code == 0
    result = done.result
    assert (result["device"], result["dtype"], result["image_size"]) == ("cpu", "float32", 64)
    assert result["image_path"] == ["assets/samples/chelsea.jpg", "assets/samples/coffee.jpg"]
    assert {"device_name", "model", "weights", "preprocess", "git_commit", "versions", "time_utc"} <= result.keys()
    assert [path.name for path in done.folder.iterdir()] == ["pca_cpu.json"]
    assert re.search(r"The three components explain \d+\.\d% of the variance", done.log)


def test_the_pages_picture_is_drawn_from_it(draw):
    result = draw().result
    found = evidence.Evidence(inference.ROOT, {"pca_cpu": result})
    assert pictures.photos_of(found) == (["cpu"], PHOTOS)
    drawn = np.asarray(pictures.draw_inference(found)).reshape(-1, 3)
    shown = {tuple(colour) for colour in np.unique(drawn, axis=0).tolist()}
    assert {tuple(colour) for colour in pca.colours_of(result).reshape(-1, 3).tolist()} <= shown


def test_a_result_of_the_cards_weights_is_evidence(draw, monkeypatch, tmp_path):
    """Also of a user's own photos, wherever they and the picture are."""
    monkeypatch.setattr(sys, "argv", ["eval/pca.py", "--image_path", f"{tmp_path}/mine.jpg", "--output", f"{tmp_path}/p.png"])
    shutil.copy(PHOTOS[0], tmp_path / "mine.jpg")
    result = draw("--output", tmp_path / "p.png", photos=[tmp_path / "mine.jpg"]).result
    assert result["image_path"] == [".../mine.jpg"]
    assert evidence.refuse(result | {"model": inference.MODEL_NAME}, "cpu") is None


# --- what is refused ---


def test_a_picture_has_room_for_a_hundred_photos(draw, tmp_path):
    for number in range(101):
        (tmp_path / f"{number:03d}.jpg").symlink_to(PHOTOS[0])
    done = draw("--output", tmp_path / "p.png", photos=[tmp_path])
    assert (done.code, done.result) == (2, None)
    last = "error: --image_path: at most 100 photos fit into a picture, and these are 101"
    assert done.terminal.splitlines()[-1] == last


@pytest.mark.parametrize("name", ["p.gif", "folder", ""])
def test_a_picture_of_another_format_is_refused_before_anything_is_loaded(draw, monkeypatch, name):
    monkeypatch.setattr(inference, "load_model", None)
    done = draw("--output", name)
    assert (done.code, done.log) == (2, "")
    assert done.terminal.endswith(f"--output {name}: the name must end in .png or .jpg (--help lists the flags)\n")


def test_a_place_that_cannot_be_written_is_named(draw, tmp_path):
    (tmp_path / "file").touch()
    done = draw("--output", tmp_path / "file" / "p.png")
    assert (done.code, done.result) == (2, None)
    assert done.terminal.splitlines()[-1] == f"error: {tmp_path}/file/p.png: cannot be written (File exists)"


@pytest.mark.parametrize("how", ["under a file", "read-only"])
def test_a_bundle_that_cannot_be_written_is_said_before_anything_is_computed(tiny_folder, monkeypatch, capsys, tmp_path, how):
    monkeypatch.setattr(inference, "host_features", None)
    folder = tmp_path / "results"
    if how == "read-only":  # played: root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "results"
    args = ["--image_path", str(PHOTOS[0]), "--model_path", str(tiny_folder), "--device", "cpu"]
    code = pca.main([*args, "--results_dir", str(folder), "--output_log", str(tmp_path / "log")])
    assert (code, folder.exists()) == (2, False)
    why = "no right to write there, or a read-only disk" if how == "read-only" else "Not a directory"
    last = f"error: {folder}: results cannot be written ({why}); name another folder with --results_dir"
    assert capsys.readouterr().err.splitlines()[-1] == last


def test_tokens_that_are_no_numbers_have_no_colours(draw, monkeypatch, tmp_path):
    def broken(*given):
        found, size = real(*given)
        found["patch_tokens"][1, 3, 5] = np.nan
        return found, size

    real = inference.host_features
    monkeypatch.setattr(inference, "host_features", broken)
    done = draw("--output", tmp_path / "p.png")
    assert (done.code, done.result, (tmp_path / "p.png").exists()) == (2, None, False)
    assert "coffee.jpg: its features in float32 hold NaN or Inf" in done.terminal.splitlines()[-1]
