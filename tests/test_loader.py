"""Loading weights: every layout, every way in which a checkpoint can be wrong, the pooler, random weights, memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
from inference import UsageError, load_model
from safetensors.torch import load_file, save_file

import reference_vit
from conftest import ROOT, SAMPLES, TINY, TINY_PREPROCESS, save_checkpoint, script_environment, tiny_model, to_native_names

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
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert tiny.parameters == sum(tensor.numel() for tensor in load_file(file).values())
    assert tiny.weights.describe() == {
        "source": "checkpoint",
        "path": ".../tiny",
        "sha256": {name: hashlib.sha256((tiny_folder / name).read_bytes()).hexdigest() for name in names},
        "note": None,
    }
    assert (tiny.pooler, tiny.missing_keys, tiny.module.training) == ("trained", [], False)


def test_the_loaded_model_agrees_with_an_independent_vit_in_float64(tiny, tiny_folder):
    weights = {name: tensor.numpy() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    pixels = inference.normalize(crops(tiny), tiny.preprocess)
    expected = reference_vit.forward(weights, pixels.numpy(), TINY["num_attention_heads"], TINY["layer_norm_eps"])
    hidden = inference.forward(tiny, crops(tiny)).hidden
    assert relative_l2(hidden.numpy(), expected) < 2e-6


def test_the_full_size_model_agrees_with_an_independent_vit_in_float64(cpu, tmp_path_factory):
    model = load_model(cpu, random_weights=True, image_size=48, levers=())  # ten tokens: float64 takes its time
    assert model.parameters + (197 - 10) * 1024 == 304_351_232
    folder = tmp_path_factory.mktemp("full")
    model.module.save_pretrained(folder)
    weights = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    pixels = inference.normalize(crops(model, 1), model.preprocess)
    expected = reference_vit.forward(weights, pixels.numpy(), 16, 1e-6)
    hidden = inference.forward(model, crops(model, 1)).hidden
    shutil.rmtree(folder)
    assert hidden.shape == (1, 10, 1024)
    assert relative_l2(hidden.numpy(), expected) < 2e-6


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
    assert sorted(sharded.weights.describe()["sha256"]) == sorted([*shards, "config.json", "preprocessor_config.json"])
    assert torch.equal(inference.forward(sharded, crops(tiny))[0], inference.forward(tiny, crops(tiny))[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", ["tiny_folder", "tiny_native"])
def test_half_precision_holds_the_rounded_weights(cpu, source, dtype, request, tiny_folder):
    half, exact = (
        load_model(cpu, str(path), kind, levers=())
        for path, kind in ((request.getfixturevalue(source), dtype), (tiny_folder, "float32"))
    )
    for (name, value), wanted in zip(half.module.named_parameters(), exact.module.parameters(), strict=True):
        if not name.startswith("pooler"):
            assert torch.equal(value, wanted.to(half.dtype)), name
    assert half.dtype_name == dtype


@pytest.mark.parametrize(
    "path", ["nowhere/at/all", "./nowhere", "/nowhere/model.pth", "weights/typo", "x" * 300, "y" * 150 + "/z", "~nobody/x"]
)
def test_a_wrong_path_is_one_line(cpu, path):
    with pytest.raises(UsageError, match=f"--model_path {path}: no such folder or file"):
        load_model(cpu, path)


def test_a_folder_without_configuration_or_weights_is_refused(cpu, tiny_folder, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json in it"):
        load_model(cpu, str(tmp_path))
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(UsageError, match=r"model\.safetensors is missing; only safetensors"):
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
        (lambda weight, bias: (weight.normal_(0, 0.022), bias.zero_()), "trained"),
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
    assert inference.classify_pooler(weight.to(getattr(torch, dtype)), torch.zeros(1024), 0.02) == "untrained"


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


SMALL_CARD = inference.Card(inference.HUB_ID, TINY["hidden_size"], TINY["num_hidden_layers"], TINY["num_attention_heads"], 16)


def test_random_weights_say_so_everywhere_and_are_the_same_every_time(run, cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "CARDS", (SMALL_CARD,))
    done = run("--image_path", PHOTO, "--random_weights", "--device", "cpu", "--pca", tmp_path / "picture.png")
    note = "random weights: not the model, features mean nothing"
    assert done.result["weights"] == {"source": "random", "note": note, "seed": 0}
    assert "=== webssl-mae300m-full2b-224 (random weights) Inference Results ===" in done.log
    assert done.result["pooler"] == "untrained"
    first, second = (load_model(cpu, random_weights=True).module.embeddings.position_embeddings for _ in range(2))
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.02)


def test_random_weights_are_these_whatever_the_version_and_the_number_of_threads(cpu, monkeypatch):
    monkeypatch.setattr(inference, "CARDS", (SMALL_CARD,))
    module = load_model(cpu, random_weights=True, levers=()).module
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
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
    command = [sys.executable, script, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: there are no weights at weights/webssl-mae300m-full2b-224, and facebook/webssl-mae300m")
    for way in ("HF_ENDPOINT", "GitCode", "ModelScope", "FILE.pth", "--random_weights"):
        assert way in last


@pytest.mark.parametrize("image_size", [32, 96])
def test_other_image_sizes_interpolate_positions_as_the_library_does(cpu, tiny_folder, image_size):
    from transformers import ViTModel

    model = load_model(cpu, str(tiny_folder), image_size=image_size, levers=())
    batch = crops(model)
    assert batch.shape[1] == image_size
    pixels = inference.normalize(batch, model.preprocess).contiguous()
    with torch.inference_mode():
        expected = ViTModel.from_pretrained(tiny_folder)(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(inference.forward(model, batch)[0], expected)


def test_an_image_size_that_patches_do_not_fill_is_refused(cpu, tiny_folder):
    with pytest.raises(UsageError, match="--image_size 100: not a multiple of the patch size, 16"):
        load_model(cpu, str(tiny_folder), image_size=100)


LOAD_AND_REPORT = """
import os, sys
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
cpu = inference.open_device("cpu")
for path in sys.argv[1:]:
    for dtype in ("float32", "float16"):
        if os.fork():  # a child's peak is its own
            os.wait()
            continue
        bare = peak()
        model = inference.load_model(cpu, path, dtype)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
        print(os.path.basename(path), dtype, peak() - bare, size, sum(initialised), flush=True)
        os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_loading_takes_no_more_memory_than_the_weights_and_initialises_nothing(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CARDS", (inference.Card(inference.HUB_ID, 1024, 3, 16, 16),))
    module = load_model(cpu, random_weights=True, levers=()).module
    folder = save_checkpoint(tmp_path / "folder", module, None)
    hub = load_file(folder / "model.safetensors")
    torch.save(to_native_names(hub, layers=3), tmp_path / "native.pth")
    command = [sys.executable, "-c", LOAD_AND_REPORT, str(folder), str(tmp_path / "native.pth")]
    done = subprocess.run(command, env=script_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False)
    reports = [line.split() for line in done.stdout.splitlines()]
    assert len(reports) == 4, done.stderr
    for layout, dtype, peak, size, initialised in reports:
        # A native file read for conversion is in memory whole, twice the size of what it becomes.
        times = 2.2 if (layout, dtype) == ("native.pth", "float16") else 1.2
        assert int(peak) < times * int(size) + (48 << 20), (layout, dtype)  # and the largest tensors, while they are converted
        assert initialised == "0"


# --- which model, and may the page speak of it? ---


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((1024, 24, 16, 16, 4096), "facebook/webssl-mae300m-full2b-224"),
        ((1280, 32, 16, 14, 5120), "facebook/webssl-mae700m-full2b-224"),
        ((1536, 40, 24, 14, 6144), "facebook/webssl-mae1b-full2b-224"),
        ((2688, 24, 21, 14, 10752), "facebook/webssl-mae2b-full2b-224"),
        ((3072, 26, 24, 14, 12288), "facebook/webssl-mae3b-full2b-224"),
        ((1024, 24, 16, 14, 4096), "another model (1024 wide, 24 layers, 16 heads, patches of 14)"),
        ((1024, 24, 16, 16, 4095), "another model (1024 wide, 24 layers, 16 heads, patches of 16)"),
        ((1024, 24, 8, 16, 4096), "another model (1024 wide, 24 layers, 8 heads, patches of 16)"),
        ((1024, 23, 16, 16, 4096), "another model (1024 wide, 23 layers, 16 heads, patches of 16)"),
    ],
)
def test_a_model_is_known_by_its_dimensions(shape, name):
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "intermediate_size")
    assert inference.identify(SimpleNamespace(**dict(zip(fields, shape, strict=True)))) == name


