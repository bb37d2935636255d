"""Weights that are locked: what env_check.py --lock_weights records in locked_models.md, and what it refuses."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import inference
import pytest

import env_check
from conftest import ROOT, SAMPLES, TINY, save_checkpoint

PHOTO = SAMPLES / "chelsea.jpg"
DIGEST, OTHER = "a" * 64, "b" * 64
MODEL = inference.HUB_ID
NOT_RECORDED = "| not recorded | not recorded |"
TABLE = (
    "Prose with `model.safetensors`.\n\n| a | `model.safetensors` | x |\n\n"
    f"{env_check.LOCK_HEADING}\n|---|---|---|---|\n| `{MODEL}` | `model.safetensors` {NOT_RECORDED}\n"
    f"| `facebook/other` | `model.safetensors` {NOT_RECORDED}\n\nThe end.\u2028"
)


@pytest.fixture
def locks(tmp_path, monkeypatch) -> Path:
    """A copy of locked_models.md that env_check writes and the loader reads."""
    path, read_locks = tmp_path / "locked_models.md", inference.read_locks
    shutil.copy(ROOT / "locked_models.md", path)
    monkeypatch.setattr(env_check, "LOCKS", path)
    monkeypatch.setattr(inference, "read_locks", lambda: read_locks(path))
    return path


@pytest.fixture
def as_the_cards(monkeypatch) -> None:
    """Tiny checkpoints count as the model of the card."""
    monkeypatch.setattr(inference, "identify", lambda _config: MODEL)


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- the table ---


def test_locking_changes_the_rows_of_its_files_and_nothing_else():
    updated = env_check.update_locks(TABLE, MODEL, {"model.safetensors": (5, DIGEST)})
    row = f"| `{MODEL}` | `model.safetensors` "
    assert updated == TABLE.replace(f"{row}{NOT_RECORDED}", f"{row}| 5 | `{DIGEST}` |")


def test_a_file_that_is_not_in_the_table_is_added_at_its_end():
    updated = env_check.update_locks(TABLE, MODEL, {"new.safetensors": (7, DIGEST)})
    assert updated == TABLE.replace("\n\nThe end", f"\n| `{MODEL}` | `new.safetensors` | 7 | `{DIGEST}` |\n\nThe end")
    bare = f"{env_check.LOCK_HEADING}\n|---|---|---|---|"
    assert env_check.update_locks(bare, MODEL, {"a": (1, DIGEST)}) == f"{bare}\n| `{MODEL}` | `a` | 1 | `{DIGEST}` |"


def test_locking_twice_is_locking_once():
    files = {"model.safetensors": (5, DIGEST), "new.safetensors": (7, OTHER)}
    once = env_check.update_locks(TABLE, MODEL, files)
    assert env_check.update_locks(once, MODEL, files) == once


def test_a_recorded_hash_is_not_replaced_and_another_models_does_not_matter():
    locked = env_check.update_locks(TABLE, MODEL, {"model.safetensors": (5, DIGEST)})
    message = rf"^model\.safetensors: locked_models\.md records another sha256 for {MODEL} \(aaaaaaaaaaaa"
    with pytest.raises(inference.UsageError, match=message):
        env_check.update_locks(locked, MODEL, {"model.safetensors": (5, OTHER)})
    both = env_check.update_locks(locked, "facebook/other", {"model.safetensors": (5, OTHER)})
    assert (both.count(DIGEST), both.count(OTHER)) == (1, 1)


def test_the_table_of_the_bundle_locks_only_what_is_recorded():
    text = (ROOT / "locked_models.md").read_text(encoding="utf-8")
    recorded = inference.read_locks(ROOT / "locked_models.md")
    names = ["config.json", "preprocessor_config.json", "model.safetensors", "webssl_mae300m_full2b_224.pth"]
    for name in names:
        is_open = f"| `{MODEL}` | `{name}` {NOT_RECORDED}" in text
        assert is_open != ((MODEL, name) in recorded), name
    assert {model for model, _ in recorded} <= {card.hub_id for card in inference.CARDS}
    for card in inference.CARDS[:3]:
        assert f"| `{card.hub_id}` | `model.safetensors` |" in text
    facts = ("CC BY-NC 4.0", "304,351,232", "303,301,632", "ViTModel", "--allow_unlocked")
    for fact in (*inference.HUB_COMMITS.items(), *facts):
        assert all(part in text for part in ([fact] if isinstance(fact, str) else fact))


# --- --lock_weights ---


def test_locked_weights_are_taken_and_changed_ones_refused(
    check, run, no_torch_npu, locks, as_the_cards, tiny_folder, tmp_path
):
    folder = tmp_path / "weights"
    shutil.copytree(tiny_folder, folder)
    done = check("--lock_weights", folder)
    assert (done.code, done.err) == (0, "")
    recorded = inference.read_locks()
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert recorded == {(MODEL, name): hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    size, digest = (folder / "model.safetensors").stat().st_size, recorded[MODEL, "model.safetensors"]
    assert f"| `{MODEL}` | `model.safetensors` | {size} | `{digest}` |\n" in locks.read_text()
    assert f"Locked: {MODEL}, model.safetensors, {size} bytes, sha256 {digest}" in done.log

    common = ("--image_path", PHOTO, "--model_path", folder, "--device", "cpu")
    assert run(*common).code == 0
    change_last_byte(folder / "model.safetensors")
    refused = run(*common)
    assert refused.code == 2
    assert "model.safetensors: its sha256 is not the one recorded in locked_models.md" in refused.terminal
    assert run(*common, "--allow_unlocked").code == 0

    before = locks.read_bytes()
    again = check("--lock_weights", folder)
    assert again.code == 2
    assert again.err.startswith("error: model.safetensors: locked_models.md records another sha256 for ")
    assert len(again.err.splitlines()) == 1
    assert locks.read_bytes() == before


def test_another_model_is_not_locked(check, no_torch_npu, locks, tiny_folder):
    before = locks.read_bytes()
    done = check("--lock_weights", tiny_folder)
    assert (done.code, done.files, locks.read_bytes()) == (2, {}, before)
    assert "this is another model (128 wide, 3 layers, 2 heads, patches of 16), no Web-SSL MAE encoder" in done.err


def test_weights_that_look_untrained_are_not_locked(check, no_torch_npu, locks, as_the_cards, tmp_path):
    import transformers

    save_checkpoint(tmp_path / "fresh", transformers.ViTModel(transformers.ViTConfig(**TINY)))
    before = locks.read_bytes()
    done = check("--lock_weights", tmp_path / "fresh")
    assert (done.code, done.files, locks.read_bytes()) == (2, {}, before)
    assert "the checkpoint looks untrained; nothing was recorded" in done.err


@pytest.mark.parametrize(
    "kind", ["empty folder", "nothing", "a picture", "Meta's native file", "truncated", "a Git LFS pointer"]
)
def test_what_is_not_the_weights_is_refused_with_one_line(check, no_torch_npu, locks, tiny_folder, tiny_native, tmp_path, kind):
    path, before = tmp_path / "weights", locks.read_bytes()
    if kind in ("a picture", "Meta's native file"):
        path = PHOTO if kind == "a picture" else tiny_native
    elif kind != "nothing":
        path.mkdir()
    if kind in ("truncated", "a Git LFS pointer"):
        shutil.copytree(tiny_folder, path, dirs_exist_ok=True)
        data = (path / "model.safetensors").read_bytes()[:-1000]
        (path / "model.safetensors").write_bytes(
            data if kind == "truncated" else b"version https://git-lfs.github.com/spec/v1\n"
        )
    done = check("--lock_weights", path)
    assert done.code == 2
    expected = kind if "truncated" in kind or "LFS" in kind else f"--lock_weights {path}: no weights there; name a folder"
    assert done.err.startswith("error: ")
    assert expected in done.err
    assert len(done.err.splitlines()) == 1
    assert locks.read_bytes() == before
    assert done.files == {}
