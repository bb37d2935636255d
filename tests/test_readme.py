"""README.md and README.zh.md: what they promise runs, what they name exists, and no figure stands there by hand."""

from __future__ import annotations

import argparse
import glob
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import inference
import numpy as np
import pytest

from conftest import ROOT, SAMPLES

READMES = ("README.md", "README.zh.md")
MOST_LINES = 280
RECIPES = "bulk/README.md"
FOLDERS = ("", "eval", "bulk", "weights")  # of the bundle's own code
SOURCES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
# Scripts, and where Python finds them: eval/ is on its path.
MODULES = {
    name: name.removesuffix(".py").removeprefix("eval/").replace("/", ".")
    for name, text in SOURCES.items()
    if "def make_parser" in text
}
FOREIGN_FLAGS = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--max_restarts", "--help"}


def readme(name: str = "README.md") -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def own_text(name: str) -> str:
    """A README without what evidence.py generates, and without its metadata."""
    text = re.sub(r"(<!-- evidence:(\w+) -->).*?(<!-- /evidence:\2 -->)", r"\1\n\3", readme(name), flags=re.DOTALL)
    return text.split("---\n", 2)[2] if text.startswith("---\n") else text


def blocks(language: str, name: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", own_text(name), re.DOTALL)


def commands(name: str = "README.md") -> list[list[str]]:
    """The words of each command of the bash blocks that runs a script of the bundle."""
    found = []
    for line in "".join(blocks("bash", name)).splitlines():
        for part in re.split(r" && ", line.partition("  #")[0]):
            words = shlex.split(part)
            if words[0] in ("python", "torchrun"):
                found.append(words)
    return found


def parser_of(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(MODULES[script]).make_parser()


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    named = {option: action for action in parser._actions for option in action.option_strings if option.startswith("--")}
    return {option: action for option, action in named.items() if option != "--help"}


def default_of(action: argparse.Action) -> str | None:
    """A default as the page may write it; None where there is none, or for a switch that is off."""
    value = action.default
    if value is None or value is False or value == []:
        return None
    words = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(str(word).removeprefix(f"{ROOT}/") for word in words)


# --- the page itself ---


@pytest.mark.parametrize("name", READMES)
def test_the_page_is_short(name):
    assert len(readme(name).splitlines()) <= MOST_LINES


def test_both_pages_have_the_same_metadata_commands_headings_tables_and_links():
    def shape(name: str) -> dict[str, list[str]]:
        text = own_text(name)
        return {
            "metadata": [readme(name).split("---\n")[1]],
            "blocks": [block for language in ("bash", "python") for block in blocks(language, name)],
            "headings": re.findall(r"^(#+) ", text, re.MULTILINE),
            "markers": re.findall(r"<!-- /?evidence:\w+ -->", text),
            "rows": [str(line.count("|")) for line in text.splitlines() if line.startswith("|")],
            "items": re.findall(r"^- ", text, re.MULTILINE),
            "links": sorted(set(re.findall(r"\]\(([^)#]+)\)", text)) - set(READMES)),
            "flags": sorted(re.findall(r"`(--\w+)`", text)),
        }

    english, chinese = map(shape, READMES)
    for what, found in english.items():
        assert chinese[what] == found, what


def test_the_chinese_page_is_chinese():
    """Each sentence, row and item of it, but what is a name, a number, a path or a list of flags."""
    text = re.sub(r"```.*?```|`[^`]*`(（[^）]*）)?|\]\([^)]*\)|<[^>]*>", " ", own_text("README.zh.md"), flags=re.DOTALL)
    text = re.sub(r"\*\*[\w/、.]+\.py\*\*", " ", text)
    english = [line for line in text.splitlines() if re.search(r"[a-z]{3,}", line) and not re.search(r"[\u4e00-\u9fff]", line)]
    assert [line for line in english if not re.search(r"webssl-mae300m-npu|Fan", line)] == []


@pytest.mark.parametrize("name", READMES)
def test_the_first_screen_has_the_label_a_picture_two_short_commands_and_the_verdict(name):
    top = own_text(name).split("<!-- evidence:audit -->")[0]
    assert "\n#+NPU\n" in top
    assert top.count("<img ") == 1
    [block] = re.findall(r"```bash\n(.*?)```", top, re.DOTALL)
    assert len(block.splitlines()) == 2
    assert max(map(len, block.splitlines())) <= 95  # what a page 900 pixels wide shows of a line of code
    assert len(top) < 1200


@pytest.mark.parametrize("name", [*READMES, "locked_models.md", "weights/README.md"])
def test_every_file_that_is_named_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []
    scripts = set(re.findall(r"(?:python |\*\*|[ `])((?:\w+/)?\w+\.py)\b", text))
    assert [script for script in scripts if not (ROOT / script).exists() and not (ROOT / "eval" / script).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_the_directory_tree_names_what_there_is(name):
    [tree] = [block for block in blocks("text", name) if block.startswith("inference.py")]
    named = [path for line in tree.splitlines() for path in re.split(r"\s{2,}", line)[0].split()]
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    for word in re.findall(r"(?<![\w/])(\w+_\w+|tune|submit|evidence)(?=[,; ])", tree):
        if word != "torch_npu":
            assert any((ROOT / folder / f"{word}.py").exists() for folder in FOLDERS) or (ROOT / f"{word}.md").exists(), word


# --- figures ---

# What is so by nature: sizes of the model, names of versions and files, counts that a command gives.
CONSTANTS = {
    **{"1%": "the bar of the card", "1": "track, exit code", "2": "exit code", "3": "exit code", "70": "exit code"},
    **{"0": "exit code", "130": "exit code", "224": "the input", "50": "P50", "64": "float64"},
    **{"1.7%": "interpolation, a constant of two formulas", "448": "its size", "2.0": "a licence", "4.0": "a licence"},
    **{"2025": "the paper's year", "2504.01017": "the paper", "16": "ViT-L/16"},
    **{"0.3": "GB of disk, and of memory, that ray 2.60 takes", "10": "CPU seconds of its start"},
    # gigabytes of a million images in float32: two tokens each, or with one for each of the patches
    **{f"{4e-3 * inference.CARDS[0].width * 2:.1f}": "features", f"{4e-3 * inference.CARDS[0].width * (2 + 14**2):.0f}": "all"},
}


@pytest.mark.parametrize("name", READMES)
def test_no_sentence_states_a_figure_that_a_run_may_change(name):
    """A figure in prose is generated, or one of CONSTANTS. Code, links and flags are held to account elsewhere."""
    text = own_text(name).split("## Flags")[0] if name == "README.md" else own_text(name).split("## 命令行参数")[0]
    text += own_text(name).rpartition("\n## ")[2]
    text = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>|webssl-mae\w+-[\w-]+|Ascend910_9362|x86_64|aarch64", " ", text, flags=re.DOTALL
    )
    text = re.sub(r"WebSSL-MAE-300M|\bA[23]\b", " ", text)
    figures = set(re.findall(r"\d+(?:[.,]\d+)*%?", text))
    assert figures - set(CONSTANTS) == set()


# --- flags and messages ---


@pytest.mark.parametrize("name", READMES)
def test_every_flag_that_is_named_exists(name):
    known = set().union(*(actions(parser_of(script)) for script in MODULES))
    named = {flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"`(--[\w-]+)", own_text(name))}
    assert named - known - FOREIGN_FLAGS == set()


def flag_list(name: str) -> dict[str, dict[str, str | None]]:
    """What the page lists: by the bold name before them, flags and what stands in brackets behind each."""
    section = next(part for part in own_text(name).split("\n## ") if "`--model_path`" in part)
    found: dict[str, dict[str, str | None]] = {}
    for title, body in re.findall(r"\*\*([^*]+)\*\*[:：](.*?)(?=\*\*|$)", section, re.DOTALL):
        flags = re.findall(r"`(--\w+)`(?:\s*[(（]([^)）]*)[)）])?", body)
        found[title] = {flag: default or None for flag, default in flags}
    return found


def scripts_of(title: str, all_flags: dict[str, dict[str, argparse.Action]]) -> list[str]:
    """The scripts that a bold name of the list stands for: those it names, or those that share the flag of its group."""
    named = re.findall(r"[\w/]+\.py", title)
    common = "--model_path" if "model" in title or "模型" in title else "--without"
    return named or [script for script, found in all_flags.items() if common in found]


@pytest.mark.parametrize("name", READMES)
def test_every_flag_stands_under_its_script_with_its_default(name):
    all_flags = {script: found for script in MODULES if (found := actions(parser_of(script)))}
    listed: dict[str, dict[str, str | None]] = {script: {} for script in all_flags}
    for title, flags in flag_list(name).items():
        for script in scripts_of(title, all_flags):
            own = ".py" in title  # what stands under the script's own name goes before what its group has
            assert own or not listed[script].keys() & flags.keys(), f"{script}: twice"
            listed[script] |= flags
    for script, found in all_flags.items():
        assert listed[script].keys() == found.keys(), script
        for flag, action in found.items():
            default, written = default_of(action), listed[script][flag]
            if default is not None:
                assert written is not None, f"{script}: {flag} has no default on the page"
                assert re.split(r"[,;，；]", written)[0].strip() == default, f"{script}: {flag}"
            for choice in action.choices or () if default is not None and len(action.choices or ()) < 4 else ():
                assert str(choice) in written, f"{script}: {flag} {choice}"


def test_every_message_is_one_that_the_scripts_print():
    section = next(part for part in own_text("README.md").split("\n## ") if "| exit code" in part)
    messages = [
        message for line in re.findall(r"^- (`.*?):", section, re.MULTILINE) for message in re.findall(r"`(.+?)`", line)
    ]
    assert len(messages) >= 8
    sources = "".join(SOURCES.values()).replace("{label}", "NPU")
    assert [message for message in messages if message not in sources] == []
    chinese = next(part for part in own_text("README.zh.md").split("\n## ") if "`begun with another`" in part)
    assert [message for message in messages if f"`{message}`" not in chinese] == []


def test_every_exit_code_is_in_the_table():
    for name in READMES:
        [row] = re.findall(r"^\|[^|\n]*0 \| 1 \|.*\|$", own_text(name), re.MULTILINE)
        assert re.findall(r"\d+", row) == ["0", "1", "2", "3", "70", "130"]


# --- what the page promises runs ---


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with what the page's commands read: photos under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    for target in ("photo.jpg", "a.jpg", "photos/cats/1.jpg", "photos/cats/2.jpg", "photos/cats/3.jpg", "more/cups/7.jpg"):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLES / "chelsea.jpg", target)
    for target in ("b.png", "photos/moons/4.png", "photos/moons/5.png", "photos/moons/6.png"):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLES / "moon.png", target)
    return tmp_path


