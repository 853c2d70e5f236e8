# SPDX-License-Identifier: Apache-2.0
"""``starkv validate clicks --kv-combinations``: eviction, quantized rows and low rank, alone and together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command
from conftest import ChatModel
from drawn_suite import use_drawn_suite
from packed_variants import pack_quickly

from starkv.cli.kv_combination_runs import CombinationAsker, KvAnswer
from starkv.cli.kv_combinations import Plan, plan_combinations
from starkv.errors import UsageError
from starkv.evaluation.samples import Problem
from starkv.evaluation.suites.synthetic import load
from starkv.kv_packing.options import PackingOptions
from starkv.manifest import KvPacking, Manifest, read_manifest
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.validation.kv_gate import MOST_KL, divergence_measures, judge_eviction, judge_packing
from starkv.validation.report import Check

BLANK = Check("packed caches", "quant", "click, 100 questions", "passed", "full")
EVERY = ["full", "evict", "quant", "evict+quant", "rank", "evict+rank", "quant+rank", "evict+quant+rank"]


@pytest.fixture(scope="module")
def manifest(gui_tiny_engine: Path) -> Manifest:
    return read_manifest(gui_tiny_engine)


@pytest.fixture(scope="module")
def quantized(gui_tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with an int8 cache."""
    options = PackingOptions("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starkv.calibration.kv_prompts.SCREENS", 6)
        return pack_quickly(gui_tiny_engine, tmp_path_factory.mktemp("quantized"), [options])[options]


def plan(manifest: Manifest, asked: bool = True, quant: Any = None, rank: float | None = None) -> Plan | None:
    return plan_combinations(Path("engine"), manifest, asked, quant, rank, 0.2)


def test_all_combinations_of_a_plain_engine(manifest: Manifest) -> None:
    found = plan(manifest)
    assert found is not None
    assert sorted(found.combinations) == sorted(EVERY)
    assert set(found.packings) == {
        PackingOptions("int8"),
        PackingOptions("none", 0.5),
        PackingOptions("int8", 0.5),
    }
    asked = [name for packing in (None, *found.packings) for name in found.asked_of(packing)]
    assert sorted(asked) == sorted(EVERY)
    both = found.combinations["evict+quant+rank"]
    assert both.policy.packed
    assert both.policy.kept_rows(100) == 20
    assert both.unpacked.name == "evict"
    assert found.combinations["full"].policy.packed is False
    other = plan(manifest, quant="int4", rank=0.75)
    assert other is not None
    assert PackingOptions("int4", 0.75) in other.packings
    assert plan(manifest, asked=False) is None


def test_a_packed_engine_has_its_own_combinations_only(manifest: Manifest) -> None:
    own = KvPacking(quant="int4", rank=0.5, bytes_per_row=1, calibration_tokens=1)
    found = plan(manifest.model_copy(update={"kv_packing": own}), asked=False)
    assert found is not None
    assert list(found.combinations) == ["full", "evict", "quant+rank", "evict+quant+rank"]
    assert not found.packings
    assert sorted(found.missing) == ["evict+quant", "evict+rank", "quant", "rank"]


