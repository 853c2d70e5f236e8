# SPDX-License-Identifier: Apache-2.0
"""What every compression method has to hold, whatever its scores."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_prefill import LENGTH, one_sequence, prefill_for, ragged, random_prefill, two_screenshots

from starkv.errors import UsageError
from starkv.methods.budget import pyramid_rows
from starkv.methods.method import KvMethod, compress_with, keep_best
from starkv.methods.oracle import Oracle
from starkv.methods.prefill import Prefill
from starkv.methods.pyramidkv import PyramidKV
from starkv.methods.registry import FORMS, MethodForm, StarKV, form_of, make_method
from starkv.methods.rows import ROW_TOKEN
from starkv.methods.select import Kept
from starkv.methods.snapkv import SnapKV
from starkv.methods.vl_cache import shared_rows

STATELESS = [form for form in FORMS if form.name != "star_kv"]
BOTH_FORMS = sorted({form.name for form in FORMS if form.index_sets == "attention_head"})
GROUPS, REPEATS = 2, 3
ANY_PREFILL = random_prefill(1, batch=2)


def name_of(form: MethodForm) -> str:
    return f"{form.name}-{form.index_sets}"


def made(form: MethodForm) -> KvMethod:
    parameters = {} if form.index_sets == "layer" else {"heads": form.index_sets.split("_")[0]}
    method = make_method(form.name, **parameters)
    assert not isinstance(method, StarKV)
    return method


def compress(method: KvMethod, prefill: Prefill, rows: int) -> Kept:
    kept = compress_with(method, prefill, rows, LENGTH)
    assert kept is not None
    return kept


@pytest.fixture(params=STATELESS, ids=name_of)
def form(request: pytest.FixtureRequest) -> MethodForm:
    chosen: MethodForm = request.param
    return chosen


@dataclass(frozen=True)
class Given(KvMethod):
    """Scores and budgets from outside."""

    name: ClassVar[str] = "given"
    scores: torch.Tensor
    keep: tuple[int, ...]
    window: int = field(default=1)

    def keep_rows(self, *_: object) -> tuple[int, ...]:
        return self.keep

    def score(self, prefill: Prefill, kept_rows: int) -> torch.Tensor:
        return self.scores


def best_rows(scores: np.ndarray, length: int, window: int, protected: set[int], keep: int) -> list[int]:
    """The rule, row by row: window, protected rows, higher score, lower row."""

    def place(row: int) -> tuple[bool, bool, float, int]:
        return row < length - window, row not in protected, -float(scores[row]), row

    return sorted(sorted(range(length), key=place)[: min(keep, length)])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_kept_rows_are_the_top_scores_with_ties_to_the_lower_row(data: st.DataObject) -> None:
    sets = data.draw(st.sampled_from([1, 2, 6]))
    window = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(window + 2, 12), min_size=2, max_size=2))
    keep = data.draw(st.lists(st.integers(window + 2, max(lengths)), min_size=3, max_size=3))
    protected = set(data.draw(st.lists(st.integers(0, min(lengths) - window - 1), max_size=2)))
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    scores = random.integers(-2, 3, (3, 2, sets, 12)).astype(np.float32)
    meta = np.zeros((3, 2, 12, 4), np.int32)
    meta[:, :, sorted(protected), 2] = 1
    prefill = replace(
        ANY_PREFILL,
        keys=torch.from_numpy(random.standard_normal((3, 2, GROUPS, 12, 5)).astype(np.float32)),
        values=torch.zeros(3, 2, GROUPS, 12, 5),
        queries=torch.zeros(3, 2, GROUPS * REPEATS, 4, 5),
        hidden_norm=None,
        kv_len=torch.tensor(lengths).expand(3, 2),
        row_meta=torch.from_numpy(meta),
        window=window,
    )
    method = Given(torch.from_numpy(scores), tuple(keep))
    kept = keep_best(method, prefill, method.scores, 1, max(lengths), len(protected))
    for (layer, sequence, index), _ in np.ndenumerate(scores[..., 0]):
        expected = best_rows(
            scores[layer, sequence, index], lengths[sequence], window, protected, keep[layer]
        )
        rows = kept.rows[layer, sequence, index].tolist()
        assert rows == expected + [-1] * (len(rows) - len(expected))
        for head in range(index * kept.keys.shape[2] // sets, (index + 1) * kept.keys.shape[2] // sets):
            stored = prefill.keys[layer, sequence, head * GROUPS // kept.keys.shape[2]]
            cached = kept.keys[layer, sequence, head]
            assert torch.equal(cached[: len(expected)], stored[expected])
            assert not cached[len(expected) :].any()


@pytest.mark.parametrize("rows", [5, 20, 45, LENGTH - 1])
def test_what_is_kept_follows_from_the_scores(form: MethodForm, rows: int) -> None:
    method = made(form)
    prefill = prefill_for(method, rows, batch=2)
    kept, scores = compress(method, prefill, rows), method.score(prefill, rows).numpy()
    keep = method.keep_rows(3, LENGTH, rows, prefill.window, prefill.sparsity)
    assert kept.kv_len.tolist() == [[count, count] for count in keep]
    for (layer, sequence, index), _ in np.ndenumerate(scores[..., 0]):
        expected = best_rows(scores[layer, sequence, index], LENGTH, prefill.window, set(), keep[layer])
        assert kept.rows[layer, sequence, index, : keep[layer]].tolist() == expected


def test_the_whole_budget_keeps_everything_to_the_bit(form: MethodForm) -> None:
    method = made(form)
    prefill = prefill_for(method, LENGTH, batch=2)
    kept = compress(method, prefill, LENGTH)
    repeats = kept.keys.shape[2] // GROUPS
    assert torch.equal(kept.keys, prefill.keys.repeat_interleave(repeats, 2))
    assert torch.equal(kept.values, prefill.values.repeat_interleave(repeats, 2))
    assert torch.equal(kept.rows, torch.arange(LENGTH).expand_as(kept.rows))
    assert kept.kv_len.tolist() == [[LENGTH, LENGTH]] * 3
    if form.index_sets == "layer":
        assert kept.row_meta is not None
        assert torch.equal(kept.row_meta, prefill.row_meta.contiguous())


def test_a_prompt_shorter_than_its_budget_stays_as_it_is(form: MethodForm) -> None:
    method = made(form)
    assert compress_with(method, prefill_for(method, LENGTH), LENGTH + 1, LENGTH) is None


@pytest.mark.parametrize("name", BOTH_FORMS)
@pytest.mark.parametrize("rows", [7, 30])
def test_kv_heads_choose_what_query_heads_agree_on(name: str, rows: int) -> None:
    few, many = (make_method(name, heads=heads) for heads in ("kv", "attention"))
    assert not isinstance(few, StarKV)
    assert not isinstance(many, StarKV)
    prefill = prefill_for(few, rows, agree=True)
    native, repeated = compress(few, prefill, rows), compress(many, prefill, rows)
    assert torch.equal(native.rows.repeat_interleave(REPEATS, 2), repeated.rows)
    assert torch.equal(native.keys.repeat_interleave(REPEATS, 2), repeated.keys)
    assert torch.equal(native.values.repeat_interleave(REPEATS, 2), repeated.values)
    disagreeing = compress(many, prefill_for(many, rows), rows)
    assert (disagreeing.rows[:, :, 0] != disagreeing.rows[:, :, 1]).any()


def test_bytes_are_those_of_the_form(form: MethodForm) -> None:
    method = made(form)
    prefill = prefill_for(method, 30)
    kept = compress(method, prefill, 30)
    assert form_of(method) == form
    row = 2 * GROUPS * prefill.keys.shape[4] * 4 * form.bytes_factor(GROUPS * REPEATS, GROUPS)
    assert int(kept.bytes_held) == row * int(kept.kv_len.sum())


@pytest.mark.parametrize("form", [form for form in STATELESS if form.name != "random"], ids=name_of)
def test_sequences_of_a_ragged_batch_are_compressed_as_if_alone(form: MethodForm) -> None:
    method, lengths = made(form), [84, LENGTH, 87]
    batch = ragged(prefill_for(method, 30, batch=3), lengths)
    # Sparsity is a mean over the batch, so it goes with it.
    kept = compress(method, batch, 30)
    for sequence, length in enumerate(lengths):
        alone = compress(method, one_sequence(batch, sequence), 30)
        assert torch.equal(kept.rows[:, sequence], alone.rows[:, 0])
        assert torch.equal(kept.keys[:, sequence], alone.keys[:, 0])
        assert int(kept.rows[:, sequence].max()) == length - 1


def test_protected_rows_stay(form: MethodForm) -> None:
    method, protected = made(form), (35,)
    rows = two_screenshots(protect=protected)
    prefill = prefill_for(method, 20)
    meta = torch.from_numpy(rows.marked(protected)).expand(3, 1, -1, -1)
    kept = compress_with(method, replace(prefill, row_meta=meta), 20, LENGTH, len(protected))
    assert kept is not None
    for row in (*protected, LENGTH - 1):
        assert (kept.rows == row).any(-1).all()


def test_budgets_too_small_for_what_has_to_stay_are_refused() -> None:
    method = PyramidKV()
    prefill = prefill_for(method, 20)
    with pytest.raises(UsageError, match="keep 9 rows, which can't hold a window of 8 and 2 protected"):
        compress_with(method, prefill, 20, LENGTH, protected=2)
    with pytest.raises(UsageError, match="can't hold a window of 8"):
        compress_with(SnapKV(), prefill, 7, LENGTH)


def test_scoring_never_waits_for_the_device(form: MethodForm) -> None:
    method = made(form)
    prefill = prefill_for(method, 20, batch=2)
    # A tensor of this device has no numbers: whoever asks for one fails.
    tensors = {
        name: tensor.to("meta") for name, tensor in vars(prefill).items() if isinstance(tensor, torch.Tensor)
    }
    scores = method.score(replace(prefill, **tensors), 20)
    sets = {"layer": 1, "kv_head": GROUPS, "attention_head": GROUPS * REPEATS}[form.index_sets]
    assert scores.shape == (3, 2, sets, LENGTH)
    assert scores.dtype == torch.float32


@given(
    layers=st.integers(1, 30),
    prompt=st.integers(3, 400),
    share=st.floats(0.01, 1.0),
    sparsity=st.lists(st.floats(0.0, 1.0, width=32), min_size=30, max_size=30),
)
def test_budgets_fit_every_prompt(layers: int, prompt: int, share: float, sparsity: list[float]) -> None:
    kept = max(2, int(prompt * share))
    window = max(1, min(8, kept - 2))
    pyramid = pyramid_rows(layers, prompt, kept, window)
    assert list(pyramid) == sorted(pyramid, reverse=True)
    assert all(window < rows <= prompt for rows in pyramid)
    assert sum(pyramid) >= layers * kept
    shared = shared_rows(torch.tensor(sparsity[:layers]), kept)
    assert (shared >= 2).all()
    assert int(shared.sum()) <= layers * (max(kept, 2) + 0.001 * layers * kept + 2)


def test_an_oracle_keeps_its_rows_first() -> None:
    method = Oracle(rows=(40, 11, 40))
    rows = compress(method, prefill_for(method, 12), 12).rows[0, 0, 0].tolist()
    assert rows == [11, 40, 80, 81, *range(82, LENGTH)]
    with pytest.raises(UsageError, match="outside"):
        Oracle(rows=(LENGTH,)).score(random_prefill(8), 12)


def test_kept_metadata_names_the_tokens() -> None:
    method = made(FORMS[2])
    kept = compress(method, prefill_for(method, 9), 9)
    assert kept.row_meta is not None
    assert kept.row_meta[0, 0, :, ROW_TOKEN].tolist() == [0, 1, 2, 3, 85, 86, 87, 88, 89]