@pytest.fixture
def card_is_tiny(monkeypatch):
    """The tiny checkpoint passes as the card's."""
    monkeypatch.setattr(inference, "identify", lambda config: inference.HUB_ID)


def save_untrained(folder):
    module = tiny_model()
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.weight.data.fill_(1)
            part.bias.data.zero_()
    return save_checkpoint(folder, module)


def test_only_trained_weights_of_the_card_are_evidence(cpu, tiny_folder, tmp_path, card_is_tiny, monkeypatch):
    assert load_model(cpu, str(tiny_folder)).is_evidence
    untrained = load_model(cpu, str(save_untrained(tmp_path / "untrained")))
    assert (untrained.is_evidence, untrained.weights.note) == (False, "looks untrained")
    assert untrained.title == "webssl-mae300m-full2b-224 (looks untrained)"
    monkeypatch.setattr(inference, "CARDS", (SMALL_CARD,))
    assert not load_model(cpu, random_weights=True).is_evidence
    monkeypatch.undo()
    assert not load_model(cpu, str(tiny_folder)).is_evidence


def test_one_trained_norm_is_enough_to_look_trained(cpu, tmp_path):
    folder = save_untrained(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.layernorm_after.bias"][3] = 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(cpu, str(folder)).weights.note is None


def test_another_or_an_untrained_model_is_named_in_log_and_result(run, tmp_path):
    folder = save_untrained(tmp_path / "untrained")
    done = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
    assert done.result["weights"]["note"] == "looks untrained"
    name = "another model (128 wide, 3 layers, 2 heads, patches of 16)"
    assert f"This is not webssl-mae300m-full2b-224 but {name}" in done.log
    assert "The weights look untrained: every layer norm" in done.log
    assert f"=== {name} (looks untrained) Inference Results ===" in done.log


# --- the lock ---


@pytest.fixture
def locks(monkeypatch, tmp_path):
    """Writes rows of the locked models: locks({(model, file): sha256})."""
    read_locks, table = inference.read_locks, tmp_path / "locked_models.md"
    monkeypatch.setattr(inference, "read_locks", lambda: read_locks(table))

    def write(rows: dict) -> None:
        lines = [f"| `{model}` | `{file}` | 1 | `{digest}` |\n" for (model, file), digest in rows.items()]
        table.write_text("| model | file | bytes | sha256 |\n|---|---|---|---|\n" + "".join(lines))

    return write


TINY_NAME = "another model (128 wide, 3 layers, 2 heads, patches of 16)"
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_recorded_hashes_lock_the_files_before_anything_is_computed(run, tiny_folder, locks, tmp_path, monkeypatch, file):
    digest = hashlib.sha256((tiny_folder / file).read_bytes()).hexdigest()
    common = ("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "features.npz")
    calls, forward = [], inference.forward
    monkeypatch.setattr(inference, "forward", lambda *given: calls.append(given) or forward(*given))
    cases = [(TINY_NAME, digest, [], 0), (TINY_NAME, "0" * 64, [], 2), (TINY_NAME, "0" * 64, ["--allow_unlocked"], 0)]
    for model, recorded, flags, code in [*cases, ("facebook/other", "0" * 64, [], 0)]:
        locks({(model, file): recorded})
        (tmp_path / "features.npz").unlink(missing_ok=True)
        calls.clear()
        done = run(*common, *flags)
        assert done.code == code
        assert (tmp_path / "features.npz").exists() == bool(calls) == (code == 0)
        told = f"{file}: its sha256 is not the one recorded in locked_models.md for {TINY_NAME} (000000000000...)"
        assert (told in done.log) == (recorded == "0" * 64 and model == TINY_NAME)


def test_the_native_file_and_each_shard_are_locked(cpu, tiny_native, tmp_path, locks):
    locks({(TINY_NAME, "tiny.pth"): "0" * 64})
    with pytest.raises(UsageError, match=r"tiny\.pth: its sha256 is not the one recorded.*nothing was computed"):
        load_model(cpu, str(tiny_native))
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    shard = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))[-1]
    locks({(TINY_NAME, shard): "0" * 64})
    with pytest.raises(UsageError, match=f"{shard}: its sha256"):
        load_model(cpu, str(tmp_path / "shards"))


