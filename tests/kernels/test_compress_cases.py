# SPDX-License-Identifier: Apache-2.0
"""Are the cases themselves fair?"""

from dataclasses import replace

import pytest
import torch
from compress_cases import CASES
from compress_prompts import Case
from torch import Tensor

from starkv.methods.star_kv import compress
from starkv.methods.star_kv_plan import plan_step
from starkv.methods.star_kv_stages import frame_values
from starkv.methods.star_kv_state import StarKVState

CLEAR = 3e-6
"""Relative distance that no rounding of a float32 program bridges."""


def assert_clear(higher: Tensor, lower: Tensor, what: str) -> None:
    """Pairs of numbers are equal or clearly apart."""
    distance = (higher - lower) / higher.abs().clamp(min=1e-30)
    assert not ((distance > 0) & (distance < CLEAR)).any(), f"{what}: choose another seed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_case_hangs_on_rounding(case: Case) -> None:
    """Where two scores decide something by which is larger, two correct programs must see the same one."""
    state = StarKVState.initial(case.layers, case.batch, case.groups)
    for index in range(len(case.prompts)):
        prompt = case.prompt(index)
        prefill = prompt.prefill
        prefill = replace(prefill, keys=prefill.keys.float(), queries=prefill.queries.float())
        plan, _ = plan_step(case.config, state.progress, prefill.frame)
        kept, scores, state = compress(prefill, state, case.config, prompt.kept_rows, prompt.length)
        assert kept is not None
        assert scores is not None
        cells = prefill.frame.cells
        if plan.mi_enabled:
            ranked = frame_values(scores.groups, prefill.frame_start, cells).clamp(min=0).sort(-1).values
            first = torch.tensor(sorted({-(-rank * cells // 16) for rank in range(1, 16)} - {cells}))
            assert_clear(ranked[..., first], ranked[..., first - 1], "bins of information")
        if case.groups > 1:
            best = scores.groups.topk(2, dim=2).values.movedim(2, 0)[:, prefill.is_past]
            assert_clear(best[0], best[1], "leading group")
        order = scores.priorities[:, :, 0].sort(descending=True).values
        last = kept.kv_len[..., None] - 1
        next_one = (last + 1).clamp(max=order.shape[-1] - 1)
        assert_clear(order.gather(-1, last), order.gather(-1, next_one), "cut")
