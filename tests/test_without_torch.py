# SPDX-License-Identifier: Apache-2.0
"""What runs where PyTorch is not installed: the whole runtime, and everything but the traced export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ChatModel

WITHOUT = Path(__file__).parent / "without.py"
TRAINING = "torch,transformers,onnxscript"
EXPORT = "onnx,onnx_ir"


def run_without(packages: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WITHOUT), packages, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


ACT = """
import importlib, pkgutil, sys
import starkv, starkv.runtime

names = [module.name for module in pkgutil.walk_packages(starkv.runtime.__path__, "starkv.runtime.")]
assert len(names) > 15, names
for name in names:
    # The PyTorch reference engine is the one part of the runtime that needs an extra.
    if not name.startswith("starkv.runtime.engines.torch_"):
        importlib.import_module(name)

from starkv.runtime.agent import Agent

reply = Agent.load(sys.argv[1], threads=1).act(sys.argv[2], "click the red star")
print(reply.text)
assert not {"torch", "transformers", "onnx", "onnx_ir"} & set(sys.modules)
assert not any(name.startswith(("starkv.export", "starkv.cli")) for name in sys.modules)
"""


def test_an_agent_acts_with_the_runtime_alone(reciting: ChatModel, screenshot: Path, tmp_path: Path) -> None:
    (tmp_path / "act.py").write_text(ACT)
    done = run_without(f"{TRAINING},{EXPORT}", "act.py", reciting.engine, screenshot, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Action: click(start_box='(56,28)')\n"


def test_export_build_and_run_need_no_torch(reciting: ChatModel, screenshot: Path, tmp_path: Path) -> None:
    def starkv(*arguments: object) -> str:
        done = run_without(TRAINING, "starkv.cli", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    exported = starkv("export", reciting.checkpoint, "--quant", "int8")
    engine = starkv("build", exported, "--prepack")
    reply = starkv("run", "--engine", engine, "--image", screenshot, "--prompt", "click", "--json")
    assert json.loads(reply)["text"] == "Action: click(start_box='(56,28)')"


@pytest.mark.parametrize(
    ("missing", "options", "advice"),
    [
        ("onnx", (), "the package onnx; pip install 'starkv[export]'"),
        ("onnx_ir", (), "the package onnx_ir; pip install 'starkv[export]'"),
        ("torch", ("--route", "trace", "--quant", "fp32"), "the package torch; pip install 'starkv[trace]'"),
    ],
)
def test_a_missing_extra_is_named(
    reciting: ChatModel, tmp_path: Path, missing: str, options: tuple[str, ...], advice: str
) -> None:
    done = run_without(missing, "starkv.cli", "export", reciting.checkpoint, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: this needs {advice}"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_is_named(reciting: ChatModel, screenshot: Path, tmp_path: Path) -> None:
    asking = ("--engine", reciting.engine, "--image", screenshot, "--prompt", "x")
    done = run_without("onnxruntime", "starkv.cli", "run", *asking, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ONNX Runtime is not installed; `pip install starkv[cpu]`\n"


def test_training_of_factors_names_its_extra(tmp_path: Path) -> None:
    done = run_without("torch", "starkv.cli", "train-kv", "gui-tiny", "--out", "a.factors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    missing = "train-kv trains in PyTorch, which is missing; pip install 'starkv[cpu,export,train]'"
    assert done.stderr == f"error: {missing}\n"
