"""weights/convert_native.py: Meta's native .pth becomes a folder in transformers' layout, whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
from inference import load_model
from safetensors.torch import load_file

from conftest import SAMPLES, TINY, TINY_PREPROCESS, forked_script
from weights import convert_native

PHOTO = SAMPLES / "chelsea.jpg"
TINY_NAME = "another model (128 wide, 3 layers, 2 heads, patches of 16)"
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]
POOLER = ["pooler.dense.bias", "pooler.dense.weight"]


@pytest.fixture
def convert(tmp_path, capsys):
    """Convert a file to a folder below tmp_path/weights: exit code, terminal, the folder, and what lies beside it."""

    def run(path: Path, folder: str = "made") -> SimpleNamespace:
        place = tmp_path / "weights"
        place.mkdir(exist_ok=True)
        code = convert_native.main([str(path), str(place / folder)])
        terminal = capsys.readouterr().err
        left = sorted(each.name for each in place.iterdir())
        return SimpleNamespace(
            code=code,
            terminal=terminal,
            last=terminal.splitlines()[-1],
            folder=place / folder,
            left=left,
            lines=terminal.splitlines(),
        )

    return run


@pytest.fixture
def native(tiny_native, tmp_path):
    """Writes a native file with another content, and the tiny one's files beside it."""

    def write(state: object, name: str = "copy.pth", **options) -> Path:
        for beside in ("config.json", "preprocessor_config.json"):
            shutil.copy(tiny_native.parent / beside, tmp_path)
        torch.save(state, tmp_path / name, **options)
        return tmp_path / name

    return write


def hidden(model: inference.LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return inference.forward(model, torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)).hidden


# --- what is written ---


def test_a_converted_file_gives_the_features_of_the_hub_layout_bit_for_bit(convert, cpu, tiny, tiny_native):
    done = convert(tiny_native)
    assert (done.code, done.left) == (0, ["made"])
    assert sorted(path.name for path in done.folder.iterdir()) == FILES
    model = load_model(cpu, str(done.folder))
    assert (model.pooler, model.missing_keys) == ("missing", POOLER)
    assert torch.equal(hidden(model), hidden(tiny))
    found, expected = (inference.features(each, [PHOTO]) for each in (model, tiny))
    for name in ("class_token", "mean_patch_token"):
        assert np.array_equal(found[name], expected[name])


def test_tensors_and_configuration_are_those_of_the_hub_layout(convert, tiny_native, tiny_folder):
    folder = convert(tiny_native).folder
    written, expected = (load_file(place / "model.safetensors") for place in (folder, tiny_folder))
    assert sorted(written) == sorted(set(expected) - set(POOLER))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in TINY} == TINY
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTModel"])


def test_the_last_lines_say_what_it_is_and_how_it_is_used(convert, tiny_native):
    done = convert(tiny_native)
    digest = hashlib.sha256(tiny_native.read_bytes()).hexdigest()
    told = [line.split("[INFO] ")[1] for line in done.lines]
    assert told == [
        f"{tiny_native}: {TINY_NAME}, sha256 {digest}",
        f"{done.folder}: {TINY_NAME}, 514,944 parameters with a pooler that the file does not have",
        f"Use it: python inference.py --model_path {done.folder} --image_path photo.jpg",
    ]


def test_the_script_runs_from_anywhere_and_what_it_writes_runs(tiny_native, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    done = forked_script("weights/convert_native.py", tiny_native, "weights/deep/made")
    assert done.returncode == 0, done.stderr
    used = run("--image_path", PHOTO, "--model_path", "weights/deep/made", "--device", "cpu")
    assert (used.code, used.result["pooler"]) == (0, "missing")
    assert f"Missing from the checkpoint: {', '.join(POOLER)}" in used.log
    assert "[WARNING] Pooler: missing from the checkpoint, seeded here" in used.log


def test_a_pooler_that_is_made_up_is_the_same_at_every_load(convert, cpu, tiny_native):
    folder = convert(tiny_native).folder
    first, second = (load_model(cpu, str(folder)).module.pooler.dense.weight for _ in range(2))
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.02)


