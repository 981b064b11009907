"""Evaluation: which games count, who recognises them, when pools change, and what is logged about it."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import RunConfig
from ooc_moe.detection.belief import Belief, Prediction
from ooc_moe.detection.tally import Recognition, ambiguous_pairs
from ooc_moe.envs import Step
from ooc_moe.evaluation.episodes import always, play, uniformly_random
from ooc_moe.evaluation.evaluate import Evaluator
from ooc_moe.evaluation.player import Player
from ooc_moe.session.session import Session, open_session
from ooc_moe_client.in_memory import InMemoryStore

A, B, UNSEEN = "pixel/catch", "pixel/avoid", "pixel/away"


# Which games count


class Scripted:
    """Environment i plays games of `lengths[i]` steps, over and over; its k-th game is worth k * 10 + i in its last step."""

    game, num_actions, observation_shape = "scripted", 18, (1, 1, 1)

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths)
        self.num_envs = len(lengths)
        self.played: list[np.ndarray] = []

    def reset(self, seed: int) -> np.ndarray:
        self._at, self._game = np.zeros(self.num_envs, dtype=int), np.ones(self.num_envs, dtype=int)
        return np.zeros((self.num_envs, 1, 1, 1), dtype=np.uint8)

    def step(self, actions: np.ndarray) -> Step:
        self.played.append(actions)
        resets = self._at == self.lengths
        self._game += resets
        self._at = np.where(resets, 0, self._at + 1)
        ended = self._at == self.lengths
        return Step(
            observations=np.zeros((self.num_envs, 1, 1, 1), dtype=np.uint8),
            rewards=np.where(ended, self._game * 10 + np.arange(self.num_envs), 0).astype(np.float32),
            terminated=ended,
            truncated=np.zeros_like(ended),
            played=~resets,
            episode_returns=[],
            episode_lengths=[],
        )

    def close(self) -> None:
        pass


def test_each_environment_plays_whole_games_one_after_another():
    envs = Scripted([2, 5])
    played = play(envs, always(envs, 3), episodes=3, steps=100, seed=0)
    assert played.returns == [10, 20, 30, 11, 21, 31]  # The first environment is through long before the second.
    assert played.num_unfinished == 0
    assert played.return_mean == 20.5
    assert len(envs.played) == 3 * (5 + 1)  # Nobody plays on for nothing.


def test_who_chooses_is_told_where_games_begin():
    envs, told = Scripted([2, 5]), []
    play(envs, lambda frames, starts: (told.append(starts.tolist()), np.zeros(2, dtype=int))[1], episodes=2, steps=9, seed=0)
    first, second = zip(*told, strict=True)
    assert [step for step, begins in enumerate(first) if begins] == [0, 3, 6]  # The step after an end begins the next game.
    assert [step for step, begins in enumerate(second) if begins] == [0, 6]


def test_an_unfinished_game_counts_where_too_few_were_finished():
    envs = Scripted([3, 50])
    played = play(envs, always(envs, 3), episodes=3, steps=10, seed=0)
    assert played.returns == [10, 20, 0, 0]
    assert played.num_unfinished == 2


def test_random_play_takes_every_action_and_a_constant_one_only_its_own():
    envs = Scripted([5] * 8)
    play(envs, uniformly_random(envs, 0), episodes=100, steps=60, seed=0)
    assert set(np.concatenate(envs.played)) == set(range(18))
    envs.played.clear()
    play(envs, always(envs, 7), episodes=1, steps=60, seed=0)
    assert set(np.concatenate(envs.played)) == {7}


# Who recognises


@contextmanager
def a_session(**changes) -> Iterator[Session]:
    """An untrained agent that knows A and B, with the experts in memory."""
    small = {"frame_size": 10, "frame_stack": 2, "stem_kernels": (3,), "stem_strides": (1,), "stem_channels": (4,), "context": 8}
    agent = dataclasses.replace(PRESETS["tiny"], **small)
    fields = {"games": (A, B, UNSEEN), "eval_envs": 3, "eval_steps": 12, "seed": 1, "prefetch": "detector"} | changes
    config = RunConfig(run_dir=Path("run"), agent=fields.pop("agent", agent), **fields)
    store = InMemoryStore()
    for spec in config.agent.bank_specs(config.name, config.seed):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names(config.name)) as session:
        for game in (A, B):
            session.agent.add_game(game)
            for recogniser in (session.detector, session.nearest_mean):
                recogniser.add_game(game)
        yield session


class Says:
    """Recognises by a script: at each step a word with a letter for each environment, in capitals where it looks unknown."""

    def __init__(self, *words: str, experts: Sequence[int] = ()) -> None:
        self._words, self._experts = iter(words), list(experts)

    def predict(self, frames_NSHW: Tensor) -> Prediction:
        word = next(self._words)
        experts = torch.zeros(len(word), 64)
        experts[:, self._experts] = 1.0
        return Prediction(
            games=(A, B),
            probabilities_NG=torch.tensor([[1.0, 0.0] if letter in "aA" else [0.0, 1.0] for letter in word]),
            unknown_N=torch.tensor([letter.isupper() for letter in word]),
            expert_probabilities_NE=experts,
            experts=self._experts,
        )


def acted(session: Session, game: str, steps: int, *, detector: Says, nearest_mean: Says | None = None) -> tuple[Player, list[list[str]]]:
    """Plays some steps; gives the player, and the game that each environment acted as at each step."""
    session = dataclasses.replace(session, detector=detector, nearest_mean=nearest_mean or Says(*["aaa"] * steps))
    player = Player(session, Belief(3, smoothing=0.0, switch_at=0.7), game, torch.Generator().manual_seed(0))
    envs = session.make_envs(game, 3)
    frames = torch.from_numpy(envs.reset(1))
    acting = []
    for _ in range(steps):
        frames = torch.from_numpy(envs.step(player(frames, torch.zeros(3, dtype=torch.bool))).observations)
        acting.append([next(segment.game for segment, rows in player._groups if env in rows) for env in range(3)])
    return player, acting


def test_a_changed_belief_begins_a_segment_at_once_and_for_its_environment_alone():
    with a_session() as session:
        player, acting = acted(session, B, 7, detector=Says("aaa", "aaa", "aba", "aba", "aba", "bba", "bba"))
        assert acting == [[A, A, A], [A, A, A], [A, B, A], [A, B, A], [A, B, A], [B, B, A], [B, B, A]]
        lengths = {tuple(rows): segment.length for segment, rows in player._groups}
        assert lengths == {(2,): 7, (1,): 5, (0,): 2}
        player, _ = acted(session, B, 9, detector=Says(*["aba"] * 3, *["bba"] * 6))
        assert {tuple(rows): segment.length for segment, rows in player._groups} == {(0, 1): 1, (2,): 1}  # Everybody's new segment.


def test_who_stays_acts_as_if_nobody_had_left():
    """Deterministic acting of one environment, alone and beside two that leave its segment."""
    with a_session() as session:
        envs = session.make_envs(A, 3)
        frames_TNSHW = [torch.from_numpy(envs.reset(1))]
        frames_TNSHW += [torch.from_numpy(envs.step(np.array([3, 4, 0])).observations) for _ in range(5)]
        session.agent.eval()
        alone = session.agent.segment(A, 1)
        values = [session.agent.act(frames[2:], alone, deterministic=True).values_N for frames in frames_TNSHW]
        player, _ = acted(session, A, 1, detector=Says("aaa"))
        player._groups = [(session.agent.segment(A, 3), [0, 1, 2])]
        player._acting_as, found = [A, A, A], []
        for step, (frames, word) in enumerate(zip(frames_TNSHW, ["aaa", "aaa", "baa", "baa", "bba", "bba"], strict=True), start=1):
            player._step = step
            player._begin_segments([A if letter == "a" else B for letter in word])
            for segment, rows in player._groups:
                output = session.agent.act(frames[rows], segment, deterministic=True)
                found += [output.values_N[place : place + 1] for place, row in enumerate(rows) if row == 2]
        assert torch.allclose(torch.cat(values), torch.cat(found), atol=1e-6)
        assert torch.cat(values).unique().numel() > 1


def test_a_game_that_begins_anew_does_not_see_the_one_before():
    with a_session() as session:
        player = Player(
            dataclasses.replace(session, detector=Says(*["aab"] * 4), nearest_mean=Says(*["aaa"] * 4)),
            Belief(3, smoothing=0.7, switch_at=0.7),
            A,
            torch.Generator(),
        )
        frames = torch.from_numpy(session.make_envs(A, 3).reset(1))
        for starts in ([True] * 3, [False] * 3, [False, True, False], [False, False, True]):
            player(frames, torch.tensor(starts))
    begun = {row: N for segment, rows in player._groups for row, N in zip(rows, segment.episode_from_N.tolist(), strict=True)}
    assert begun == {0: 0, 1: 2, 2: 3}


@pytest.mark.parametrize(
    ("recognise", "game", "expected"), [("detector", B, A), ("nearest-mean", A, B), ("oracle", B, B), ("oracle", UNSEEN, A)]
)
def test_the_configuration_says_who_recognises(recognise, game, expected):
    with a_session(recognise=recognise) as session:
        player, acting = acted(session, game, 3, detector=Says(*["aaa"] * 3), nearest_mean=Says(*["bbb"] * 3))
    assert acting == [[expected] * 3] * 3
    fields = player.recognition.fields()
    assert fields["believed"] == {expected: 1.0}
    if game != UNSEEN:  # Both were asked, whoever acted.
        assert (fields["detector_accuracy"], fields["nearest_mean_accuracy"]) == ((1.0, 0.0) if game == A else (0.0, 1.0))


@pytest.mark.parametrize(
    ("smoothing", "switch_at", "believed"), [(0.7, 0.7, {A: 1.0}), (0.0, 0.7, {A: 0.5, B: 0.5}), (0.7, 0.0, {A: 8 / 12, B: 4 / 12})]
)
def test_the_configuration_says_how_fast_a_belief_turns(smoothing, switch_at, believed):
    """Two frames of each game in turn. Smoothed, B is as probable as 0, 0, .30, .51, .36, .25, .47, .63, .44, .31, .52, .66."""
    with a_session(belief_smoothing=smoothing, belief_switch_at=switch_at, eval_steps=12) as session:
        seen = dataclasses.replace(session, detector=Says(*["aaa", "aaa", "bbb", "bbb"] * 3), nearest_mean=Says(*["aaa"] * 12))
        (fields,) = Evaluator(seen).evaluate([A])
    assert fields["believed"] == pytest.approx(believed)


def test_the_configuration_says_what_the_detector_stores_and_whether_it_notices_the_unknown():
    with a_session(exemplars_per_game=7) as usual, a_session(exemplars_per_game=0, detect_unknown=False) as bare:
        for session in (usual, bare):
            frames = torch.from_numpy(session.make_envs(A, 3).reset(1)).repeat(4, 1, 1, 1)
            for recogniser in (session.detector, session.nearest_mean):
                recogniser.learn(frames, A, torch.zeros(session.num_experts))
        found = [[len(each["screens"]) for each in session.detector.get_extra_state()["stored"]] for session in (usual, bare)]
        assert found == [[7, 0], [0, 0]]
        strange = torch.randint(0, 256, (4, 2, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for each, unknown in ((usual, True), (bare, False)):
            assert each.detector.predict(strange).unknown_N.tolist() == [unknown] * 4
            assert each.nearest_mean.predict(strange).unknown_N.tolist() == [unknown] * 4


def test_prefetch_recall_is_the_share_of_needed_experts_that_were_named_before():
    with a_session() as session:
        pool = session.agent.prefetch_set(B)
        for named, recall in ((pool, 1.0), ([], 0.0), (session.agent.prefetch_set(A), 0.0)):
            player, _ = acted(session, B, 6, detector=Says(*["aaa"] * 2, *["bbb"] * 4, experts=named))
            assert player.prefetch_recall == recall
        player, _ = acted(session, B, 2, detector=Says("aaa", "aaa", experts=pool))
        assert player.prefetch_recall is None  # Nothing was needed for the true game.
    with a_session(prefetch="off") as session:
        player, _ = acted(session, B, 6, detector=Says(*["bbb"] * 6, experts=pool))
        assert player.prefetch_recall is None


def test_tokens_are_counted_for_each_environment():
    with a_session() as session:
        player, _ = acted(session, B, 8, detector=Says(*["aab"] * 8))
        agent = session.config.agent
        by_env = player.usage_by_env()
        pools = {game: set(session.agent.prefetch_set(game)) for game in (A, B)}
        for usage, game in zip(by_env, (A, A, B), strict=True):
            assert [sum(tokens.values()) for tokens in usage.values()] == [8 * agent.top_k] * agent.num_layers
            assert {int(expert) for tokens in usage.values() for expert in tokens} <= pools[game]
        together = player.usage()
        for layer, tokens in together.items():
            assert tokens == {expert: sum(usage[layer].get(expert, 0) for usage in by_env) for expert in tokens}


# What is logged


def test_recognition_is_counted_by_hand():
    seen = Recognition(B, 2)
    detector, mean = Says("aB", "bb", "ab", "bb"), Says("bb", "AA", "aa", "bb")
    for believed in ([A, B], [B, B], [A, B], [B, A]):
        seen.add(detector.predict(torch.zeros(2)), mean.predict(torch.zeros(2)), believed)
    assert seen.fields() == {
        "believed": {A: 3 / 8, B: 5 / 8},
        "detector_accuracy": 6 / 8,
        "nearest_mean_accuracy": 4 / 8,
        "unknown": 1 / 8,
        "nearest_mean_unknown": 2 / 8,
        "probabilities": {A: 2 / 8, B: 6 / 8},
        "steps_to_detect": 0.5,
        "steps_to_detect_by_env": [1, 0],
        "false_switches": 1000 * 2 / 8,
    }


def test_of_a_game_never_learned_no_answer_is_right():
    seen = Recognition(UNSEEN, 2)
    seen.add(Says("AB").predict(torch.zeros(2)), Says("ab").predict(torch.zeros(2)), [A, B])
    fields = seen.fields()
    assert fields["unknown"] == 1.0
    for name in ("detector_accuracy", "nearest_mean_accuracy", "steps_to_detect", "steps_to_detect_by_env", "false_switches"):
        assert fields[name] is None


def test_pairs_that_look_alike_are_named_whatever_the_detector_prefers():
    told_apart = {A: {A: 0.99, B: 0.01}, B: {A: 0.0, B: 1.0}}
    assert ambiguous_pairs(told_apart) == []
    for share in (0.0, 0.3, 1.0):  # Two equal games get the same answer, which may favour either.
        same = {A: share, B: 1 - share}
        assert ambiguous_pairs({A: same, B: same, UNSEEN: {UNSEEN: 1.0}}) == [(A, B, 1.0)]


def test_an_evaluation_logs_all_of_it_for_known_and_unseen_games():
    with a_session(eval_episodes=2, eval_steps=200) as session:
        session.agent.train()
        known, unseen = Evaluator(session).evaluate([A, UNSEEN])
        assert session.agent.training
    assert (known["known"], unseen["known"]) == (True, False)
    assert len(known["returns"]) == len(unseen["returns"]) == 3 * 2
    assert known["return_mean"] == np.mean(known["returns"])
    assert (known["episodes_truncated"], unseen["episodes_truncated"]) == (0, 0)
    assert set(unseen["believed"]) <= {A, B}
    assert 0 <= known["dormant"] <= 1
    assert "dormant" not in unseen
    assert "usage_by_env" not in known


def test_usage_of_each_environment_is_kept_where_tokens_choose_and_all_games_are_known():
    agent = dataclasses.replace(PRESETS["tiny"], frame_size=42, routing="token")
    for games, kept in (((A, B), True), ((A, B, UNSEEN), False)):
        with a_session(agent=agent, games=games) as session:
            (fields,) = Evaluator(session).evaluate([A])
            assert ("usage_by_env" in fields) is kept


def test_before_any_game_is_learned_nothing_is_played():
    with a_session() as session:
        config, store = session.config, session.store
    with open_session(config, store, config.agent.bank_names(config.name)) as empty:
        assert list(Evaluator(empty).evaluate([A])) == []
