"""The measures against matrices worked out by hand."""

import numpy as np
import pytest

from ooc_moe.metrics import measures

NAN = float("nan")
# Three games trained in the order 0, 1, 2. Game 0: learned to 10, fell to 6. Game 1: learned to 4, rose to 5. Game 2: learned to 8.
SCORES = [
    [10.0, 1.0, 2.0],
    [9.0, 4.0, 3.0],
    [6.0, 5.0, 8.0],
]
TRAINED = (0, 1, 2)
RANDOM = [2.0, 1.0, 0.0]


def equal(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), atol=1e-12)


def test_learning_is_the_score_right_after_the_own_phase() -> None:
    equal(measures.learning(SCORES, TRAINED), [10, 4, 8])


def test_final_is_the_last_row() -> None:
    equal(measures.final(SCORES), [6, 5, 8])


def test_forgetting_is_the_best_earlier_score_less_the_last_and_unsaid_for_the_last_game() -> None:
    equal(measures.forgetting(SCORES, TRAINED), [4, -1, NAN])


def test_forgetting_ignores_scores_from_before_the_game_was_trained() -> None:
    lucky = [[10.0, 99.0], [10.0, 4.0], [10.0, 3.0]]
    equal(measures.forgetting(lucky, (0, 1, 0)), [NAN, 1])


def test_retention_is_the_share_of_the_gain_over_random_that_is_left() -> None:
    equal(measures.retention(SCORES, TRAINED, RANDOM), [(6 - 2) / (10 - 2), (5 - 1) / (4 - 1), NAN])


def test_retention_of_a_game_that_never_beat_random_is_unsaid_not_perfect() -> None:
    equal(measures.retention([[2.0, 0.0], [2.0, 5.0]], (0, 1), [2.0, 0.0]), [NAN, NAN])


def test_best_own_looks_only_from_the_own_phase_on() -> None:
    equal(measures.best_own(SCORES, TRAINED), [10, 5, 8])
    equal(measures.best_own([[1.0, 9.0], [2.0, 3.0]], (0, 1)), [2, 3])


def test_normalised_scores_are_zero_at_random_and_one_at_the_best() -> None:
    normal = measures.normalise(SCORES, RANDOM, measures.best_own(SCORES, TRAINED))
    equal(normal, [[1, 0, 0.25], [7 / 8, 0.75, 3 / 8], [0.5, 1, 1]])


def test_normalising_by_a_ceiling_that_is_not_above_the_floor_is_unsaid() -> None:
    equal(measures.normalise([1.0, 1.0], [0.0, 2.0], [2.0, 2.0]), [0.5, NAN])


def test_forward_transfer_is_what_came_before_the_own_phase() -> None:
    equal(measures.forward_transfer(SCORES, TRAINED, [0.0, 3.0, 1.0]), [NAN, -2, 2])


def test_isolated_forgetting_is_what_each_later_game_took_over_the_greatest_score() -> None:
    found = measures.isolated_forgetting(SCORES, TRAINED)
    equal(found, [[NAN, NAN, NAN], [(10 - 9) / 10, NAN, NAN], [(9 - 6) / 10, (4 - 5) / 5, NAN]])


def test_isolated_forgetting_on_a_fixed_scale_is_not_made_larger_by_a_low_score() -> None:
    low = np.asarray(SCORES) / 10
    scale = [8.0, 4.0, 8.0]
    equal(measures.isolated_forgetting(low, TRAINED), measures.isolated_forgetting(SCORES, TRAINED))
    equal(measures.isolated_forgetting(low, TRAINED, scale), measures.isolated_forgetting(SCORES, TRAINED, scale) / 10)
    equal(measures.isolated_forgetting(SCORES, TRAINED, scale)[2], [3 / 8, -1 / 4, NAN])


def test_zero_shot_transfer_is_what_each_earlier_game_gave_to_one_that_was_not_trained() -> None:
    found = measures.zero_shot_transfer(SCORES, TRAINED, [0.0, 3.0, 1.0])
    equal(found, [[NAN, (1 - 3) / 5, (2 - 1) / 8], [NAN, NAN, (3 - 2) / 8], [NAN, NAN, NAN]])
    equal(measures.zero_shot_transfer(SCORES, TRAINED, [NAN] * 3, [1.0, 1.0, 2.0]), [[NAN] * 3, [NAN, NAN, 0.5], [NAN] * 3])


def test_a_game_that_comes_back_neither_forgets_nor_transfers_in_its_own_phases() -> None:
    scores = [[10.0, 0.0], [7.0, 5.0], [9.0, 4.0]]
    equal(measures.isolated_forgetting(scores, (0, 1, 0)), [[NAN, NAN], [0.3, NAN], [NAN, 0.2]])
    equal(measures.zero_shot_transfer(scores, (0, 1, 0), [0.0, 1.0]), [[NAN, -0.2], [NAN, NAN], [NAN, NAN]])


