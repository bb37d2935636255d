"""Loading weights: every layout, every way in which a checkpoint can be wrong, the pooler, random weights, the lock, memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import re
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
import transformers
from inference import UsageError, load_model
from safetensors.torch import load_file, save_file

import reference_vit
from conftest import ROOT, SAMPLES, TINY, TINY_PREPROCESS, forked, save_checkpoint, tiny_model

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
    model = load_model(cpu, random_weights=True, image_size=48)  # ten tokens: float64 takes its time
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


def test_sharded_weights_load_and_every_shard_is_hashed(cpu, tiny, tiny_folder, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="500KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    sharded = load_model(cpu, str(tmp_path))
    assert len(shards) > 1
    assert sorted(sharded.weights.describe()["sha256"]) == sorted([*shards, "config.json", "preprocessor_config.json"])
    assert torch.equal(inference.forward(sharded, crops(tiny))[0], inference.forward(tiny, crops(tiny))[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_holds_the_rounded_weights(cpu, dtype, tiny_folder):
    half, exact = (load_model(cpu, str(tiny_folder), kind) for kind in (dtype, "float32"))
    for (name, value), wanted in zip(half.module.named_parameters(), exact.module.parameters(), strict=True):
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
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_damaged_weight_file_is_named(cpu, tiny_folder, content, said, dtype, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UsageError, match=rf"{file}: {said}"):
        load_model(cpu, str(folder), dtype)


@pytest.mark.parametrize("name", ["tiny.pth", "with space's.pth"])
def test_metas_native_file_is_one_line_that_says_how_to_convert_it(run, tiny_native, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_native, name)
    done = run("--image_path", PHOTO, f"--model_path={name}", "--device", "cpu")
    assert (done.code, done.result) == (2, None)
    last = done.terminal.splitlines()[-1]
    said = re.fullmatch(r"error: --model_path (.*): a file, where a folder .*; convert Meta's native file once \((.*)\)", last)
    assert said[1] == name
    command = shlex.split(said[2])
    assert command == ["python", "weights/convert_native.py", name, "weights/webssl-mae300m-full2b-224"]
    assert (ROOT / command[1]).is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_folder_is_one_line_that_asks_for_the_folder(cpu, tiny_folder, name):
    with pytest.raises(UsageError, match=rf"--model_path .*{name}: a file, where a folder .* is wanted; name its folder$"):
        load_model(cpu, str(tiny_folder / name))


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


OWN_CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTModel

Path({mark!r}).touch()

class MyConfig(ViTConfig):
    model_type = "my_vit"

class MyModel(ViTModel):
    config_class = MyConfig
"""


