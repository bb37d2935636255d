"""Pre-processing that follows the checkpoint: what transformers' own processor gives, or one line that names the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
import transformers
from inference import Preprocess, UsageError, load_model, read_preprocess
from PIL import Image

from conftest import SAMPLES, TINY_PREPROCESS
from test_images import MEAN, STD, assert_same_pixels, library_pixels, our_pixels

FOUR = transformers.__version__.startswith("4.")
ABSENT = "absent"  # the field is taken out
SQUASH = {"size": {"height": 64, "width": 64}, "crop_size": ABSENT, "do_center_crop": ABSENT}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
FAST = {  # what the fast processors of transformers 4 save beside the rest
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "disable_grouping": None,
    "do_pad": None,
    "input_data_format": None,
    "pad_size": None,
    "return_tensors": None,
}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    cat = Image.open(SAMPLES / "chelsea.jpg").convert("RGB")
    return [cat, cat.transpose(Image.Transpose.ROTATE_90), cat.resize((50, 41))]


@pytest.fixture
def described(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint with other fields in its pre-processing, in a file of any name."""

    def write(file: str = "preprocessor_config.json", **changes) -> Path:
        folder = shutil.copytree(tiny_folder, tmp_path / "described", dirs_exist_ok=True)
        fields = {name: value for name, value in (TINY_PREPROCESS | changes).items() if value != ABSENT}
        (folder / "preprocessor_config.json").unlink()
        (folder / file).write_text(json.dumps({"image_processor": fields} if file == "processor_config.json" else fields))
        return folder

    return write


def their_processor(folder: Path):
    return transformers.AutoImageProcessor.from_pretrained(folder, **({"use_fast": False} if FOUR else {"backend": "pil"}))


def assert_as_the_processor_has_it(folder: Path, photos: list[Image.Image], cpu: inference.Device) -> None:
    """Pixels, and features of the library's model from the library's pixels."""
    model, processor = load_model(cpu, str(folder)), their_processor(folder)
    pixels = [processor(photo, return_tensors="pt").pixel_values for photo in photos]
    for photo, expected in zip(photos, pixels, strict=True):
        assert_same_pixels(our_pixels(photo, model.preprocess), expected)
    found = inference.features(model, photos, names=["class_token", "patch_tokens"])
    library = transformers.ViTModel.from_pretrained(folder)
    with torch.inference_mode():
        tokens = library(torch.cat(pixels), interpolate_pos_encoding=True).last_hidden_state.numpy()
    for name, expected in (("class_token", tokens[:, 0]), ("patch_tokens", tokens[:, 1:])):
        assert np.linalg.norm(found[name] - expected) < 1e-6 * np.linalg.norm(expected)


# --- what is followed ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 80}, "resample": 2},
        {"size": {"height": 70, "width": 90}},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "rescale_factor": 0.003},
        {"size": 80, "crop_size": 64},
        {"size": [70, 90], "crop_size": [64, 64]},
        FAST,
        {"processor_class": "CLIPProcessor", "_processor_class": "CLIPProcessor", "something_else": 1},
        {"_valid_processor_keys": ["images", "do_resize", "size"]},
        {"image_processor_type": ABSENT, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"image_processor_type": ABSENT, "feature_extractor_type": "ViTFeatureExtractor", **SQUASH},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 73}},
        {"image_processor_type": "CLIPImageProcessorFast", **FAST},
        {"image_processor_type": "BitImageProcessorFast", "resample": 1},
        {"image_processor_type": "ViTImageProcessor", **SQUASH},
        {"image_processor_type": "ViTImageProcessor", **SQUASH, "size": 64},
        {"image_processor_type": "ViTImageProcessorFast", **SQUASH, **FAST},
        {"image_processor_type": "SiglipImageProcessor", **SQUASH, **HALVES},
        {"image_processor_type": "SiglipImageProcessorFast", **SQUASH, **HALVES},
        {"image_processor_type": "DeiTImageProcessor", "size": {"height": 73, "width": 73}, "resample": 0},
        {"do_convert_rgb": False},
        {"crop_size": {"height": 96, "width": 96}},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items() if value != ABSENT)[:70] or "plain",
)
def test_the_configuration_gives_what_transformers_own_processor_gives(described, photos, cpu, changes):
    assert_as_the_processor_has_it(described(**changes), photos, cpu)