@pytest.mark.parametrize(
    ("changes", "asked", "quant", "rank", "message"),
    [
        ({}, False, "int8", None, "belong to --kv-combinations"),
        ({}, False, None, 0.5, "belong to --kv-combinations"),
        ({}, True, "none", None, "leaves nothing to combine"),
        ({}, True, None, 1.5, "a KV rank is a share"),
        ({"compute_dtype": "float16"}, True, None, None, "is for a GPU"),
        (
            {"kv_packing": KvPacking(quant="int8", rank=None, bytes_per_row=1, calibration_tokens=1)},
            True,
            "int4",
            None,
            "packs its cache as int8; leave --kv-quant and --kv-rank out",
        ),
    ],
)
def test_bad_plans(
    manifest: Manifest, changes: dict[str, object], asked: bool, quant: Any, rank: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(manifest.model_copy(update=changes), asked, quant, rank)


def measures(**changes: float) -> dict[str, float]:
    plain = {"samples": 100.0, "kv_bytes": 30.0, "kl_mean": 0.005}
    return plain | {"packing_lost": 0.0, "packing_won": 0.0, "unpacked_right": 90.0} | changes


UNPACKED = {"kv_bytes": 100.0, "kl_mean": 0.0}


@pytest.mark.parametrize(
    ("found", "unpacked", "status", "reason"),
    [
        (measures(), UNPACKED, "passed", ""),
        (measures(packing_lost=4), UNPACKED, "passed", ""),  # by chance
        (measures(packing_lost=5), UNPACKED, "failed", "5 right clicks lost and 0 won"),
        (measures(packing_lost=9, packing_won=4), UNPACKED, "passed", ""),
        (measures(samples=1000.0, packing_lost=10), UNPACKED, "passed", ""),  # certain, but too few to matter
        (measures(kl_mean=0.06), UNPACKED, "failed", "divergence grows by 0.060 nats"),
        (measures(kl_mean=0.06), UNPACKED | {"kl_mean": 0.055}, "passed", ""),  # eviction's share
        (measures(kl_mean=float("nan")), UNPACKED, "failed", "divergence grows by nan nats"),
        (measures(kv_bytes=100.0), UNPACKED, "failed", "no fewer bytes are held"),
        (
            measures(unpacked_right=4.0),
            UNPACKED,
            "skipped",
            "full is right on 4 of 100: too few to tell a loss",
        ),
        (measures(unpacked_right=4.0, kl_mean=1.0), UNPACKED, "failed", "divergence grows by 1.000 nats"),
    ],
)
def test_verdicts_of_packing(
    found: dict[str, float], unpacked: dict[str, float], status: str, reason: str
) -> None:
    check = judge_packing(BLANK, found, unpacked)
    assert (check.status, check.reason) == (status, reason)
    assert check.measures["tolerance_kl"] == MOST_KL


def test_replies_of_one_token_have_no_divergence() -> None:
    assert divergence_measures([np.zeros(0)]) == {}
    found = divergence_measures([np.array([0.0, 0.1]), np.zeros(0), np.array([0.2])])
    assert found == {"kl_mean": pytest.approx(0.1), "kl_p95": pytest.approx(0.19)}
    without = {name: value for name, value in measures().items() if name != "kl_mean"}
    assert judge_packing(BLANK, without, UNPACKED).status == "passed"


def test_eviction_must_not_hold_more() -> None:
    assert judge_eviction(BLANK, measures(), UNPACKED).status == "passed"
    assert judge_eviction(BLANK, measures(kv_bytes=101.0), UNPACKED).status == "failed"


def answers_of(
    engine: Path, policies: dict[str, KvPolicy], said: dict[str, list[int]], problems: list[Problem]
) -> dict[str, list[KvAnswer]]:
    samples = load("trajectory", "test", 0, 4).samples
    asker = CombinationAsker(Agent.load(engine, threads=1), SamplingParameters(6), "plain", said)
    return asker.ask(samples, policies, problems.append, lambda name: None)


def test_replies_are_forced_where_they_differ(babbling: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The babbling model's replies depend on every row that is kept, of earlier questions' memory as well."""
    use_drawn_suite(monkeypatch)
    combinations = plan(read_manifest(babbling.engine))
    assert combinations is not None
    policies = {name: one.policy for name, one in combinations.asked_of(None).items()}
    said: dict[str, list[int]] = {}
    together = answers_of(babbling.engine, policies, said, [])
    assert len(said) == len(together["full"]) == 4
    assert all((one.divergences == 0).all() for one in together["full"])
    assert all(len(one.divergences) == len(said[one.record.id]) - 1 for one in together["evict"])
    assert any(
        one.record.reply != whole.record.reply
        for one, whole in zip(together["evict"], together["full"], strict=True)
    )
    # Without the full cache in the same run its reply is known, and its distributions are worked out again.
    alone = answers_of(babbling.engine, {"evict": policies["evict"]}, said, [])
    for one, other in zip(alone["evict"], together["evict"], strict=True):
        assert one.record.reply == other.record.reply
        assert one.divergences == pytest.approx(other.divergences, rel=1e-3, abs=1e-6)
        assert one.divergences.sum() > 0


def test_what_cannot_be_asked_is_told(babbling: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use_drawn_suite(monkeypatch)
    problems: list[Problem] = []
    found = answers_of(babbling.engine, {"full": KvPolicy(packed=True)}, {}, problems)
    assert found == {"full": []}
    assert sum(problem.samples for problem in problems) == 4
    assert "without a packed cache" in problems[0].reason


def test_the_command_compares_all(
    starkv: Command, gui_tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_drawn_suite(monkeypatch)
    monkeypatch.setattr("starkv.calibration.kv_prompts.SCREENS", 6)
    monkeypatch.setattr("starkv.cli.click_engines.has_random_weights", lambda manifest: True)
    options = ("--n", 3, "--max-new-tokens", 16, "--threads", 1, "--kv-budget", "0.5", "--task", "click")
    ran = starkv(
        *("validate", "clicks", "--engine", gui_tiny_engine, *options),
        *("--kv-combinations", "--kv-quant", "int4", "--kv-rank", "0.75", "--out", tmp_path / "report"),
    )
    assert "Eviction, quantized rows and low rank" in ran.out
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    checks = {
        check["implementation"]: check for check in report["checks"] if check["subject"] == "packed caches"
    }
    assert sorted(checks) == sorted(EVERY)
    found = {name: check["measures"] for name, check in checks.items()}
    assert found["full"]["kl_mean"] == 0
    assert found["full"]["same_replies"] == found["full"]["kv_bytes_share"] == 1
    for name in EVERY:
        alone, evicted = (
            found[name],
            found[f"evict+{name}" if name != "full" else "evict"] if "evict" not in name else found[name],
        )
        assert evicted["kv_bytes"] <= alone["kv_bytes"]
        assert alone["decode_per_token_ms_median"] > 0
    for name in ("quant", "rank", "quant+rank"):
        assert found[name]["kl_mean"] > 0
        assert found[name]["kv_bytes"] < found["full"]["kv_bytes"]
    assert found["quant"]["kv_bytes_share"] == pytest.approx(0.125 + 12 / 1024, abs=0.001)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "## Eviction, quantized rows and low rank" in markdown
    assert f"KL ≤ evict's + {MOST_KL:g}" in markdown
    assert ran.code == int(any(check["status"] == "failed" for check in report["checks"]))


def test_a_packed_engine_is_compared_unasked(
    starkv: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_drawn_suite(monkeypatch)
    monkeypatch.setattr("starkv.cli.click_engines.has_random_weights", lambda manifest: True)
    options = (
        "--n",
        6,
        "--max-new-tokens",
        16,
        "--threads",
        1,
        "--kv-budget",
        "1",
        "--task",
        "click",
        "--json",
    )
    ran = starkv("validate", "clicks", "--engine", quantized, *options, "--out", tmp_path)
    assert ran.code == 0, ran.out + ran.err
    checks = json.loads(ran.out)["checks"]
    by_name = {check["implementation"]: check for check in checks if check["subject"] == "packed caches"}
    assert [by_name[name]["status"] for name in ("full", "evict", "quant", "evict+quant")] == ["passed"] * 4
    assert by_name["quant"]["reference"] == "full"
    assert 0 < by_name["quant"]["measures"]["kl_added"] < MOST_KL
    assert "ask the engine that it was made from" in by_name["rank"]["reason"]
    # The other parts are about float rows: with every row kept, nothing changes.
    (native,) = (
        check
        for check in checks
        if check["implementation"] == "native 1" and check["subject"] == "compression"
    )
    assert native["measures"]["same_replies"] == 1
