# SPDX-License-Identifier: Apache-2.0
"""Maths of ``starkv validate clicks``: intervals, comparisons, verdicts, and one prefill for every policy."""

from collections.abc import Mapping

import numpy as np
import pytest
from conftest import ChatModel
from drawn_suite import use_drawn_suite

from starkv.evaluation.comparison import compare
from starkv.evaluation.records import Record
from starkv.evaluation.runner import Asking, ask
from starkv.evaluation.statistics import paired_interval
from starkv.evaluation.suites.synthetic import load
from starkv.evaluation.sweep import sweep
from starkv.methods.budget import Budget
from starkv.methods.names import STAR_KV
from starkv.runtime.agent import Agent
from starkv.runtime.generation import SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.validation.clicks import judge_budget, judge_memory, judge_pair, latencies
from starkv.validation.report import Check

BLANK = Check("subject", "engine", "case", "passed")


def test_the_paired_interval_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10.
    assert paired_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_interval(2, 30, 1, 7)
    other_low, other_high = paired_interval(2, 1, 30, 7)
    assert (low, high) == pytest.approx((-other_high, -other_low))
    assert paired_interval(0, 0, 0, 0) == (-1, 1)
    assert paired_interval(0, 5, 0, 0)[1] == 1


def record(name: str, reply: str, right: bool, point: tuple[float, float] | None = (1.0, 2.0)) -> Record:
    return Record(
        id=name,
        group=name,
        facets={},
        reply=reply,
        action=None,
        point=point,
        error=None,
        grades={"rule": float(right)},
        distance=None if point is None else 3.0,
        kv_tokens_full=10,
        kv_tokens_kept=5,
        timings={},
    )


def test_a_comparison_counts_pairs() -> None:
    run = [
        record("a", "x", True),
        record("b", "y", False),
        record("c", "z", True, None),
        record("d", "", False),
    ]
    other = [record("b", "y", True), record("a", "x", True), record("c", "?", False), record("e", "", True)]
    found = compare(run, other, "rule")
    assert (found.both, found.lost, found.won, found.neither) == (1, 1, 1, 0)
    assert (found.same_replies, found.same_clicks, found.distance) == (2, 2, 3.0)
    measures = found.measures()
    assert measures["accuracy"] == measures["reference_accuracy"] == 2 / 3
    with pytest.raises(ValueError, match="no sample"):
        compare(run[:1], other[:1], "rule")


def measures(both: int, lost: int, won: int, neither: int, same: float = 1.0) -> dict[str, float]:
    names = (
        [(True, True)] * both + [(False, True)] * lost + [(True, False)] * won + [(False, False)] * neither
    )
    run = [record(str(number), "", right) for number, (right, _) in enumerate(names)]
    other = [record(str(number), "", right) for number, (_, right) in enumerate(names)]
    return compare(run, other, "rule").measures() | {"same_replies": same}


@pytest.mark.parametrize(
    ("found", "exact", "status"),
    [
        (measures(20, 0, 0, 0), True, "passed"),
        (measures(20, 0, 0, 0, same=0.97), True, "failed"),
        (measures(20, 0, 0, 0, same=0.2), False, "passed"),
        (measures(20, 5, 0, 0), False, "failed"),
        (measures(20, 4, 0, 0), False, "passed"),  # by chance
        (measures(20, 9, 4, 0), False, "passed"),
        (measures(792, 8, 0, 0), False, "passed"),  # certain, but too few to matter
        (measures(0, 4, 0, 96), False, "skipped"),
        (measures(0, 0, 0, 20), True, "passed"),
        (measures(0, 0, 0, 20, same=0.5), True, "failed"),
    ],
)
def test_verdicts_of_pairs(found: Mapping[str, float], exact: bool, status: str) -> None:
    check = judge_pair(BLANK, found, exact)
    assert check.status == status
    assert bool(check.reason) == (status != "passed")