def tried(words: list[str], tiny_folder: Path, place: Path) -> list[str]:
    """The arguments of a command of the page for a try: a tiny checkpoint on the CPU, nothing written outside of `place`."""
    words = [word.replace("assets/samples", str(SAMPLES)) for word in words]
    words = ["cpu" if word == "npu" else word for word in words]
    words = [word for word in words if word != "--random_weights"]
    where = ["--results_dir", str(place / "results"), "--output_log", str(place / "run.log")]
    return [*words, "--model_path", str(tiny_folder), *where]


def test_every_command_is_one_that_its_script_takes(capsys):
    seen = set()
    for words in commands():
        place = next(number for number, word in enumerate(words) if word.endswith(".py"))
        seen.add(words[place])
        parser_of(words[place]).parse_args(words[place + 1 :])
        assert words[0] == "python" or words[:place] == ["torchrun", "--nproc_per_node", "8"]
    measuring = {"eval/env_check.py", "eval/eval_accuracy.py", "eval/eval_performance.py", "eval/tune.py", "eval/submit.py"}
    assert seen >= {"inference.py", "embed.py", "eval/pca.py", *measuring}
    assert capsys.readouterr().err == ""


def test_the_commands_that_make_features_run_one_after_another(workplace, tiny_folder):
    import embed
    import pca

    mains = {"inference.py": inference.main, "embed.py": embed.main, "eval/pca.py": pca.main}
    for words in commands():
        place = next(number for number, word in enumerate(words) if word.endswith(".py"))
        if words[place] in mains:
            extra = ["--num_workers", "0"] if words[place] == "embed.py" else []
            arguments = tried(words[place + 1 :], tiny_folder, workplace)
            if words[0] == "torchrun":  # another dtype than the folder was begun with
                arguments[arguments.index("features/")] = "features-torchrun/"
            assert mains[words[place]]([*arguments, *extra]) == 0, words
    rows = [len(np.load(path)["path"]) for path in sorted(glob.glob("features/part-*.npz"))]
    assert rows == [6, 1]  # --add has taken the photo in more/
    assert np.load("features.npz")["class_token"].shape == (2, 128)
    assert Path("picture.png").is_file()


