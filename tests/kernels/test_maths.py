# SPDX-License-Identifier: Apache-2.0
"""The kernels' arithmetic that needs no threads, tested in C++ (plugins_trt/tests/maths_test.cpp)."""

import subprocess

from kernel_library import built_for_the_processor


def test_arithmetic_of_the_kernels() -> None:
    program = built_for_the_processor("maths_test", "maths_test")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
