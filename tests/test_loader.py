"""Loading weights: every layout, every way in which a checkpoint can be wrong, the pooler, random weights, memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import inference
import numpy as np
import pytest
import reference_vit
import torch
from conftest import ROOT, SAMPLES, TINY, TINY_PREPROCESS, save_checkpoint, script_environment, tiny_model, to_native_names
from inference import UsageError, load_model
from safetensors.torch import load_file, save_file

PHOTO = SAMPLES / "chelsea.jpg"


def crops(model: inference.LoadedModel, count: int = 2) -> torch.Tensor:
    size = model.preprocess.image_size
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@pytest.fixture
def edited(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint with its tensors edited."""

    def edit(change) -> str:
        folder = shutil.copytree(tiny_folder, tmp_path / "edited")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return edit


def test_a_folder_loads_with_its_source_hash_parameters_and_pooler(tiny, tiny_folder):
    file = tiny_folder / "model.safetensors"
    assert tiny.parameters == sum(tensor.numel() for tensor in load_file(file).values())
    assert tiny.weights.describe() == {
        "source": "checkpoint",
        "path": str(tiny_folder),
        "sha256": {"model.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    assert (tiny.pooler, tiny.missing_keys, tiny.module.training) == ("trained", [], False)


def test_the_loaded_model_agrees_with_an_independent_vit_in_float64(tiny, tiny_folder):
    weights = {name: tensor.numpy() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    pixels = inference.normalize(crops(tiny), tiny.preprocess)
    expected = reference_vit.forward(weights, pixels.numpy(), TINY["num_attention_heads"], TINY["layer_norm_eps"])
    hidden, _ = inference.forward(tiny, crops(tiny))
    assert relative_l2(hidden.numpy(), expected) < 1e-5


def test_the_full_size_model_agrees_with_an_independent_vit_in_float64(cpu, tmp_path_factory):
    model = load_model(cpu, random_weights=True)
    assert model.parameters == 304_351_232
    folder = tmp_path_factory.mktemp("full")
    model.module.save_pretrained(folder)
    weights = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    pixels = inference.normalize(crops(model, 1), model.preprocess)
    expected = reference_vit.forward(weights, pixels.numpy(), 16, 1e-6)
    hidden, _ = inference.forward(model, crops(model, 1))
    shutil.rmtree(folder)
    assert hidden.shape == (1, 197, 1024)
    assert relative_l2(hidden.numpy(), expected) < 1e-5


def test_the_native_file_gives_the_same_features_as_the_hub_layout(cpu, tiny, tiny_native):
    native = load_model(cpu, str(tiny_native))
    assert native.pooler == "missing"
    assert native.missing_keys == ["pooler.dense.bias", "pooler.dense.weight"]
    assert torch.equal(inference.forward(native, crops(tiny))[0], inference.forward(tiny, crops(tiny))[0])


def test_sharded_weights_load_and_every_shard_is_hashed(cpu, tiny, tiny_folder, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="500KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    sharded = load_model(cpu, str(tmp_path))
    assert len(shards) > 1
    assert sorted(sharded.weights.describe()["sha256"]) == shards
    assert torch.equal(inference.forward(sharded, crops(tiny))[0], inference.forward(tiny, crops(tiny))[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", ["tiny_folder", "tiny_native"])
def test_half_precision_holds_the_rounded_weights(cpu, source, dtype, request, tiny):
    half = load_model(cpu, str(request.getfixturevalue(source)), dtype)
    for (name, value), exact in zip(half.module.named_parameters(), tiny.module.parameters(), strict=True):
        if not name.startswith("pooler"):
            assert torch.equal(value, exact.to(inference.DTYPES[dtype])), name
    assert half.dtype_name == dtype


@pytest.mark.parametrize("path", ["nowhere/at/all", "./nowhere", "/nowhere/model.pth", "weights/typo"])
def test_a_wrong_path_is_one_line(cpu, path):
    with pytest.raises(UsageError, match=f"--model_path {path}: no such folder or file"):
        load_model(cpu, path)


def test_a_folder_without_configuration_or_weights_is_refused(cpu, tiny_folder, tmp_path):
    with pytest.raises(UsageError, match="no config.json in it"):
        load_model(cpu, str(tmp_path))
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(UsageError, match="model.safetensors is missing; only safetensors"):
        load_model(cpu, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: b"", "empty"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("source", ["tiny_folder", "tiny_native"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_damaged_weight_file_is_named(cpu, source, content, said, dtype, request, tmp_path):
    original = request.getfixturevalue(source)
    if original.is_dir():
        path = shutil.copytree(original, tmp_path / "copy")
        file = path / "model.safetensors"
    else:
        path = file = tmp_path / "copy.pth"
        shutil.copy(original, file)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UsageError, match=rf"{file}: {said}"):
        load_model(cpu, str(path), dtype)


def test_another_architecture_is_refused(cpu, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "dinov2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="model_type is 'dinov2', and this bundle runs 'vit'"):
        load_model(cpu, str(folder))


@pytest.mark.parametrize("text", ["not json", "[]", '{"model_type": "vit", "hidden_size": "many"}'])
def test_an_unusable_configuration_is_refused(cpu, tiny_folder, tmp_path, text):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json: |cannot build the model: "):
        load_model(cpu, str(folder))


def test_missing_keys_are_named(cpu, edited):
    with pytest.raises(UsageError, match=r"it lacks .*layernorm_before\.weight; nothing was loaded"):
        load_model(cpu, edited(lambda tensors: tensors.pop("encoder.layer.1.layernorm_before.weight")))


def test_half_a_pooler_is_a_missing_key(cpu, edited):
    with pytest.raises(UsageError, match=r"it lacks pooler\.dense\.bias; nothing was loaded"):
        load_model(cpu, edited(lambda tensors: tensors.pop("pooler.dense.bias")))


def test_unexpected_keys_are_named(cpu, edited):
    with pytest.raises(UsageError, match=r"it has unexpected classifier\.weight; nothing was loaded"):
        load_model(cpu, edited(lambda tensors: tensors.update({"classifier.weight": torch.zeros(2)})))


def test_a_tensor_of_the_wrong_shape_is_named(cpu, edited):
    with pytest.raises(UsageError, match=r"it has the wrong shape for embeddings\.cls_token; nothing was loaded"):
        load_model(cpu, edited(lambda tensors: tensors.update({"embeddings.cls_token": torch.zeros(1, 1, 8)})))


def test_a_native_file_of_something_else_is_refused(cpu, tmp_path, tiny_native):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="not a ViT in timm's layout: 'cls_token' is missing"):
        load_model(cpu, str(tmp_path / "other.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="not a plain state dict of tensors"):
        load_model(cpu, str(tmp_path / "list.pth"))
    state = torch.load(tiny_native) | {"head.weight": torch.zeros(2)}
    torch.save(state, tiny_native.parent / "head.pth")
    with pytest.raises(UsageError, match=r"it has unexpected head\.weight"):
        load_model(cpu, str(tiny_native.parent / "head.pth"))


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_nothing_in_a_native_file_is_executed(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match="not a plain state dict"):
        load_model(cpu, "evil.pth")
    assert not (tmp_path / "executed").exists()


OWN_CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTModel

Path(__file__).with_name("executed").touch()

class MyConfig(ViTConfig):
    model_type = "my_vit"

class MyModel(ViTModel):
    config_class = MyConfig
"""


def test_code_of_a_checkpoint_runs_only_when_trusted_and_with_a_warning(run, cpu, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    module = tiny_model()
    folder = save_checkpoint(tmp_path / "own", module)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_vit", "auto_map": {"AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(OWN_CODE)
    done = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
    assert (done.code, done.terminal.count("\n")) == (2, done.log.count("\n"))
    assert "runs only with --trust_remote_code" in done.terminal
    trusted = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu", "--trust_remote_code")
    assert trusted.code == 0
    assert "[WARNING] --trust_remote_code: running the Python code" in trusted.log


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda weight, bias: weight.normal_(0, 0.02), "trained"),  # its bias is not zero
        (lambda weight, bias: (weight.normal_(0, 0.02), bias.zero_()), "untrained"),
        (lambda weight, bias: (weight.normal_(0, 0.03), bias.zero_()), "trained"),
    ],
)
def test_the_pooler_is_told_apart(cpu, tmp_path, change, state):
    torch.manual_seed(0)
    module = tiny_model()
    change(module.pooler.dense.weight.data, module.pooler.dense.bias.data)
    assert load_model(cpu, str(save_checkpoint(tmp_path / "model", module))).pooler == state


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_untrained_pooler_is_recognised_in_half_precision_too(cpu, dtype):
    weight = torch.empty(1024, 1024).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    assert inference.classify_pooler(weight.to(inference.DTYPES[dtype]), torch.zeros(1024), 0.02) == "untrained"


def test_a_missing_pooler_is_the_same_at_every_load_and_is_named(run, cpu, tiny_native):
    first, second = (load_model(cpu, str(tiny_native)).module.pooler.dense.weight for _ in range(2))
    assert torch.equal(first, second)
    done = run("--image_path", PHOTO, "--model_path", tiny_native, "--device", "cpu")
    assert done.result["pooler"] == "missing"
    assert "Missing from the checkpoint: pooler.dense.bias, pooler.dense.weight" in done.log
    assert "[WARNING] Pooler: missing from the checkpoint, seeded here" in done.log


def test_pooler_features_are_saved_only_when_asked_for(run, tiny_folder, tmp_path):
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    run(*common, "--output", tmp_path / "plain.npz")
    run(*common, "--output", tmp_path / "asked.npz", "--save_pooler")
    assert "pooler_output" not in np.load(tmp_path / "plain.npz")
    assert np.load(tmp_path / "asked.npz")["pooler_output"].shape == (1, TINY["hidden_size"])


def test_random_weights_say_so_everywhere_and_are_the_same_every_time(run, cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "VIT_LARGE", inference.VIT_LARGE | TINY | {"image_size": 224})
    done = run("--image_path", PHOTO, "--random_weights", "--device", "cpu", "--pca", tmp_path / "picture.png")
    assert done.result["weights"] == {"source": "random", "note": "random weights: not the model, features mean nothing", "seed": 0}
    assert "=== webssl-mae300m-full2b-224 Inference Results (random weights) ===" in done.log
    assert done.result["pooler"] == "untrained"
    first, second = (load_model(cpu, random_weights=True).module.embeddings.position_embeddings for _ in range(2))
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.02)


def test_random_weights_are_these_whatever_the_version_and_the_number_of_threads(cpu, monkeypatch):
    monkeypatch.setattr(inference, "VIT_LARGE", inference.VIT_LARGE | TINY)
    matrices = [parameter for parameter in load_model(cpu, random_weights=True).module.parameters() if parameter.dim() > 1]
    for seed, expected in RANDOM_VALUES.items():
        assert matrices[seed].flatten()[:3].tolist() == pytest.approx(expected, abs=1e-8)


RANDOM_VALUES = {  # the first values of the class token, the first query and the pooler
    0: [-0.000259351, 0.018582951, -0.02851112],
    3: [-0.034345631, -0.027326956, -0.014837269],
    21: [-0.001831228, 0.007870353, -0.033804573],
}


def test_without_weights_the_hub_is_tried_and_then_the_ways_to_get_them_are_told(tmp_path):
    script = tmp_path / "inference.py"
    shutil.copy(ROOT / "inference.py", script)
    flags = ["--device", "cpu", "--image_path", str(PHOTO)]
    environment = script_environment(HF_HOME=str(tmp_path / "hub"))
    done = subprocess.run([sys.executable, script, *flags], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: there are no weights at weights/webssl-mae300m-full2b-224, and facebook/webssl-mae300m")
    for way in ("HF_ENDPOINT", "GitCode", "ModelScope", "FILE.pth", "--random_weights"):
        assert way in last


@pytest.mark.parametrize("image_size", [32, 96])
def test_other_image_sizes_interpolate_positions_as_the_library_does(cpu, tiny_folder, image_size):
    from transformers import ViTModel

    model = load_model(cpu, str(tiny_folder), image_size=image_size)
    batch = crops(model)
    assert batch.shape[1] == image_size
    pixels = inference.normalize(batch, model.preprocess)
    with torch.inference_mode():
        expected = ViTModel.from_pretrained(tiny_folder)(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(inference.forward(model, batch)[0], expected)


def test_an_image_size_that_patches_do_not_fill_is_refused(cpu, tiny_folder):
    with pytest.raises(UsageError, match="--image_size 100: not a multiple of the patch size, 16"):
        load_model(cpu, str(tiny_folder), image_size=100)


LOAD_AND_REPORT = """
import sys
import inference, torch, transformers
from transformers import ViTModel

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

initialised = []
for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_"):
    def record(tensor, *args, _real=getattr(torch.nn.init, name), **kwargs):
        if tensor.device.type != "meta":
            initialised.append(tensor.numel())
        return _real(tensor, *args, **kwargs)
    setattr(torch.nn.init, name, record)
bare = peak()
model = inference.load_model(inference.open_device("cpu"), sys.argv[1], sys.argv[2])
size = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
print((peak() - bare) / size, sum(initialised))
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["folder", "native"])
def test_loading_takes_no_more_memory_than_the_weights_and_initialises_nothing(tmp_path, dtype, layout):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**TINY | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096})
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(tmp_path)
    path = tmp_path
    if layout == "native":
        path = tmp_path / "model.pth"
        torch.save(to_native_names(load_file(tmp_path / "model.safetensors")), path)
    command = [sys.executable, "-c", LOAD_AND_REPORT, str(path), dtype]
    done = subprocess.run(command, env=script_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratio, initialised = map(float, done.stdout.split())
    # A native file read for conversion is in memory whole, twice the size of what it becomes.
    assert ratio < (2.6 if (layout, dtype) == ("native", "float16") else 1.3)
    assert initialised == 0


def test_recorded_hashes_lock_the_weights(run, tiny_folder, monkeypatch, tmp_path):
    digest = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "features.npz")
    read_locks = inference.read_locks
    table = tmp_path / "locked_models.md"
    monkeypatch.setattr(inference, "read_locks", lambda: read_locks(table))
    for recorded, flags, code in ((digest, [], 0), ("0" * 64, [], 2), ("0" * 64, ["--allow_unlocked"], 0)):
        table.write_text(f"| file | bytes | sha256 |\n|---|---|---|\n| `model.safetensors` | 1 | `{recorded}` |\n")
        (tmp_path / "features.npz").unlink(missing_ok=True)
        done = run(*common, *flags)
        assert done.code == code
        assert (tmp_path / "features.npz").exists() == (code == 0)
    assert "its sha256 is not the one recorded in locked_models.md" in done.log