def test_a_pre_processing_beside_the_file_is_taken_along(convert, native, tiny_native):
    path = native(torch.load(tiny_native))
    text = json.dumps(TINY_PREPROCESS | {"size": {"shortest_edge": 80}}, indent=7)
    (path.parent / "preprocessor_config.json").write_text(text)
    done = convert(path)
    assert (done.folder / "preprocessor_config.json").read_text() == text


def test_without_one_the_official_demos_is_written(convert, native, tiny_native, cpu):
    path = native(torch.load(tiny_native))
    (path.parent / "preprocessor_config.json").unlink()
    done = convert(path)
    assert done.code == 0
    written = json.loads((done.folder / "preprocessor_config.json").read_text())
    assert written == TINY_PREPROCESS
    assert load_model(cpu, str(done.folder)).preprocess == inference.Preprocess().resized(64)


def test_a_pre_processing_that_cannot_be_honoured_ends_the_conversion(convert, native, tiny_native):
    path = native(torch.load(tiny_native))
    (path.parent / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS | {"do_normalize": False}))
    done = convert(path)
    assert (done.code, done.left) == (2, [])
    assert done.last == f"error: {path}: made/preprocessor_config.json: do_normalize is False, which is not supported"


# --- its heads, and its sisters ---


def native_of_width(width: int, patch: int = 14) -> dict[str, torch.Tensor]:
    """A state dict of one layer whose tensors take no room: each value is the same one number."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {name: (width,) for name in ("patch_embed.proj.bias", "norm.weight", "norm.bias")}
    block = {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)}
    block |= {"mlp.fc1.weight": (8, width), "mlp.fc1.bias": (8,), "mlp.fc2.weight": (width, 8)}
    names = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias")
    block |= {name: (width,) for name in names}
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    return {name: torch.full((1,), 0.01, dtype=torch.float16).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 16), (1536, 24), (2688, 21), (3072, 24)])
def test_the_heads_of_the_published_widths_are_known(convert, tmp_path, width, heads):
    torch.save(native_of_width(width), tmp_path / "native.pth")
    done = convert(tmp_path / "native.pth")
    config = json.loads((done.folder / "config.json").read_text())
    found = [config[name] for name in ("hidden_size", "num_attention_heads", "patch_size", "image_size", "num_hidden_layers")]
    assert found == [width, heads, 14, 28, 1]
    assert inference.read_preprocess(done.folder, 224) == inference.Preprocess().resized(28)


def test_an_unknown_width_is_refused_unless_the_heads_are_told(convert, tmp_path):
    path = tmp_path / "native.pth"
    torch.save(native_of_width(384), path)
    told = "384 wide is none of the Web-SSL MAE encoders (1024, 1280, 1536, 2688, 3072), and the number of heads is not in"
    assert f"error: {path}: {told}" in convert(path).last
    for heads in (0, 5, "6", None, -6):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
        done = convert(path)
        assert (done.code, done.left) == (2, [])
        assert "384 wide" in done.last and 'put a config.json with {"num_attention_heads": N} beside it' in done.last
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    done = convert(path)
    assert json.loads((done.folder / "config.json").read_text())["num_attention_heads"] == 6


def test_the_heads_beside_a_native_file_win_over_its_width(convert, tmp_path):
    torch.save(native_of_width(1024, 16), tmp_path / "native.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8}')
    done = convert(tmp_path / "native.pth")
    assert json.loads((done.folder / "config.json").read_text())["num_attention_heads"] == 8


def test_a_configuration_beside_it_that_cannot_be_read_is_named(convert, tmp_path):
    torch.save(native_of_width(1024, 16), tmp_path / "native.pth")
    (tmp_path / "config.json").write_text("[]")
    assert convert(tmp_path / "native.pth").last.startswith(f"error: {tmp_path}/config.json: ")


# --- what is taken ---


def test_a_training_checkpoint_is_unwrapped_and_its_decoder_left_out_by_name(convert, cpu, tiny, tiny_native, native):
    decoder = {
        "mask_token": torch.zeros(3),
        "decoder_pos_embed": torch.zeros(2),
        "decoder_blocks.0.norm1.weight": torch.ones(2),
    }
    done = convert(native({"model": torch.load(tiny_native) | decoder, "epoch": 7, "args": {"lr": 0.1}}))
    assert done.code == 0
    assert "a training checkpoint; its 'model' is taken" in done.terminal
    assert "3 tensors of the decoder of MAE pre-training (mask_token, decoder_*) are left out" in done.terminal
    assert torch.equal(hidden(load_model(cpu, str(done.folder))), hidden(tiny))


def test_a_file_of_the_format_before_torch_1_6_is_taken(convert, cpu, tiny, tiny_native, native):
    done = convert(native(torch.load(tiny_native), _use_new_zipfile_serialization=False))
    assert done.code == 0
    assert torch.equal(hidden(load_model(cpu, str(done.folder))), hidden(tiny))


def test_half_precision_stays_as_it_is(convert, cpu, tiny_native, native):
    state = {name: tensor.half() for name, tensor in torch.load(tiny_native).items()}
    done = convert(native(state))
    model = load_model(cpu, str(done.folder))
    assert torch.equal(model.module.embeddings.cls_token, state["cls_token"].float())
    assert {tensor.dtype for tensor in load_file(done.folder / "model.safetensors").values()} == {torch.float16}


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: data[:-300], "truncated or damaged"),
        (lambda data: data.replace(b"PK\x01\x02", b"\0K\x01\x02", 1), "truncated or damaged"),
        (lambda data: b"", "empty"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer, not the weights; run git",
        ),
    ],
    ids=["half", "nearly whole", "damaged directory", "empty", "LFS pointer"],
)
def test_a_damaged_file_is_named(convert, tiny_native, tmp_path, content, said):
    path = tmp_path / "copy.pth"
    path.write_bytes(content(tiny_native.read_bytes()))
    done = convert(path)
    assert (done.code, done.left, len(done.lines)) == (2, [], 1)
    assert done.last.startswith(f"error: {path}: {said}")


@pytest.mark.parametrize(
    ("place", "reason"),
    [("nowhere.pth", "No such file or directory"), (".", "Is a directory"), ("/proc/self/mem", "Input/output error")],
)
def test_a_file_that_cannot_be_read_is_named(convert, tmp_path, place, reason):
    done = convert(tmp_path / place)
    assert (done.code, done.left, len(done.lines)) == (2, [], 1)
    assert done.last == f"error: {tmp_path / place}: cannot be read ({reason})"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.zeros(2)}, "not a ViT in timm's layout: 'cls_token' is missing"),
        ({}, "not a ViT in timm's layout: 'cls_token' is missing"),
        ([1, 2], "not a plain state dict of tensors; Meta's native .pth is wanted"),
        ({"cls_token": 1.0}, "not a plain state dict of tensors"),
        ({1: torch.zeros(2)}, "not a plain state dict of tensors"),
        (torch.zeros(2), "not a plain state dict of tensors"),
    ],
    ids=["another model", "nothing", "list", "numbers", "names that are numbers", "tensor"],
)
def test_what_is_no_encoder_in_timms_layout_is_refused(convert, native, state, said):
    path = native(state)
    done = convert(path)
    assert (done.code, done.left, len(done.lines)) == (2, [], 1)
    assert done.last.startswith(f"error: {path}: {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head.weight": torch.zeros(2)}, r"it has unexpected head\.weight; nothing was loaded"),
        ({"blocks.1.norm1.weight": None}, r"it lacks .*layers?\.1\.layernorm_before\.weight.*; nothing was loaded"),
        ({"norm.bias": torch.zeros(7)}, r"it has the wrong shape for layernorm\.bias; nothing was loaded"),
    ],
    ids=["unknown name", "missing", "another shape"],
)
def test_tensors_that_do_not_make_the_model_are_named_with_the_file(convert, native, tiny_native, change, said):
    state = {name: tensor for name, tensor in (torch.load(tiny_native) | change).items() if tensor is not None}
    path = native(state)
    done = convert(path)
    assert (done.code, done.left) == (2, [])
    assert re.fullmatch(f"error: {path}: checkpoint made: {said}", done.last)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_that_are_no_real_numbers_are_refused(convert, native, tiny_native, kind):
    state = torch.load(tiny_native)
    path = native(state | {"norm.bias": state["norm.bias"].to(kind)})
    done = convert(path)
    told = f"layernorm.bias holds {str(kind).removeprefix('torch.')} values, not floating-point weights"
    assert (done.code, done.left) == (2, [])
    assert done.last == f"error: {path}: made/model.safetensors: {told}"


def test_a_training_checkpoint_with_objects_in_it_is_refused(convert, native, tiny_native):
    path = native({"model": torch.load(tiny_native), "args": argparse.Namespace(lr=0.1)})
    done = convert(path)
    assert (done.code, done.left) == (2, [])
    assert done.last.startswith(f"error: {path}: ") and "not a plain state dict" in done.last


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_nothing_in_a_native_file_is_executed(convert, native, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = convert(native({"cls_token": Payload()}))
    assert done.code == 2 and "not a plain state dict" in done.last
    assert not (tmp_path / "executed").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(convert, tiny_native, tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tiny_native) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    monkeypatch.setattr(torch, "load", None)
    done = convert(path)
    assert (done.code, done.left) == (2, [])
    assert "a compressed archive, which torch.save never writes" in done.last


def test_the_files_hash_is_compared_with_the_lock_before_anything_is_written(convert, tiny_native, locks):
    digest = hashlib.sha256(tiny_native.read_bytes()).hexdigest()
    locks({(TINY_NAME, "tiny.pth"): "0" * 64})
    done = convert(tiny_native)
    assert (done.code, done.left) == (2, [])
    told = f"its sha256 is not the one recorded in locked_models.md for {TINY_NAME}; fetch the file again"
    assert done.last == f"error: {tiny_native}: {told}"
    assert convert(shutil.copy(tiny_native, tiny_native.with_name("other.pth")), "other").code == 0
    locks({("facebook/other", "tiny.pth"): "0" * 64, (TINY_NAME, "other.pth"): "0" * 64})
    assert convert(tiny_native, "others").code == 0
    locks({(TINY_NAME, "tiny.pth"): digest})
    assert convert(tiny_native, "locked").code == 0


# --- where it goes ---


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_there_already_is_left_alone(convert, tiny_native, tmp_path, kind):
    place = tmp_path / "weights" / "made"
    place.parent.mkdir()
    place.write_text("mine") if kind == "file" else place.mkdir()
    if kind == "folder":
        (place / "model.safetensors").write_text("mine")
    done = convert(tiny_native)
    assert (done.code, done.left) == (2, ["made"])
    assert done.last == f"error: {place}: there already; remove it, or name another folder"
    assert [path.read_text() for path in place.parent.rglob("*") if path.is_file()] == ["mine"] * (kind != "empty folder")


def test_a_place_that_cannot_be_written_is_named(convert, tiny_native, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "file").touch()
    done = convert(tiny_native, "file/made")
    assert (done.code, done.left) == (2, ["file"])
    assert done.last == f"error: {done.folder}: cannot be written (File exists)"


@contextmanager
def no_file_larger_than(size: int):
    """For the writer this is a full disk: the same calls fail, with another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [100, 100_000], ids=["at the configuration", "at the weights"])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_behind(convert, tiny_native, size):
    with no_file_larger_than(size):
        done = convert(tiny_native)
    assert (done.code, done.left, len(done.lines)) == (2, [], 2)
    assert done.last.startswith(f"error: {done.folder}: cannot be written (") and "File too large" in done.last


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_being_stopped_leaves_nothing_behind(convert, tiny_native, monkeypatch, name):
    def stopped(*_given, **_options):
        assert signal.getsignal(getattr(signal, name)) is not signal.SIG_DFL, "it would kill the test run"
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(5)

    monkeypatch.setattr(inference, "load_model", stopped)
    done = convert(tiny_native)
    assert (done.code, done.left, done.last) == (130, [], "stopped; nothing was saved")
    assert "Traceback" not in done.terminal