@pytest.mark.parametrize(
    ("found", "kept", "budget", "bounded", "status"),
    [
        (measures(90, 10, 0, 0), 0.4, 0.4, True, "passed"),
        (measures(60, 40, 0, 0), 0.4, 0.4, True, "failed"),
        (measures(60, 40, 0, 0), 0.4, 0.4, False, "passed"),
        (measures(60, 40, 0, 0), 0.2, 0.2, True, "passed"),  # no bound there
        (measures(85, 15, 0, 0), 0.8, 0.8, True, "failed"),
        (measures(100, 0, 0, 0), 0.43, 0.4, False, "failed"),
        (measures(100, 0, 0, 0), 1.0, 1.0, True, "passed"),
        (measures(100, 0, 0, 0, same=0.99), 1.0, 1.0, True, "failed"),
        (measures(0, 2, 0, 98), 0.8, 0.8, True, "skipped"),
    ],
)
def test_verdicts_of_budgets(
    found: dict[str, float], kept: float, budget: float, bounded: bool, status: str
) -> None:
    assert judge_budget(BLANK, found | {"kept_share": kept}, budget, bounded).status == status


def test_memory_that_grows_fails() -> None:
    right = {"kv_bytes_full": 10.0, "kv_bytes_kept": 4.0, "kv_bytes_held": 5.0, "kv_bytes_reserved": 20.0}
    assert judge_memory(BLANK, right).status == "passed"
    assert judge_memory(BLANK, right | {"kv_bytes_kept": 11.0}).status == "failed"
    assert judge_memory(BLANK, right | {"kv_bytes_held": 21.0}).status == "failed"


def test_latencies_leave_the_first_question_out() -> None:
    def timing(scale: float, tokens: int) -> dict[str, float]:
        stages = {f"{stage}_ms": scale for stage in ("vision", "prefill", "compress")}
        return stages | {"decode_ms": scale * (tokens - 1), "generated_tokens": tokens}

    found = latencies([timing(1000, 2), *(timing(scale, 5) for scale in range(1, 12)), timing(6, 1)])
    assert found["prefill_ms_median"] == found["decode_per_token_ms_median"] == 6
    assert found["vision_ms_p95"] == pytest.approx(np.quantile([*range(1, 12), 6], 0.95))
    assert found["samples"] == 12
    assert latencies([timing(7, 2)])["prefill_ms_median"] == 7
    assert "decode_per_token_ms_median" not in latencies([timing(7, 1)])


@pytest.mark.parametrize("task", ["click", "trajectory"])
def test_one_prefill_answers_as_each_policy_alone(
    babbling: ChatModel, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """The babbling model's replies depend on every row that is kept, of earlier questions' memory as well."""
    use_drawn_suite(monkeypatch)
    samples = load("click" if task == "click" else "trajectory", "test", 0, 3).samples
    agent = Agent.load(babbling.engine, threads=1)
    policies = {
        "full": KvPolicy(),
        "half": KvPolicy(STAR_KV, Budget(0.5)),
        "fifth": KvPolicy(STAR_KV, Budget(0.2)),
    }
    parameters = SamplingParameters(max_new_tokens=6)
    alone = {
        name: list(ask(samples, Asking(agent, policy, parameters, "plain"), pytest.fail))
        for name, policy in policies.items()
    }
    prefills = []
    prefill = type(agent.engine).prefill

    def counted(self: object, *given: object) -> object:
        prefills.append(given)
        return prefill(self, *given)

    monkeypatch.setattr(type(agent.engine), "prefill", counted)
    asked: list[str] = []
    together = sweep(samples, agent, policies, parameters, "plain", pytest.fail, asked.append)
    assert asked == [sample.id for sample in samples]
    assert len(prefills) == len(samples)
    for name, records in alone.items():
        ignored = {"timings"}
        found = [one.model_dump(exclude=ignored) for one in together[name]]
        assert found == [one.model_dump(exclude=ignored) for one in records]
    assert alone["full"][0].reply != alone["fifth"][0].reply
