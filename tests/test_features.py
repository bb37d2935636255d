"""From crops to features: the encoder, a run over a few images, what it logs, saves and draws."""

from __future__ import annotations

import re
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from conftest import SAMPLES, TINY
from inference import Encoder, UsageError, load_model, open_device
from PIL import Image

PHOTO = SAMPLES / "chelsea.jpg"
PHOTOS = [SAMPLES / name for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "moon.png")]


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def some_crops(count: int, size: int = TINY["image_size"]) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


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
    from test_images import library_processor
    from transformers import ViTModel
    from transformers.image_utils import load_image

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
    assert relative_l2(saved["class_token"], hidden[:, 0]) < 1e-6
    assert relative_l2(saved["mean_patch_token"], hidden[:, 1:].mean(1)) < 1e-6
    assert relative_l2(saved["patch_tokens"], hidden[:, 1:]) < 1e-6
    assert relative_l2(saved["pooler_output"], expected.pooler_output.numpy()) < 1e-6
    assert saved["path"].tolist() == [str(path) for path in PHOTOS]
    assert saved["index"].tolist() == [0, 1, 2, 3]


def test_the_result_has_the_published_keys_and_says_what_made_it(run, tiny_folder):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    result, size = done.result, TINY["hidden_size"]
    assert done.folder.joinpath("inference_cpu.json").is_file()
    assert (result["device"], result["dtype"], result["image_size"], result["image_path"]) == ("cpu", "float32", 64, str(PHOTO))
    assert (result["pooler_shape"], result["last_hidden_shape"]) == ([1, size], [1, 17, size])
    assert result["throughput_img_s"] == pytest.approx(1 / result["inference_time_s"])
    assert result["inference_time_s"] in result["inference_times_s"] or len(result["inference_times_s"]) % 2 == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["time_utc"])
    assert set(result["versions"]) == {"python", "torch", "torch_npu", "transformers", "numpy", "pillow"}
    assert result["weights"]["source"] == "checkpoint"
    assert result["scripts_sha256"]["inference.py"] == inference._sha256(inference.ROOT / "inference.py")
    for key in ("command", "git_commit", "git_dirty", "device_name", "allow_hf32", "parameters", "missing_keys", "pooler"):
        assert key in result


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
        "=== webssl-mae300m-full2b-224 Inference Results ===",
        "Device: cpu",
        "Dtype: float32",
        "Image size: 64x64",
        f"Pooler output shape: (1, {TINY['hidden_size']})",
        f"Last hidden state shape: (1, 17, {TINY['hidden_size']})",
    ):
        assert expected in texts


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_is_one_line_and_the_run_goes_on(capsys):
    inference.start_log(Path("/dev/full"))
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
        (["--image_path", "x.jpg", "--batch_size", "0"], "'0' is not a whole number above zero"),
        (["--image_path", "x.jpg", "--modelpath", "y"], "unrecognized arguments: --modelpath"),
        (["--image_path", "x.jpg", "--output", "folder", "--pca", "p.png"], "--pca draws a few images"),
        (["--image_path", "x.jpg", "--num_workers", "-1"], "--num_workers: 0 "),
    ],
)
def test_wrong_usage_is_one_line_and_2(run, arguments, said):
    done = run(*arguments)
    assert done.code == 2
    assert said in done.terminal
    assert len(done.terminal.strip().splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_to_float32(cpu, tiny_folder, tiny, dtype):
    half = load_model(cpu, str(tiny_folder), dtype)
    names = ["class_token", "mean_patch_token"]
    exact, rounded = (Encoder(model, names, 4).submit(some_crops(4))() for model in (tiny, half))
    for name in names:
        assert rounded[name].dtype == np.float32
        assert 1e-5 < relative_l2(rounded[name], exact[name]) < 0.03


def test_features_do_not_depend_on_the_batch(tiny):
    batch = some_crops(9)
    together = Encoder(tiny, ["class_token"], 9).submit(batch)()["class_token"]
    for size in (1, 2, 4):
        apart = Encoder(tiny, ["class_token"], size).submit(batch)()["class_token"]
        assert relative_l2(apart, together) < 5e-6


def test_nan_in_the_features_is_an_error_and_never_a_result(run, tiny_folder, tmp_path, monkeypatch):
    forward = inference.forward

    def poisoned(model, crops):
        hidden, pooler = forward(model, crops)
        hidden = hidden.clone()
        hidden[-1, 3, 5] = float("nan")
        return hidden, pooler

    monkeypatch.setattr(inference, "forward", poisoned)
    done = run("--image_path", *PHOTOS, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
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
    for flags in (["--output", tmp_path / "file" / "f.npz"], ["--pca", tmp_path / "file" / "p.png"]):
        done = run(*common, *flags)
        assert done.code == 2
        assert done.terminal.splitlines()[-1] == f"error: {flags[1]}: cannot be written (File exists)"


def test_the_time_is_measured_between_synchronisations(npu, tiny_folder):
    model = load_model(open_device("npu"), str(tiny_folder))
    encoder = Encoder(model, ["class_token"], 1)
    encoder.run(some_crops(1))
    npu.queue.seconds_per_op = 0.001
    operators = npu.queue.count
    times = inference.time_forward(encoder, some_crops(1), runs=3)
    operators = (npu.queue.count - operators) // 3
    assert operators > 30
    assert min(times) >= operators * 0.001 * 0.9


def test_the_picture_shows_the_crop_beside_the_components(run, tiny_folder, tmp_path):
    path = tmp_path / "picture.png"
    done = run("--image_path", *PHOTOS[:2], "--model_path", tiny_folder, "--device", "cpu", "--pca", path)
    picture = Image.open(path)
    assert picture.size == (944, 1032)
    crop = inference.crop_uint8(Image.open(PHOTOS[0]), inference.Preprocess(64, 64))
    shown = picture.crop((16, 60, 16 + 448, 60 + 448))
    assert np.array_equal(np.asarray(shown), np.asarray(Image.fromarray(crop).resize((448, 448), Image.Resampling.BICUBIC)))
    blocks = np.asarray(picture.crop((480, 60, 480 + 448, 60 + 448))).reshape(4, 112, 4, 112, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # one colour for each of the 4x4 patches
    assert len(np.unique(blocks[:, 0, :, 0].reshape(-1, 3), axis=0)) > 8
    assert done.result["pca"]["colours_hex"][0] == blocks[:, 0, :, 0].tobytes().hex()
    assert re.search(r"its three components explain \d+\.\d% of the variance", done.log)


def test_principal_components_are_those_of_the_covariance():
    tokens = np.random.default_rng(0).normal(size=(2, 30, 8)) * np.arange(1, 9)
    projected, explained = inference.principal_components(tokens)
    flat = tokens.reshape(-1, 8)
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    expected = (flat - flat.mean(0)) @ vectors[:, ::-1][:, :3]
    assert np.abs(projected.reshape(-1, 3)) == pytest.approx(np.abs(expected))
    assert explained == pytest.approx(100 * values[::-1][:3].sum() / values.sum())
    mirrored, _ = inference.principal_components(tokens[:, ::-1])
    assert mirrored[:, ::-1] == pytest.approx(projected)  # the sign does not depend on the order


def test_colours_compare_between_images_and_need_no_variance():
    tokens = np.random.default_rng(0).normal(size=(2, 16, 8)) * np.arange(1, 9)
    colours, explained = inference.patch_colours(tokens)
    projected, expected = inference.principal_components(tokens)
    low, high = np.percentile(projected.reshape(-1, 3), (1, 99), axis=0)
    assert colours.reshape(2, 16, 3) == pytest.approx(255 * np.clip((projected - low) / (high - low), 0, 1), abs=0.5)
    assert explained == expected
    flat, explained = inference.patch_colours(np.ones((1, 16, 8)))
    assert (flat.tolist(), explained) == (np.zeros((1, 4, 4, 3)).tolist(), 0.0)


# --- memory and graphs, on the simulated NPU ---


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_out_of_memory_halves_the_batch_and_goes_on(npu, tiny_folder, caplog, execution):
    model = load_model(open_device("npu"), str(tiny_folder))
    batch = some_crops(16)
    expected = Encoder(model, ["class_token"], 16, execution).submit(batch)()["class_token"]
    npu.memory.limit = npu.memory.allocated + 2_000_000
    inference.log.propagate = True
    encoder = Encoder(model, ["class_token"], 16, execution)
    result = encoder.submit(batch)()["class_token"]
    assert 1 <= encoder.batch_size < 16
    assert relative_l2(result, expected) < 5e-6
    assert "Out of memory on npu:0 with batch size 16: going on with 8" in caplog.text


def test_out_of_memory_with_one_image_ends_the_run(npu, tiny_folder):
    model = load_model(open_device("npu"), str(tiny_folder))
    npu.memory.limit = npu.memory.allocated + 10_000
    with pytest.raises(UsageError, match="out of memory on npu:0 with a single image"):
        Encoder(model, ["class_token"], 4).submit(some_crops(4))


def test_a_model_that_does_not_fit_is_one_line(npu, tiny_folder):
    device = open_device("npu")
    npu.memory.limit = npu.memory.allocated + 100_000
    with pytest.raises(UsageError, match="npu:0 has too little memory for the model"):
        load_model(device, str(tiny_folder))


def test_a_replayed_graph_gives_what_eager_gives(npu, tiny_folder):
    model = load_model(open_device("npu"), str(tiny_folder))
    names = ["class_token", "mean_patch_token", "pooler_output"]
    eager, graph = (Encoder(model, names, 4, execution) for execution in ("eager", "graph"))
    batch = some_crops(11)
    expected = eager.submit(batch)()
    for _ in range(2):
        for name, value in graph.submit(batch)().items():
            assert value.shape == expected[name].shape
            assert relative_l2(value.astype(float), expected[name].astype(float)) < 1e-6


def test_one_capture_serves_every_batch(npu, tiny_folder, monkeypatch):
    captures = []
    make = npu.NPUGraph.__init__
    monkeypatch.setattr(npu.NPUGraph, "__init__", lambda self: captures.append(self) or make(self))
    encoder = Encoder(load_model(open_device("npu"), str(tiny_folder)), ["class_token"], 4, "graph")
    for count in (4, 4, 3, 1, 11):
        encoder.submit(some_crops(count))()
    assert len(captures) == 1


def test_a_graph_replays_without_calling_the_model(npu, tiny_folder, monkeypatch):
    encoder = Encoder(load_model(open_device("npu"), str(tiny_folder)), ["class_token"], 4, "graph")
    first = encoder.submit(some_crops(4))()["class_token"]
    monkeypatch.setattr(inference, "forward", None)
    assert np.array_equal(encoder.submit(some_crops(4).flip(0))()["class_token"], first[::-1])


def test_graphs_are_refused_on_the_cpu(run, tiny_folder):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--execution", "graph")
    assert done.code == 2
    assert (
        done.terminal.splitlines()[-1] == "error: --execution graph: the CPU has no graphs to capture; use it with cuda or npu"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_gpu_gives_what_the_cpu_gives(tiny_folder, tiny, execution):
    model = load_model(open_device("cuda"), str(tiny_folder))
    expected = Encoder(tiny, ["class_token"], 4).submit(some_crops(11))()["class_token"]
    assert relative_l2(Encoder(model, ["class_token"], 4, execution).submit(some_crops(11))()["class_token"], expected) < 1e-5
