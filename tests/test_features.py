"""A run over a few photos: what it computes, logs and saves; and the same from Python, by features()."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import UsageError
from PIL import Image

from conftest import SAMPLES, TINY

PHOTO = SAMPLES / "chelsea.jpg"
PHOTOS = [SAMPLES / name for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "moon.png")]
ROUNDING = 1e-6  # folded patches add up in another order, and no error in method is as small


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def hidden_of(model: inference.LoadedModel, crops: torch.Tensor) -> np.ndarray:
    return inference.forward(model, crops.to(model.device.torch_device)).hidden.cpu().double().numpy()


def test_one_exact_value_through_the_real_command(run, tiny_folder, tmp_path):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert done.code == 0
    saved = np.load(tmp_path / "f.npz")
    assert saved["class_token"][0, :4] == pytest.approx(EXPECTED_CLASS_TOKEN, abs=2e-5)
    assert saved["mean_patch_token"][0, :4] == pytest.approx(EXPECTED_MEAN_PATCH_TOKEN, abs=2e-5)
    assert done.result["hidden_mean_norm"] == pytest.approx(EXPECTED_HIDDEN_NORM, rel=1e-5)
    assert done.result["pooler_norm"] == pytest.approx(EXPECTED_POOLER_NORM, rel=1e-5)


EXPECTED_CLASS_TOKEN = [0.81104, -0.14008, 0.03134, -0.27661]
EXPECTED_MEAN_PATCH_TOKEN = [0.80111, -0.17157, -0.06993, -0.28548]
EXPECTED_HIDDEN_NORM = 8.294312
EXPECTED_POOLER_NORM = 7.472383


def test_saved_features_are_what_transformers_computes(run, tiny_folder, tmp_path):
    from transformers import ViTModel
    from transformers.image_utils import load_image

    from test_images import library_processor

    run(
        *("--image_path", *PHOTOS, "--model_path", tiny_folder, "--device", "cpu", "--save_patch_tokens", "--save_pooler"),
        *("--output", tmp_path / "f.npz", "--batch_size", 3),
    )
    saved = np.load(tmp_path / "f.npz")
    processor = library_processor(size={"shortest_edge": 64}, crop_size=64)
    pixels = processor([load_image(str(path)) for path in PHOTOS], return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = ViTModel.from_pretrained(tiny_folder)(pixels)
    hidden = expected.last_hidden_state.numpy()
    assert relative_l2(saved["class_token"], hidden[:, 0]) < ROUNDING
    assert relative_l2(saved["mean_patch_token"], hidden[:, 1:].mean(1)) < ROUNDING
    assert relative_l2(saved["patch_tokens"], hidden[:, 1:]) < ROUNDING
    assert relative_l2(saved["pooler_output"], expected.pooler_output.numpy()) < ROUNDING
    assert saved["path"].tolist() == [str(path) for path in PHOTOS]
    assert saved["index"].tolist() == [0, 1, 2, 3]


def test_the_result_has_the_published_keys_and_says_what_made_it(run, tiny_folder):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    result, size = done.result, TINY["hidden_size"]
    assert done.folder.joinpath("inference_cpu.json").is_file()
    assert (result["device"], result["dtype"], result["image_size"], result["image_path"]) == (
        *("cpu", "float32", 64),
        "assets/samples/chelsea.jpg",
    )
    assert (result["pooler_shape"], result["last_hidden_shape"]) == ([1, size], [1, 17, size])
    assert result["throughput_img_s"] == pytest.approx(1 / result["inference_time_s"])
    assert result["inference_time_s"] in result["inference_times_s"] or len(result["inference_times_s"]) % 2 == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["time_utc"])
    assert set(result["versions"]) == {"python", "torch", "torch_npu", "transformers", "numpy", "pillow"}
    assert result["weights"]["source"] == "checkpoint"
    assert result["scripts_sha256"]["inference.py"] == inference.sha256(inference.ROOT / "inference.py")
    for key in ("command", "git_commit", "git_dirty", "device_name", "allow_hf32", "missing_keys", "preprocess", "environment"):
        assert key in result
    heads = TINY["num_attention_heads"]
    assert result["model"] == f"another model ({size} wide, 3 layers, {heads} heads, patches of 16)"
    assert result["dimensions"] == {name: TINY[name] for name in result["dimensions"]}
    assert len(result["dimensions"]) == 5
    assert (result["strict_float32"], result["pooler"]) == (True, "trained")


def test_the_log_reads_like_the_published_one(run, tiny_folder):
    log = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu").log
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[(INFO|WARNING)\] ", line) for line in log.splitlines())
    texts = [line.split("] ", 1)[1] for line in log.splitlines()]
    for expected in (
        f"Loading webssl-mae300m-full2b-224 from {tiny_folder} ...",
        "Loading image: " + str(PHOTO),
        "Input shape: (1, 3, 64, 64)",
        "Warming up ...",
        "Running inference ...",
        "=== another model (128 wide, 3 layers, 2 heads, patches of 16) Inference Results ===",
        "Device: cpu",
        "Dtype: float32",
        "Image size: 64x64",
        f"Pooler output shape: (1, {TINY['hidden_size']})",
        f"Last hidden state shape: (1, 17, {TINY['hidden_size']})",
    ):
        assert expected in texts


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_is_one_line_and_the_run_goes_on(capsys):
    inference.start_log()
    inference.open_log(Path("/dev/full"))
    inference.log.info("first")
    inference.log.info("second")
    inference.stop_log()
    lines = [re.sub(r"^[\d-]{10} [\d:,]{12} ", "", line) for line in capsys.readouterr().err.splitlines()]
    told = "/dev/full: the log cannot be written any more ([Errno 28] No space left on device)"
    assert lines == ["[INFO] first", told, "[INFO] second"]


def test_flags_are_taken_with_hyphens_too(run, tiny_folder):
    done = run("--image-path", PHOTO, "--model-path", tiny_folder, "--device=cpu", "--image-size=32", "--batch-size", "1")
    assert (done.code, done.result["image_size"]) == (0, 32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --image_path"),
        (["--image_path", "x.jpg", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--image_path", "x.jpg", "--batch_size", "0"], "'0' is not a whole number from 1"),
        (["--image_path", "x.jpg", "--batch_size", "9" * 20], "9' is not a whole number from 1"),
        (["--image_path", "x.jpg", "--modelpath", "y"], "unrecognized arguments: --modelpath"),
        (
            ["--image_path", "x.jpg", "--output", "folder"],
            "--output 'folder': the name must end in .npz; folders are written by e",
        ),
        (["--image_path", "x.jpg", "--output", ""], "--output '': the name must end in .npz"),
    ],
)
def test_wrong_usage_is_one_line_and_2(run, arguments, said):
    done = run(*arguments)
    assert done.code == 2
    assert said in done.terminal
    assert len(done.terminal.strip().splitlines()) == 1


@pytest.mark.parametrize(("where", "value"), [("hidden", "nan"), ("pooler", "inf")])
def test_nan_in_the_features_is_an_error_and_never_a_result(run, tiny_folder, tmp_path, monkeypatch, where, value):
    forward = inference.forward

    def poisoned(*given):
        outputs = forward(*given)
        bad = getattr(outputs, where).clone()
        bad[-1].view(-1)[5] = float(value)
        return outputs._replace(**{where: bad})

    monkeypatch.setattr(inference, "forward", poisoned)
    done = run(
        *("--image_path", *PHOTOS, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz"),
        "--save_pooler",
    )
    assert done.code == 2
    assert done.terminal.splitlines()[-1].startswith(f"error: {PHOTOS[-1]}: its features in float32 hold NaN or Inf")
    assert done.result is None
    assert not (tmp_path / "f.npz").exists()


def test_a_failed_run_leaves_the_older_result_alone(run, tiny_folder, tmp_path):
    first = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTO.read_bytes()[:1000])
    second = run("--image_path", PHOTO, broken, "--model_path", tiny_folder, "--device", "cpu")
    assert (first.code, second.code) == (0, 2)
    assert second.result == first.result


def test_a_crash_while_writing_leaves_the_older_file(tmp_path):
    path = tmp_path / "result.json"
    inference.write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="Out of range"):
        inference.write_json(path, {"value": float("nan")})
    with pytest.raises(RuntimeError), inference.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == '{\n  "value": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(run, tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    place = tmp_path / "file" / "f.npz"
    done = run(*common, "--output", place)
    assert done.code == 2
    assert done.terminal.splitlines()[-1] == f"error: {place}: cannot be written (File exists)"


# --- saved as float16, and from Python ---


def test_features_are_saved_in_the_dtype_that_was_asked_for(run, tiny_folder, tmp_path):
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    run(*common)
    full = dict(np.load(tmp_path / "f.npz"))
    run(*common, "--feature_dtype", "float16")
    half = dict(np.load(tmp_path / "f.npz"))
    assert (full["class_token"].dtype, half["class_token"].dtype, half["index"].dtype) == (np.float32, np.float16, np.int64)
    assert np.array_equal(half["class_token"], full["class_token"].astype(np.float16))


def test_layers_alone_are_saved_without_the_output(run, tiny_folder, tmp_path):
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert run(*common, "--layers", 2, "--save_patch_tokens").code == 0
    kept = ["class_token_layer_2", "index", "mean_patch_token_layer_2", "patch_tokens", "path"]
    assert sorted(np.load(tmp_path / "f.npz")) == kept


def scaled(forward, factor: float):
    def scaled_forward(*given):
        outputs = forward(*given)
        return outputs._replace(hidden=outputs.hidden * factor)

    return scaled_forward


def test_a_feature_too_large_for_float16_is_an_error(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "forward", scaled(inference.forward, 1e6))
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert run(*common).code == 0
    (tmp_path / "f.npz").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one line is the error's, none NumPy's
        done = run(*common, "--feature_dtype", "float16")
    assert (done.code, (tmp_path / "f.npz").exists()) == (2, False)
    assert "use --feature_dtype float32" in done.terminal.splitlines()[-1]


def test_features_from_python_take_paths_and_pictures(tiny):
    picture = Image.open(PHOTOS[1])
    found = inference.features(tiny, [str(PHOTOS[0]), picture, PHOTOS[3]])
    assert sorted(found) == ["class_token", "mean_patch_token"]
    hidden = hidden_of(tiny, inference.crops_of([PHOTOS[0], PHOTOS[1], PHOTOS[3]], tiny.preprocess))
    assert relative_l2(found["class_token"], hidden[:, 0]) < ROUNDING
    assert relative_l2(found["mean_patch_token"], hidden[:, 1:].mean(1)) < ROUNDING
    single = inference.features(tiny, PHOTOS[1], names=["patch_tokens", "class_token_layer_2"], batch_size=1)
    assert relative_l2(single["patch_tokens"], hidden[1:2, 1:]) < ROUNDING
    assert single["class_token_layer_2"].shape == (1, TINY["hidden_size"])


def described(given: object) -> str:
    return type(given).__name__


@pytest.mark.parametrize(
    "given",
    [
        np.full((3, 2), 123.5),
        np.array(123.5),
        np.zeros((0, 3)),
        torch.full((3, 2), 123.5),
        torch.tensor(7),
        b"\xff\xd8photo.jpg",
        {"photo.jpg": 1},
        {},
        7,
        None,
    ],
    ids=described,
)
def test_what_is_no_photo_is_refused_by_its_type_and_never_shown(tiny, given):
    name = type(given).__name__
    said = f"{name}: no photo; paths and PIL images are taken, one or a list of them"
    for images in (given, [given], (PHOTO, given)):
        with pytest.raises(UsageError) as refused:
            inference.features(tiny, images)
        assert str(refused.value) == said


def test_an_array_made_into_a_picture_is_taken(tiny):
    pixels = np.asarray(Image.open(PHOTO))
    found, expected = (inference.features(tiny, photo)["class_token"] for photo in (Image.fromarray(pixels), PHOTO))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("several", [list, tuple, iter, lambda photos: dict.fromkeys(photos).keys()])
def test_photos_come_in_anything_that_can_be_gone_through(tiny, several):
    found = inference.features(tiny, several(PHOTOS[:2]))["class_token"]
    assert np.array_equal(found, inference.features(tiny, PHOTOS[:2])["class_token"])


def test_no_photos_are_refused_in_one_line(tiny):
    with pytest.raises(UsageError, match="no photos were given"):
        inference.features(tiny, [])


def test_features_from_python_take_a_batch_size(tiny, monkeypatch):
    sizes, forward = [], inference.forward
    monkeypatch.setattr(
        inference, "forward", lambda model, crops, *more: sizes.append(len(crops)) or forward(model, crops, *more)
    )
    inference.features(tiny, PHOTOS[:3], batch_size=2)
    inference.features(tiny, PHOTOS[:3])
    assert sizes == [2, 1, 3]


def test_a_picture_is_turned_upright_as_its_file_is(tiny, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(PHOTO).save(tmp_path / "turned.jpg", exif=exif)
    found = inference.features(tiny, [tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")])["class_token"]
    assert relative_l2(found[0], found[1]) < ROUNDING


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "missing.jpg", "missing.jpg: No such file"),
        (lambda folder: Image.new("F", (9, 9)), "Image.*floating-point grey"),
        (lambda folder: Image.open(cut(folder / "cut.jpg")), "JpegImage.*truncated"),
    ],
)
def test_a_photo_that_cannot_be_used_is_named_in_python_too(tiny, tmp_path, make, said):
    with pytest.raises(UsageError, match=said):
        inference.features(tiny, [PHOTO, make(tmp_path)])


def cut(path: Path) -> Path:
    path.write_bytes(PHOTO.read_bytes()[:9000])
    return path


@pytest.mark.parametrize(
    "name",
    ["classtoken", "class_token_layer_0", "class_token_layer_4", "class_token_layer_x", "pooler", "pooler_output_layer_1"],
)
def test_a_feature_that_is_not_there_is_named(tiny, name):
    with pytest.raises(UsageError, match=f"{name}: no such feature"):
        inference.features(tiny, PHOTO, names=["class_token", name])


def test_features_that_are_no_numbers_are_named_in_python_too(tiny, monkeypatch):
    monkeypatch.setattr(inference, "forward", scaled(inference.forward, float("nan")))
    with pytest.raises(UsageError, match=rf"{PHOTO}: its features in float32 hold NaN or Inf; .*the weights may be damaged"):
        inference.features(tiny, [PHOTO])
