"""The Atari games: all 57 play, ale-py's traps stay shut, and what a lost life means is pinned."""

import sys

import numpy as np
import pytest

from ooc_moe import envs
from ooc_moe.envs.atari import STEPS_MAX, AtariEnvs, _legal_actions
from ooc_moe_wire.errors import InvalidRequest


def make(game: str, num_envs: int = 2, **changes) -> AtariEnvs:
    return AtariEnvs(game, num_envs, **({"frame_size": 42, "frame_stack": 4, "num_threads": 2, "max_episode_steps": None} | changes))


def play(played: AtariEnvs, steps: int, *, seed: int = 0) -> list[envs.Step]:
    rng = np.random.default_rng(seed)
    return [played.step(rng.integers(0, 18, played.num_envs)) for _ in range(steps)]


def stacked(steps: list[envs.Step], name: str) -> np.ndarray:
    return np.stack([getattr(step, name) for step in steps])


@pytest.fixture(scope="module")
def breakout() -> AtariEnvs:
    played = make("breakout")
    yield played
    played.close()


def test_there_are_57_games():
    assert len(set(envs.ATARI_GAMES)) == 57
    assert set(envs.REFERENCE_SCORES) == set(envs.ATARI_GAMES) | set(envs.PIXEL_GAMES)


@pytest.mark.parametrize("game", envs.ATARI_GAMES)
def test_every_game_resets_and_plays_all_18_actions(game):
    played = envs.make(game, 1, frame_size=42, num_threads=1)
    observations = played.reset(seed=1)
    assert observations.shape == (1, *played.observation_shape) == (1, 4, 42, 42)
    assert observations.dtype == np.uint8
    for action in range(18):  # Skiing hangs for ever if one of these reaches it as it is.
        step = played.step(np.array([action]))
        assert step.rewards.dtype == np.float32
        assert step.terminated.dtype == step.truncated.dtype == step.played.dtype == np.bool_
        assert step.played.all()
    assert step.observations.any()
    played.close()


def test_equal_seeds_give_equal_steps_bit_for_bit_with_two_threads():
    one, other = make("road_runner"), make("road_runner", num_threads=1)
    runs = []
    for played, seed in ((one, 5), (other, 5), (one, 5), (one, 6)):
        first = played.reset(seed=seed)
        steps = play(played, 150)
        runs.append([first, *(stacked(steps, name) for name in ("observations", "rewards", "terminated", "played"))])
    for again in runs[1:3]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], again, strict=True))
    assert not np.array_equal(runs[0][1], runs[3][1])


def test_neighbouring_seeds_share_no_game():
    """ale-py seeds environment i with seed + i, so that one call's second environment would repeat the next call's first."""
    played = make("krull")
    games = []
    for seed in (5, 6):
        played.reset(seed=seed)
        steps = [played.step(np.full(2, 3)) for _ in range(40)]
        games.append(stacked(steps, "observations"))
    assert not np.array_equal(games[0][:, 1], games[1][:, 0])
    assert not np.array_equal(games[0][:, 0], games[0][:, 1])


def test_after_a_lost_life_the_game_goes_on_and_the_next_action_is_played(breakout):
    """Terminated without an end: the emulator keeps its game, the stack its frames, and the very next action moves the paddle."""
    breakout.reset(seed=3)
    lost = next(step for step in iter(lambda: play(breakout, 1)[0], None) if step.terminated[0])
    assert lost.episode_returns == []
    after = breakout.step(np.full(2, 3))
    assert after.played.all()
    assert not after.terminated[0]
    assert np.array_equal(after.observations[0, :3], lost.observations[0, 1:])  # A reset would have emptied the stack.
    right = [breakout.step(np.full(2, 3)) for _ in range(8)][-1]
    left = [breakout.step(np.full(2, 4)) for _ in range(8)][-1]
    paddle = slice(37, 40)
    assert paddle_x(right.observations[0, -1, paddle]) > paddle_x(left.observations[0, -1, paddle])


def paddle_x(rows: np.ndarray) -> float:
    """The centre of what shines between the side walls."""
    inside = rows[:, 3:-3].astype(float).sum(axis=0)
    return float((inside * np.arange(len(inside))).sum() / inside.sum())


def test_a_whole_game_is_five_lives_and_one_return(breakout):
    breakout.reset(seed=4)
    steps = play(breakout, 900)
    terminated, played, rewards = (stacked(steps, name)[:, 0] for name in ("terminated", "played", "rewards"))
    first_reset = int(np.argmin(played))
    assert terminated[:first_reset].sum() == 5
    assert terminated[first_reset - 1]
    own = [step for step in steps[:first_reset] if step.episode_returns and step.terminated[0]]
    assert own[-1].episode_returns[0] == rewards[:first_reset].sum()
    assert own[-1].episode_lengths[0] == first_reset


