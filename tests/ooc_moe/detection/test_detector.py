"""The detector: games told apart online, one after another, without forgetting; experts named; the unknown noticed; beliefs over time."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ooc_moe import envs
from ooc_moe.detection.belief import Prediction, prefetch_set
from ooc_moe.detection.detector import Belief, Detector
from ooc_moe.detection.nearest_mean import NearestClassMean
from ooc_moe.detection.screens import Reservoir, ScreenFeatures
from ooc_moe.detection.tally import ambiguous_pairs
from ooc_moe_wire.errors import InvalidRequest

MEAN_SIZES = {"frame_stack": 2, "frame_size": 42, "num_experts": 16, "prefetch_experts": 4, "detect_unknown": True, "seed": 3}
SIZES = MEAN_SIZES | {"exemplars_per_game": 200}
SMOOTH = {"smoothing": 0.7, "switch_at": 0.7}  # Four certain frames in a row turn a belief.
PIXEL = ("pixel/catch", "pixel/avoid", "pixel/cross")
ATARI = ("krull", "road_runner", "crazy_climber")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def frames_of(game: str, *, seed: int, steps: int, num_envs: int = 8, frame_size: int = 42) -> Tensor:
    """Random play, environment after environment: (num_envs * steps, 2, H, W) uint8."""
    played = envs.make(game, num_envs, frame_size=frame_size, frame_stack=2, num_threads=1)
    played.reset(seed=seed)
    rng = np.random.default_rng(seed)
    kept = [played.step(rng.integers(0, 18, num_envs)).observations for _ in range(steps)]
    played.close()
    return torch.from_numpy(np.stack(kept, axis=1)).flatten(0, 1)


def usage(index: int) -> Tensor:
    """Game `index` uses experts 4i..4i+3 for 64 frames: always, often, seldom, hardly ever."""
    counts = torch.zeros(16)
    counts[4 * index : 4 * index + 4] = torch.tensor([64.0, 40.0, 20.0, 1.0])
    return counts


def teach(detector, frames: dict[str, Tensor], *, calls: int = 20) -> list[dict[str, float]]:
    """Each game in turn, as training does: never two games in one call, never back to an earlier one."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for index, (game, frames_MSHW) in enumerate(frames.items()):
        detector.add_game(game)
        for _ in range(calls):
            chosen = torch.randperm(len(frames_MSHW), generator=generator)[:64]
            losses.append(detector.learn(frames_MSHW[chosen], game, usage(index)))
    return losses


def accuracy(detector, game: str, frames: Tensor) -> float:
    return float(np.mean([name == game for name in detector.predict(frames).names]))


@pytest.fixture(scope="module")
def pixel_frames() -> dict[str, Tensor]:
    return {game: frames_of(game, seed=1, steps=100) for game in PIXEL}


@pytest.fixture(scope="module")
def atari_frames() -> dict[str, tuple[Tensor, Tensor]]:
    """Frames to learn from, and frames of another environment to be tested with."""
    return {game: frames_of(game, seed=1, steps=120, num_envs=4).tensor_split([360]) for game in (*ATARI, "pong")}


@pytest.fixture(scope="module")
def taught(pixel_frames) -> Detector:
    torch.set_num_threads(1)
    detector = Detector(**SIZES)
    teach(detector, pixel_frames)
    return detector


# Recognising


@pytest.mark.parametrize("game", PIXEL)
def test_games_learned_one_after_another_are_told_apart_on_held_out_frames(taught, game):
    held_out = frames_of(game, seed=2, steps=40)
    assert accuracy(taught, game, held_out) > 0.95
    assert float(taught.predict(held_out).unknown_N.float().mean()) < 0.05
    assert float(taught.predict(held_out).confidence_N.mean()) > 0.9


@pytest.mark.parametrize("game", ["pixel/toward", "pixel/away"])
def test_a_game_never_seen_is_unknown(taught, game):
    assert float(taught.predict(frames_of(game, seed=2, steps=20)).unknown_N.float().mean()) > 0.9


def test_frames_of_an_unknown_game_name_no_experts(taught):
    strange = frames_of("pixel/away", seed=2, steps=20)
    unknown_N = taught.predict(strange).unknown_N
    assert unknown_N.any()
    assert taught.predict(strange[unknown_N]).experts == []


