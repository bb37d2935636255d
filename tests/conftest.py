"""Fixtures: tiny checkpoints of the same architecture, an NPU where there is one, and ways to run the scripts."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SAMPLES = ROOT / "assets" / "samples"
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores; threads beside it would only contend

import inference
import torch
from PIL import Image

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TINY_PREPROCESS = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 64},
}


def tiny_model(seed: int = 1, layers: int = TINY["num_hidden_layers"]) -> torch.nn.Module:
    """A ViT of the tiny size whose parameters, biases and norms too, are all random, so that a mix-up shows.

    Drawn in the order of the hub's names: each version of transformers has its own order.
    """
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTModel

    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        ViTModel(ViTConfig(**TINY | {"num_hidden_layers": layers})).save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        for name in sorted(tensors):
            spread = 0.5 if tensors[name].dim() == 1 else 0.1
            tensors[name] = torch.empty(tensors[name].shape).normal_(0, spread, generator=generator)
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        module = ViTModel.from_pretrained(folder).eval()
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # not mapped to a file that is about to go
    return module


def save_checkpoint(folder: Path, module: torch.nn.Module, preprocess: dict | None = TINY_PREPROCESS) -> Path:
    module.save_pretrained(folder)
    if preprocess is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint in transformers' layout, with a pooler that counts as trained."""
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", tiny_model())


@pytest.fixture(scope="session")
def tiny_native(tmp_path_factory, tiny_folder) -> Path:
    """The same weights as Meta's native .pth: timm's names, query, key and value stacked, no pooler; its heads beside it."""
    from safetensors.torch import load_file

    path = tmp_path_factory.mktemp("native") / "tiny.pth"
    torch.save(to_native_names(load_file(tiny_folder / "model.safetensors")), path)
    (path.parent / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESS))
    (path.parent / "config.json").write_text(json.dumps({"num_attention_heads": TINY["num_attention_heads"]}))
    return path