def test_the_bundles_own_table_of_locks_is_read(tmp_path):
    table = tmp_path / "locked.md"
    table.write_text(f"| `m` | `a.json` | 12 | `{'a' * 64}` |\n| `m` | `b` | not recorded | not recorded |\n")
    assert inference.read_locks(table) == {("m", "a.json"): "a" * 64}
    assert inference.read_locks(tmp_path / "gone.md") == {}


# --- Meta's native file and its siblings ---


def native_of_width(width: int, patch: int = 14) -> dict[str, torch.Tensor]:
    """A state dict of one layer whose tensors take no room: each value is the same one number."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {name: (width,) for name in ("patch_embed.proj.bias", "norm.weight", "norm.bias")}
    block = {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)}
    block |= {"mlp.fc1.weight": (8, width), "mlp.fc1.bias": (8,), "mlp.fc2.weight": (width, 8)}
    block |= {
        name: (width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias")
    }
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    return {name: torch.full((1,), 0.01).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 16), (1536, 24), (2688, 21), (3072, 24)])
def test_the_heads_of_the_published_widths_are_known(cpu, tmp_path, width, heads):
    torch.save(native_of_width(width), tmp_path / "native.pth")
    config = load_model(cpu, str(tmp_path / "native.pth"), levers=()).module.config
    assert (config.hidden_size, config.num_attention_heads, config.patch_size, config.image_size) == (width, heads, 14, 28)


def test_an_unknown_width_is_refused_unless_the_heads_are_told(cpu, tmp_path):
    path = tmp_path / "native.pth"
    torch.save(native_of_width(384), path)
    with pytest.raises(UsageError, match=r"384 wide is none of the Web-SSL MAE encoders \(1024, 1280, .*config\.json"):
        load_model(cpu, str(path))
    for heads in (0, 5, "6", None):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
        with pytest.raises(UsageError, match="384 wide"):
            load_model(cpu, str(path))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    assert load_model(cpu, str(path)).module.config.num_attention_heads == 6


def test_the_heads_beside_a_native_file_win_over_its_width(cpu, tmp_path):
    torch.save(native_of_width(1024, 16), tmp_path / "native.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8}')
    assert load_model(cpu, str(tmp_path / "native.pth"), levers=()).module.config.num_attention_heads == 8


def native_copy(tiny_native, tmp_path, state: object, **options):
    """A native file with another content, and the tiny one's files beside it."""
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_native.parent / name, tmp_path)
    torch.save(state, tmp_path / "copy.pth", **options)
    return tmp_path / "copy.pth"


