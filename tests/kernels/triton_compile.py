# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs that needn't be there, and print what each one needs.

    PYTHONPATH=tests python tests/kernels/triton_compile.py --capability 90 --dtype bfloat16 --dim 128

Compiles exactly the kernels that one call of an operator launches, with the types of its arguments:
``Compress``, or with ``--operator`` decode attention over latents or codes. Must not run under
``TRITON_INTERPRET``, which leaves nothing to compile.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import triton
from compress_cases import make_call
from compress_prompts import Case
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from starkv.kernels.compress_call import CompressCall
from starkv.kernels.low_rank_factors import LatentForm
from starkv.kernels.triton_compress import compress
from starkv.kernels.triton_low_rank import low_rank_attention
from starkv.kernels.triton_quantized_rows import quantized_rows_attention
from starkv.methods.star_kv_config import Pooling, StarKVConfig
from starkv.methods.star_kv_state import StarKVState
from starkv.validation.low_rank_cases import DecodeShape, low_rank_case, quantized_case

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")
"""Arguments of a launch that are no arguments of the kernel."""


@dataclass(frozen=True)
class Needs:
    """What a kernel takes of a GPU."""

    kernel: str
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; registers that were spilled lie there."""
    shared_bytes: int
    """Per block."""


def source_of(function: JITFunction, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """A kernel with the types of a launch's arguments, as Triton specialises them."""
    values = dict(zip(function.arg_names, arguments, strict=False)) | constants
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constants or value == 1:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, fixed, attributes)


def compiled_kernels(operator: Callable[[], object], capability: int) -> list[CompiledKernel]:
    """Compile the kernels that an operator launches, launching none."""
    target = GPUTarget("cuda", capability, 32)
    compiled: list[CompiledKernel] = []

    def run(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
        source = source_of(function, arguments, constants)
        compiled.append(triton.compile(source, target=target, options=options))

    launch = JITFunction.run
    JITFunction.run = run
    try:
        operator()
    finally:
        JITFunction.run = launch
    return compiled


def needs(kernel: CompiledKernel) -> Needs:
    """Ask ``cuobjdump``, which Triton brings along."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK"))
    return Needs(kernel.metadata.name, registers, stack, kernel.metadata.shared)


def example_call(dtype: torch.dtype, dim: int, window: int, pooling: Pooling, single: bool) -> CompressCall:
    """A call of several layers, sequences and heads, or of a single one: sizes of 1 become constants."""
    config = StarKVConfig(window=window, pooling=pooling)
    several = Case("several", config, prompts=(((12, 13),),), batch=2, sharing=7, dim=dim, dtype=dtype)
    case = replace(several, layers=1, batch=1, groups=1, sharing=1) if single else several
    state = StarKVState.initial(case.layers, case.batch, case.groups)
    return make_call(case.prompt(0), config, state, torch.device("cpu"))


def decode_operator(name: str, dtype: torch.dtype, dim: int, single: bool) -> Callable[[], object]:
    """Decode attention by its name, such as ``low-rank-int4`` or ``quantized-int8``: with a tail and biases,
    keys of 7 query heads in factors of ragged ranks; or of a single head each."""
    pairs = dim // 2
    shape = DecodeShape(
        heads=4 if single else 28,
        kv_heads=4,
        dim=dim,
        capacity=1024,
        rows=(1000, 70),
        sections=(pairs // 4, pairs // 4, pairs - 2 * (pairs // 4)),
        key_ranks=(26, 48),
        value_rank=min(154, 4 * dim),
        tail_capacity=100,
        tail_rows=(7, 100),
        frame=(5, 7),
    )
    kind, form = name.rsplit("-", 1)
    if kind == "low-rank":
        latents = low_rank_case(shape, cast(LatentForm, form), dtype, torch.device("cpu"))
        return lambda: low_rank_attention(latents)
    codes = quantized_case(shape, cast(LatentForm, form), dtype, torch.device("cpu"))
    return lambda: quantized_rows_attention(codes)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 120])
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--dim", type=int, nargs="+", default=[128])
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--pooling", choices=["avgpool", "maxpool"], default="avgpool")
    parser.add_argument(
        "--operator", default="compress", help="or low-rank-float, -int8, -int4, quantized-int8, -int4"
    )
    parser.add_argument("--single", action="store_true", help="one layer, sequence and head")
    parser.add_argument("--ptx", type=Path, help="folder for the PTX of each kernel")
    options = parser.parse_args()
    print("sm dtype dim kernel registers stack shared")
    for capability, dtype, dim in product(options.capability, options.dtype, options.dim):
        element = getattr(torch, dtype)
        if options.operator == "compress":
            call = example_call(element, dim, options.window, options.pooling, options.single)
            operator = partial(compress, call)
        else:
            operator = decode_operator(options.operator, element, dim, options.single)
        for kernel in compiled_kernels(operator, capability):
            one = needs(kernel)
            print(capability, dtype, dim, one.kernel, one.registers, one.stack_bytes, one.shared_bytes)
            if options.ptx:
                Path(options.ptx, f"{one.kernel}.ptx").write_text(kernel.asm["ptx"])


if __name__ == "__main__":
    main()