def test_the_greatest_score_is_the_absolute_value_of_the_best_and_unsaid_for_zero() -> None:
    equal(measures.greatest_score([[-3.0, 0.0, NAN, -5.0], [2.0, -1.0, NAN, -4.0]]), [2, NAN, NAN, 4])


def test_without_the_last_game_its_score_is_unsaid() -> None:
    equal(measures.without_last([1, 2, 3], (0, 2, 1)), [1, NAN, 3])


def test_a_game_that_comes_back_is_learned_at_its_last_phase_and_first_met_at_its_first() -> None:
    scores = [[10.0, 0.0], [7.0, 5.0], [9.0, 4.0]]
    equal(measures.learning(scores, (0, 1, 0)), [9, 5])
    equal(measures.forgetting(scores, (0, 1, 0)), [NAN, 1])
    equal(measures.best_own(scores, (0, 1, 0)), [10, 5])


def test_a_half_finished_run_says_only_what_it_knows() -> None:
    half = [[10.0, 1.0, 2.0]]
    equal(measures.learning(half, TRAINED), [10, NAN, NAN])
    equal(measures.forgetting(half, TRAINED), [NAN, NAN, NAN])
    equal(measures.best_own(half, TRAINED), [10, NAN, NAN])
    nothing = np.empty((0, 3))
    for measure in (measures.learning, measures.forgetting, measures.best_own):
        equal(measure(nothing, TRAINED), [NAN, NAN, NAN])
    equal(measures.final(nothing), [NAN, NAN, NAN])


def test_scores_that_were_not_evaluated_do_not_count() -> None:
    equal(measures.forgetting([[NAN, 0.0], [8.0, 1.0], [5.0, 2.0]], (0, 1, 1)), [3, NAN])


@pytest.mark.parametrize(
    ("returns", "floor", "above"),
    [
        ([10, 11, 12], 5, True),
        ([0, 20], 5, False),
        ([9], 5, False),
        ([4, 4], 5, False),
        ([4, 6], 2.9, True),  # 5 - 2 * sqrt(2) / sqrt(2) = 3.
        ([4, 6], 3.1, False),
    ],
)
def test_clearly_above_needs_two_standard_errors(returns: list[float], floor: float, above: bool) -> None:
    assert measures.clearly_above(returns, floor) is above


COUNTS = [[6, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_mass_overlap_is_the_sum_of_the_smaller_shares() -> None:
    equal(measures.mass_overlap(COUNTS), [[1, 0.25, NAN], [0.25, 1, NAN], [NAN, NAN, NAN]])


def test_thinned_rows_have_as_many_tokens_as_the_smallest_and_none_that_were_not_there() -> None:
    counts = np.array([[300, 0, 28], [5, 70, 75], [0, 0, 0]])
    thin = measures.thinned(counts)
    equal(thin.sum(axis=1), [150, 150, 0])
    assert (thin <= counts).all()
    equal(thin[1], counts[1])
    equal(thin, measures.thinned(counts))
    assert thin[0, 0] == pytest.approx(150 * 300 / 328, abs=10)
    assert measures.thinned(np.empty((0, 3))).shape == (0, 3)
    equal(measures.thinned([[0, 0]]), [[0, 0]])


def test_top_overlap_compares_the_most_used_experts_and_no_unused_ones() -> None:
    equal(measures.top_overlap(COUNTS), [[1, 1 / 3, NAN], [1 / 3, 1, NAN], [NAN, NAN, NAN]])
    equal(measures.top_overlap(COUNTS, top=1), [[1, 0, NAN], [0, 1, NAN], [NAN, NAN, NAN]])


def test_the_mean_overlap_leaves_out_the_diagonal_and_what_is_unsaid() -> None:
    assert measures.mean_off_diagonal(measures.mass_overlap(COUNTS)) == pytest.approx(0.25)
    assert np.isnan(measures.mean_off_diagonal([[1.0]]))


def test_confusion_rows_sum_to_one_and_unknown_names_have_a_column() -> None:
    matrix = measures.confusion([{"a": 3, "b": 1}, {"b": 0.5, "?": 0.5}, {}], ["a", "b", "?"])
    equal(matrix, [[0.75, 0.25, 0], [0, 0.5, 0.5], [NAN, NAN, NAN]])


def test_cold_experts_are_equal_unless_parameters_or_moments_changed() -> None:
    before = {0: ("a", "b"), 1: ("c", "d"), 2: ("e", "f"), 3: ("g", "h")}
    after = before | {1: ("c", "changed"), 2: ("changed", "f"), 4: ("new", "new")}
    assert measures.cold_unchanged(before, after, set()) == (2, 4)
    assert measures.cold_unchanged(before, after, {1, 4}) == (2, 3)
    assert measures.cold_unchanged(before, {}, {0}) == (0, 3)
    assert measures.cold_unchanged({}, after, set()) == (0, 0)