def test_a_training_checkpoint_is_unwrapped_and_its_decoder_left_out_by_name(run, tiny, tiny_native, tmp_path, cpu):
    state = torch.load(tiny_native)
    decoder = {
        "mask_token": torch.zeros(3),
        "decoder_pos_embed": torch.zeros(2),
        "decoder_blocks.0.norm1.weight": torch.ones(2),
    }
    path = native_copy(tiny_native, tmp_path, {"model": state | decoder, "epoch": 7, "args": {"lr": 0.1}})
    done = run("--image_path", PHOTO, "--model_path", path, "--device", "cpu")
    assert done.code == 0
    assert "a training checkpoint; its 'model' is loaded" in done.log
    assert "3 tensors of the decoder of MAE pre-training (mask_token, decoder_*) are left out" in done.log
    assert torch.equal(
        inference.forward(load_model(cpu, str(path)), crops(tiny)).hidden, inference.forward(tiny, crops(tiny)).hidden
    )


def test_a_training_checkpoint_with_objects_in_it_is_refused(cpu, tiny_native, tmp_path):
    import argparse

    path = native_copy(tiny_native, tmp_path, {"model": torch.load(tiny_native), "args": argparse.Namespace(lr=0.1)})
    with pytest.raises(UsageError, match=r"copy\.pth: .*not a plain state dict"):
        load_model(cpu, str(path))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_of_the_format_before_torch_1_6_loads(cpu, tiny, tiny_native, tmp_path, dtype):
    path = native_copy(tiny_native, tmp_path, torch.load(tiny_native), _use_new_zipfile_serialization=False)
    hidden = inference.forward(load_model(cpu, str(path), dtype), crops(tiny)).hidden
    exact = inference.forward(tiny, crops(tiny)).hidden
    assert torch.equal(hidden, exact) if dtype == "float32" else relative_l2(hidden.float().numpy(), exact.numpy()) < 1e-2


def test_a_compressed_archive_is_refused_before_it_is_unpacked(cpu, tiny_native, tmp_path):
    with zipfile.ZipFile(tiny_native) as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    for dtype in ("float32", "float16"):
        with pytest.raises(UsageError, match=r"bomb\.pth: .*a compressed archive, which torch\.save never writes"):
            load_model(cpu, str(tmp_path / "bomb.pth"), dtype)


def test_an_archive_with_a_damaged_directory_is_named(cpu, tiny_native, tmp_path):
    data = tiny_native.read_bytes()
    (tmp_path / "w.pth").write_bytes(data.replace(b"PK\x01\x02", b"\0K\x01\x02", 1))
    with pytest.raises(UsageError, match=r"w\.pth: truncated or damaged"):
        load_model(cpu, str(tmp_path / "w.pth"))