def test_the_fields_are_these(described):
    changes = {"size": {"shortest_edge": 80}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.003}
    assert read_preprocess(described(**changes), 224) == Preprocess(80, 64, 2, 0.003, (0.1, 0.2, 0.3), STD)
    found = read_preprocess(described(image_processor_type="ViTImageProcessor", **SQUASH), 224)
    assert found == Preprocess((64, 64), 64, 3, 1 / 255, MEAN, STD)


@pytest.mark.parametrize("changes", [{}, {"image_processor_type": "ViTImageProcessor", **SQUASH}], ids=["crop", "squash"])
def test_a_file_that_transformers_saved_again_says_the_same(described, tmp_path, photos, cpu, changes):
    folder = described(**changes)
    before = read_preprocess(folder, 224)
    their_processor(folder).save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "again" / "preprocessor_config.json", folder)
    assert read_preprocess(folder, 224) == before
    assert_as_the_processor_has_it(folder, photos, cpu)


def test_a_pre_processing_within_processor_config_json_is_read(described, photos, cpu):
    folder = described("processor_config.json", size={"shortest_edge": 80})
    assert not (folder / "preprocessor_config.json").exists()
    assert read_preprocess(folder, 224).resize == 80
    assert_as_the_processor_has_it(folder, photos, cpu)
    assert sorted(load_model(cpu, str(folder)).weights.files) == ["config.json", "model.safetensors", "processor_config.json"]


def test_of_two_files_the_one_is_taken_that_the_library_takes_and_both_are_named(described, photos, cpu):
    folder = described("processor_config.json", size={"shortest_edge": 80})
    (folder / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS))
    assert read_preprocess(folder, 224).resize == (64 if FOUR else 80)
    assert_as_the_processor_has_it(folder, photos, cpu)
    assert set(inference.PREPROCESS_FILES) < set(load_model(cpu, str(folder)).weights.files)
    for name in inference.PREPROCESS_FILES:
        fields = json.loads((folder / name).read_text())
        fields.get("image_processor", fields)["do_normalize"] = False
        (folder / name).write_text(json.dumps(fields))
    both = f"{folder}/preprocessor_config.json and {folder}/processor_config.json: do_normalize is False"
    with pytest.raises(UsageError, match=both):
        read_preprocess(folder, 224)


def test_without_a_file_the_defaults_are_the_official_demos_and_a_warning_names_them(tmp_path, logged):
    assert read_preprocess(tmp_path, 224) == Preprocess(224, 224, 3, 1 / 255, MEAN, STD)
    assert read_preprocess(tmp_path, 64) == Preprocess(64, 64, 3, 1 / 255, MEAN, STD)
    told = f"WARNING {tmp_path} has no preprocessor_config.json: the official demo's pre-processing is taken, "
    assert logged == [f"{told}{Preprocess()}", f"{told}{Preprocess(64, 64)}"]
    assert str(Preprocess()).startswith("Preprocess(resize=224, image_size=224, resample=3, rescale_factor=0.0039215")


