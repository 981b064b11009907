"""Statistics of few runs, against numbers worked out by hand and samples whose distribution is known."""

import numpy as np
import pytest
from scipy import stats

from ooc_moe.metrics import statistics

NAN = float("nan")


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert statistics.iqm([100, 1, 2, 3, -50, 4, 5, 6]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert statistics.iqm([1, 2, 9]) == pytest.approx(4)  # A quarter of three is none.
    np.testing.assert_allclose(statistics.iqm([[0, 1, 3, 90], [2, 2, 4, 4]]), [2, 3])
    np.testing.assert_allclose(statistics.iqm([[1, NAN, 2, 9, NAN], [4, 0, 3, 90, NAN]]), [4, 3.5])
    assert np.isnan(statistics.iqm([]))


def test_the_interquartile_mean_is_scipys_trimmed_mean() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=(50, 13))
    values[rng.random(values.shape) < 0.2] = NAN
    np.testing.assert_allclose(statistics.iqm(values), stats.trim_mean(values, 0.25, axis=-1, nan_policy="omit"))


def test_each_resample_draws_as_many_from_a_stratum_as_it_has() -> None:
    # Were the two strata drawn from together, some means would leave the set of (0 + 0 + 10 + 10 + 10) / 5 = 6.
    samples = statistics.bootstrap([[0, 0], [10, 10, 10]], resamples=200)
    np.testing.assert_allclose(samples, 6)


def test_the_bootstrap_of_two_values_has_the_three_means_in_proportion() -> None:
    samples = statistics.bootstrap([[0.0, 1.0]], resamples=20_000)
    shares = [float((samples == mean).mean()) for mean in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)


def test_the_games_of_a_run_are_drawn_together() -> None:
    # One run is good at both games, one bad at both. Drawn one by one, some samples of four values would have a mean of 1/4.
    samples = statistics.bootstrap([[[0.0, 0.0], [1.0, 1.0]]], resamples=20_000)
    shares = [float((samples == mean).mean()) for mean in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)


def test_a_run_that_says_nothing_is_not_drawn_and_one_that_says_little_counts_for_that() -> None:
    samples = statistics.bootstrap([[[NAN, NAN], [1.0, NAN], [4.0, 4.0]]], resamples=500)
    assert set(samples) == {1, (1 + 4 + 4) / 3, 4}


def test_the_only_run_of_a_stratum_is_in_every_resample_once() -> None:
    samples = statistics.bootstrap([[[6.0, 0.0]], [0.0, 6.0]], resamples=200)
    assert set(samples) == {(6 + 0 + a + b) / 4 for a in (0, 6) for b in (0, 6)}
    np.testing.assert_allclose(statistics.bootstrap([[3.0]], resamples=5), 3)
    assert np.isnan(statistics.bootstrap([], resamples=5)).all()


def test_equal_seeds_draw_equal_resamples_and_others_do_not() -> None:
    first, again, other = (statistics.bootstrap([[1.0, 2.0, 4.0], [8.0, 16.0]], resamples=50, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # The figures of published results hang on these draws.
    rng = np.random.default_rng(0)
    draws = [np.array(stratum)[rng.integers(0, len(stratum), (50, len(stratum)))] for stratum in ([1.0, 2.0, 4.0], [8.0, 16.0])]
    np.testing.assert_array_equal(first, np.concatenate(draws, axis=1).mean(axis=1))


@pytest.mark.parametrize(("strata", "least", "most"), [([30], 0.88, 0.99), ([5, 5], 0.80, 0.94), ([5], 0.75, 0.91)])
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says_and_less_often_of_few_runs(
    strata: list[int], least: float, most: float
) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        drawn = [rng.normal(1, 1, runs) for runs in strata]
        low, high = statistics.interval(statistics.bootstrap(drawn, resamples=400, seed=trial))
        hits += low <= 1 <= high
    assert least <= hits / 200 <= most


def test_what_is_unsaid_is_left_out_and_nothing_stays_unsaid() -> None:
    np.testing.assert_allclose(statistics.bootstrap([[2, NAN], [NAN]], resamples=5), 2)
    low, high = statistics.interval(statistics.bootstrap([[NAN]], resamples=5))
    assert np.isnan(low)
    assert np.isnan(high)


def test_a_difference_lies_above_zero_where_the_groups_are_apart_and_not_where_they_are_one() -> None:
    rng = np.random.default_rng(0)
    high = [rng.normal(0.95, 0.03, 5) for _ in range(4)]
    low = [rng.normal(0.5, 0.2, 5) for _ in range(4)]
    mean, lowest, highest = statistics.difference(high, low)
    assert lowest < mean < highest
    assert lowest > 0.2
    _, lowest, highest = statistics.difference(low, [rng.normal(0.5, 0.2, 5) for _ in range(4)])
    assert lowest < 0 < highest
    mean, lowest, highest = statistics.difference(low, low)  # Two draws, not one that is compared with itself.
    assert lowest < mean == 0 < highest


# Members 0, 1 alike; 2, 3 alike; everything else unlike.
BLOCKS = [[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.2], [0.1, 0.3, 1, 0.8], [0.2, 0.2, 0.8, 1]]


def test_within_and_between_leave_out_what_is_compared_with_itself() -> None:
    within, between = statistics.within_and_between(BLOCKS, ["a", "a", "b", "b"])
    assert within == pytest.approx((0.9 + 0.8) / 2)
    assert between == pytest.approx((0.1 + 0.2 + 0.3 + 0.2) / 4)


def test_each_pair_of_groups_is_compared_alone() -> None:
    found = statistics.by_pair(BLOCKS, ["b", "b", "a", "c"])
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"] == pytest.approx((0.9, (0.1 + 0.3) / 2))
    assert found["b", "c"] == pytest.approx((0.9, 0.2))
    np.testing.assert_allclose(found["a", "c"], (NAN, 0.8))


def test_an_exact_p_value_counts_the_ways_to_deal_the_labels_out() -> None:
    # Six ways to deal aabb; the true one and its mirror image are the best.
    assert statistics.separation_p(BLOCKS, ["a", "a", "b", "b"]) == pytest.approx(2 / 6)
    assert statistics.separation_p(BLOCKS, ["a", "b", "a", "b"]) == pytest.approx(1)


def test_separated_groups_have_a_small_p_value_and_alike_ones_have_not() -> None:
    labels = ["a"] * 8 + ["b"] * 8
    rng = np.random.default_rng(1)
    noise = rng.random((16, 16)) / 10
    noise = noise + noise.T
    same = np.equal.outer(labels, labels)
    assert statistics.separation_p(noise + same, labels, resamples=500) == pytest.approx(1 / 501)
    assert statistics.separation_p(noise, labels, resamples=500) > 0.05


def test_one_group_alone_separates_from_nothing() -> None:
    assert np.isnan(statistics.separation_p(np.ones((3, 3)), ["a", "a", "a"]))
