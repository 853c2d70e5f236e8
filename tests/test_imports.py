# SPDX-License-Identifier: Apache-2.0
"""What importing costs: the import contracts see who may import whom, not what an import drags in."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tensorrt"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules, and all of starkv, that a fresh process has loaded after ``statement``."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = json.loads(printed)
    return {name for name in names if "." not in name or name.startswith("starkv.")}


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = modules_after("import starkv")
    assert not loaded & (HEAVY | {"numpy", "PIL", "pydantic", "typer"})
    assert not any(name.startswith("starkv.") for name in loaded)


@pytest.mark.parametrize(
    "module", ["starkv.cli.main", "starkv.runtime.agent", "starkv.export.cards", "starkv.evaluation.runner"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert not loaded & HEAVY


def test_the_command_loads_a_room_only_when_it_is_entered() -> None:
    loaded = modules_after("import starkv.cli.main")
    assert not any(name.startswith(("starkv.runtime", "starkv.export")) for name in loaded)
