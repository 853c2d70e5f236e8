# SPDX-License-Identifier: Apache-2.0
"""The TensorRT plugins without TensorRT: compiled against the headers of each version that is at hand, over
the kernels that run on the processor.

``STARKV_TENSORRT_HEADERS=/path/10.3/include:/path/11.1/include`` names the versions.
"""

import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from compress_cases import CASES, check_implementation, check_in_place
from compress_prompts import Case
from plugin_build import HEADERS_VARIABLE, PluginBuild, build, header_folders

from starkv.errors import UsageError
from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.c_abi import KernelError
from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.kernels.full_attention_call import FullAttentionCall, reference_full_attention
from starkv.kernels.packable_attention_call import reference_packable_attention
from starkv.kernels.plugin_driver import PluginDriver
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.validation.packable_calls import PackableSize, make_packable_call
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call

pytestmark = pytest.mark.slow
_HEADERS = header_folders()
_REASON = f"no TensorRT headers; name their folders in {HEADERS_VARIABLE} or set TENSORRT_ROOT"
CPU = torch.device("cpu")
# The kernels have tests of their own; here every tensor must arrive at its place.
_NAMES = ("native_bfloat16", "official_float16", "maxpool_7", "ragged_batch", "no_screenshot", "ties")
COMPRESS_CASES = [case for case in CASES if case.name in _NAMES]


@pytest.fixture(scope="module", params=_HEADERS or [None], ids=lambda folder: folder and str(folder))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PluginBuild:
    """The plugins compiled against one version's headers."""
    if request.param is None:
        pytest.skip(_REASON)
    name = str(request.param.resolve()).replace("/", "_")
    return build(request.param, tmp_path_factory.getbasetemp() / "plugins" / name)


@pytest.fixture(scope="module")
def driver(built: PluginBuild) -> PluginDriver:
    return PluginDriver(built.plugin, built.driver)


