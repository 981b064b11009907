"""A trained run opened as a library: what it offers, and that the run stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ooc_moe.config.run import RunConfig
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.session.load import load
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_wire.errors import InvalidRequest
from tests.conftest import DaemonProcess
from tests.ooc_moe.runs import assert_same_state, bodies, end_of, pixel_run, play

CATCH, AVOID = "pixel/catch", "pixel/avoid"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shared_daemon: DaemonProcess) -> Path:
    """A finished run of two games in the shared daemon."""
    config = pixel_run(tmp_path_factory.mktemp("load") / "loaded", store=shared_daemon.target)
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.to_json())
    store = RemoteStore(shared_daemon.target)
    play(config, store)
    store.close()
    return config.run_dir


@pytest.fixture
def store(shared_daemon: DaemonProcess) -> Iterator[RemoteStore]:
    store = RemoteStore(shared_daemon.target)
    yield store
    store.close()


def test_a_loaded_run_has_the_agent_and_the_detector_of_its_last_checkpoint(run_dir: Path, store: RemoteStore) -> None:
    saved = end_of(run_dir, "latest.pt").state
    with load(run_dir) as run:
        assert_same_state(run.agent.state_dict(), saved["agent"])
        assert_same_state(run.detector.state_dict(), saved["detector"])
        assert not run.agent.training
        assert run.config == RunConfig.read(run_dir)
        assert bodies(run.store, run.caches[0].bank) == bodies(store, "loaded/experts")


def test_a_loaded_run_recognises_and_plays_a_game(run_dir: Path) -> None:
    with load(str(run_dir)) as run:
        envs, belief = run.make_envs(CATCH, 3), run.new_belief(3)
        frames = torch.from_numpy(envs.reset(seed=1))
        games, _ = belief.update(run.detector.predict(frames))
        assert set(games) <= {CATCH, AVOID}
        acted = run.agent.act(frames, run.agent.segment(CATCH, 3))
        assert acted.actions_N.shape == (3,)
        assert acted.prediction.games == (CATCH, AVOID)


def test_an_earlier_checkpoint_knows_the_games_of_its_time(run_dir: Path) -> None:
    with load(run_dir, checkpoint="0-pixel-catch") as run:
        assert run.agent.games == [CATCH]
        assert run.detector.games == (CATCH,)


def test_nothing_done_to_a_loaded_run_reaches_the_run(run_dir: Path, store: RemoteStore) -> None:
    before, banks = bodies(store, "loaded/experts"), {bank.spec.name for bank in store.list_banks()}
    with load(run_dir) as run:
        frames = torch.from_numpy(run.make_envs(CATCH, 3).reset(seed=1)).unsqueeze(1)
        run.agent(frames, game=CATCH).value_BT.sum().backward()
        ExpertAdam(run.agent.caches, run.agent.gradients, lr=0.1).step()
        run.flush()
        assert bodies(run.store, run.caches[0].bank) != before
    assert bodies(store, "loaded/experts") == before
    assert {bank.spec.name for bank in store.list_banks()} == banks


def test_fields_of_the_configuration_can_be_changed_for_the_time_of_loading(run_dir: Path) -> None:
    with load(run_dir, eval_envs=5, plane="stream") as run:
        assert (run.config.eval_envs, run.config.plane) == (5, "stream")
    with pytest.raises(InvalidRequest, match="device: 'tpu' is neither cpu nor cuda"), load(run_dir, device="tpu"):
        pass


def test_a_missing_run_or_checkpoint_is_refused_by_name(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no run"), load(tmp_path):
        pass
    held = r"'9-chess' is not in .*, which holds 0-pixel-catch, 1-pixel-avoid, latest"
    with pytest.raises(InvalidRequest, match=held), load(run_dir, checkpoint="9-chess"):
        pass
