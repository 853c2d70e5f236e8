# SPDX-License-Identifier: Apache-2.0
"""The library on raw pointers, in a Python without PyTorch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from starkv.errors import UsageError
from starkv.kernels.c_abi import AttentionShape, CompressShape, KernelAbi, KernelError
from starkv.kernels.cuda_library import KernelLibrary

PROGRAM = """
import sys
sys.modules["torch"] = None
import numpy as np
from starkv.kernels.c_abi import KernelAbi
abi = KernelAbi(sys.argv[1])
logits = np.array([[0.5, 2.0, -1.0, 2.0], [3.0, np.nan, 1.0, 2.0]], np.float32)
ids = np.full(2, -1, np.int32)
abi.call("starkv_argmax", logits.ctypes.data, ids.ctypes.data, 2, 4, None)
print(abi.device, *ids)
"""


def test_without_pytorch(kernels: KernelLibrary) -> None:
    if kernels.device != "cpu":
        pytest.skip("host memory is for the library built for the processor")
    command = [sys.executable, "-c", PROGRAM, str(kernels.path.resolve())]
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "cpu 1 0\n", done.stderr


def test_workspace_grows_with_the_shape(kernels: KernelLibrary) -> None:
    abi = KernelAbi(kernels.path)
    sizes = {"layers": 2, "sequences": 1, "kv_heads": 4, "query_heads": 28, "window": 8, "head_dim": 128}
    sizes |= {"capacity": 1000, "slots": 1, "slot_capacity": 300, "pattern_capacity": 600, "dtype": 2}
    needed = abi.workspace_bytes(CompressShape(**sizes, pooling_kernel=5))
    for name in ("layers", "sequences", "capacity", "slot_capacity"):
        larger = CompressShape(**(sizes | {name: 2 * sizes[name]}), pooling_kernel=5)
        assert abi.workspace_bytes(larger) > needed
    # One float for each row and KV head, never one for each query.
    rows = sizes["layers"] * sizes["capacity"] * sizes["query_heads"] * sizes["window"]
    assert needed < 4 * rows


def test_a_shape_that_no_kernel_takes(kernels: KernelLibrary) -> None:
    abi = KernelAbi(kernels.path)
    with pytest.raises(KernelError, match=r"starkv_attention: STARKV_ERROR_DTYPE"):
        abi.workspace_bytes(AttentionShape())


def test_status_codes_come_back(kernels: KernelLibrary) -> None:
    ids = np.zeros(1, np.int32)
    with pytest.raises(KernelError, match="starkv_argmax: STARKV_ERROR_NULL_POINTER"):
        kernels.abi.call("starkv_argmax", None, ids.ctypes.data, 1, 4, None)


def test_tensors_of_another_device_are_refused(kernels: KernelLibrary) -> None:
    elsewhere = torch.empty(1, 4, device="meta")
    with pytest.raises(UsageError, match=r"works on .* tensors, not on meta"):
        kernels.argmax(elsewhere)