def symbols(library: Path, *options: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", *options, library], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def attention_call(dtype: torch.dtype, new_tokens: int) -> AttentionCall:
    """Three sequences, the last without room for its new tokens."""
    random = torch.Generator().manual_seed(new_tokens)
    batch, heads, groups, capacity, dim = 3, 6, 2, 40, 64

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    return AttentionCall(
        q=draw(batch, new_tokens, heads * dim),
        k=draw(batch, new_tokens, groups * dim),
        v=draw(batch, new_tokens, groups * dim),
        past_k=draw(batch, groups, capacity, dim),
        past_v=draw(batch, groups, capacity, dim),
        kv_len=torch.tensor([7, 0, capacity], dtype=torch.int32),
    )


def test_harness(built: PluginBuild) -> None:
    done = built.harness("--enqueue")
    assert done.returncode == 0, done.stdout + done.stderr


def test_exports_are_what_tensorrt_looks_up(built: PluginBuild) -> None:
    assert sorted(symbols(built.plugin, "--defined-only")) == ["getCreators", "setLoggerFinder"]


def test_needs_no_tensorrt_and_no_driver(built: PluginBuild) -> None:
    needed = symbols(built.plugin, "--undefined-only")
    assert "malloc" in needed or "memcpy" in needed
    unwanted = re.compile("nvinfer|PluginRegistry|createInfer|^cuda|^cu[A-Z]|^starkv_")
    assert not [name for name in needed if unwanted.search(name)]


@pytest.mark.parametrize("case", COMPRESS_CASES, ids=lambda case: case.name)
def test_compress_equals_the_reference(driver: PluginDriver, case: Case) -> None:
    check_implementation(driver.compress, case, CPU)


def test_compress_where_tensorrt_copies_instead_of_aliasing(driver: PluginDriver) -> None:
    def apart(call: CompressCall) -> CompressResult:
        return driver.compress(call, aliased=False)

    check_implementation(apart, COMPRESS_CASES[0], CPU)


def test_a_cache_can_be_compacted_into_itself(driver: PluginDriver) -> None:
    check_in_place(driver.compress, COMPRESS_CASES[0], CPU)


@pytest.mark.parametrize("aliased", [True, False], ids=["aliased", "apart"])
@pytest.mark.parametrize("new_tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_equals_the_reference(
    driver: PluginDriver, dtype: torch.dtype, new_tokens: int, aliased: bool
) -> None:
    expected = reference_attention(attention_call(dtype, new_tokens))
    call = attention_call(dtype, new_tokens)
    before = replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
    out, present_k, present_v = driver.attention(call, aliased)
    # One rounding of weights and one of the result, at the type's precision.
    torch.testing.assert_close(out.float(), expected[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal(present_k, expected[1])
    assert torch.equal(present_v, expected[2])
    assert (out[2] == 0).all()
    assert torch.equal(call.past_k, expected[1] if aliased else before.past_k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_full_attention_equals_the_reference(driver: PluginDriver, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3 * 80, generator=generator).to(dtype) for _ in range(3))
    call = FullAttentionCall(q, k, v, heads=3)
    expected = reference_full_attention(call)
    torch.testing.assert_close(
        driver.full_attention(call).float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("carrier", [torch.int8, torch.int32], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantized_attention_equals_the_reference(
    driver: PluginDriver, dtype: torch.dtype, bits: int, carrier: torch.dtype
) -> None:
    """Codes go in place where they are carried as words, else into copies."""
    aliased = carrier == torch.int32
    size = QuantizedSize((7, 0, 40, 39), 40, bits, query_heads=6, kv_heads=2, head_dim=64)
    call = make_quantized_call(size, dtype, CPU)
    expected = reference_quantized_attention(call)
    before = call.past_k.clone()
    out, present_k, present_v = driver.quantized_attention(call, aliased, carrier)
    # Queries and weights are rounded to 11 bits unless they are float32, the result to its type.
    error = (out.double() - expected[0]).norm() / expected[0].norm()
    assert error <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]
    assert torch.equal(present_k, expected[1])
    assert torch.equal(present_v, expected[2])
    assert (out[2] == 0).all()
    assert torch.equal(call.past_k, expected[1] if aliased else before)


@pytest.mark.parametrize("carrier", [torch.int8, torch.int32], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new_tokens", [1, 9])
@pytest.mark.parametrize("cache", ["floats", "codes"])
def test_packable_attention_equals_the_reference(
    driver: PluginDriver, cache: str, new_tokens: int, dtype: torch.dtype, bits: int, carrier: torch.dtype
) -> None:
    """Caches are written in place where codes are carried as words, else copied."""
    aliased, over_codes = carrier == torch.int32, cache == "codes"
    codes = QuantizedSize((7, 0, 40, 31), 40 if over_codes else 1, bits, 6, 2, head_dim=64)
    call = make_packable_call(PackableSize(codes, float_rows=40, new_tokens=new_tokens), dtype, CPU)
    if over_codes and new_tokens > 1:
        with pytest.raises(UsageError, match=r"takes one new token, not 9.*of one row, not 40"):
            reference_packable_attention(call)
        with pytest.raises(KernelError, match=r"takes one new token, not 9.*of one row, not 40"):
            driver.packable_attention(call)
        return
    expected, *presents = reference_packable_attention(call)
    past = (call.past_k, call.past_v, call.past_k_codes, call.past_v_codes)
    before = [tensor.clone() for tensor in past]
    out, *found = driver.packable_attention(call, aliased, carrier)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= {torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]
    assert (out[2] == 0).all()
    for tensor, wanted, result, held in zip(past, presents, found, before, strict=True):
        assert torch.equal(result, wanted)
        assert torch.equal(tensor, wanted if aliased else held)
    changed = [not torch.equal(*pair) for pair in zip(presents, before, strict=True)]
    assert changed == [not over_codes, not over_codes, over_codes, over_codes]


def test_errors_are_reported_with_their_reason(driver: PluginDriver) -> None:
    call = attention_call(torch.float16, 1)
    with pytest.raises(KernelError, match="KVAttention: STARKV_ERROR_DTYPE: "):
        driver.attention(replace(call, q=call.q.float()))
    with pytest.raises(KernelError, match=r"KVAttention: k must be \[B S N\], but its dimension 1 is 2"):
        driver.attention(replace(call, k=call.k.repeat(1, 2, 1)))
    storage = torch.zeros(call.q.numel() + 1, dtype=torch.float16)
    misaligned = storage[1:].view(call.q.shape)
    with pytest.raises(KernelError, match="KVAttention: STARKV_ERROR_MISALIGNED: "):
        driver.attention(replace(call, q=misaligned))
    with pytest.raises(KernelError, match="KVCompress: attribute pooling_kernel must be odd"):
        driver.run("KVCompress", {"pooling_kernel": 2}, [call.q], [call.q])
    with pytest.raises(KernelError, match="no operator Expand"):
        driver.run("Expand", {}, [call.q], [call.q])


_LEAN_REGISTRY = """
import sys
import numpy as np
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
field = trt.PluginField("pooling_kernel", np.array([7], np.int32), trt.PluginFieldType.INT32)
wrong = trt.PluginField("pooling_kernel", np.array([4], np.int32), trt.PluginFieldType.INT32)
creator = registry.get_creator("KVCompress", "1", "ai.starkv")
plugin = creator.create_plugin("layer", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD)
build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
assert type(build).__name__ == "IPluginV3OneBuildV2"
assert build.num_outputs == 10
assert build.timing_cache_id == "avgpool 7"
assert creator.create_plugin("layer", trt.PluginFieldCollection([wrong]), trt.TensorRTPhase.BUILD) is None
assert [f.name for f in registry.get_creator("KVAttention", "1", "ai.starkv").field_names] == [
    "num_heads", "kv_num_heads"]
assert [f.name for f in registry.get_creator("QuantizedKVAttention", "1", "ai.starkv").field_names] == [
    "num_heads", "kv_num_heads", "bits", "mrope_section"]
assert registry.get_creator("PackableKVAttention", "1", "ai.starkv") is not None
assert registry.get_creator("KVCompress", "1", "") is None
print("ok", trt.__version__)
"""


def lean_library() -> Path:
    """TensorRT's lean library, whose registry works without a GPU."""
    found = find_spec("tensorrt_lean_libs")
    if found is None or not find_spec("tensorrt_lean_bindings"):
        pytest.skip("tensorrt-lean-cu13-libs and tensorrt-lean-cu13-bindings are not installed")
    folder = Path(next(iter(found.submodule_search_locations or ())))
    return next(folder.glob("libnvinfer_lean.so.*"))


def test_registry_of_the_lean_bindings(built: PluginBuild) -> None:
    """Of any version: one build of the plugin serves them all."""
    lean_library()
    done = subprocess.run(
        [sys.executable, "-c", _LEAN_REGISTRY, built.plugin], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("ok"), done.stderr


def test_registry_of_the_lean_library(built: PluginBuild) -> None:
    library = lean_library()
    major = int(library.suffix[1:])
    if major != built.major:
        pytest.skip(f"the harness is built for TensorRT {built.major}, the library is of {major}")
    done = built.harness("--registry", library)
    assert done.returncode == 0, done.stdout + done.stderr
