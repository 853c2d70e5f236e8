# SPDX-License-Identifier: Apache-2.0
"""Paired comparisons against values that can be worked out by hand."""

import numpy as np
import pytest

from starkv.evaluation.paired import Discordance, cluster_intervals, holm


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ((0, 0), 1.0),
        ((5, 5), 1.0),
        ((0, 5), 2 / 32),
        ((5, 0), 2 / 32),
        # 2 (1 + 10 + 45) / 1024
        ((2, 8), 0.109375),
        # R's binom.test(15, 40) says 0.1539.
        ((15, 25), 0.1538606),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(split: tuple[int, int], expected: float) -> None:
    assert Discordance(*split).p_value == pytest.approx(expected, rel=1e-5)


def test_mcnemar_of_thousands_of_questions_is_a_number() -> None:
    assert Discordance(2000, 2000).p_value == 1.0
    assert 0.0 < Discordance(900, 1200).p_value < 1e-9


def test_discordance_counts_what_only_one_got_right() -> None:
    assert Discordance.of([True, True, False, True], [True, False, True, False]) == Discordance(2, 1)
    with pytest.raises(ValueError, match="argument"):
        Discordance.of([True], [True, False])


def test_interval_of_clusters_of_one_is_the_normal_one() -> None:
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 2000, p=[0.1, 0.6, 0.3])
    low, high = cluster_intervals(differences, [str(i) for i in range(2000)])[0]
    half = 1.96 * differences.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.003)


def test_questions_that_agree_within_their_cluster_widen_the_interval() -> None:
    differences = np.repeat(np.random.default_rng(2).choice([0.0, 1.0], 50), 20)
    apart = cluster_intervals(differences, [str(i) for i in range(1000)])[0]
    together = cluster_intervals(differences, [str(i // 20) for i in range(1000)])[0]
    # Twenty answers that are one answer say as little as one: sqrt(20) times wider.
    assert np.diff(together) / np.diff(apart) == pytest.approx(np.sqrt(20), rel=0.1)


def test_intervals_do_not_depend_on_their_company() -> None:
    one = np.array([0.0, 1.0, 0.0, -1.0])
    both = cluster_intervals(np.stack([np.ones(4), one]), ["a", "a", "b", "c"])
    assert both[0] == pytest.approx([1.0, 1.0])
    assert (both[1] == cluster_intervals(one, ["a", "a", "b", "c"])[0]).all()
    assert (cluster_intervals(one[:2], ["a", "a"])[0] == [0.5, 0.5]).all()


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], ["a", "b"])])
def test_questions_without_clusters_are_refused(values: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="names of clusters"):
        cluster_intervals(np.array(values), clusters)


def test_holm_adjusts_step_by_step() -> None:
    # 4 * 0.005, 3 * 0.01, then 2 * 0.03 carries over the larger 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
