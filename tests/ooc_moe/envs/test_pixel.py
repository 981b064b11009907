"""The pixel games: what play is worth, what tells conflicting games apart, and the interface they share with Atari."""

import time

import numpy as np
import pytest

from ooc_moe import envs
from ooc_moe.envs.pixel import GRID, PixelEnvs, pixel_game
from ooc_moe_wire.errors import InvalidRequest

PAIRS = [("pixel/catch", "pixel/avoid"), ("pixel/toward", "pixel/away")]


def make(game: str, num_envs: int = 8, **changes) -> PixelEnvs:
    made = PixelEnvs(game, num_envs, **({"frame_size": GRID, "frame_stack": 2, "max_episode_steps": None} | changes))
    made.reset(seed=1)
    return made


def random_actions(steps: int, num_envs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 18, (steps, num_envs))


@pytest.mark.parametrize("game", [*envs.PIXEL_GAMES, "pixel/cross@2", "pixel/cross@flip", "pixel/catch@turn"])
def test_best_play_reaches_the_optimal_return_in_every_game(game):
    played = make(game)
    returns = [value for _ in range(200) for value in played.step(played.best_actions()).episode_returns]
    assert len(returns) >= 8
    assert set(returns) == {pixel_game(game)[0].optimal_return}


@pytest.mark.parametrize("game", envs.PIXEL_GAMES)
def test_random_play_earns_what_is_said_and_so_does_no_constant_action_much_better(game):
    rules, _, _ = pixel_game(game)
    played = make(game, 128)
    returns = [value for actions in random_actions(400, 128) for value in played.step(actions).episode_returns]
    assert np.mean(returns) == pytest.approx(rules.random_return, abs=0.25)
    for action in range(2, 6):
        played = make(game, 128)
        returns = [value for _ in range(200) for value in played.step(np.full(128, action)).episode_returns]
        assert np.mean(returns) < 0.3 * rules.optimal_return


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_conflicting_pair_differs_by_a_cue_and_the_sign_of_its_rewards(one, other):
    first, second = make(one), make(other)
    for actions in random_actions(100, 8):
        a, b = first.step(actions), second.step(actions)
        assert np.array_equal(a.rewards, -b.rewards)
        assert np.array_equal(a.observations[:, :, 1:], b.observations[:, :, 1:])
        assert (a.observations[:, -1, 0] != b.observations[:, -1, 0]).sum(axis=1).tolist() == [2] * 8


@pytest.mark.parametrize("game", envs.PIXEL_GAMES)
def test_equal_seeds_give_equal_steps_and_another_seed_does_not(game):
    def play(played, seed):
        steps = [played.step(actions) for actions in random_actions(60, 8) if seed is not None]
        return np.stack([step.observations for step in steps]), np.stack([step.rewards for step in steps])

    one, other = make(game), make(game)
    first = play(one, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, play(other, 1), strict=True))
    one.reset(seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, play(one, 1), strict=True))
    one.reset(seed=2)
    assert not np.array_equal(first[0], play(one, 2)[0])


def test_the_step_after_an_end_ignores_its_action_and_begins_a_game():
    one, other = make("pixel/toward", 1), make("pixel/toward", 1)
    for _ in range(20):
        ended, also = one.step(one.best_actions()), other.step(other.best_actions())
    assert ended.terminated.all()
    assert not ended.truncated.any()
    assert ended.episode_returns == [20.0]
    assert ended.episode_lengths == [20]
    reset, also = one.step(np.array([3])), other.step(np.array([4]))
    assert not reset.played.any()
    assert reset.rewards.tolist() == [0.0]
    assert not reset.terminated.any()
    assert reset.episode_returns == []
    assert not reset.observations[:, 0].any()
    assert reset.observations[:, 1].any()
    assert np.array_equal(reset.observations, also.observations)
    assert one.step(one.best_actions()).played.all()


def test_a_step_limit_truncates():
    played = make("pixel/cross", 2, max_episode_steps=3)
    waiting = np.zeros(2, dtype=np.int64)
    steps = [played.step(waiting) for _ in range(8)]
    assert [step.truncated.all() for step in steps] == [False, False, True, False, False, False, True, False]
    assert [step.played.all() for step in steps] == [True, True, True, False, True, True, True, False]
    assert not any(step.terminated.any() for step in steps)
    assert steps[2].episode_lengths == [3, 3]


