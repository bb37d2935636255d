"""Where the bundle finds itself: broken packages beside it, an isolated interpreter, a disk that cannot be written."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import inference
import pytest
from inference import UsageError

from conftest import ROOT, SAMPLES, forget_modules, forked

PHOTO = SAMPLES / "chelsea.jpg"


# --- packages beside it ---


def broken(folder: Path, name: str, code: str) -> str:
    """A folder for sys.path in which a package of this name is installed and cannot be imported."""
    site, version = folder / "site-packages", "0.1.2"
    with suppress(PackageNotFoundError):
        version = importlib.metadata.version(name)  # transformers looks at it
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(code)
    (site / f"{name}-{version}.dist-info").mkdir()
    (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / f"{name}-{version}.dist-info" / "RECORD").write_text(f"{name}/__init__.py,,\n")
    (site / f"{name}-{version}.dist-info" / "top_level.txt").write_text(f"{name}\n")
    return str(site)


def run_beside(site: str, name: str, *flags: object) -> subprocess.CompletedProcess:
    """inference.py where transformers is imported for the first time, with that folder in front."""

    def program() -> None:
        forget_modules((name, "transformers"))
        sys.path.insert(0, site)
        sys.exit(inference.main(["--image_path", str(PHOTO), "--device", "cpu", *map(str, flags)]))

    return forked(program)


def test_a_broken_package_that_is_not_needed_is_named_and_done_without(tmp_path, tiny_folder):
    """torch was replaced on the host, and torchvision was not."""
    site = broken(tmp_path, "torchvision", 'raise RuntimeError("operator torchvision::nms does not exist")\n')
    where = ["--model_path", tiny_folder, "--output_log", tmp_path / "log", "--results_dir", tmp_path]
    done = run_beside(site, "torchvision", *where)
    assert done.returncode == 0, done.stderr
    told = rf"torchvision 0\.1\.2 cannot be imported beside torch {re.escape(inference.torch.__version__)}"
    assert re.search(rf"\[WARNING\] {told} \(operator torchvision::nms does not exist\): going on without it", done.stderr)
    assert "pip install" not in done.stderr


def test_env_check_tells_of_the_package_that_a_run_would_tell_of(tmp_path, monkeypatch):
    import env_check

    site = broken(tmp_path, "torchvision", 'raise RuntimeError("operator torchvision::nms does not exist")\n')
    monkeypatch.setitem(env_check.ENVIRONMENT, "PYTHONPATH", site)
    [told] = env_check.imports_fit()
    assert told.startswith("torchvision 0.1.2 cannot be imported beside torch ")


def test_a_broken_package_that_is_needed_is_one_line_with_both_versions_and_its_causes_in_the_log(tmp_path, tiny_folder):
    code = "try:\n    import not_there\nexcept ImportError as error:\n    raise ImportError('the outer word') from error\n"
    where = ["--model_path", tiny_folder, "--output_log", tmp_path / "log", "--results_dir", tmp_path]
    done = run_beside(broken(tmp_path, "tokenizers", code), "tokenizers", *where)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    versions = (
        f"tokenizers {importlib.metadata.version('tokenizers')} cannot be imported beside torch {inference.torch.__version__}"
    )
    told = f"error: {versions} (No module named 'not_there')"
    assert last == f"{told}; install what goes together: pip install -r requirements.txt"
    assert "No module named 'not_there'" in (tmp_path / "log").read_text()
    assert "Traceback (most recent call last)" in (tmp_path / "log").read_text()


def test_what_is_hidden_from_transformers_is_hidden_from_nobody_else(cpu, tiny_folder, monkeypatch):
    """After open_device("cpu") and a model somebody's own `import torch_npu` works as if nothing had been."""
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    seen = []
    monkeypatch.setattr(inference, "_prove_preprocess", lambda *_given: seen.append("torch_npu" in sys.modules))
    inference.load_model(inference.open_device("cpu"), str(tiny_folder))
    assert (seen, "torch_npu" in sys.modules) == ([False], False)
    mine = monkeypatch.setitem(sys.modules, "torch_npu", sys) or sys.modules["torch_npu"]
    inference.load_model(inference.open_device("cpu"), str(tiny_folder))
    assert sys.modules["torch_npu"] is mine


# --- how it is started ---


@pytest.mark.parametrize(
    "script", ["inference.py", "embed.py", "eval/pca.py", "eval/eval_performance.py", "weights/convert_native.py"]
)
def test_a_script_runs_where_its_own_folder_is_not_on_the_path(script, tmp_path):
    """python -I and PYTHONSAFEPATH=1 leave it out."""

    def program() -> None:
        forget_modules()
        sys.path[:] = [
            path for path in sys.path if not path.startswith((str(ROOT / "eval"), str(ROOT / "tests"))) and path != str(ROOT)
        ]
        os.chdir(tmp_path)
        sys.argv = [str(ROOT / script), "--help"]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    done = forked(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


# --- what it may write ---


@pytest.mark.parametrize("named", [False, True])
def test_a_read_only_bundle_is_said_before_anything_is_computed(tiny_folder, tmp_path, monkeypatch, named, capsys):
    bundle, access = tmp_path / "bundle", os.access
    bundle.mkdir()
    monkeypatch.setattr(inference, "ROOT", bundle)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(bundle)) and access(path, mode))
    computed = []
    monkeypatch.setattr(inference, "crops_of", lambda *given: computed.append(given))
    flags = [
        "--image_path",
        str(PHOTO),
        "--model_path",
        str(tiny_folder),
        "--device",
        "cpu",
        "--output_log",
        str(tmp_path / "log"),
    ]
    flags += ["--results_dir", str(tmp_path / "mine" / "deep")] if named else []
    code = inference.main(flags)
    last = capsys.readouterr().err.splitlines()[-1]
    if named:
        assert len(computed) == 1
        return
    told = "results cannot be written (no right to write there, or a read-only disk)"
    assert (code, computed) == (2, [])
    assert last == f"error: {bundle}/results/trial: {told}; name another folder with --results_dir"


def test_a_file_where_the_results_should_go_is_said_too(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/x: results cannot be written \(Not a directory\); name another folder"):
        inference.require_writable(tmp_path / "file" / "x")
    inference.require_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
