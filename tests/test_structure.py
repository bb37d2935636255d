"""The shape of the bundle: who imports whom, what a function and a file may hold, and what stands where."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import warnings
from pathlib import Path

import pytest

from conftest import ROOT, forget_modules, forked

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "bulk/*.py", "eval/*.py", "weights/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)
# Whom the files of a place may import, of the bundle's own.
ONE_WAY = {
    "inference": set(),
    "bulk": {"bulk", "inference"},
    "embed": {"bulk", "inference"},
    "embed_cluster": {"embed", "bulk", "inference"},  # the same run, elsewhere
    "eval": {"eval", "bulk", "inference"},
    "weights": {"inference"},
}
MEASURED = {("end_to_end", "embed")}  # what is timed is embed.py's own run
PAGE_MAKERS = {"evidence", "tables", "pictures", "submit"}  # these read what the others write
BARE = {"stacks": set(), "env_check": {"inference", "stacks"}}  # for a host where nothing is installed yet
LONGEST_FUNCTION = 60
LONGEST_SECTION = 180


def name_of(script: str) -> str:
    """What others import it by: eval/ lies on sys.path itself."""
    return script.removesuffix(".py").removeprefix("eval/").replace("/", ".")


def place_of(name: str) -> str:
    """The folder of a file, or its own name at the top level."""
    script = next(script for script in SCRIPTS if name_of(script) == name)
    return Path(script).parts[0].removesuffix(".py")


NAMES = {name_of(script) for script in SCRIPTS}


def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text(encoding="utf-8"))


def functions_of(script: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree_of(script)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def imported(nodes: list[ast.AST]) -> set[str]:
    """Modules and, of what is taken from one, both: bulk.parts and bulk.parts.Part."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git clone")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imports_of(script: str) -> set[str]:
    """What a script imports, anywhere in it, but for the sake of types alone."""

    class Leaver(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return imported(list(ast.walk(Leaver().visit(tree_of(script)))))


OURS = {name_of(script): imports_of(script) & NAMES for script in SCRIPTS}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_go_one_way(name):
    others = {other for other in OURS[name] if (name, other) not in MEASURED}
    assert {place_of(other) for other in others} <= ONE_WAY[place_of(name)]
    assert OURS[name] <= BARE.get(name, NAMES - {"env_check"})
    if name not in PAGE_MAKERS:
        assert OURS[name] & PAGE_MAKERS == set()


def test_the_ways_that_are_meant_are_gone():
    """Else the test above would pass for files that it does not see."""
    assert "inference" in OURS["weights.convert_native"]
    assert {"bulk.encoder", "bulk.decoding", "bulk.parts", "bulk.sources", "inference"} <= OURS["embed"]
    assert OURS["inference"] == set()
    assert {"bulk.encoder", "common", "inference"} <= OURS["eval_performance"]


def test_no_script_imports_itself_in_a_circle():
    left = {name: set(others) for name, others in OURS.items()}
    while free := {name for name, others in left.items() if not others}:
        left = {name: others - free for name, others in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_a_private_name_of_another(script):
    """Names with one underscore, taken by attribute or by import from a file of the bundle."""
    taken, names = [], NAMES | {name.rpartition(".")[2] for name in NAMES}
    for node in ast.walk(tree_of(script)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            taken.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            taken += [alias.name for alias in node.names]
    assert [name for name in taken if name.startswith("_")] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_function_fits_a_screen(script):
    declarative = {"add_model_arguments", "add_feature_arguments", "make_parser"}
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions_of(script) if node.name not in declarative}
    assert {name: lines for name, lines in lengths.items() if lines >= LONGEST_FUNCTION} == {}


def test_a_section_of_inference_can_be_read_in_one_go():
    lines = (ROOT / "inference.py").read_text(encoding="utf-8").splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("# --- ")]
    assert len(starts) > 10
    lengths = {lines[start]: end - start for start, end in zip([0, *starts], [*starts, len(lines)], strict=True)}
    assert {heading: length for heading, length in lengths.items() if length > LONGEST_SECTION} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_public_functions_are_described_and_typed(script):
    """Typed all of them; described those where the name and the types cannot say it all."""
    for node in tree_of(script).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert node.returns is not None, f"{script}: {node.name} has no return type"
        assert [argument.arg for argument in arguments if argument.annotation is None] == [], f"{script}: {node.name}"
        says_itself = node.name in ("make_parser", "main") or len(node.body) == 1 or node.end_lineno - node.lineno < 12
        assert ast.get_docstring(node) or says_itself, f"{script}: {node.name} has no docstring"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_what_it_is_for(script):
    assert len(ast.get_docstring(tree_of(script)) or "") > 60


def test_importing_a_script_changes_nothing_but_the_one_variable(tmp_path):
    """All of them in one process, one after another; none may see what the one before it has changed."""
    code = (
        "import importlib, os, signal, sys\n"
        "state = lambda: (dict(os.environ), list(sys.argv), signal.getsignal(signal.SIGINT), os.getcwd())\n"
        f"for name in {sorted(NAMES)}:\n"
        "    before = state()\n"
        "    importlib.import_module(name)\n"
        "    after = state()\n"
        "    changed = sorted(key for key in after[0] if before[0].get(key) != after[0][key])\n"
        "    print('CHANGED', name, *changed, *(['ELSE'] if before[1:] != after[1:] else []))\n"
    )
    environment = dict(os.environ)
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)

    def program() -> None:  # in the order of the alphabet: bulk before embed, neither needs the other first
        forget_modules()
        os.chdir(tmp_path)
        exec(code, {})

    done = forked(program, **environment)
    assert done.returncode == 0, done.stderr
    changes = {name: set(rest) for name, *rest in (line.split()[1:] for line in re.findall(r"CHANGED .*", done.stdout))}
    assert set(changes) == NAMES
    allowed = {"TORCH_DEVICE_BACKEND_AUTOLOAD", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    assert set().union(*changes.values()) - allowed == set()
    assert changes["bulk.decoding"] == {"TORCH_DEVICE_BACKEND_AUTOLOAD"}  # the first of them that imports inference
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith(("eval/", "weights/"))])
def test_scripts_in_folders_find_the_bundles_own_files_first(script):
    """PyPI has a package called inference: the root must stand in front of sys.path before anything of ours is imported."""
    code = (ROOT / script).read_text(encoding="utf-8")
    first = re.search(rf"^(?:import|from) (?:{'|'.join(NAMES | {'bulk'})})\b", code, re.MULTILINE)
    if first is None or OURS[name_of(script)] <= {"stacks"}:
        return
    path = re.search(r"^sys\.path(?:\.insert\(0, |\[:0\] = \[).*(?:parent\.parent|ROOT)", code, re.MULTILINE)
    assert path and path.start() < first.start()


