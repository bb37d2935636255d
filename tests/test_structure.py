"""The shape of the bundle: who imports whom, how long functions are, and that the README names what is there."""

from __future__ import annotations

import ast
import glob
import os
import re
import subprocess
import sys

import eval_accuracy
import eval_performance
import inference
import numpy as np
import pytest
from conftest import ROOT, SAMPLES

SCRIPTS = ["inference.py", *sorted(f"eval/{path.name}" for path in (ROOT / "eval").glob("*.py"))]
READMES = ["README.md", "README.zh.md"]


def readme(name: str = "README.md") -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def flags_of(script: str) -> set[str]:
    """Every flag that a script's own code and the shared definitions add."""
    return set(re.findall(r'add_argument\(\s*"(--\w+)"', (ROOT / script).read_text(encoding="utf-8")))


def shared_flags() -> set[str]:
    parser = inference.ArgumentParser("")
    inference.add_model_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")} - {"--help"}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme(), re.DOTALL)


def imported(script: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_go_one_way(script):
    ours = {"inference", "eval_accuracy", "eval_performance", "env_check", "evidence"}
    assert imported(script) & ours == (set() if script == "inference.py" else {"inference"})


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "inference.py"])
def test_eval_scripts_take_only_public_names_of_inference(script):
    used = re.findall(r"\binference\.(_\w+)", (ROOT / script).read_text(encoding="utf-8"))
    assert used == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_function_fits_a_screen(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    declarative = {"add_model_arguments", "make_parser"}
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= 60}
    assert {name: lines for name, lines in long.items() if name not in declarative} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_public_functions_are_described_and_typed(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{script}: {node.name} has no return type"
            untyped = [arg.arg for arg in node.args.args if arg.annotation is None]
            assert not untyped, f"{script}: {node.name} has no type for {untyped}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_changes_nothing_but_the_one_variable(script, tmp_path):
    module = script.removeprefix("eval/").removesuffix(".py")
    code = (
        "import os, sys; before = dict(os.environ); arguments = list(sys.argv);"
        f"import {module};"
        "changed = {k for k in os.environ if before.get(k) != os.environ[k]};"
        "print(sorted(changed), sys.argv == arguments)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    changed = set(ast.literal_eval(done.stdout.split("]")[0] + "]"))
    assert changed - {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"} == {"TORCH_DEVICE_BACKEND_AUTOLOAD"}
    assert done.stdout.strip().endswith("True")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_stands_at_the_top_level():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git clone")
    top = {path.split("/")[0] for path in listed.stdout.split()}
    assert top <= {
        *("README.md", "README.zh.md", "requirements.txt", "locked_models.md", "inference.py", ".gitignore", ".ci"),
        *("eval", "results", "logs", "assets", "weights", "tests"),
    }


# --- the README ---


@pytest.mark.parametrize("name", READMES)
def test_every_flag_that_the_readme_names_exists(name):
    known = set().union(*(flags_of(script) for script in SCRIPTS))
    foreign = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--max_restarts", "--index"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*", readme(name)))
    assert named - known - foreign - {"--image"} == set()


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_readme_beside_its_script(name, script):
    shared, row = (
        readme(name).split("`--output_log`, `--results_dir`")[0],
        next((line for line in readme(name).splitlines() if line.startswith(f"| `{script}` |")), ""),
    )
    assert row, f"{name} has no row of flags for {script}"
    own = flags_of(script) - (shared_flags() if script == "inference.py" else set())
    assert {flag for flag in own if f"`{flag}`" not in row} == set()
    assert {flag for flag in shared_flags() if f"`{flag}`" not in shared + "`--output_log` `--results_dir`"} == set()


@pytest.mark.parametrize("name", [*READMES, "locked_models.md", "weights/README.md"])
def test_every_file_that_the_readme_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert links or name != "README.md"
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []
    scripts = set(re.findall(r"(?:python |`)((?:eval/)?\w+\.py)", text))
    assert [script for script in scripts if script not in SCRIPTS and f"eval/{script}" not in SCRIPTS] == []


@pytest.mark.parametrize("name", READMES)
def test_the_two_commands_stand_on_the_first_screen(name):
    commands = re.findall(r"```bash\n(python3 -m venv .*?)\n```", readme(name))
    assert commands == re.findall(r"```bash\n(python3 -m venv .*?)\n```", readme())
    assert len(commands) == 2
    assert readme(name).split("---\n", 2)[2].index(commands[1]) < 2500


def test_the_chinese_readme_has_the_same_commands_and_headings():
    assert re.findall(r"```(?:bash|python)\n.*?```", readme("README.zh.md"), re.DOTALL) == re.findall(
        r"```(?:bash|python)\n.*?```", readme(), re.DOTALL
    )
    levels = [re.findall(r"^(#+) ", readme(name), re.MULTILINE) for name in READMES]
    assert levels[0] == levels[1]
    metadata = [readme(name).split("---\n")[1] for name in READMES]
    assert metadata[0] == metadata[1]


def test_every_message_of_the_troubleshooting_table_is_one_that_the_scripts_print():
    sources = "".join((ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS)
    table = readme().split("| message | what to do |")[1].split("\n\n")[0]
    for message in re.findall(r"^\| `(?:BLOCKED: )?(.+?)` \|", table, re.MULTILINE):
        for part in re.split(r"\.\.\.|npu:\d", message):
            if part.strip(" :"):
                assert part.strip(" :") in sources, message


def test_the_readmes_way_to_read_parts_finds_the_nearest_neighbour(run, tiny_folder, tmp_path, monkeypatch, capsys):
    done = run(
        *("--image_path", SAMPLES, SAMPLES, "--model_path", tiny_folder, "--device", "cpu"),
        *("--part_size", 5, "--output", tmp_path / "features"),
    )
    assert done.code == 0, done.terminal
    monkeypatch.chdir(tmp_path)
    exec(code_blocks("python")[0], {})
    photos = sorted(path for path in glob.glob(f"{SAMPLES}/*") if not path.endswith(".md"))
    assert f"'{photos[0]}'" in capsys.readouterr().out.split()[0]  # the same photo, given twice, is its own nearest


def test_the_readmes_way_to_parquet_keeps_rows_and_paths(run, tiny_folder, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    pytest.importorskip("pyarrow", reason="pyarrow is optional")
    run(
        *("--image_path", SAMPLES, "--model_path", tiny_folder, "--device", "cpu"),
        *("--part_size", 4, "--output", tmp_path / "features"),
    )
    monkeypatch.chdir(tmp_path)
    exec(code_blocks("python")[1], {})
    part = np.load(tmp_path / "features" / "part-00001.npz")
    rows = np.load(tmp_path / "embeddings" / "img_emb" / "img_emb_00001.npy")
    assert rows == pytest.approx(part["class_token"] / np.linalg.norm(part["class_token"], axis=1, keepdims=True))
    table = pandas.read_parquet(tmp_path / "embeddings" / "metadata" / "metadata_00001.parquet")
    assert table["image_path"].tolist() == part["path"].tolist()
    assert table["index"].tolist() == [4, 5]


def test_every_parser_takes_the_shared_flags():
    for module in (inference, eval_accuracy, eval_performance):
        options = {option for action in module.make_parser()._actions for option in action.option_strings}
        assert shared_flags() <= options
