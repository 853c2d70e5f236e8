# SPDX-License-Identifier: Apache-2.0
"""Sequences that cannot be compressed: every implementation leaves them as they are, and only them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from compress_cases import UNTOUCHED, Compress, assert_close, assert_unchanged, make_call, on_device
from compress_prompts import Case

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_state import StarKVState

CASE = Case(
    "refused",
    config=StarKVConfig.official(mi_profile_steps=1),
    batch=3,
    groups=1,
    prompts=(((4, 5), (4, 5)),),
)
REFUSED = 1
"""The sequence that is spoiled; its neighbours are compressed."""


def _no_row_competes(call: CompressCall) -> None:
    call.kv_len[:, REFUSED] = call.window


def _longer_than_its_cache(call: CompressCall) -> None:
    call.kv_len[:, REFUSED] = call.k.shape[3] + 1


def _slot_behind_the_last(call: CompressCall) -> None:
    call.slot[REFUSED] = call.dst_k.shape[1]


def _negative_slot(call: CompressCall) -> None:
    call.slot[REFUSED] = -1


def _too_short_for_the_screenshot_in_one_layer(call: CompressCall) -> None:
    call.kv_len[1, REFUSED] = call.window + 5


SPOILS: dict[str, Callable[[CompressCall], None]] = {
    "no_row_competes": _no_row_competes,
    "longer_than_its_cache": _longer_than_its_cache,
    "slot_behind_the_last": _slot_behind_the_last,
    "negative_slot": _negative_slot,
    "too_short_for_the_screenshot_in_one_layer": _too_short_for_the_screenshot_in_one_layer,
}


def refusable_call(device: torch.device) -> CompressCall:
    """A call whose state is not the initial one."""
    state = StarKVState.initial(CASE.layers, CASE.batch, CASE.groups)
    state = replace(state, mi_ema=state.mi_ema + 0.25, temperature=state.temperature * 0.5)
    call = make_call(CASE.prompt(0), CASE.config, state, device)
    call.pattern_ema.fill_(0.125)
    return call


def check_refused(implementation: Compress, spoil: str, device: torch.device) -> None:
    """Assert that a spoiled sequence stays as it is, and that its neighbours don't notice.

    Args:
        implementation: of ``Compress``.
        spoil: one of :data:`SPOILS`.
        device: where it runs.
    """
    call = refusable_call(device)
    SPOILS[spoil](call)
    inputs = on_device(call, torch.device("cpu"))
    expected_call = refusable_call(device)
    result, expected = implementation(call), implementation(expected_call)
    assert_unchanged(call, inputs)
    assert_left_alone(call, result, REFUSED)
    slot = int(expected_call.slot[REFUSED])
    assert (call.dst_k[:, slot] == UNTOUCHED).all()
    assert (call.dst_v[:, slot] == UNTOUCHED).all()
    assert (call.dst_meta[:, slot] == UNTOUCHED).all()
    for neighbour in (REFUSED - 1, REFUSED + 1):
        assert torch.equal(result.rows[:, neighbour], expected.rows[:, neighbour])
        assert (expected.new_len[:, neighbour] > 0).all()
        for name in ("scores", "stages", "mi_ema", "pattern_ema", "temperature", "new_len"):
            actual, wanted = getattr(result, name)[:, neighbour], getattr(expected, name)[:, neighbour]
            assert_close(actual.float(), wanted.float(), name)
        slot = int(call.slot[neighbour])
        assert torch.equal(call.dst_k[:, slot], expected_call.dst_k[:, slot])


def check_small_pool_refused(implementation: Compress, device: torch.device) -> None:
    """Assert that nothing is written where a slot is a row too small for what is kept."""
    call = refusable_call(device)
    rows = int(implementation(on_device(call, device)).new_len.max()) - 1
    small = {name: getattr(call, name)[..., :rows, :].contiguous() for name in ("dst_k", "dst_v", "dst_meta")}
    call = replace(call, **small)
    result = implementation(call)
    for sequence in range(CASE.batch):
        assert_left_alone(call, result, sequence)
    assert (call.dst_k == UNTOUCHED).all()
    assert (call.dst_v == UNTOUCHED).all()
    assert (call.dst_meta == UNTOUCHED).all()


def assert_left_alone(call: CompressCall, result: CompressResult, sequence: int) -> None:
    """A sequence keeps no rows and its state."""
    assert (result.new_len[:, sequence] == 0).all()
    assert (result.rows[:, sequence] == -1).all()
    assert torch.equal(result.mi_ema[:, sequence], call.mi_ema[:, sequence])
    assert torch.equal(result.pattern_ema[:, sequence], call.pattern_ema[:, sequence])
    assert torch.equal(result.temperature[:, sequence], call.temperature[:, sequence])
