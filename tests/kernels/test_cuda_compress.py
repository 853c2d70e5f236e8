# SPDX-License-Identifier: Apache-2.0
"""The CUDA library's ``Compress``: on the GPU where there is one, else the same kernels on the processor."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress_cases import CASES, check_implementation, check_in_place, make_call, on_device
from compress_prompts import Case
from compress_refusals import SPOILS, check_refused, check_small_pool_refused

from starkv.errors import UsageError
from starkv.kernels.c_abi import KernelError
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.cuda_library import KernelLibrary, find_library
from starkv.kernels.cuda_structures import compress_buffers, compress_shape
from starkv.methods.star_kv_state import StarKVState

names = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@names
def test_agrees_with_the_reference(case: Case, kernels: KernelLibrary, device: torch.device) -> None:
    check_implementation(kernels.compress, case, device)


@names
def test_in_place_as_out_of_place(case: Case, kernels: KernelLibrary, device: torch.device) -> None:
    check_in_place(kernels.compress, case, device)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_sequence_that_cannot_be_compressed(
    spoil: str, kernels: KernelLibrary, device: torch.device
) -> None:
    check_refused(kernels.compress, spoil, device)


def test_a_pool_that_is_too_small(kernels: KernelLibrary, device: torch.device) -> None:
    check_small_pool_refused(kernels.compress, device)


def small_call(device: torch.device, name: str = "native") -> CompressCall:
    case = next(case for case in CASES if case.name == name)
    return make_call(
        case.prompt(0), case.config, StarKVState.initial(case.layers, case.batch, case.groups), device
    )


def test_state_may_be_updated_in_place(kernels: KernelLibrary, device: torch.device) -> None:
    call = small_call(device)
    call.pattern_ema.uniform_()
    own = on_device(call, device)
    expected = kernels.compress(call)
    result = CompressResult.empty_for(own)
    result.mi_ema, result.pattern_ema, result.temperature = own.mi_ema, own.pattern_ema, own.temperature
    kernels.compress(own, result)
    for state in ("mi_ema", "pattern_ema", "temperature"):
        assert torch.equal(getattr(result, state), getattr(expected, state))


@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
def test_threads_in_another_order_make_no_difference(
    schedule: str, kernels: KernelLibrary, device: torch.device, tmp_path: Path
) -> None:
    """On the processor threads run in an order of our choice: a missing barrier shows as another result."""
    if device.type != "cpu":
        pytest.skip("a GPU's threads run in its own order; compute-sanitizer looks for races there")
    program = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from test_cuda_compress import run_some
from starkv.kernels.cuda_library import KernelLibrary
torch.save(run_some(KernelLibrary({str(kernels.path)!r})), {str(tmp_path / "results.pt")!r})
"""
    environment = {**os.environ, "STARKV_CPU_SCHEDULE": schedule}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    for own, other in zip(run_some(kernels), torch.load(tmp_path / "results.pt"), strict=True):
        assert torch.equal(own, other)


def run_some(kernels: KernelLibrary) -> list[torch.Tensor]:
    """All outputs of a few calls that between them take every path."""
    outputs = []
    for name in ("native_bfloat16", "maxpool_7", "layer_budgets", "ragged_with_spare_rows", "another_size"):
        call = small_call(torch.device("cpu"), name)
        result = kernels.compress(call)
        past = torch.arange(result.scores.shape[-1]) < (call.kv_len - call.window)[..., None]
        outputs += [call.dst_k, call.dst_v, call.dst_meta, result.scores[past], result.stages]
        outputs += [result.new_len, result.rows, result.mi_ema, result.pattern_ema, result.temperature]
    return outputs


# --- refused before anything is launched ---


