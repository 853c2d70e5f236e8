# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the PyTorch reference."""

import pytest
import torch
from compress_cases import CASES, check_implementation, check_in_place
from compress_prompts import Case
from compress_refusals import SPOILS, check_refused, check_small_pool_refused

from starkv.kernels.triton_compress import compress


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trajectories_equal_the_reference(case: Case, device: torch.device) -> None:
    check_implementation(compress, case, device)


IN_PLACE = ("native", "dim_80_float32", "ragged_with_spare_rows", "nearly_all_rows", "all_rows", "few_rows")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in IN_PLACE], ids=lambda case: case.name
)
def test_a_cache_can_be_compacted_into_itself(case: Case, device: torch.device) -> None:
    check_in_place(compress, case, device)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_sequence_that_cannot_be_compressed_is_left_alone(spoil: str, device: torch.device) -> None:
    check_refused(compress, spoil, device)


def test_a_slot_that_is_too_small_is_left_alone(device: torch.device) -> None:
    check_small_pool_refused(compress, device)
