# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for GPUs that aren't there: the interpreter takes what the compiler does not."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_compile.py")
KERNELS = {
    "softmax_parts_kernel",
    "merge_parts_kernel",
    "window_mass_kernel",
    "norm_statistics_kernel",
    "group_scores_kernel",
    "entropy_kernel",
    "layer_rows_kernel",
    "information_kernel",
    "pattern_kernel",
    "final_scores_kernel",
    "select_kernel",
    "move_kernel",
}
LOW_RANK = {
    "lifted_scores_kernel",
    "latent_sums_kernel",
    "cached_rows_kernel",
    "merge_kernel",
    "lift_values_kernel",
}
QUANTIZED = {"bias_logits_kernel", "cached_rows_kernel", "merge_kernel"}
MOST_SHARED = {"80": 163, "86": 99, "90": 227, "120": 99}
"""KiB of shared memory that a block can have."""
Needs = tuple[int, int, int]


def compile_kernels(*arguments: str) -> dict[str, Needs]:
    """Registers and bytes of stack per thread and bytes of shared memory of each kernel, the most of its
    launches.

    In a process of its own: in this one kernels may be interpreted, which leaves nothing to compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package, and what the cases share with the other tests.
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (SCRIPT.parents[2], SCRIPT.parents[1])))
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    needs: dict[str, Needs] = {}
    for line in done.stdout.splitlines()[1:]:
        _, _, _, kernel, registers, stack, shared = line.split()
        before = needs.get(kernel, (0, 0, 0))
        needs[kernel] = (
            max(int(registers), before[0]),
            max(int(stack), before[1]),
            max(int(shared), before[2]),
        )
    return needs


def check(needs: dict[str, Needs], capability: str, kernels: set[str] = KERNELS) -> None:
    assert set(needs) == kernels
    for kernel, (_, stack_bytes, shared_bytes) in needs.items():
        assert shared_bytes <= MOST_SHARED[capability] * 1024, kernel
        # A few spilled registers are harmless where they are spilled once; an array in memory is not.
        assert stack_bytes <= 512, kernel


@dataclass(frozen=True)
class Compiled:
    needs: dict[str, Needs]
    ptx: Path
    """Folder with the code of each kernel."""


@pytest.fixture(scope="module")
def for_hopper(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("ptx")
    arguments = ("--capability", "90", "--dtype", "bfloat16", "--dim", "128")
    return Compiled(compile_kernels(*arguments, "--ptx", str(folder)), folder)


def test_every_kernel_compiles_and_fits(for_hopper: Compiled) -> None:
    check(for_hopper.needs, "90")


def test_rows_are_read_before_any_is_overwritten(for_hopper: Compiled) -> None:
    """Compaction in place hangs on a barrier between a step's loads and its stores."""
    code = (for_hopper.ptx / "move_kernel.ptx").read_text()
    memory = re.findall(r"ld\.global|bar\.sync|st\.global", code)
    first_store = memory.index("st.global")
    last_load = len(memory) - 1 - memory[::-1].index("ld.global")
    assert last_load < first_store
    assert "bar.sync" in memory[last_load:first_store]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "arguments"),
    [
        ("86", "--dtype float32 --dim 256 --window 64 --pooling maxpool"),
        ("120", "--dtype float16 --dim 80 --window 1 --single"),
    ],
)
def test_other_gpus_and_shapes(capability: str, arguments: str) -> None:
    check(compile_kernels("--capability", capability, *arguments.split()), capability)


@pytest.mark.parametrize(
    ("operator", "kernels", "products"),
    [
        ("low-rank-int4", LOW_RANK, ("lifted_scores_kernel", "latent_sums_kernel", "lift_values_kernel")),
        ("quantized-int8", QUANTIZED, ("cached_rows_kernel",)),
    ],
)
def test_decode_attention_runs_on_tensor_cores(
    operator: str, kernels: set[str], products: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ("--operator", operator, "--capability", "90", "--dtype", "bfloat16", "--ptx", str(tmp_path))
    check(compile_kernels(*arguments), "90", kernels)
    for kernel in products:
        code = (tmp_path / f"{kernel}.ptx").read_text()
        assert re.search(r"(wgmma\.mma_async|mma)\.sync\.aligned\.\S*bf16", code), kernel
        # Codes are read in words: a byte at a time would cost four times the instructions.
        assert not re.search(r"ld\.global\S*\.b8", code), kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "operator", "arguments"),
    [
        ("80", "low-rank-int8", "--dtype bfloat16 --dim 128"),
        ("80", "quantized-int4", "--dtype float16 --dim 64"),
        ("86", "low-rank-float", "--dtype bfloat16 --dim 128"),
        ("120", "low-rank-int4", "--dtype float16 --dim 64 --single"),
        ("120", "low-rank-float", "--dtype float32 --dim 128"),
        ("120", "quantized-int8", "--dtype float32 --dim 128 --single"),
        ("120", "quantized-int4", "--dtype bfloat16 --dim 80"),
    ],
)
def test_decode_attention_on_other_gpus(capability: str, operator: str, arguments: str) -> None:
    needs = compile_kernels("--capability", capability, "--operator", operator, *arguments.split())
    check(needs, capability, LOW_RANK if operator.startswith("low-rank") else QUANTIZED)
