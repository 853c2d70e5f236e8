# SPDX-License-Identifier: Apache-2.0
"""Methods by name: what is refused, where each form runs, STaR-KV beside the others."""

import re
from typing import Any

import pytest
import torch
from random_prefill import LENGTH, random_prefill, two_screenshots

from starkv.errors import UsageError
from starkv.methods.full import Full
from starkv.methods.method import KvMethod
from starkv.methods.names import ENGINE_METHODS
from starkv.methods.oracle import Oracle
from starkv.methods.pyramidkv import PyramidKV
from starkv.methods.registry import FORMS, METHODS, StarKV, make_method


def test_engines_run_exactly_the_forms_that_are_marked() -> None:
    assert sorted(form.name for form in FORMS if form.on_engines) == sorted(ENGINE_METHODS)
    assert {form.name for form in FORMS} == set(METHODS)
    assert all(form.bytes_factor(28, 4) == 1 for form in FORMS if form.on_engines)


@pytest.mark.parametrize("mode", ["native", "official"])
def test_star_kv_is_reached_by_name_and_returns_its_state(mode: str) -> None:
    method = make_method("star_kv", mode=mode, window=6)
    assert isinstance(method, StarKV)
    prefill = random_prefill(method.window_for(two_screenshots(), LENGTH), batch=2)
    kept, state = method.compress(prefill, method.initial_state(prefill), LENGTH, LENGTH)
    assert kept is not None
    assert torch.equal(kept.keys, prefill.keys)
    kept, after = method.compress(prefill, state, 20, LENGTH)
    assert kept is not None
    assert (state.progress.temporal_step, after.progress.temporal_step) == (1, 2)
    none, skipped = method.compress(prefill, after, LENGTH + 1, LENGTH)
    assert none is None
    assert skipped.progress.temporal_step == 3


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("star_vk", {}, "unknown KV method 'star_vk'; known: full, star_kv, snapkv"),
        ("snapkv", {"alpha": 2}, "snapkv has no parameter 'alpha'; it has: window, kernel, pooling, heads"),
        ("star_kv", {"heads": "kv"}, "star_kv has no parameter 'heads'"),
        ("star_kv", {"mode": "paper"}, "known: native, official"),
        ("gui_kv", {"heads": "all"}, "heads must be kv or attention, not 'all'"),
        ("gui_kv", {"boost_temperature": 0}, "boost_temperature must be above 0"),
        ("gui_kv", {"rank": 0}, "rank must be at least 1"),
        ("h2o", {"heads": "layer"}, "heads must be kv or attention"),
        ("snapkv", {"kernel": 4}, "kernel must be odd"),
        ("snapkv", {"pooling": "mean"}, "pooling must be avgpool or maxpool"),
        ("pyramidkv", {"beta": 0}, "beta must be at least 1"),
        ("vl_cache", {"layer_budgets": (5, 1)}, "layer_budgets must be at least 2 rows each"),
        ("streaming_llm", {"n_sink": -1}, "n_sink must not be negative"),
        ("random", {"seed": -1}, "seed must not be negative"),
        ("oracle", {"rows": (-1,)}, "rows must not be negative"),
        *(
            (name, {"window": 0}, "window must be at least 1")
            for name in ("snapkv", "h2o", "random", "oracle")
        ),
    ],
)
def test_parameters_that_make_no_sense_are_refused(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_method(name, **parameters)


def test_parameters_act() -> None:
    full, steep = make_method("full"), make_method("pyramidkv", beta=2)
    assert isinstance(full, Full)
    assert isinstance(steep, PyramidKV)
    assert full.keep_rows(3, LENGTH, 20, 1) == (LENGTH,) * 3
    # 12 rows compete: half of them in the last layer, 24 − 6 in the first.
    assert steep.keep_rows(3, LENGTH, 20, 8) == (26, 20, 14)


def test_every_method_knows_its_name() -> None:
    for name in METHODS:
        method = make_method(name)
        assert method.name == name
        assert isinstance(method, StarKV) or KvMethod in type(method).__mro__
    assert isinstance(make_method("oracle", rows=(1, 2)), Oracle)
