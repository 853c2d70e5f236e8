# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs, whether there is one or not."""

import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_library import ROOT

SOURCES = sorted((ROOT / "plugins_trt" / "kernels").glob("*.cu"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_for_the_oldest_gpu(source: Path, tmp_path: Path) -> None:
    includes = ["-I", str(ROOT / "plugins_trt" / "include"), "-I", str(source.parent)]
    command = ["nvcc", "-std=c++17", "-ptx", "-arch=compute_80", *includes, str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.ptx")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr.lower(), done.stderr[-3000:]
    assert ".entry" in (tmp_path / "kernels.ptx").read_text()