def status_of(
    kernels: KernelLibrary,
    call: CompressCall,
    changes: dict[str, int] | None = None,
    workspace: int | None = None,
) -> str:
    """Name of the status that the C function returns for a call with changed numbers."""
    result = CompressResult.empty_for(call)
    shape, buffers = compress_shape(call), compress_buffers(call, result)
    for name, value in (changes or {}).items():
        setattr(shape if hasattr(shape, name) else buffers, name, value)
    memory = torch.empty(1 << 24, dtype=torch.uint8, device=call.k.device)
    size = memory.numel() if workspace is None else workspace
    try:
        kernels.abi.launch(shape, buffers, memory.data_ptr(), size)
    except KernelError as error:
        return error.status.name if error.status else str(error)
    return "STARKV_OK"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "STARKV_OK"),
        ({"k": 0}, "STARKV_ERROR_NULL_POINTER"),
        ({"new_temperature": 0}, "STARKV_ERROR_NULL_POINTER"),
        ({"dtype": 7}, "STARKV_ERROR_DTYPE"),
        ({"head_dim": 72}, "STARKV_ERROR_HEAD_DIM"),
        ({"window": 0}, "STARKV_ERROR_WINDOW"),
        ({"window": 65}, "STARKV_ERROR_WINDOW"),
        ({"kv_heads": 0}, "STARKV_ERROR_HEADS"),
        ({"query_heads": 3}, "STARKV_ERROR_HEADS"),
        ({"pooling": 2}, "STARKV_ERROR_POOLING"),
        ({"pooling_kernel": 4}, "STARKV_ERROR_POOLING"),
        ({"pooling_kernel": 65}, "STARKV_ERROR_POOLING"),
        ({"layers": 0}, "STARKV_ERROR_SHAPE"),
        ({"capacity": 1 << 25}, "STARKV_ERROR_SHAPE"),
        ({"sequences": 1 << 16}, "STARKV_ERROR_SHAPE"),
        ({"pattern_capacity": 0}, "STARKV_ERROR_SHAPE"),
    ],
)
def test_refused_with_a_name(
    changes: dict[str, int], name: str, kernels: KernelLibrary, device: torch.device
) -> None:
    assert status_of(kernels, small_call(device), changes) == name


def test_refused_for_its_memory(kernels: KernelLibrary, device: torch.device) -> None:
    call = small_call(device)
    for field in ("k", "row_meta", "limits"):
        shifted = getattr(call, field).data_ptr() + 4
        assert status_of(kernels, call, {field: shifted}) == "STARKV_ERROR_MISALIGNED"
    assert status_of(kernels, call, workspace=1024) == "STARKV_ERROR_WORKSPACE"
    inside = {"dst_k": call.k.data_ptr() + 64}
    assert status_of(kernels, call, inside) == "STARKV_ERROR_OVERLAP"
    assert status_of(kernels, call, {"dst_v": call.k.data_ptr()}) == "STARKV_ERROR_OVERLAP"
    only_keys = {"dst_k": call.k.data_ptr()}
    assert status_of(kernels, call, only_keys) == "STARKV_ERROR_OVERLAP"
    sources = {"dst_k": call.k, "dst_v": call.v, "dst_meta": call.row_meta}
    all_three = {name: source.data_ptr() for name, source in sources.items()}
    assert status_of(kernels, call, all_three) == "STARKV_ERROR_SHAPE"


def test_every_status_says_what_to_do(kernels: KernelLibrary) -> None:
    statuses = [kernels.abi.status(code) for code in range(13)]
    assert len({status.name for status in statuses}) == len({status.message for status in statuses}) == 13
    assert kernels.abi.status(99).name == "STARKV_ERROR_UNKNOWN"


def test_refused_in_python(kernels: KernelLibrary, device: torch.device, tmp_path: Path) -> None:
    call = small_call(device)
    with pytest.raises(UsageError, match=r"kv_len must be torch\.int32"):
        kernels.compress(replace(call, kv_len=call.kv_len.long()))
    with pytest.raises(UsageError, match="must be contiguous"):
        kernels.compress(replace(call, v=call.v.transpose(2, 3).contiguous().transpose(2, 3)))
    # 72 is a head dimension that no kernel was built for.
    narrow = {
        name: getattr(call, name)[..., :12].contiguous() for name in ("k", "v", "q_window", "dst_k", "dst_v")
    }
    with pytest.raises(KernelError, match="STARKV_ERROR_HEAD_DIM: the head dimension must be 64"):
        kernels.compress(replace(call, **narrow))
    with pytest.raises(KernelError, match="no such library"):
        KernelLibrary(tmp_path / "missing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(KernelError, match="not a starkv kernel library"):
        KernelLibrary(broken)


def test_a_library_is_found_by_its_variable(
    kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARKV_KERNELS", str(kernels.path))
    found = find_library(kernels.device)
    assert found is not None
    assert found.path == kernels.path


@pytest.mark.gpu
def test_graph_replay_is_the_call_itself(kernels: KernelLibrary, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    call = small_call(device)
    expected = kernels.compress(on_device(call, device))
    result = CompressResult.empty_for(call)
    kernels.compress(call, result)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.compress(call, result)
    for output in vars(result).values():
        output.zero_()
    call.dst_k.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, output in vars(expected).items():
        assert torch.equal(getattr(result, name), output), name
