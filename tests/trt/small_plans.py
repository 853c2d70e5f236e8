# SPDX-License-Identifier: Apache-2.0
"""Small networks as starkv opens and runs them."""

from pathlib import Path

from small_engines import Small

from starkv.trt_compat.execution import Execution
from starkv.trt_compat.module import load_tensorrt
from starkv.trt_compat.running import Plan, Runtime


def opened(small: Small, folder: Path) -> Plan:
    """What a small network's plan file says."""
    content = small.build()
    assert content is not None, small.said
    path = folder / "small.plan"
    path.write_bytes(content)
    return Runtime(load_tensorrt()).open(path)


def ready(small: Small, plan: Plan, aliases: dict[str, str] | None = None) -> Execution:
    size = plan.scratch_bytes(0)
    return Execution(plan, 0, small.place("scratch", size), size, small.stream, aliases)


def room(small: Small, name: str) -> int:
    return small.place(name, 1 << 16)
