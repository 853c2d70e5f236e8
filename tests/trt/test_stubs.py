# SPDX-License-Identifier: Apache-2.0
"""mypy checks starkv's use of TensorRT against stubs made from the real bindings."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from api_description import describe
from bindings import CACHE, CHECKED, ROOT, UnavailableError, bindings, wanted
from stub_files import write_stubs
from test_api import MISSING_BEFORE, SOURCES
from typed_sources import PACKAGE, write_typed_sources

from starkv.trt_compat.version import TensorRTVersion

RELEASES = wanted() if wanted() != CHECKED else (CHECKED[0], CHECKED[-1])
"""The oldest and the newest; all where the environment says so."""
SETTINGS = """
[mypy]
strict = True
python_version = 3.10

[mypy-tensorrt]
ignore_errors = True

[mypy-starkv.*]
follow_imports = silent
"""
"""Own settings: elsewhere TensorRT is not there for mypy."""

pytestmark = pytest.mark.skipif(
    not find_spec("mypy") or not find_spec("pybind11_stubgen"), reason="needs mypy and pybind11-stubgen"
)


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stubs(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the package ``tensorrt`` of stubs."""
    folder = tmp_path_factory.mktemp("stubs")
    try:
        given_up = write_stubs(bindings(release), folder)
    except UnavailableError as error:
        pytest.skip(f"bindings of TensorRT {release}: {error}")
    assert given_up == ["add_scale_nd"]
    return folder


def mypy(sources: Mapping[str, str], release: str, stubs: Path, folder: Path) -> list[str]:
    """Errors that mypy finds in the sources."""
    write_typed_sources(sources, describe(release), TensorRTVersion.parse(release), folder)
    settings = folder / "mypy.ini"
    settings.write_text(SETTINGS)
    options = ["--config-file", str(settings), "--cache-dir", str(CACHE / "mypy"), "-p", PACKAGE]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *options],
        cwd=folder,
        env=dict(os.environ, MYPYPATH=os.pathsep.join(map(str, (folder, stubs, ROOT)))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert bool(errors) == bool(done.returncode), done.stdout + done.stderr
    return [error for error in errors if not let_through(error, TensorRTVersion.parse(release))]


def let_through(error: str, version: TensorRTVersion) -> bool:
    """Whether the error is about a name that early versions may lack, see ``test_api.py``."""
    found = re.search(r'"type\[(\w+)\]" has no attribute "(\w+)"', error)
    name = f"{found[1]}.{found[2]}" if found else ""
    return name in MISSING_BEFORE and version < MISSING_BEFORE[name]


def test_types(release: str, stubs: Path, tmp_path: Path) -> None:
    errors = mypy(SOURCES, release, stubs, tmp_path)
    assert not errors, "\n".join(errors)


WRONG = (
    ("building.py", "config.set_memory_pool_limit(", "config.set_memory_limit(", "set_memory_limit"),
    ("building.py", "BuilderFlag.STRIP_PLAN", "BuilderFlag.STRIP", '"STRIP"'),
    ("building.py", "profile.set_shape(name, ", "profile.set_shape(", "set_shape"),
    ("building.py", "module.OnnxParser(network, logger)", "module.OnnxParser(logger, network)", "OnnxParser"),
    ("running.py", ".set_optimization_profile_async(", ".set_profile_async(", '"set_profile_async"'),
    (
        "running.py",
        "_engine.create_execution_context(strategy)",
        "_engine.create_context()",
        "create_context",
    ),
    ("plan_file.py", "network, config", "config, network", "build_serialized_network"),
    ("plugins.py", "registry.load_library(", "registry.load(", '"load"'),
    ("module.py", "def log(self, level: Any, message: str)", "def log(self, level: Any)", "incompatible"),
)
"""File, what stands there, what a careless author might write, and a part of mypy's message."""


def test_mistakes_are_found(release: str, stubs: Path, tmp_path: Path) -> None:
    changed = dict(SOURCES)
    for file, right, wrong, _ in WRONG:
        assert right in changed[file], f"{file} has no {right}: choose another example"
        changed[file] = changed[file].replace(right, wrong)
    errors = mypy(changed, release, stubs, tmp_path)
    for file, _, _, message in WRONG:
        assert any(f"/{file}:" in error and message in error for error in errors), (file, message, errors)
