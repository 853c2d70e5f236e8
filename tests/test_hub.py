# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: folders first, then what an earlier download left, the network last."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from starkv.errors import CheckpointError
from starkv.export.cards import CARDS_DIRECTORY, resolve_model
from starkv.export.hub import HOME_VARIABLE, find_checkpoint

NAME, REPOSITORY = "ui-tars-1.5-7b", "ByteDance-Seed/UI-TARS-1.5-7B"


class FakeHub:
    """A hub that has a copy on disk, a connection, both or neither."""

    def __init__(self, cached: Path | None = None, remote: Path | None = None) -> None:
        self.cached, self.remote = cached, remote
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, repository: str, offline: bool) -> Path:
        self.asked.append((repository, offline))
        found = self.cached if offline else self.remote
        if found is None:
            raise RuntimeError("no connection\nto the hub")
        return found


@pytest.fixture(autouse=True)
def no_models_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOME_VARIABLE, raising=False)


def checkpoint(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", weights):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("folder", ["", NAME, "UI-TARS-1.5-7B", REPOSITORY])
def test_a_given_folder_or_one_that_holds_it(tmp_path: Path, folder: str) -> None:
    place = checkpoint(tmp_path / "models" / folder)
    hub = FakeHub()
    assert find_checkpoint(NAME, REPOSITORY, tmp_path / "models", hub) == place
    assert hub.asked == []


def test_a_given_folder_without_the_model_is_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path / "other")
    hub = FakeHub(remote=tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no checkpoint of ui-tars"):
        find_checkpoint(NAME, REPOSITORY, tmp_path, hub)
    assert hub.asked == []


def test_models_at_home_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    remote = checkpoint(tmp_path / "cache")
    hub = FakeHub(remote=remote)
    assert find_checkpoint(NAME, REPOSITORY, download=hub) == remote
    place = checkpoint(tmp_path / NAME)
    assert resolve_model(NAME, download=hub).folder == place
    assert len(hub.asked) == 2


def test_a_complete_copy_needs_no_network(tmp_path: Path) -> None:
    cached = checkpoint(tmp_path / "snapshot")
    hub = FakeHub(cached)
    assert find_checkpoint(NAME, REPOSITORY, download=hub) == cached
    assert hub.asked == [(REPOSITORY, True)]


def test_a_download_that_broke_off_is_continued(tmp_path: Path) -> None:
    half = checkpoint(tmp_path / "half", "tokenizer.json")
    index = (
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    (half / "model.safetensors.index.json").write_text(index)
    (half / "model-00001-of-00002.safetensors").write_text("")
    whole = checkpoint(tmp_path / "whole")
    hub = FakeHub(half, whole)
    assert find_checkpoint(NAME, REPOSITORY, download=hub) == whole
    assert hub.asked == [(REPOSITORY, True), (REPOSITORY, False)]


def test_no_weights_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError) as failure:
        find_checkpoint(NAME, REPOSITORY, download=FakeHub())
    line = str(failure.value)
    assert "\n" not in line
    assert "(no connection to the hub)" in line
    assert f"`hf download {REPOSITORY} --local-dir checkpoints/{NAME}`" in line
    assert f"{HOME_VARIABLE}=checkpoints" in line
    assert "--random-weights" in line
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match=f"--local-dir {tmp_path}/{NAME}`"):
        find_checkpoint(NAME, REPOSITORY, download=FakeHub())


def run_offline(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with the real library, its cache in ``tmp_path``, kept off the network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "starkv.cli", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_offline_without_a_copy(tmp_path: Path) -> None:
    done = run_offline(tmp_path, "export", NAME)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"`hf download {REPOSITORY}" in done.stderr
    assert not (tmp_path / "exports").exists()


def test_offline_with_a_copy_in_the_cache(tmp_path: Path) -> None:
    """The cache's layout is the library's; what lies in it is the embedded model, small enough to export."""
    cache = tmp_path / "hf" / "hub" / "models--ByteDance-Seed--UI-TARS-1.5-7B"
    ignored = shutil.ignore_patterns("train", "README.md")
    shutil.copytree(CARDS_DIRECTORY / "gui-tiny", cache / "snapshots" / ("0" * 40), ignore=ignored)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    done = run_offline(tmp_path, "export", NAME, "--quant", "int8")
    assert (done.returncode, done.stdout) == (0, f"exports/{NAME}-int8\n"), done.stderr
    assert "licence of the weights is Apache-2.0" in done.stderr


def test_the_library_is_needed_for_the_hub_only(tmp_path: Path) -> None:
    without = [
        sys.executable,
        Path(__file__).with_name("without.py"),
        "huggingface_hub",
        "starkv.cli",
        "export",
    ]
    done = subprocess.run([*without, NAME], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: this needs the package huggingface_hub; pip install 'starkv[export]'\n"
    done = subprocess.run([*without, "gui-tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "exports/gui-tiny-int8\n"), done.stderr