# --- checkpoints that are legal, and some that are not ---


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_no_real_numbers_are_refused(cpu, edited, tiny_native, tmp_path, kind, dtype):
    said = f"holds {str(kind).removeprefix('torch.')} values, not floating-point weights"
    name = "encoder.layer.0.intermediate.dense.bias"
    with pytest.raises(UsageError, match=rf"model\.safetensors: {name} {said}"):
        load_model(cpu, edited(lambda tensors: tensors.update({name: tensors[name].to(kind)})), dtype)
    state = torch.load(tiny_native)
    path = native_copy(tiny_native, tmp_path, state | {"norm.bias": state["norm.bias"].to(kind)})
    with pytest.raises(UsageError, match=rf"copy\.pth: norm\.bias {said}"):
        load_model(cpu, str(path), dtype)


@pytest.fixture
def configured(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint with other fields in its configuration."""

    def write(**fields) -> str:
        folder = shutil.copytree(tiny_folder, tmp_path / "configured", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.mark.parametrize(
    "fields",
    [{"image_size": [64, 64], "patch_size": [16, 16]}, {"auto_map": None}, {"auto_map": ["x"]}, {"torch_dtype": "float16"}],
    ids=str,
)
def test_legal_configurations_load(cpu, tiny, configured, fields):
    model = load_model(cpu, configured(**fields))
    assert torch.equal(inference.forward(model, crops(tiny)).hidden, inference.forward(tiny, crops(tiny)).hidden)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": [64, 32]},
        {"hidden_act": "no_such_thing"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"image_size": 0},
        {"patch_size": 0},
        {"patch_size": "16"},
        {"hidden_size": None},
        {"num_hidden_layers": -1},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_one_line(cpu, configured, fields):
    with pytest.raises(UsageError, match=r"config\.json: |checkpoint .*: "):
        load_model(cpu, configured(**fields))


@pytest.mark.parametrize("weight_map", [["model.safetensors"], {"a": 1}, None, "model.safetensors"], ids=str)
def test_an_index_that_names_no_files_is_refused(cpu, configured, weight_map):
    folder = configured()
    with open(f"{folder}/model.safetensors.index.json", "w") as file:
        json.dump({"weight_map": weight_map}, file)
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json: its weight_map does not name files"):
        load_model(cpu, folder)


# --- the hub ---


def fill_cache(monkeypatch, tmp_path, tiny_folder, hub_id: str, commit: str) -> None:
    """Put the tiny checkpoint into a cache of the hub, at a commit that is also the branch main."""
    import huggingface_hub

    repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(inference, "ROOT", tmp_path)  # where no weights are


def test_the_pinned_commit_is_taken_from_the_cache_without_a_network(cpu, monkeypatch, tmp_path, tiny, tiny_folder):
    commit = "4655a0ac1726c206ba14d5ccb26758c62a4d03b0"
    fill_cache(monkeypatch, tmp_path, tiny_folder, "facebook/webssl-mae300m-full2b-224", commit)
    assert load_model(cpu).parameters == tiny.parameters


def test_another_commit_in_the_cache_is_not_taken_for_the_pinned_one(cpu, monkeypatch, tmp_path, tiny_folder):
    import huggingface_hub

    asked = []
    fill_cache(monkeypatch, tmp_path, tiny_folder, "facebook/webssl-mae300m-full2b-224", "0" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda _api, *args, **options: asked.append(options["revision"]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", record_download(asked, huggingface_hub.snapshot_download))
    with pytest.raises(UsageError, match="could not be downloaded"):
        load_model(cpu)
    assert asked == ["4655a0ac1726c206ba14d5ccb26758c62a4d03b0"] * 3


def record_download(asked: list, download):
    def snapshot_download(*args, **options):
        asked.append(options["revision"])
        return download(*args, **options | {"local_files_only": True})

    return snapshot_download


def test_a_cached_hub_id_without_a_pinned_commit_loads_offline(cpu, monkeypatch, tmp_path, tiny, tiny_folder):
    import huggingface_hub

    fill_cache(monkeypatch, tmp_path, tiny_folder, "someone/tiny-vit", "1" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model(cpu, "someone/tiny-vit").parameters == tiny.parameters
    with pytest.raises(UsageError, match="someone/else: not a folder or file here, and someone/else could not be downloaded"):
        load_model(cpu, "someone/else")