def test_the_commands_that_evaluate_run(workplace, tiny_folder, monkeypatch):
    import eval_accuracy
    import eval_performance

    for engine in ("onnxruntime", "openvino"):  # where one is installed, it takes seconds to convert the model
        monkeypatch.setitem(sys.modules, engine, None)
    few = {
        eval_accuracy: ["--views", "0", "--probe", "0", "--image_path", "photo.jpg", "b.png"],
        eval_performance: ["--batch_sizes", "1", "--warmup", "1", "--num_runs", "2", "--rounds", "1"],
    }
    for module, less in few.items():
        words = next(words for words in commands() if words[1] == f"eval/{module.__name__}.py")
        arguments = tried(words[2:], tiny_folder, workplace)
        if "--end_to_end" in arguments:  # its children import torch anew; tests/eval/test_end_to_end.py has them
            place = arguments.index("--end_to_end")
            arguments[place : place + 2] = []
        assert module.main([*arguments, *less]) in (0, 1)
    assert json.loads(Path("results/accuracy_eval_cpu.json").read_text())["overall"] == "PASS"
    assert json.loads(Path("results/performance_eval_cpu.json").read_text())["results"][0]["throughput_img_s"] > 0


def test_the_first_command_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    """In full size: random weights are the same everywhere, and so are the shapes and norms that come of them."""
    monkeypatch.setattr(inference, "time_once", lambda _device, _run: 1.0)  # times are not on the page
    [expected] = [block for block in blocks("text") if block.startswith("[INFO]")]
    assert expected == next(block for block in blocks("text", "README.zh.md") if block.startswith("[INFO]"))
    words = next(words for words in commands() if words[1] == "inference.py")
    where = ["--results_dir", str(tmp_path), "--output_log", str(tmp_path / "run.log"), "--device", "cpu"]
    assert inference.main([word.replace("assets/samples", str(SAMPLES)) for word in words[2:]] + where) == 0
    printed = [re.sub(r"^\S+ \S+ ", "", line) for line in capsys.readouterr().err.splitlines()]
    kept = [line for line in printed if line in expected.splitlines()]
    saved = f"[INFO] Results saved to {tmp_path}/inference_cpu.json"
    assert [*kept, "[INFO] Results saved to results/trial/inference_cpu.json"] == expected.splitlines()
    assert saved in printed