def test_a_run_without_a_file_warns_and_records_what_was_taken(run, described):
    folder = described()
    (folder / "preprocessor_config.json").unlink()
    done = run("--image_path", SAMPLES / "chelsea.jpg", "--model_path", folder, "--device", "cpu")
    assert done.code == 0
    assert f"[WARNING] {folder} has no preprocessor_config.json" in done.log
    assert (done.result["preprocess"]["resize"], done.result["preprocess"]["image_size"]) == (64, 64)
    assert sorted(done.result["weights"]["sha256"]) == ["config.json", "model.safetensors"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"size": {"longest_edge": 64}}, "[Ss]ize"),
        ({"do_center_crop": False}, "size .*do not give a square"),
        ({"do_center_crop": False, "size": {"height": 64, "width": 32}}, "size .*do not give a square"),
        ({"crop_size": {"height": 64, "width": 32}}, "crop_size .*do not give a square"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": "x"}, "image_std"),
        ({"image_std": [0.2, 0.2, 0.0]}, r"gives other pixels than this bundle \(nan\)"),
        ({"resample": "bicubic"}, "resample"),
        ({"resample": 9}, "resample|filter"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": 3}, "image_processor_type|'int'"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}, "crop_pct=0.875"),
        ({"image_processor_type": "EfficientNetImageProcessor", "include_top": True, **SQUASH}, "include_top=True"),
        ({"image_processor_type": "VivitImageProcessor"}, "offset=True"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_cannot_be_honoured_is_named_in_one_line(described, changes, named):
    folder = described(**changes)
    with pytest.raises(UsageError, match=rf"^{folder}/preprocessor_config\.json: .*{named}") as refused:
        read_preprocess(folder, 64)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [{"do_pad": True, "pad_size": {"height": 70, "width": 70}}, {"size": {"shortest_edge": 64, "longest_edge": 100}}],
    ids=["pad", "longest edge"],
)
def test_what_only_one_version_of_the_library_honours_is_refused_there(described, photos, cpu, changes):
    folder = described(**changes)
    if FOUR:  # it leaves these aside
        assert_as_the_processor_has_it(folder, photos, cpu)
        return
    named = "pad_size=" if "pad_size" in changes else "size=.*longest_edge=100"
    with pytest.raises(UsageError, match=rf"preprocessor_config\.json: BitImageProcessor\w* gives other pixels .*{named}"):
        read_preprocess(folder, 64)


@pytest.mark.parametrize("text", ["", "{", "[]", '["image_processor_type"]', '"text"', "7", "\xff"])
@pytest.mark.parametrize("name", inference.PREPROCESS_FILES)
def test_a_file_that_is_no_json_object_is_one_line(described, run, name, text):
    folder = described()
    (folder / "preprocessor_config.json").unlink()
    (folder / name).write_bytes(text.encode("latin-1"))
    done = run("--image_path", SAMPLES / "chelsea.jpg", "--model_path", folder, "--device", "cpu")
    assert (done.code, done.result) == (2, None)
    assert done.terminal.splitlines()[-1].startswith(f"error: {folder}/{name}: ")
    assert done.terminal.count("\n") == done.log.count("\n")


OWN_CODE = """
from pathlib import Path

Path({mark!r}).touch()
from {module} import {name}


class MyImageProcessor({name}):
    pass
"""


def test_code_that_comes_with_a_pre_processing_runs_only_when_it_is_trusted(described, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = described(image_processor_type="MyImageProcessor", auto_map={"AutoImageProcessor": "own.MyImageProcessor"})
    base = type(their_processor(described()))
    folder = described(image_processor_type="MyImageProcessor", auto_map={"AutoImageProcessor": "own.MyImageProcessor"})
    code = OWN_CODE.format(mark=str(tmp_path / "executed"), module=base.__module__, name=base.__name__)
    (folder / "own.py").write_text(code)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json: transformers cannot read the pre-processing"):
        read_preprocess(folder, 64)
    assert not (tmp_path / "executed").exists()
    assert read_preprocess(folder, 64, trust_remote_code=True) == Preprocess(64, 64, 3, 1 / 255, MEAN, STD)
    assert (tmp_path / "executed").exists()


# --- other sizes, and the three ways to a square ---


def test_another_image_size_scales_resize_and_crop_alike(described):
    preprocess = read_preprocess(described(size={"shortest_edge": 80}), 64).resized(128)
    assert (preprocess.resize, preprocess.image_size) == (160, 128)
    preprocess = read_preprocess(described(size={"height": 70, "width": 90}), 64).resized(128)
    assert (preprocess.resize, preprocess.image_size) == ((140, 180), 128)


@pytest.mark.parametrize(
    ("resize", "options"),
    [
        ("crop", {"size": {"shortest_edge": 96}, "crop_size": 96}),
        ("squash", {"size": {"height": 96, "width": 96}, "do_center_crop": False}),
        ("256", {"size": {"shortest_edge": 110}, "crop_size": 96}),
    ],
)
def test_the_three_official_ways_to_a_square(described, photos, resize, options):
    preprocess = read_preprocess(described(), 64).resized(96, resize)
    for image in photos:
        assert_same_pixels(our_pixels(image, preprocess), library_pixels(image, **options))


def test_the_way_to_a_square_is_followed_and_recorded(run, tiny_folder, tmp_path):
    common = ("--image_path", SAMPLES / "coffee.jpg", "--model_path", tiny_folder, "--device", "cpu")
    saved = []
    for resize, edges in (("crop", 64), ("squash", [64, 64]), ("256", 73)):
        done = run(*common, "--resize", resize, "--output", tmp_path / f"{resize}.npz")
        assert done.result["preprocess"]["resize"] == edges
        saved.append(np.load(tmp_path / f"{resize}.npz")["class_token"].tolist())
    assert saved[0] != saved[1] != saved[2] != saved[0]
