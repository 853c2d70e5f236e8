# SPDX-License-Identifier: Apache-2.0
"""A decoder of UI-TARS-1.5-7B's width is lowered without its weights in memory."""

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_configs import QWEN2_5_VL_7B
from tiny_model import tiny_card

from starkv.export.export_model import export_model
from starkv.export.lower.trt import lower_to_trt
from starkv.export.quantize.presets import PRESETS
from starkv.export.random_checkpoint import write_random_checkpoint
from starkv.trt_compat.version import NEWEST, OLDEST

MOST_BYTES = 150 << 20
"""Of memory; the head takes 2180 MB as float32."""

pytestmark = pytest.mark.slow


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """Two layers of full width with a small vision tower; gigabytes, so nothing of it stays behind."""
    vision = {**QWEN2_5_VL_7B["vision_config"], "depth": 2, "fullatt_block_indexes": [1]}
    write_random_checkpoint(QWEN2_5_VL_7B | {"vision_config": vision}, tmp_path / "checkpoint", layers=2)
    export_model(tmp_path / "checkpoint", tiny_card(), tmp_path / "export", PRESETS["int4"])
    shutil.rmtree(tmp_path / "checkpoint")
    yield tmp_path / "export"
    shutil.rmtree(tmp_path)


def test_weights_pass_through_memory_in_stripes(export: Path) -> None:
    hashes = set()
    for target in (OLDEST, NEWEST):
        out = export.parent / str(target)
        out.mkdir()
        tracemalloc.start()
        try:
            lowered = lower_to_trt(export, out, target, "bfloat16")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MOST_BYTES
        # The head's 8 bits become 16; the layers keep their 4.
        assert {graph.name: graph.expanded for graph in lowered} == {"vision": 0, "decoder": 1, "compress": 0}
        hashes.add(tuple(graph.sha256 for graph in lowered))
        shutil.rmtree(out)
    assert len(hashes) == 1