def test_the_python_example_gives_features_of_a_path_and_of_a_picture(workplace, tiny_folder, cpu, monkeypatch, capsys):
    [code] = [block for block in blocks("python") if "load_model" in block]
    load_model = inference.load_model
    monkeypatch.setattr(inference, "open_device", lambda _spec: cpu)
    monkeypatch.setattr(inference, "load_model", lambda device: load_model(device, str(tiny_folder)))
    found: dict = {}
    exec(code, found)
    assert capsys.readouterr().out.splitlines() == ["class_token (2, 128)", "mean_patch_token (2, 128)"]
    alone = inference.features(load_model(cpu, str(tiny_folder)), "b.png")
    np.testing.assert_allclose(found["arrays"]["class_token"][1], alone["class_token"][0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def parts(workplace) -> list[dict[str, np.ndarray]]:
    """features/ in two parts: two kinds of photos, three of each and one that is there twice, with captions."""
    numbers = np.random.default_rng(0)
    centres = {"cats": numbers.normal(size=16), "moons": numbers.normal(size=16)}
    rows = [(kind, number) for kind in centres for number in range(6)]
    x = np.stack([centres[kind] * 3 + numbers.normal(size=16) for kind, _ in rows]).astype("float16") + np.float16(5)
    x[4] = x[1]
    paths = np.array([f"photos/{kind}/{number}.jpg" for kind, number in rows])
    Path("features").mkdir()
    made = []
    for k, rows_of_part in enumerate((slice(0, 7), slice(7, 12))):
        part = {"index": np.arange(12)[rows_of_part], "path": paths[rows_of_part], "class_token": x[rows_of_part]}
        part |= {"caption": np.char.add("about ", paths[rows_of_part])}
        part |= {name: np.char.add(f"{name} of ", paths[rows_of_part]) for name in ("url", "key")}
        np.savez(f"features/part-{k:05d}.npz", **part)
        made.append(part)
    return made


def test_the_recipes_find_neighbours_duplicates_and_classes(parts, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    exec(next(block for block in blocks("python", RECIPES) if "sklearn" in block), {})
    nearest, duplicates, right = capsys.readouterr().out.splitlines()
    assert nearest.split()[2] == "photos/cats/0.jpg"
    assert all("/cats/" in path for path in nearest.split()[3:])
    assert len(nearest.split()) == 3 + 5
    assert duplicates == "duplicates ['photos/cats/1.jpg' 'photos/cats/4.jpg']"
    assert float(right.split()[1]) == 1


def test_the_probe_standardises_each_dimension(capsys):
    """A class that shows in a dimension of small values alone is not found otherwise."""
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    code = next(block for block in blocks("python", RECIPES) if "sklearn" in block)
    numbers, labels = np.random.default_rng(0), np.arange(60) % 2
    given = {"raw": numbers.normal(size=(60, 4)), "paths": [f"photos/{'ab'[label]}/x.jpg" for label in labels]}
    given["raw"][:, 0] = 1e-3 * (labels + 0.1 * numbers.normal(size=60))
    imports = next(line for line in code.splitlines() if "sklearn" in line)
    exec("\n".join([imports, code[code.index("logistic =") :]]), given)
    assert float(capsys.readouterr().out.split()[1]) > 0.9


def test_the_recipe_to_npy_and_parquet_keeps_rows_paths_and_captions(parts):
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    exec("".join(blocks("python", RECIPES)), {})
    everything = np.concatenate([part["class_token"] for part in parts]).astype("float64")
    for k, part in enumerate(parts):
        rows = np.load(f"embeddings/img_emb/img_emb_{k:05d}.npy")
        centred = part["class_token"] - everything.mean(0)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, centred / np.linalg.norm(centred, axis=1, keepdims=True), rtol=1e-5)
        table = parquet.read_table(f"embeddings/metadata/metadata_{k:05d}.parquet").to_pydict()
        columns = {"index": "index", "image_path": "path", "caption": "caption", "url": "url", "key": "key"}
        assert table == {column: part[name].tolist() for column, name in columns.items()}


def test_the_recipe_reads_parts_as_embed_writes_them(workplace, tiny_folder):
    """Of a tar as img2dataset makes it: the columns that the recipe takes along are those that a part has."""
    import embed

    with tarfile.open("00000.tar", "w") as tar:
        for number in range(4):
            photo = Path(("photo.jpg", "b.png")[number % 2]).read_bytes()
            members = {"jpg": photo, "json": json.dumps({"caption": "猫", "url": f"u{number}"}).encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"00000{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert (
        embed.main(tried(["--image_path", "00000.tar", "--output", "features/", "--num_workers", "0"], tiny_folder, workplace))
        == 0
    )
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    part = np.load("features/part-00000.npz")
    [code] = [block for block in blocks("python", RECIPES) if "pyarrow" in block]
    exec(code, {"np": np, "parts": [part], "raw": part["class_token"]})
    table = parquet.read_table("embeddings/metadata/metadata_00000.parquet").to_pydict()
    assert table["caption"] == ["猫"] * 4
    assert table["url"] == [f"u{number}" for number in range(4)]
    assert table["image_path"] == [f"00000.tar/00000{number}.jpg" for number in range(4)]