def test_the_step_after_a_game_ignores_its_action_and_begins_a_new_one():
    """Two copies of one game get different actions at the step that resets, and stay equal."""
    one, other = make("breakout", 1), make("breakout", 1)
    one.reset(seed=4)
    other.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(900):
        action = rng.integers(0, 18, 1)
        ended, _ = one.step(action), other.step(action)
        if ended.episode_returns:
            break
    assert ended.terminated.all()
    reset, also = one.step(np.array([3])), other.step(np.array([4]))
    assert not reset.played.any()
    assert not reset.terminated.any()
    assert reset.rewards.tolist() == [0.0]
    assert not reset.observations[0, :3].any()
    assert np.array_equal(reset.observations, also.observations)
    assert np.array_equal(one.step(np.array([0])).observations, other.step(np.array([0])).observations)


@pytest.mark.parametrize(("game", "steps"), [("pong", 1100), ("bank_heist", 500), ("breakout", 500)])
def test_a_reset_is_reported_exactly_where_the_emulator_begins_a_game(game, steps):
    """Games without lives, games that play on at zero lives, games with lives: the emulator's own frame counters agree."""
    played = make(game, 2)
    played.reset(seed=1)
    counters = []
    step_of_ale = played._ale.step

    def counting(actions):
        outcome = step_of_ale(actions)
        counters.append((outcome[-1]["frame_number"], outcome[-1]["episode_frame_number"]))
        return outcome

    played._ale.step = counting
    reported = stacked(play(played, steps), "played")
    frames, of_episode = (np.stack(column) for column in zip(*counters, strict=True))
    began = np.diff(frames, axis=0) != np.diff(of_episode, axis=0)
    assert began.any()
    assert np.array_equal(~reported[1:], began)


def test_rewards_are_raw():
    played = make("krull")
    played.reset(seed=1)
    assert stacked(play(played, 200), "rewards").max() > 1.0


def test_actions_are_sticky():
    """Environments differ although they begin alike and get one action: a quarter of the actions is replaced by the one before."""
    played = make("freeway", 4, num_threads=1)
    played.reset(seed=1)
    last = [played.step(np.full(4, 2 if t % 2 else 5)) for t in range(60)][-1]
    assert len({frame.tobytes() for frame in last.observations[:, -1, 4:38]}) > 1


def test_the_step_limit_counts_steps_of_four_frames_and_truncates():
    played = make("pong", 1, max_episode_steps=10)
    played.reset(seed=1)
    steps = play(played, 22)
    assert [t for t, step in enumerate(steps) if step.truncated[0]] == [9, 20]
    assert [t for t, step in enumerate(steps) if not step.played[0]] == [10, 21]
    assert steps[9].episode_lengths == [10]
    assert not steps[9].terminated[0]
    assert steps[9].observations[0, 0].any()  # The last frames of the game, to bootstrap from; not yet the next game's.
    assert STEPS_MAX == 27_000


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        (np.array([0, 18]), "actions: 18 for environment 1"),
        (np.array([-1, 0]), "actions: -1 for environment 0"),
        (np.array([0]), r"actions: shape \(1,\)"),
        (np.array([0.0, 1.0]), "actions: dtype float64"),
    ],
)
def test_actions_that_would_hang_the_emulator_never_reach_it(breakout, actions, complaint):
    breakout.reset(seed=1)
    with pytest.raises(InvalidRequest, match=complaint):
        breakout.step(actions)
    assert breakout.step(np.array([0, 17])).played.all()


def test_an_action_that_a_game_lacks_is_played_without_the_button():
    skiing = [0, 2, 3, 4, 5, 6, 7, 8, 9]
    index = _legal_actions(skiing)
    assert [skiing[i] for i in index] == [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9]
    assert _legal_actions(list(range(18))).tolist() == list(range(18))


def test_a_missing_ale_py_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py.vector_env", None)
    with pytest.raises(InvalidRequest, match=r"ooc-moe\[atari\]"):
        envs.make("krull", 1)


def test_closing_twice_is_harmless():
    played = make("pong", 1)
    played.close()
    played.close()


@pytest.mark.parametrize(
    ("game", "complaint"),
    [
        ("Krull", "; did you mean 'krull'?"),
        ("roadrunner", "; did you mean 'road_runner'?"),
        ("zzz", ""),
        ("pixel_catch", "; did you mean 'pixel/catch'?"),
        ("pixel/catsh", "; did you mean 'pixel/catch'?"),
        ("pixel/catch@zzz", "; did you mean 'pixel/catch'?"),
    ],
)
def test_an_unknown_game_is_refused_with_the_most_similar_name(game, complaint):
    with pytest.raises(InvalidRequest) as error:
        envs.check_name(game)
    assert str(error.value) == f"game: {game!r} is unknown{complaint} (`ooc-moe games` lists all games)"


@pytest.mark.parametrize("size", [{"num_envs": 0}, {"frame_size": 0}, {"frame_stack": 0}, {"num_threads": 0}, {"max_episode_steps": 0}])
def test_sizes_below_one_are_refused(size):
    arguments = {"num_envs": 1} | size
    with pytest.raises(InvalidRequest, match=f"{next(iter(size))}: 0 is not at least 1"):
        envs.make("pong", **arguments)