def test_a_walker_who_waits_runs_out_of_time_and_one_who_runs_meets_a_car():
    waiting = make("pixel/cross", 4)
    steps = [waiting.step(np.zeros(4, dtype=np.int64)) for _ in range(60)]
    assert steps[-1].truncated.all()
    running = make("pixel/cross", 64)
    returns = [value for _ in range(30) for value in running.step(np.full(64, 2)).episode_returns]
    assert min(returns) == 0.0


@pytest.mark.parametrize("frame_size", [10, 42, 84])
def test_frames_are_whole_squares_inside_a_black_margin(frame_size):
    played = make("pixel/catch@1", 2, frame_size=frame_size, frame_stack=3)
    observations = played.step(np.array([3, 4])).observations
    assert observations.shape == (2, 3, frame_size, frame_size)
    assert observations.dtype == np.uint8
    small = make("pixel/catch@1", 2, frame_stack=3).step(np.array([3, 4])).observations
    cell, margin = frame_size // GRID, frame_size % GRID // 2
    assert np.array_equal(observations[..., margin + cell // 2 :: cell, margin + cell // 2 :: cell][..., :GRID, :GRID], small)
    assert observations.sum() == small.sum(dtype=np.int64) * cell**2


def test_observations_are_the_callers_to_keep():
    played = make("pixel/catch")
    first = played.reset(seed=3)
    kept = first.copy()
    second = played.step(np.zeros(8, dtype=np.int64)).observations
    assert np.array_equal(first, kept)
    assert np.array_equal(second[:, 0], first[:, 1])


def test_backgrounds_differ_by_number_and_leave_the_game_as_it_is():
    plain, faint, other = make("pixel/catch"), make("pixel/catch@1"), make("pixel/catch@2")
    for actions in random_actions(20, 8):
        a, b, c = plain.step(actions), faint.step(actions), other.step(actions)
        assert np.array_equal(a.rewards, b.rewards)
        assert not np.array_equal(b.observations, c.observations)
        bright = a.observations > 60
        assert np.array_equal(b.observations[bright], a.observations[bright])


@pytest.mark.parametrize(("view", "as_seen"), [("flip", lambda frame: frame[::-1]), ("turn", lambda frame: frame.T)])
def test_a_view_rearranges_the_picture_and_leaves_the_game_as_it_is(view, as_seen):
    plain, other = make("pixel/cross", frame_size=21), make(f"pixel/cross@{view}", frame_size=21)
    for actions in random_actions(30, 8):
        a, b = plain.step(actions), other.step(actions)
        assert np.array_equal(a.rewards, b.rewards)
        assert np.array_equal(as_seen(a.observations[0, -1, :20, :20]), b.observations[0, -1, :20, :20])
        assert not np.array_equal(a.observations, b.observations)


def test_nothing_but_its_rewards_tells_the_blind_pair_apart():
    toward, away = make("pixel/blind-toward"), make("pixel/blind-away")
    total = 0
    for actions in random_actions(60, 8):
        a, b = toward.step(actions), away.step(actions)
        assert np.array_equal(a.observations, b.observations)
        assert np.array_equal(a.rewards, -b.rewards)
        total += np.abs(a.rewards).sum()
    assert total > 0


def test_eight_games_of_the_same_rules_look_different():
    names = [f"pixel/{rules}{look}" for rules in ("catch", "avoid", "toward", "cross") for look in ("", "@flip", "@turn")]
    screens = {name: make(name).step(np.zeros(8, dtype=np.int64)).observations.tobytes() for name in names}
    assert len(set(screens.values())) == 12


def test_sixteen_environments_play_thousands_of_steps_a_second():
    played = make("pixel/catch", 16, frame_size=42, frame_stack=4)
    actions = random_actions(100, 16)
    began = time.process_time()
    for row in actions:
        played.step(row)
    assert 1600 / (time.process_time() - began) > 5000  # 40,000 on an idle core: this only catches a loop over environments.


@pytest.mark.parametrize(
    "name", ["pixel/chess", "pixel/", "pixel/catch@", "pixel/catch@0", "pixel/catch@x", "pixel/catch@-1", "pixel/catch@flop", "pixel/@1"]
)
def test_an_unknown_pixel_game_is_refused_with_a_known_one(name):
    with pytest.raises(InvalidRequest) as refused:
        envs.make(name, 1)
    said = str(refused.value)
    assert said.startswith(f"game: {name!r} is unknown; did you mean 'pixel/")
    assert any(repr(game) in said for game in envs.PIXEL_GAMES)
    assert "`ooc-moe games` lists all games" in said


def test_a_frame_smaller_than_the_grid_is_refused():
    with pytest.raises(InvalidRequest, match="frame_size: 9"):
        envs.make("pixel/catch", 1, frame_size=9)