def test_code_of_a_checkpoint_runs_only_when_trusted_and_with_a_warning(run, cpu, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    module = tiny_model()
    folder = save_checkpoint(tmp_path / "own", module)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_vit", "auto_map": {"AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(OWN_CODE.format(mark=str(tmp_path / "executed")))
    done = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
    assert (done.code, done.terminal.count("\n")) == (2, done.log.count("\n"))
    assert "runs only with --trust_remote_code" in done.terminal
    assert not (tmp_path / "executed").exists()
    trusted = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu", "--trust_remote_code")
    assert trusted.code == 0
    assert "[WARNING] --trust_remote_code: running the Python code" in trusted.log
    assert (tmp_path / "executed").exists()


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


def test_a_missing_pooler_is_the_same_at_every_load_and_is_named(run, cpu, edited):
    folder = edited(lambda tensors: (tensors.pop("pooler.dense.bias"), tensors.pop("pooler.dense.weight")))
    models = [load_model(cpu, folder) for _ in range(2)]
    assert [(model.pooler, model.missing_keys) for model in models] == [("missing", inference.POOLER_KEYS)] * 2
    assert torch.equal(models[0].module.pooler.dense.weight, models[1].module.pooler.dense.weight)
    done = run("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
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


def test_random_weights_say_so_everywhere_and_are_the_same_every_time(run, cpu, monkeypatch):
    monkeypatch.setattr(inference, "CARDS", (SMALL_CARD,))
    done = run("--image_path", PHOTO, "--random_weights", "--device", "cpu")
    note = "random weights: not the model, features mean nothing"
    assert done.result["weights"] == {"source": "random", "note": note, "seed": 0}
    assert "=== webssl-mae300m-full2b-224 (random weights) Inference Results ===" in done.log
    assert done.result["pooler"] == "untrained"
    first, second = (load_model(cpu, random_weights=True).module.embeddings.position_embeddings for _ in range(2))
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.02)


def test_random_weights_are_these_whatever_the_version_and_the_number_of_threads(cpu, monkeypatch):
    monkeypatch.setattr(inference, "CARDS", (SMALL_CARD,))
    module = load_model(cpu, random_weights=True).module
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    for seed, expected in RANDOM_VALUES.items():
        assert matrices[seed].flatten()[:3].tolist() == pytest.approx(expected, abs=1e-8)


RANDOM_VALUES = {  # the first values of the class token, the first query and the pooler
    0: [-0.000259351, 0.018582951, -0.02851112],
    3: [-0.034345631, -0.027326956, -0.014837269],
    21: [-0.001831228, 0.007870353, -0.033804573],
}


def test_without_weights_the_hub_is_tried_and_then_the_ways_to_get_them_are_told(run, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(inference, "ROOT", tmp_path)  # where no weights are
    done = run("--device", "cpu", "--image_path", PHOTO)
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert last.startswith("error: there are no weights at weights/webssl-mae300m-full2b-224, and facebook/webssl-mae300m")
    for way in ("HF_ENDPOINT", "GitCode", "ModelScope", "weights/convert_native.py", "--random_weights"):
        assert way in last


@pytest.mark.parametrize("image_size", [32, 96])
def test_other_image_sizes_interpolate_positions_as_the_library_does(cpu, tiny_folder, image_size):
    from transformers import ViTModel

    model = load_model(cpu, str(tiny_folder), image_size=image_size)
    batch = crops(model)
    assert batch.shape[1] == image_size
    pixels = inference.normalize(batch, model.preprocess).contiguous()
    with torch.inference_mode():
        expected = ViTModel.from_pretrained(tiny_folder)(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(inference.forward(model, batch)[0], expected)


def test_an_image_size_that_patches_do_not_fill_is_refused(cpu, tiny_folder):
    with pytest.raises(UsageError, match="--image_size 100: not a multiple of the patch size, 16"):
        load_model(cpu, str(tiny_folder), image_size=100)


def load_and_report(folder: str, dtype: str) -> None:
    """Print by how much the peak of memory grows, the size of the weights, and how much was initialised."""
    initialised = []

    def recorded(fill):
        def record(tensor, *args, **options):
            initialised.append(0 if tensor.device.type == "meta" else tensor.numel())
            return fill(tensor, *args, **options)

        return record

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])

    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_"):
        setattr(torch.nn.init, name, recorded(getattr(torch.nn.init, name)))
    bare = peak()
    model = load_model(inference.open_device("cpu"), folder, dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    print(peak() - bare, size, sum(initialised))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_loading_takes_no_more_memory_than_the_weights_and_initialises_nothing(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CARDS", (inference.Card(inference.HUB_ID, 1024, 3, 16, 16),))
    module = load_model(cpu, random_weights=True).module
    folder = save_checkpoint(tmp_path / "folder", module)
    del module
    for dtype in ("float32", "float16"):
        gc.collect()
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else what is free here would be taken before the peak grows
        done = forked(lambda dtype=dtype: load_and_report(str(folder), dtype))
        assert done.returncode == 0, done.stderr
        peak, size, initialised = map(int, done.stdout.split())
        assert peak < 1.2 * size + (48 << 20), dtype  # and the largest tensors, while they are converted
        assert initialised == 0


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


def test_each_shard_is_locked(cpu, tmp_path, locks):
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    shard = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))[-1]
    locks({(TINY_NAME, shard): "0" * 64})
    with pytest.raises(UsageError, match=f"{shard}: its sha256 is not the one recorded.*nothing was computed"):
        load_model(cpu, str(tmp_path / "shards"))


def test_the_bundles_own_table_of_locks_is_read(tmp_path):
    table = tmp_path / "locked.md"
    table.write_text(f"| `m` | `a.json` | 12 | `{'a' * 64}` |\n| `m` | `b` | not recorded | not recorded |\n")
    assert inference.read_locks(table) == {("m", "a.json"): "a" * 64}
    assert inference.read_locks(tmp_path / "gone.md") == {}


# --- checkpoints that are legal, and some that are not ---


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_no_real_numbers_are_refused(cpu, edited, kind, dtype):
    said = f"holds {str(kind).removeprefix('torch.')} values, not floating-point weights"
    name = "encoder.layer.0.intermediate.dense.bias"
    with pytest.raises(UsageError, match=rf"model\.safetensors: {name} {said}"):
        load_model(cpu, edited(lambda tensors: tensors.update({name: tensors[name].to(kind)})), dtype)


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