def test_without_exemplars_the_first_game_is_forgotten(pixel_frames):
    """The tests above can fail: this is what the stored frames prevent."""
    forgetful = Detector(**(SIZES | {"exemplars_per_game": 0}))
    teach(forgetful, pixel_frames)
    assert accuracy(forgetful, PIXEL[0], pixel_frames[PIXEL[0]]) < 0.5
    assert accuracy(forgetful, PIXEL[2], pixel_frames[PIXEL[2]]) > 0.95
    assert [len(stored["screens"]) for stored in forgetful.get_extra_state()["stored"]] == [0, 0, 0]
    assert forgetful.predict(pixel_frames[PIXEL[2]]).unknown_N.all(), "there is nothing to compare with"


@pytest.mark.parametrize("kind", [Detector, NearestClassMean])
def test_where_unknown_games_are_not_detected_strange_frames_are_taken_for_a_known_one(kind, pixel_frames):
    sizes = SIZES if kind is Detector else MEAN_SIZES
    strange = torch.randint(0, 256, (64, 2, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    predictions = []
    for detect_unknown in (True, False):
        recogniser = kind(**(sizes | {"detect_unknown": detect_unknown}))
        teach(recogniser, pixel_frames, calls=5)
        predictions.append(recogniser.predict(strange))
    noticed, taken = predictions
    assert noticed.unknown_N.all()
    assert not taken.unknown_N.any()
    assert torch.equal(noticed.probabilities_NG, taken.probabilities_NG)
    assert noticed.experts == [] != taken.experts


def test_every_game_counts_the_same_in_a_step_however_many_of_its_frames_there_are(taught, pixel_frames, monkeypatch):
    """16 frames of the game on the screen, 32 stored ones of either other game; the slow twin takes the mean of each game's mean."""
    detector, numbers = copy_of(taught), (16, 32, 32)
    detector.add_game("new")  # Without frames: it counts for nothing.
    shown = [frames[:number] for frames, number in zip(pixel_frames.values(), numbers, strict=True)]
    screens = [frames[:, -1] for frames in shown]
    monkeypatch.setattr(detector, "_replay", lambda others: (torch.cat(screens[1:]), torch.tensor([1] * 32 + [2] * 32)))
    monkeypatch.setattr("ooc_moe.detection.detector.GRADIENT_STEPS", 1)
    with torch.no_grad():
        detector.features.whole.weight.add_(torch.randn(detector.features.whole.weight.shape, generator=torch.Generator().manual_seed(0)))
    logits = [detector.predict(frames).probabilities_NG.log() for frames in shown]
    wanted = sum(float(-log_NG[:, game].mean()) for game, log_NG in enumerate(logits)) / 3
    together = float(-torch.cat([log_NG[:, game] for game, log_NG in enumerate(logits)]).mean())
    assert abs(together - wanted) > 0.01 * wanted
    assert detector.learn(shown[0], PIXEL[0], usage(0))["game_loss"] == pytest.approx(wanted, rel=1e-4)


def test_an_experts_usage_outlasts_a_call_by_a_decaying_share():
    detector = Detector(**SIZES)
    detector.add_game("a")
    frames = torch.zeros(64, 2, 42, 42, dtype=torch.uint8)
    for uses in (64.0, 0.0, 128.0):  # All frames, none, and all of them in two layers.
        detector.learn(frames, "a", torch.full((16,), uses))
    assert detector.get_extra_state()["usage"][0].tolist() == pytest.approx([0.8 * 0.8 + 0.2] * 16)


def test_real_games_learned_one_after_another_are_told_apart_and_a_fourth_is_unknown(atari_frames):
    detector = Detector(**SIZES)
    teach(detector, {game: atari_frames[game][0] for game in ATARI})
    for game in ATARI:
        assert accuracy(detector, game, atari_frames[game][1]) > 0.95
        assert float(detector.predict(atari_frames[game][1]).unknown_N.float().mean()) < 0.2
    unseen = detector.predict(atari_frames["pong"][1])
    assert float(unseen.unknown_N.float().mean()) > 0.9
    assert float(unseen.confidence_N.mean()) > 0.9  # The probabilities would not have told.


@pytest.mark.parametrize("frame_size", [10, 84])
def test_a_conflicting_pair_is_told_apart_in_small_and_large_frames(frame_size):
    detector = Detector(**(SIZES | {"frame_size": frame_size}))
    teach(detector, {game: frames_of(game, seed=1, steps=50, frame_size=frame_size) for game in PIXEL[:2]}, calls=15)
    for game in PIXEL[:2]:
        assert accuracy(detector, game, frames_of(game, seed=2, steps=20, frame_size=frame_size)) >= 0.99


def test_a_pair_that_looks_the_same_is_confused(taught):
    detector = copy_of(taught)
    blind = ("pixel/blind-toward", "pixel/blind-away")
    teach(detector, {game: frames_of(game, seed=1, steps=20) for game in blind}, calls=10)
    games = (*PIXEL, *blind)
    played = {game: detector.predict(frames_of(game, seed=2, steps=20)) for game in games}
    probabilities = {game: dict(zip(seen.games, seen.probabilities_NG.mean(0).tolist(), strict=True)) for game, seen in played.items()}
    ((one, other, confusion),) = ambiguous_pairs(probabilities)
    assert (one, other) == blind
    assert confusion == pytest.approx(1.0, abs=0.05)


def test_the_baseline_goes_on_from_a_file_bit_for_bit(pixel_frames, tmp_path: Path):
    original = NearestClassMean(**MEAN_SIZES)
    teach(original, pixel_frames, calls=2)
    torch.save(original.state_dict(), tmp_path / "mean.pt")
    resumed = NearestClassMean(**(MEAN_SIZES | {"num_experts": 2}))
    resumed.load_state_dict(torch.load(tmp_path / "mean.pt", weights_only=True))
    frames = pixel_frames[PIXEL[0]][:64]
    for _ in range(2):
        one, other = original.predict(frames), resumed.predict(frames)
        assert torch.equal(one.probabilities_NG, other.probabilities_NG)
        assert torch.equal(one.unknown_N, other.unknown_N)
        assert one.experts == other.experts
        assert original.learn(frames, PIXEL[0], usage(0)) == resumed.learn(frames, PIXEL[0], usage(0))
    state = original.state_dict()
    resumed.load_state_dict(state)
    resumed.learn(frames, PIXEL[0], usage(0))
    assert torch.equal(state["counts"], original.state_dict()["counts"])  # Shares nothing with what it was loaded from.


def test_only_the_newest_frame_of_the_stack_counts(taught, pixel_frames):
    frames = pixel_frames[PIXEL[0]][:16]
    fresh = frames.clone()
    fresh[:, 0] = 0  # As just after a reset.
    assert torch.equal(taught.predict(frames).probabilities_NG, taught.predict(fresh).probabilities_NG)


def test_accuracy_and_confidence_are_those_before_learning(pixel_frames):
    losses = teach(Detector(**SIZES), dict(list(pixel_frames.items())[:2]))
    assert losses[0]["accuracy"] == 1.0  # There is one game only.
    assert losses[20]["accuracy"] == 0.0  # The first frames of a game that the detector never saw.
    assert losses[-1]["accuracy"] > 0.95
    assert losses[-1]["game_loss"] < losses[20]["game_loss"]
    assert losses[-1]["expert_loss"] < losses[0]["expert_loss"]
    assert losses[-1]["loss"] == pytest.approx(losses[-1]["game_loss"] + losses[-1]["expert_loss"])


# Experts


@pytest.mark.parametrize(("index", "game"), list(enumerate(PIXEL)))
def test_a_game_names_the_experts_it_used_most_used_first(taught, pixel_frames, index, game):
    prediction = taught.predict(pixel_frames[game][:32])
    assert prediction.experts == [4 * index, 4 * index + 1, 4 * index + 2]
    assert torch.allclose(prediction.expert_probabilities_NE.mean(0), usage(index) / 64, atol=0.1)


def test_a_batch_of_two_games_names_the_experts_of_both(taught, pixel_frames):
    mixed = torch.cat([pixel_frames[PIXEL[0]][:15], pixel_frames[PIXEL[2]][:1]])
    assert set(taught.predict(mixed).experts) >= {0, 8}


def test_at_most_so_many_experts_are_named_and_none_that_nobody_used():
    probabilities = torch.tensor([[0.9, 0.0, 0.5, 0.05], [0.2, 0.7, 0.0, 0.0]])
    assert prefetch_set(probabilities, 8) == [0, 1, 2]
    assert prefetch_set(probabilities, 2) == [0, 1]
    untaught = Detector(**SIZES)
    untaught.add_game("krull")
    assert untaught.predict(torch.zeros(4, 2, 42, 42, dtype=torch.uint8)).experts == []


def test_growing_keeps_what_was_learned(taught, pixel_frames):
    grown = copy_of(taught)
    frames = torch.cat([frames[:8] for frames in pixel_frames.values()])
    before = taught.predict(frames)
    grown.grow_experts(24)
    grown.grow_experts(20)
    after = grown.predict(frames)
    assert grown.num_experts == 24
    assert torch.equal(after.expert_probabilities_NE[:, :16], before.expert_probabilities_NE)
    assert after.expert_probabilities_NE[:, 16:].max() < 0.05
    grown.add_game("new")
    grown.add_game("new")
    assert grown.games == (*PIXEL, "new")
    used = torch.zeros(24)
    used[20] = 64
    noise = torch.randint(0, 256, (64, 2, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(15):
        grown.learn(noise, "new", used)
    assert grown.predict(noise).experts == [20]
    assert set(grown.predict(noise).names) == {"new"}
    assert accuracy(grown, PIXEL[0], frames[:8]) == 1.0


# Predicting changes nothing


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_mode_state_and_gradients_alone(taught, pixel_frames, training):
    detector = copy_of(taught).train(training)
    before = saved(detector)
    random_state = torch.get_rng_state()
    prediction = detector.predict(pixel_frames[PIXEL[0]][:16])
    assert all(module.training is training for module in detector.modules())
    assert not prediction.probabilities_NG.requires_grad
    assert not prediction.expert_probabilities_NE.requires_grad
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert saved(detector) == before
    other = copy_of(taught).train(not training).predict(pixel_frames[PIXEL[0]][:16])
    assert torch.equal(prediction.probabilities_NG, other.probabilities_NG)


def test_learning_works_inside_no_grad_and_draws_only_from_its_own_generator(taught, pixel_frames):
    detector = copy_of(taught)
    state = torch.get_rng_state()
    detector.add_game("new")
    detector.grow_experts(16)
    before = [parameter.clone() for parameter in detector.parameters()]
    with torch.no_grad():
        detector.learn(pixel_frames[PIXEL[1]][:64], PIXEL[1], usage(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not all(torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True))


# State


def saved(detector: Detector) -> bytes:
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    return file.getvalue()


def copy_of(detector: Detector) -> Detector:
    """Through a file, into a detector that knows no game, of another seed and with fewer experts."""
    copy = Detector(**(SIZES | {"num_experts": 2, "seed": 99}))
    copy.load_state_dict(torch.load(io.BytesIO(saved(detector)), weights_only=True))
    return copy


def test_the_state_survives_a_file_and_learning_goes_on_bit_for_bit(taught, pixel_frames, tmp_path: Path):
    original = copy_of(taught)
    torch.save(original.state_dict(), tmp_path / "detector.pt")
    resumed = Detector(**(SIZES | {"num_experts": 2, "seed": 99}))
    resumed.load_state_dict(torch.load(tmp_path / "detector.pt", weights_only=True))
    assert resumed.games == original.games
    assert resumed.num_experts == 16
    frames = pixel_frames[PIXEL[0]]
    for detector in (original, resumed):
        detector.grow_experts(18)
    more = torch.cat([usage(0), torch.ones(2)])
    for start in (0, 64, 128):
        assert original.learn(frames[start : start + 64], PIXEL[0], more) == resumed.learn(frames[start : start + 64], PIXEL[0], more)
    one, other = original.predict(frames[:64]), resumed.predict(frames[:64])
    assert torch.equal(one.probabilities_NG, other.probabilities_NG)
    assert torch.equal(one.unknown_N, other.unknown_N)
    assert one.experts == other.experts


def test_a_loaded_detector_shares_nothing_with_the_state_it_came_from(taught, pixel_frames):
    state = taught.state_dict()
    copy = Detector(**SIZES)
    copy.load_state_dict(state)
    before = saved(taught)
    copy.learn(pixel_frames[PIXEL[0]][:64], PIXEL[0], usage(0))
    assert saved(taught) == before


def test_one_seed_gives_one_detector_and_another_seed_another(pixel_frames):
    frames = {game: frames[:200] for game, frames in list(pixel_frames.items())[:2]}
    detectors = [Detector(**(SIZES | {"seed": seed})) for seed in (3, 3, 4)]
    losses = [teach(detector, frames, calls=5) for detector in detectors]
    assert losses[0] == losses[1] != losses[2]
    probabilities = [detector.predict(frames[PIXEL[0]]).probabilities_NG for detector in detectors]
    assert torch.equal(probabilities[0], probabilities[1])
    assert not torch.equal(probabilities[0], probabilities[2])


def test_a_reservoir_is_a_uniform_sample_of_what_was_added():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(60)
    for _ in range(300):
        reservoir = Reservoir(10)
        for start in range(0, 60, 15):
            values = torch.arange(start, start + 15, dtype=torch.uint8)
            reservoir.add(values[:, None, None].expand(-1, 42, 42).contiguous(), generator)
        assert reservoir.screens_MHW.shape == (10, 42, 42)
        assert reservoir.num_seen == 60
        kept = reservoir.screens_MHW[:, 0, 0].long()
        assert len(set(kept.tolist())) == 10
        counts[kept] += 1
    assert counts.sum() == 3000
    assert counts.min() > 20  # 50 expected, standard deviation 6.5.
    assert counts.max() < 80


def test_features_are_a_convolution_whose_kernels_do_not_overlap():
    features = ScreenFeatures()
    screens = torch.randint(0, 256, (3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kernels = features.patches.weight.view(16, 1, 6, 6)
    maps = torch.nn.functional.conv2d(screens[:, None] / 255, kernels, features.patches.bias, stride=6).relu()
    assert torch.allclose(features(screens), features.whole(maps.flatten(2).transpose(1, 2).flatten(1)).relu(), atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(4, 2, 84, 84, dtype=torch.uint8),
        torch.zeros(4, 3, 42, 42, dtype=torch.uint8),
        torch.zeros(2, 42, 42, dtype=torch.uint8),
        torch.zeros(0, 2, 42, 42, dtype=torch.uint8),
        torch.zeros(4, 2, 42, 42),
    ],
)
def test_frames_of_another_shape_or_dtype_are_refused(taught, frames):
    with pytest.raises(InvalidRequest, match=r"uint8 \(N, 2, 42, 42\)"):
        taught.predict(frames)


def test_unknown_games_wrong_usage_and_predictions_before_any_game_are_refused(taught, pixel_frames):
    frames = pixel_frames[PIXEL[0]][:4]
    with pytest.raises(InvalidRequest, match="'pong'"):
        taught.learn(frames, "pong", usage(0))
    with pytest.raises(InvalidRequest, match=r"\(15,\), but there are 16 experts"):
        taught.learn(frames, PIXEL[0], torch.zeros(15))
    for detector in (Detector(**SIZES), NearestClassMean(**MEAN_SIZES)):
        with pytest.raises(InvalidRequest, match="before any game"):
            detector.predict(frames)


# Cost


def test_predicting_and_learning_cost_milliseconds(taught, pixel_frames):
    """About 0.5 ms and 12 ms on an idle core; the bounds only catch another order of magnitude."""
    detector, frames = copy_of(taught), pixel_frames[PIXEL[0]]
    assert best_seconds(lambda: detector.predict(frames[:16])) < 0.02
    assert best_seconds(lambda: detector.learn(frames[:64], PIXEL[0], usage(0))) < 0.2


def best_seconds(act) -> float:
    seconds = []
    for _ in range(5):
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    return min(seconds)


# The baseline


def test_nearest_class_mean_tells_real_games_apart_and_names_their_experts(atari_frames):
    baseline = NearestClassMean(**MEAN_SIZES)
    losses = teach(baseline, {game: atari_frames[game][0] for game in ATARI}, calls=5)
    assert losses[-1]["accuracy"] > 0.8
    for index, game in enumerate(ATARI):
        assert accuracy(baseline, game, atari_frames[game][1]) > 0.8
        assert 4 * index in baseline.predict(atari_frames[game][1]).experts
    assert float(baseline.predict(atari_frames["pong"][1]).unknown_N.float().mean()) > 0.9


def test_nearest_class_mean_grows_as_the_detector_does(pixel_frames):
    baseline = NearestClassMean(**MEAN_SIZES)
    baseline.add_game("a")
    baseline.grow_experts(18)
    baseline.learn(pixel_frames[PIXEL[0]][:64], "a", torch.cat([usage(0), torch.tensor([64.0, 0.0])]))
    assert baseline.num_experts == 18
    assert set(baseline.predict(pixel_frames[PIXEL[0]][:8]).experts) == {0, 1, 2, 16}


# Belief


def seen(*rows: list[float], unknown: list[bool] | None = None) -> Prediction:
    """A prediction of these game probabilities; games are a, b, c, ..."""
    probabilities = torch.tensor(rows)
    return Prediction(
        games=tuple("abcdef"[: probabilities.shape[1]]),
        probabilities_NG=probabilities,
        unknown_N=torch.tensor(unknown or [False] * len(rows)),
        expert_probabilities_NE=torch.zeros(len(rows), 1),
        experts=[],
    )


def test_the_first_prediction_is_believed_at_once_and_doubted_as_nothing_was_believed_before():
    belief = Belief(2, **SMOOTH)
    assert belief.update(seen([0.9, 0.1], [0.4, 0.6])) == (["a", "b"], [True, True])
    assert belief.update(seen([0.9, 0.1], [0.4, 0.6])) == (["a", "b"], [False, False])


@pytest.mark.parametrize(("smoothing", "switch_at"), [(0.7, 0.7), (0.9, 0.7), (0.5, 0.9), (0.0, 0.7), (0.7, 0.0), (0.9, 0.0), (0.0, 0.0)])
def test_the_belief_says_how_many_certain_frames_turn_it(smoothing, switch_at):
    belief = Belief(1, smoothing=smoothing, switch_at=switch_at)
    belief.update(seen([1.0, 0.0]))
    found = [belief.update(seen([0.0, 1.0]))[0] for _ in range(30)]
    assert found.index(["b"]) == belief.steps_to_switch


def test_a_switch_takes_several_frames_and_is_doubted_from_the_first():
    belief = Belief(1, **SMOOTH)
    belief.update(seen([1.0, 0.0]))
    steps = [belief.update(seen([0.0, 1.0])) for _ in range(5)]
    assert [games for games, _ in steps] == [["a"], ["a"], ["a"], ["b"], ["b"]]
    assert [doubts for _, doubts in steps] == [[True], [True], [True], [False], [False]]


def test_one_odd_frame_switches_nothing():
    belief = Belief(1, **SMOOTH)
    belief.update(seen([1.0, 0.0]))
    found = [belief.update(seen([0.0, 1.0] if step % 3 == 0 else [1.0, 0.0]))[0] for step in range(30)]
    assert found == [["a"]] * 30


def test_frames_that_hesitate_between_two_games_never_go_back_and_forth():
    belief = Belief(1, **SMOOTH)
    belief.update(seen([1.0, 0.0]))
    found = [belief.update(seen([0.4, 0.6] if step % 2 else [0.6, 0.4]))[0] for step in range(30)]
    assert found == [["a"]] * 30


def test_each_environment_is_believed_by_its_own_frames():
    belief = Belief(3, **SMOOTH)
    belief.update(seen([1.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
    for _ in range(6):
        games, doubts = belief.update(seen([1.0, 0.0], [0.0, 1.0], [0.0, 1.0]))
    assert games == ["a", "b", "b"]
    assert doubts == [False, False, False]


def test_frames_of_an_unknown_game_raise_doubt_and_persuade_slowly():
    belief = Belief(1, **SMOOTH)
    belief.update(seen([1.0, 0.0]))
    steps = [belief.update(seen([0.0, 1.0], unknown=[True])) for _ in range(40)]
    assert all(doubts == [True] for _, doubts in steps)
    switched = [games for games, _ in steps].index(["b"])
    assert 10 < switched < 30


def test_a_new_game_joins_a_belief_in_progress():
    belief = Belief(1, **SMOOTH)
    belief.update(seen([1.0]))
    for _ in range(6):
        games, _ = belief.update(seen([0.0, 1.0]))
    assert games == ["b"]


@pytest.mark.parametrize(("switch_at", "hesitating"), [(0.7, "a"), (0.0, "b")])
def test_without_smoothing_every_frame_is_believed_without_hysteresis_hesitating_ones_too(switch_at, hesitating):
    belief = Belief(1, smoothing=0.0, switch_at=switch_at)
    rows = ([1.0, 0.0], [0.1, 0.9], [0.8, 0.2], [0.45, 0.55])
    assert [belief.update(seen(row))[0] for row in rows] == [["a"], ["b"], ["a"], [hesitating]]


def test_a_prediction_for_other_environments_is_refused():
    with pytest.raises(InvalidRequest, match="2 rows for 3 environments"):
        Belief(3, **SMOOTH).update(seen([1.0], [1.0]))