def test_nothing_else_stands_at_the_top_level():
    top = {path.split("/")[0] for path in tracked_files()}
    assert top <= {
        *("README.md", "README.zh.md", "CONTRIBUTING.md", "locked_models.md", "ruff.toml"),
        *("requirements.txt", "requirements-cluster.txt"),
        *("inference.py", "embed.py", "embed_cluster.py", "bulk", "eval", "weights", "tests"),
        *("results", "logs", "assets", "findings", ".gitignore", ".ci"),
    }


def test_the_size_of_the_bundle_is_told():
    lines = {script: len((ROOT / script).read_text(encoding="utf-8").splitlines()) for script in SCRIPTS}
    warnings.warn(f"{sum(lines.values())} lines outside tests: {lines}", stacklevel=1)


def test_no_file_shows_a_path_of_somebodys_machine():
    """Placeholders of the tests (home of alice) apart: where a home directory, a checkout or a temporary folder is named."""
    places = re.compile(
        r"(?<![\w.~])(?:/home/(?!alice|me\b)\w+|/Users/(?!alice|me\b)\w+|/root/|/workspace/|/work/|[A-Z]:\\Users\\)"
    )
    if str(ROOT) not in ("/", "/app"):
        places = re.compile(f"{places.pattern}|{re.escape(str(ROOT))}/")
    found = []
    for name in tracked_files():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data and name != "tests/test_structure.py":
            found += [f"{name}: {place}" for place in places.findall(data.decode("utf-8", "replace"))]
    assert found == []


def test_the_readmes_test_command_is_the_one_that_ci_runs():
    command = re.search(r"readme_command='(.*)'", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))[1]
    for name in ("README.md", "README.zh.md"):
        assert command in (ROOT / name).read_text(encoding="utf-8").splitlines()
