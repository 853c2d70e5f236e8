# SPDX-License-Identifier: Apache-2.0
"""The wheel: what is in it, and that it works where nothing else of this project is."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import starkv

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
SOURCES = ("starkv", "export", "runtime", "models", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
EXAMPLE = REPOSITORY / "examples" / "screen.png"
STAR = (39, 268, 66, 295)
"""Where the red star of the example is, in pixels."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: builds leave folders behind, whose files would get into the next wheel."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, source / name)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", root, source)
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment of its own."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    call(scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu,export]")
    return scripts / "starkv"


def call(*arguments: object, cwd: Path | None = None) -> str:
    """Run a program outside the repository's reach; returns its stdout."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "STARKV_ENGINES")
    }
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_name_goes_into_site_packages(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {"starkv", f"starkv-{starkv.__version__}.dist-info"}


def test_every_module_is_in_it(names: set[str]) -> None:
    for room, place in (("starkv", "starkv"), ("export", "starkv/export"), ("runtime", "starkv/runtime")):
        modules = {
            path.relative_to(REPOSITORY / room).as_posix() for path in (REPOSITORY / room).rglob("*.py")
        }
        assert modules
        assert {f"{place}/{module}" for module in modules} <= names
    assert "starkv/py.typed" in names


def test_cards_and_the_embedded_model_are_in_it(names: set[str]) -> None:
    cards = {path.name for path in (REPOSITORY / "models").glob("*.toml")}
    files = {path.name for path in (REPOSITORY / "models" / "gui-tiny").iterdir() if path.is_file()}
    configs = {path.name for path in (REPOSITORY / "models" / "configs").iterdir()}
    assert cards
    assert "model.safetensors" in files
    assert {f"starkv/models/{name}" for name in cards} <= names
    assert {f"starkv/models/gui-tiny/{name}" for name in files} <= names
    assert "starkv/evaluation/published.json" in names
    assert configs
    assert {f"starkv/models/configs/{name}" for name in configs} <= names


def test_no_training_and_no_tests_are_in_it(names: set[str]) -> None:
    wrong = {name for name in names if {"train", "tests", "benchmarks", "__pycache__"} & set(name.split("/"))}
    assert not wrong
    assert not any(Path(name).name.startswith(("test_", "conftest")) for name in names)


def test_licence_and_notice_are_in_it(names: set[str]) -> None:
    licences = f"starkv-{starkv.__version__}.dist-info/licenses"
    assert {f"{licences}/LICENSE", f"{licences}/NOTICE"} <= names


def test_the_command_starts(command: Path, tmp_path: Path) -> None:
    assert call(command, "--version", cwd=tmp_path) == f"starkv {starkv.__version__}\n"
    findings = {finding["subject"]: finding for finding in json.loads(call(command, "doctor", "--json"))}
    assert findings["ONNX Runtime"]["usable"]
    assert findings["export, build"]["usable"]
    assert not findings["PyTorch"]["usable"], "this environment should not have PyTorch"


def test_the_embedded_model_is_built_and_run(command: Path, tmp_path: Path) -> None:
    engine = call(command, "build", "gui-tiny", cwd=tmp_path).strip()
    assert engine.endswith("gui-tiny-ort-int8")
    asking = ("--image", EXAMPLE, "--prompt", "Click the red star.", "--json")
    reply = json.loads(call(command, "run", "--engine", "gui-tiny", *asking, cwd=tmp_path))
    assert reply["action"]["type"] == "click"
    x, y = reply["screen_xy"]
    assert STAR[0] <= x < STAR[2]
    assert STAR[1] <= y < STAR[3]
