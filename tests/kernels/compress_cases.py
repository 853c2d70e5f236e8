# SPDX-License-Identifier: Apache-2.0
"""What every implementation of ``Compress`` must do: the same as the PyTorch reference, on every case.

The reference runs on the CPU, so that a case means the same on every machine. Needs PyTorch alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from compress_prompts import NATIVE, Case, Prompt
from torch import Tensor

from starkv.kernels.compress_call import CompressCall, CompressResult
from starkv.methods.select import Kept
from starkv.methods.star_kv import StarKVScores, compress
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_plan import layer_limits, plan_step
from starkv.methods.star_kv_state import StarKVState

Compress = Callable[[CompressCall], CompressResult]
NOT_POOLED = replace(NATIVE, kernel=1)
OFFICIAL = StarKVConfig.official(mi_profile_steps=1, mi_ramp_steps=2)
TOLERANCE = 1e-5
"""Relative. Two float32 programs that sum in different orders differ by a few 1e-7 per sum; a GPU's
exponential adds 1e-6 where a row scores far below the best one."""
UNTOUCHED = 7.0
"""What destinations hold where nothing is written."""

_TWO = (((7, 9),), ((7, 9), (7, 9)))
_ONE = (((9, 11),),)

CASES = [
    Case("native", layers=1, prompts=(((13, 15),), ((13, 15), (13, 15)), ((13, 15), (13, 15)))),
    Case("official", config=OFFICIAL, prompts=(((7, 9),),) + (((7, 9), (7, 9)),) * 2),
    Case("native_bfloat16", dtype=torch.bfloat16, dim=128, sharing=3, prompts=_TWO),
    Case("official_float16", config=OFFICIAL, dtype=torch.float16, dim=80, sharing=1, prompts=_ONE),
    Case("dim_96_of_seven", dtype=torch.bfloat16, dim=96, sharing=7, groups=1, layers=1, prompts=_TWO),
    Case("dim_256", dtype=torch.float16, dim=256, prompts=_ONE),
    Case("dim_256_float32", dim=256, prompts=_ONE),
    Case("dim_80_float32", dim=80, groups=3, prompts=_TWO),
    Case("window_1", config=replace(NATIVE, window=1), prompts=_TWO),
    Case("window_20", config=replace(NATIVE, window=20), prompts=_TWO),
    Case("window_64", config=replace(NATIVE, window=64), prompts=(((12, 13),),), layers=1, seed=1),
    Case("maxpool", config=replace(NATIVE, pooling="maxpool"), prompts=_TWO),
    Case(
        "maxpool_7", config=replace(OFFICIAL, pooling="maxpool", kernel=7), prompts=_TWO, sharing=3, layers=1
    ),
    Case("not_pooled", NOT_POOLED, prompts=_ONE),
    Case("wide_pool", config=replace(NATIVE, kernel=63), prompts=_ONE),
    Case("protected_rows", protect=True, share=0.2, prompts=_TWO),
    Case("ragged_batch", batch=3, ragged=True, prompts=_TWO),
    Case("spare_rows", spare_rows=9, prompts=_TWO),
    Case("ragged_with_spare_rows", NATIVE, _ONE, batch=2, ragged=True, spare_rows=5, protect=True),
    Case("layer_budgets", layers=5, share=0.6, prompts=_TWO, groups=1),
    Case("equal_budgets", config=replace(NATIVE, entropy=False), layers=3, prompts=_TWO),
    Case("few_rows", share=0.0, layers=3, prompts=_TWO),
    Case("nearly_all_rows", share=0.97, layers=3, prompts=_TWO),
    Case("all_rows", share=1.0, prompts=_ONE),
    Case("no_screenshot", prompts=((), (), ((5, 6),))),
    Case("one_cell", prompts=(((1, 1),), ((1, 1), (1, 1)))),
    Case("fewer_cells_than_bins", prompts=(((2, 3),), ((2, 3), (2, 3))), config=OFFICIAL),
    Case("another_size", prompts=(((7, 9), (7, 9)), ((9, 16), (5, 6)), ((5, 6), (5, 6)), ((5, 6), (9, 16)))),
    Case("no_hidden_norm", hidden_norm=False, prompts=_TWO),
    Case("no_boost", config=replace(NATIVE, boost=0.0), prompts=_TWO),
    Case("no_prior", config=replace(NATIVE, mi=False, temporal=False), prompts=_TWO),
    Case("warm_up", config=replace(NATIVE, temporal_warmup=2)),
    Case(
        "smoothed_temperature",
        config=replace(OFFICIAL, entropy_smooth=0.6, temporal_eps=0.3, temporal_floor=0.2),
    ),
    Case("ties", tied=True, prompts=_TWO, share=0.3),
    Case("ties_official_bfloat16", tied=True, config=OFFICIAL, dtype=torch.bfloat16, prompts=_TWO, share=0.3),
    Case("groups_tie", NOT_POOLED, (((13, 15),), ((13, 15), (13, 15))), layers=1, tied_groups=True),
    Case("one_layer_one_head", layers=1, groups=1, sharing=1, prompts=_TWO),
    # Every kernel takes more than one step.
    Case("larger", prompts=(((30, 36), (30, 36)),), layers=1, sharing=1, dim=256, dtype=torch.bfloat16),
]


@dataclass
class Outcome:
    """One call by the reference and by an implementation."""

    call: CompressCall
    result: CompressResult
    kept: Kept
    scores: StarKVScores


def make_call(prompt: Prompt, config: StarKVConfig, state: StarKVState, device: torch.device) -> CompressCall:
    """The call that compresses a prompt into the middle slots of a pool, the last sequence into the first."""
    prefill = prompt.prefill
    plan, _ = plan_step(config, state.progress, prefill.frame)
    if prefill.hidden_norm is None:
        plan = replace(plan, boost=0.0)
    limits = layer_limits(
        plan, prompt.kept_rows, prefill.window, prompt.length - prefill.window, prompt.protected
    )
    layers, batch, groups, _, dim = prefill.keys.shape
    slots, rows = batch + 2, prefill.window + limits.ceiling + 3
    pool = torch.full((layers, slots, groups, rows, dim), UNTOUCHED, dtype=prefill.keys.dtype)
    meta = torch.full((layers, slots, rows, 4), int(UNTOUCHED), dtype=torch.int32)
    slot = torch.arange(batch).flip(0) + 1
    destination = (pool, pool.clone(), meta)
    call = CompressCall.of(prefill, state, plan, limits, destination, slot, config.pooling, config.kernel)
    return on_device(call, device)


def on_device(call: CompressCall, device: torch.device) -> CompressCall:
    """A copy of a call on a device."""
    tensors = {
        name: value.clone().to(device) for name, value in vars(call).items() if isinstance(value, Tensor)
    }
    return replace(call, **tensors)


def walk(implementation: Compress, case: Case, device: torch.device) -> list[Outcome]:
    """Take the reference and an implementation through a trajectory, each with its own state."""
    shape = (case.layers, case.batch, case.groups)
    expected_state = state = StarKVState.initial(*shape)
    outcomes = []
    for index in range(len(case.prompts)):
        prompt = case.prompt(index)
        call = make_call(prompt, case.config, state, device)
        inputs = on_device(call, torch.device("cpu"))
        result = implementation(call)
        prefill = prompt.prefill
        exact = replace(prefill, keys=prefill.keys.float(), queries=prefill.queries.float())
        kept, scores, expected_state = compress(
            exact, expected_state, case.config, prompt.kept_rows, prompt.length, prompt.protected
        )
        assert kept is not None
        assert scores is not None
        state = replace(
            expected_state,
            mi_ema=result.mi_ema.cpu(),
            pattern_ema=result.pattern_ema.cpu(),
            temperature=result.temperature.cpu(),
        )
        assert_unchanged(call, inputs)
        assert_state(state, expected_state)
        outcomes.append(Outcome(call, result, kept, scores))
    return outcomes


def check_implementation(implementation: Compress, case: Case, device: torch.device) -> None:
    """Assert that an implementation does what the reference does, prompt after prompt of a trajectory."""
    for outcome in walk(implementation, case, device):
        assert_scores(outcome)
        assert_rows(outcome)
        assert_destination(outcome.call, outcome.result)


def check_in_place(implementation: Compress, case: Case, device: torch.device) -> None:
    """Assert that a cache compacted into itself holds what a cache compacted elsewhere holds."""
    prompt = case.prompt(0)
    apart = make_call(prompt, case.config, StarKVState.initial(case.layers, case.batch, case.groups), device)
    expected = implementation(apart)
    source = on_device(apart, device)
    slot = torch.arange(case.batch, dtype=torch.int32, device=device)
    inside = replace(source, dst_k=source.k, dst_v=source.v, dst_meta=source.row_meta, slot=slot)
    result = implementation(inside)
    assert torch.equal(result.new_len, expected.new_len)
    for layer, sequence, count in kept_counts(expected):
        rows = expected.rows[layer, sequence, 0]
        assert torch.equal(result.rows[layer, sequence, 0, :count], rows[:count])
        assert (result.rows[layer, sequence, 0, count:] == -1).all()
        at = int(apart.slot[sequence])
        for name in ("dst_k", "dst_v"):
            wanted, actual = getattr(apart, name), getattr(inside, name)
            assert torch.equal(actual[layer, sequence, :, :count], wanted[layer, at, :, :count])
        assert torch.equal(inside.dst_meta[layer, sequence, :count], apart.dst_meta[layer, at, :count])


# --- what must agree ---


def kept_counts(result: CompressResult) -> list[tuple[int, int, int]]:
    """Layer, sequence and number of kept rows."""
    lengths = result.new_len.cpu()
    return [
        (layer, sequence, int(count))
        for layer, counts in enumerate(lengths)
        for sequence, count in enumerate(counts)
    ]


def assert_close(actual: Tensor, expected: Tensor, name: str, absolute: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual.cpu(), expected.cpu(), rtol=TOLERANCE, atol=absolute, msg=lambda text: f"{name}: {text}"
    )


def assert_scores(outcome: Outcome) -> None:
    """Final scores and every stage, within the past; zero scores elsewhere."""
    scores, result = outcome.scores, outcome.result
    length = outcome.call.kv_len.cpu()[..., None] - outcome.call.window
    past = torch.arange(result.scores.shape[-1]) < length
    assert (result.scores.cpu()[~past] == 0).all()
    assert_close(result.scores.cpu()[past], scores.final[past], "scores")
    expected = (scores.pooled.mean(2), scores.groups.mean(2), scores.after_mi, scores.after_temporal)
    for index, name in enumerate(("attention", "boosted", "weighted", "discounted")):
        assert_close(result.stages[:, :, index].cpu()[past], expected[index][past], name)


def assert_rows(outcome: Outcome) -> None:
    """The very same rows."""
    rows, expected = outcome.result.rows.cpu(), outcome.kept.rows
    assert torch.equal(outcome.result.new_len.cpu().long(), outcome.kept.kv_len)
    most = expected.shape[-1]
    assert torch.equal(rows[..., :most], expected)
    assert (rows[..., most:] == -1).all()


def assert_destination(call: CompressCall, result: CompressResult) -> None:
    """Slots hold the very bytes of the kept rows in front; other slots, and rows behind the most that any
    layer keeps, hold what they held."""
    most = int(result.new_len.max())
    slots = call.slot.tolist()
    others = [slot for slot in range(call.dst_k.shape[1]) if slot not in slots]
    for destination in (call.dst_k, call.dst_v):
        assert (destination[:, others] == UNTOUCHED).all()
        assert (destination[:, slots, :, most:] == UNTOUCHED).all()
    assert (call.dst_meta[:, others] == UNTOUCHED).all()
    assert (call.dst_meta[:, slots, most:] == UNTOUCHED).all()
    for layer, sequence, count in kept_counts(result):
        rows, slot = result.rows[layer, sequence, 0, :count], slots[sequence]
        for source, destination in ((call.k, call.dst_k), (call.v, call.dst_v)):
            assert torch.equal(destination[layer, slot, :, :count], source[layer, sequence][:, rows])
        assert torch.equal(call.dst_meta[layer, slot, :count], call.row_meta[layer, sequence, rows])


def assert_state(state: StarKVState, expected: StarKVState) -> None:
    # Information is a difference to what chance shows, so its error is not relative to itself.
    assert_close(state.mi_ema, expected.mi_ema, "mi_ema", absolute=1e-6)
    assert_close(state.temperature, expected.temperature, "temperature")
    cells = expected.pattern_ema.shape[-1]
    assert_close(state.pattern_ema[..., :cells], expected.pattern_ema, "pattern_ema")


def assert_unchanged(call: CompressCall, inputs: CompressCall) -> None:
    """Nothing but the destination was written."""
    for name, before in vars(inputs).items():
        if isinstance(before, Tensor) and not name.startswith("dst_"):
            after = getattr(call, name).cpu()
            assert torch.equal(after.nan_to_num(5.0), before.nan_to_num(5.0)), f"{name} was written"