def to_native_names(hub: dict[str, torch.Tensor], layers: int = TINY["num_hidden_layers"]) -> dict[str, torch.Tensor]:
    native = {
        "cls_token": hub["embeddings.cls_token"],
        "pos_embed": hub["embeddings.position_embeddings"],
        "patch_embed.proj.weight": hub["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": hub["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": hub["layernorm.weight"],
        "norm.bias": hub["layernorm.bias"],
    }
    for layer in range(layers):
        old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
        for leaf in ("weight", "bias"):
            stacked = [hub[f"{old}.attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            native[f"{new}.attn.qkv.{leaf}"] = torch.cat(stacked)
            native[f"{new}.attn.proj.{leaf}"] = hub[f"{old}.attention.output.dense.{leaf}"]
            native[f"{new}.norm1.{leaf}"] = hub[f"{old}.layernorm_before.{leaf}"]
            native[f"{new}.norm2.{leaf}"] = hub[f"{old}.layernorm_after.{leaf}"]
            native[f"{new}.mlp.fc1.{leaf}"] = hub[f"{old}.intermediate.dense.{leaf}"]
            native[f"{new}.mlp.fc2.{leaf}"] = hub[f"{old}.output.dense.{leaf}"]
    return native


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder of seven photos at three depths and two files that are none."""
    photo = (SAMPLES / "chelsea.jpg").read_bytes()
    for name in ("b.JPG", "a.jpeg", "sub/c.Webp", "sub/deep/d.tif", "z.png", "e.gif", "f.BMP"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo)
    (tmp_path / "photos" / "notes.md").write_text("not an image")
    (tmp_path / "photos" / "sub" / "labels.csv").touch()
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def cpu() -> inference.Device:
    return inference.open_device("cpu")


@pytest.fixture(scope="session")
def tiny(cpu, tiny_folder) -> inference.LoadedModel:
    return inference.load_model(cpu, str(tiny_folder))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that are logged, as "LEVEL text", until a script's main() ends all logging."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    level = inference.log.level
    inference.log.setLevel(logging.INFO)
    inference.log.addHandler(handler)
    yield lines
    inference.log.removeHandler(handler)
    inference.log.setLevel(level)


@pytest.fixture
def locks(monkeypatch, tmp_path) -> Callable[[dict], None]:
    """Writes rows of the locked models: locks({(model, file): sha256})."""
    read_locks, table = inference.read_locks, tmp_path / "locked_models.md"
    monkeypatch.setattr(inference, "read_locks", lambda: read_locks(table))

    def write(rows: dict) -> None:
        lines = [f"| `{model}` | `{file}` | 1 | `{digest}` |\n" for (model, file), digest in rows.items()]
        table.write_text("| model | file | bytes | sha256 |\n|---|---|---|---|\n" + "".join(lines))

    return write


@pytest.fixture
def measure(run, tiny_folder) -> Callable[..., SimpleNamespace]:
    """Run eval_performance.py on the tiny checkpoint, three runs of each batch size and one turn."""
    import eval_performance

    def run_measurement(*flags: object, device: str = "cpu") -> SimpleNamespace:
        common = ("--model_path", tiny_folder, "--device", device, "--num_runs", 3, "--rounds", 1)
        return run(*common, *flags, main=eval_performance.main, name="performance_eval")

    return run_measurement


@pytest.fixture
def no_peers(monkeypatch) -> None:
    import eval_performance

    monkeypatch.setattr(eval_performance, "measure_peers", lambda *_arguments: iter(()))


@pytest.fixture
def no_engines(monkeypatch) -> None:
    """An engine that is installed takes seconds to convert the model."""
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)


@pytest.fixture
def quick_npu(monkeypatch, no_peers) -> None:
    """What takes child processes, or seconds of sampling, left out."""
    import eval_performance

    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *_arguments: None)
    monkeypatch.setattr(eval_performance, "measure_power", lambda *_arguments: None)


@pytest.fixture
def no_torch_npu(monkeypatch) -> None:
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def absent(name: str) -> str:
        if name == "torch_npu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch_npu" else find_spec(name, *rest)
    )
    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


@pytest.fixture
def check(tmp_path, capsys) -> Callable[..., SimpleNamespace]:
    """Run env_check.py in this process: exit code, stdout, stderr, the JSON files by name, the log."""
    import env_check

    results, log = tmp_path / "results", tmp_path / "logs" / "env_check.log"

    def run_check(*arguments: object) -> SimpleNamespace:
        code = env_check.main(["--results_dir", str(results), "--output_log", str(log), *map(str, arguments)])
        printed = capsys.readouterr()
        files = {path.name: json.loads(path.read_text()) for path in results.glob("*.json")}
        logged = log.read_text() if log.exists() else ""
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, files=files, log=logged)

    return run_check


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "npu: needs an NPU in this process; tests/cann runs these over its stand-in")
    # As inference.py sets it; pytest begins each test with filters of its own.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "npu" in getattr(item, "fixturenames", ()):
            item.add_marker("npu")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker that is done takes tests over from the other."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def npu() -> Iterator[inference.Device]:
    """An NPU that torch_npu opens in this very process: a real one, or the real torch_npu over tests/cann's stand-in."""
    try:
        device = inference.open_device("npu")
    except inference.Blocked as blocked:
        pytest.skip(f"no NPU can be used in this process: {blocked.reason} (tests/cann/README.md: over a stand-in for CANN)")
    deterministic, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield device
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    inference.set_float32_precision("npu", False, False)


@pytest.fixture
def as_an_npu(npu, monkeypatch) -> None:
    """Nothing tells the stand-in from an NPU: what an NPU's results do."""
    monkeypatch.setattr(inference, "is_stand_in", lambda: False)


@pytest.fixture
def scene(request, tmp_path, tiny_folder):
    """A place to run scripts over the stand-in for CANN, on the wheel that a parameter `stack` names, or the newest."""
    from cann import bundle, stacks

    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    newest = next((name for name in stacks.STACKS if stacks.is_made(name)), "2.13.0")
    return bundle.Scene(params.get("stack", newest), tmp_path, tiny_folder)


@pytest.fixture
def run(tmp_path, capsys) -> Callable[..., SimpleNamespace]:
    """Run a script's main() in this process, with results and log in tmp_path: exit code, terminal, log, result."""

    def run_main(*arguments: object, main: Callable = inference.main, name: str = "inference") -> SimpleNamespace:
        log, results = tmp_path / f"{name}.log", tmp_path / "results"
        log.unlink(missing_ok=True)
        try:
            code = main([*map(str, arguments), "--output_log", str(log), "--results_dir", str(results)])
        except SystemExit as error:
            code = error.code
        terminal = capsys.readouterr().err
        found = sorted(results.glob(f"{name}*.json")) if results.is_dir() else []
        result = json.loads(found[-1].read_text()) if found else None
        logged = log.read_text() if log.exists() else ""
        return SimpleNamespace(code=code, terminal=terminal, log=logged, result=result, folder=results)

    return run_main


@pytest.fixture
def page_bundle(tmp_path, monkeypatch) -> Path:
    """A bundle with READMEs to be filled and no results."""
    from made_results import make_bundle

    monkeypatch.setattr(inference, "ROOT", tmp_path / "bundle")
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def make_pages(page_bundle, capsys) -> Callable[..., SimpleNamespace]:
    """Run evidence.py in this process: exit code and what it printed."""
    import evidence

    def run_main(*arguments: str) -> SimpleNamespace:
        code = evidence.main(arguments)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out.splitlines(), err=printed.err)

    return run_main


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """23 different small photographs."""
    folder = tmp_path_factory.mktemp("photos")
    originals = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp]*g"))]
    for number in range(23):
        image = originals[number % len(originals)]
        image.resize((90 + 3 * number, 80 + 2 * number)).save(folder / f"{number:02d}.jpg", quality=90)
    return folder


@pytest.fixture
def bulk_flags(tiny_folder) -> list[object]:
    return ["--model_path", tiny_folder, "--device", "cpu", "--part_size", 5, "--batch_size", 2, "--num_workers", 0]


@pytest.fixture
def bulk(run, bulk_flags, photos, tmp_path) -> Callable[..., SimpleNamespace]:
    """Run embed.py in parts of 5, batches of 2: five parts of 23 photos, the last one short, the last batch of each too."""
    import embed

    def run_bulk(*more: object, images: object = photos, output: Path = tmp_path / "out") -> SimpleNamespace:
        named = images if isinstance(images, (list, tuple)) else [images]
        done = run("--image_path", *named, "--output", output, *bulk_flags, *more, main=embed.main, name="embed")
        done.parts = sorted(Path(output).glob("part-*.npz"))
        done.last = done.terminal.splitlines()[-1] if done.terminal else ""
        return done

    return run_bulk


@pytest.fixture
def whole_captures(npu, monkeypatch) -> None:
    """A torch_npu that a failed capture leaves whole, as from 2.13 on."""
    from bulk import encoder

    monkeypatch.setattr(encoder, "leaves_no_allocator", lambda device: False)


@pytest.fixture
def no_waits(monkeypatch) -> None:
    """Reading again after a disk error need not wait in tests."""
    sleep = time.sleep
    monkeypatch.setattr(inference.time, "sleep", lambda seconds: sleep(min(seconds, 0.2)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked child computes in one thread: so does what it is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script_environment(**variables: str) -> dict[str, str]:
    """The environment of a script that must not reach the network nor see what the tests have set."""
    quiet = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **quiet, **variables}


def run_script(*arguments: object, root: Path = ROOT, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess:
    """Run a script of the bundle as a process of its own."""
    command = [sys.executable, str(root / str(arguments[0])), *map(str, arguments[1:])]
    return subprocess.run(
        command, env=script_environment(**variables), capture_output=True, text=True, timeout=timeout, check=False
    )


def forked_script(
    *arguments: object, root: Path = ROOT, anew: Iterable[str] = (), **variables: str
) -> subprocess.CompletedProcess:
    """run_script, but for the interpreter: a fork of this process, so that nobody waits for torch and transformers again.

    Of what is imported it has neither the bundle's own files nor the packages `anew`.
    """
    argv = [str(root / str(arguments[0])), *map(str, arguments[1:])]
    return forked(lambda: _run_as_script(argv, anew), **script_environment(**variables))


def _run_as_script(argv: list[str], anew: Iterable[str]) -> None:
    forget_modules(anew)
    own = {str(ROOT), str(ROOT / "eval"), str(TESTS)}
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(argv[0]).parent), *given, *(path for path in sys.path if path not in own)]
    importlib.invalidate_caches()
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def forget_modules(packages: Iterable[str] = ()) -> None:
    """Let what lies in the bundle, and these packages, be imported anew."""
    own = tuple(str(ROOT / place) for place in ("inference.py", "embed", "bulk", "eval", "weights"))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages or (getattr(module, "__file__", None) or "").startswith(own):
            del sys.modules[name]


def forked(body: Callable[[], object], seconds: float = 120, **variables: str) -> subprocess.CompletedProcess:
    """What a process prints that runs body() as its program, in a fork of this one: exit code, stdout, stderr."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = get_context("fork").Process(target=_as_program, args=(body, stdout.fileno(), stderr.fileno(), variables))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        shown = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return subprocess.CompletedProcess([], process.exitcode, *shown)


def _as_program(body: Callable[[], object], stdout: int, stderr: int, variables: dict[str, str]) -> None:
    for number, descriptor in ((1, stdout), (2, stderr)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables or script_environment())
    torch.set_num_threads(1)  # those of the parent are not here
    code: object = 0
    try:
        body()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    if not isinstance(code, (int, type(None))):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
