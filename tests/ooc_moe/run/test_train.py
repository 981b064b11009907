"""Whole short runs: real games, a real daemon process, everything through the store."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ooc_moe import envs
from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.evaluation.evaluate import evaluate_run
from ooc_moe.learning.rollout import Collector
from ooc_moe.metrics.log import read_metrics
from ooc_moe.run.train import Interrupted, resume, train
from ooc_moe.run.trainer import Trainer
from ooc_moe.session import checkpoint
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.runs import PPO, SILENT, assert_same_run, end_of, run_store, stored_experts, tiny_run, updates, wait_for, without_clock

# Half of what an optimizer step needs.
QUARTER_IN_HBM = dataclasses.replace(PRESETS["tiny"], hbm_experts=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(tiny_run(tmp_path_factory.mktemp("runs") / "finished"), SILENT)


def test_training_changes_the_experts_of_its_game_with_their_moments_and_no_others(finished):
    first, second = end_of(finished, "0-krull.pt"), end_of(finished, "1-road_runner.pt")
    after_krull = stored_experts(finished, snapshot_id=first.snapshot_id)
    after_both = stored_experts(finished, snapshot_id=second.snapshot_id)
    assert after_krull
    assert all(optimizer for _, optimizer in after_krull.values())
    assert len({optimizer for _, optimizer in after_krull.values()}) == len(after_krull)
    assert {expert: after_both[expert] for expert in after_krull} == after_krull  # Cold experts, bit for bit.
    assert after_both.keys() > after_krull.keys()


def test_the_detector_learns_both_games(finished):
    first, second = end_of(finished, "0-krull.pt").state["detector"], end_of(finished, "1-road_runner.pt").state["detector"]
    assert first.keys() <= second.keys()
    changed = [key for key, value in first.items() if isinstance(value, torch.Tensor) and value.dtype == torch.float32]
    assert any(not torch.equal(first[key], second[key]) for key in changed if first[key].shape == second[key].shape)


def test_all_three_tiers_work(finished):
    last = [event for event in read_metrics(finished) if event["event"] == "update"][-1]
    assert last["cache"]["hits"] > 0
    assert last["cache"]["misses"] > 0
    assert last["store"]["total"]["pushed_experts"] > 0
    assert last["store"]["nvme"]["written_bytes"] > 0
    assert (finished / "report" / "index.html").exists()


def test_one_seed_run_twice_is_equal_bit_for_bit(finished, tmp_path):
    train(tiny_run(tmp_path / "finished"), SILENT)
    assert_same_run(finished, tmp_path / "finished")


def test_another_seed_is_another_run(finished, tmp_path):
    train(tiny_run(tmp_path / "other", seed=8, eval_steps=0), SILENT)
    assert stored_experts(finished) != stored_experts(tmp_path / "other")


def test_a_resumed_run_continues_bit_for_bit_after_kill_9(tmp_path):
    """The trainer is killed somewhere after its first checkpoint; its daemon goes with it. Experts leave the cache within an update."""
    changes = {"games": ("pixel/catch", "pixel/avoid"), "eval_steps": 4, "checkpoint_every": 1, "agent": QUARTER_IN_HBM}
    undisturbed = train(tiny_run(tmp_path / "a" / "run", **changes), SILENT)
    assert updates(undisturbed)[-1]["cache"]["evictions"] > 10 * len(updates(undisturbed))
    killed = tmp_path / "b" / "run"
    config = tiny_run(killed, **changes)
    (tmp_path / "config.json").write_text(config.to_json())
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; from ooc_moe.run.train import train, RunConfig;"
        "train(RunConfig.from_json(Path(sys.argv[1]).read_text(), Path(sys.argv[2])), Console(quiet=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "config.json"), str(killed)])
    wait_for(lambda: len(updates(killed)) >= 3)
    process.kill()
    process.wait()
    left_over = "run/update-8"  # As if the kill had come between a snapshot and its checkpoint's file.
    with run_store(killed) as (store, bank):
        store.create_snapshot([bank], name=left_over)
        store.create_snapshot([bank], name="a user's own")
    resume(killed, SILENT)
    assert_same_run(undisturbed, killed)
    with run_store(killed) as (store, bank):
        kept = {snapshot.id: snapshot.name for snapshot in store.list_snapshots(bank)}
    assert left_over not in kept.values()
    assert "a user's own" in kept.values()
    assert {id for id, name in kept.items() if name.startswith("run/")} == checkpoint.referenced_snapshots(killed / "checkpoints")


def test_a_run_that_stopped_before_its_first_update_can_be_resumed(tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", games=("pixel/catch",), eval_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_learn", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, SILENT)
    resume(config.run_dir, SILENT)
    assert [event["update"] for event in updates(config.run_dir)] == [1, 2]


def test_ctrl_c_saves_and_resume_finishes(tmp_path):
    command = [sys.executable, "-m", "ooc_moe.cli.main", "train", "--run-dir", str(tmp_path / "run")]
    new = ["--preset", "tiny", "--games", "pixel/catch", "--steps-per-game", "6144", "--eval-steps", "0"]
    process = subprocess.Popen([*command, *new], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(updates(tmp_path / "run")) >= 2)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "Traceback" not in complaint
    saved = end_of(tmp_path / "run", "latest.pt").progress
    assert 2 <= saved.update < 6
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert [event["update"] for event in updates(tmp_path / "run")] == list(range(1, 7))


def test_ctrl_c_during_an_evaluation_stops_before_the_next_game(tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", games=("pixel/catch", "pixel/avoid"))
    monkeypatch.setattr(Trainer, "_evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="after pixel/catch"):
        train(config, SILENT)
    assert end_of(config.run_dir, "latest.pt").progress == checkpoint.Progress(turn=1, update=2, step=64)


def test_before_the_first_update_all_ratios_are_1():
    """Acting frame by frame with router noise, and seeing the segments whole with the routing replayed, say the same."""
    config = tiny_run(Path("unused"))
    store = InMemoryStore()
    (spec,) = config.agent.bank_specs("run", config.seed)
    store.create_bank(spec)
    with ExpertCache(store, spec.name, capacity_experts=8) as cache:
        agent = Agent(config.agent, [cache], seed=config.seed)
        agent.add_game("krull")
        game_envs = envs.make("krull", PPO.num_envs, frame_size=config.agent.frame_size)
        generator = torch.Generator().manual_seed(1)
        collector = Collector(agent, game_envs, PPO, generator=generator, on_segment=lambda frames: None)
        collector.reset(1)
        rollout = collector.collect()
        seen = agent(rollout.frames_BTSHW, game="krull", starts_BT=rollout.starts_BT, routing=rollout.experts_BTLK)
        log_probs = seen.logits_BTA.log_softmax(-1).gather(-1, rollout.actions_BT.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close((log_probs - rollout.log_probs_BT).exp(), torch.ones_like(log_probs), atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.value_BT, rollout.values_BT, atol=1e-5, rtol=1e-5)


def test_training_goes_on_when_the_daemon_is_killed_and_restarted(start_daemon, tmp_path):
    """Ends bit-equal to the run that nothing happened to."""
    daemon = start_daemon(dram_bytes="1MiB")
    games = ("pixel/catch", "pixel/avoid")
    changes = {"games": games, "steps_per_game": 128, "eval_steps": 0, "checkpoint_every": 2, "agent": QUARTER_IN_HBM}
    calm = train(tiny_run(tmp_path / "calm", store=daemon.target, **changes), SILENT)
    shaken = tmp_path / "shaken"
    failures = []

    def run():
        try:
            train(tiny_run(shaken, store=daemon.target, **changes), SILENT)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=run)
    trainer.start()
    for after in (1, 3, 6):
        wait_for(lambda after=after: failures or len(updates(shaken)) >= after)
        daemon.restart()
    trainer.join(timeout=120)
    assert not trainer.is_alive()
    assert not failures
    assert without_clock(calm) == without_clock(shaken)
    store = RemoteStore(daemon.target)
    experts = [{i.expert: (i.parameter_xxh3, i.optimizer_xxh3) for i in store.list_experts(f"{run}/experts")} for run in ("calm", "shaken")]
    store.close()
    assert experts[0] == experts[1]


def test_two_trainers_share_a_daemon_and_its_statistics_tell_them_apart(daemon, tmp_path):
    command = [sys.executable, "-m", "ooc_moe.cli.main", "train", "--preset", "tiny", "--store", daemon.target, "--eval-steps", "0"]
    trainers = [
        subprocess.Popen([*command, "--games", game, "--run-dir", str(tmp_path / name), "--steps-per-game", "4096", "--quiet"])
        for name, game in (("one", "pixel/catch"), ("two", "pixel/cross"))
    ]
    store = RemoteStore(daemon.target)

    def hbm():
        return {trainer.trainer: trainer for trainer in store.stats().trainers if trainer.hbm and trainer.hbm[0].hits}

    wait_for(lambda: {"one", "two"} <= hbm().keys())
    together = hbm()
    assert together["one"].activity.startswith("training pixel/catch")
    assert together["two"].hbm[0].bank == "two/experts"
    assert [trainer.wait(timeout=120) for trainer in trainers] == [0, 0]
    assert {bank.bank: bank.access.pushed_experts > 0 for bank in store.stats().banks} == {"one/experts": True, "two/experts": True}
    store.close()


def test_a_finished_run_is_evaluated_again_without_touching_its_bank(finished):
    before = stored_experts(finished)
    shown = io.StringIO()
    found = evaluate_run(finished, Console(file=shown, width=120), eval_envs=2, eval_steps=6, constants=True)
    assert [fields["evaluated"] for fields in found] == ["krull", "road_runner"]
    assert all(len(fields["returns"]) == 2 for fields in found)
    assert stored_experts(finished) == before
    said = shown.getvalue()
    for wanted in ("best constant", "dormant units", "Waited for experts", "hit rate", "late", "nearest mean", "prefetch recall"):
        assert wanted in said
    assert len(list((finished / "baselines").iterdir())) == 2
    tiers = next(line.split() for line in said.splitlines() if line.startswith("HBM"))
    assert tiers[5].replace(",", "") == str(sum(fields["cache"]["hits"] for fields in found))


@pytest.mark.parametrize("nothing", ["eval_envs", "eval_episodes", "eval_steps"])
def test_an_evaluation_of_nothing_is_refused(finished, nothing):
    with pytest.raises(InvalidRequest, match=f"{nothing}: 0"):
        evaluate_run(finished, SILENT, **{nothing: 0})


def test_a_run_without_evaluations_asks_for_their_steps(tmp_path):
    config = tiny_run(tmp_path / "blind", eval_steps=0)
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.to_json())
    with pytest.raises(InvalidRequest, match="--eval-steps"):
        evaluate_run(config.run_dir, SILENT)


def test_the_full_preset_makes_real_updates_through_all_tiers(tmp_path):
    """25 MB records, 256 experts, six layers. HBM holds one game's 4 experts and DRAM 6, so that coming back to a game reads NVMe."""
    agent = dataclasses.replace(PRESETS["full"], hbm_experts=4, dram_experts=6)
    ppo = PPOConfig(num_envs=2, rollout_steps=32, epochs=1, minibatch_segments=1)
    config = RunConfig(run_dir=tmp_path / "full", agent=agent, ppo=ppo, games=("krull", "boxing", "krull"), steps_per_game=64, eval_steps=0)
    train(config, SILENT)
    assert len(updates(config.run_dir)) == 3
    last = updates(config.run_dir)[-1]
    assert last["cache"]["write_backs"] >= 8
    assert last["cache"]["fetched_from"]["nvme"] > 0
    assert last["store"]["nvme"]["written_bytes"] >= 8 * 25_000_000


def test_a_directory_that_holds_a_run_is_refused(finished):
    with pytest.raises(InvalidRequest, match="--resume"):
        train(tiny_run(finished), SILENT)


def test_a_bank_that_was_written_is_refused_unless_forked(finished, tmp_path):
    (tmp_path / "again").mkdir()
    os.rename(finished / "store", tmp_path / "store")
    try:
        with embedded_daemon(tmp_path / "store", dram_bytes=1 << 20) as target:
            with pytest.raises(InvalidRequest, match="already written"):
                train(tiny_run(tmp_path / "again" / "finished", store=target), SILENT)
            forked = tiny_run(tmp_path / "branch", store=target, from_bank="finished/experts", games=("pixel/catch",), eval_steps=0)
            train(forked, SILENT)
            store = RemoteStore(target)
            assert store.get_bank("branch/experts").forked_from == "finished/experts"
            store.close()
    finally:
        os.rename(tmp_path / "store", finished / "store")


def test_the_configuration_survives_its_file(tmp_path):
    config = tiny_run(tmp_path / "x", store="localhost:1", from_bank="b")
    assert RunConfig.from_json(config.to_json(), tmp_path / "x") == config
    assert "run_dir" not in json.loads(config.to_json())


def test_a_daemon_that_still_drains_is_waited_for(tmp_path, start_daemon):
    """As after kill -9 of a trainer and --resume at once: the old daemon has not let go of the directory yet."""
    old = start_daemon(data_dir=tmp_path / "store")
    stopper = threading.Timer(1.0, old.stop)
    stopper.start()
    with embedded_daemon(tmp_path / "store", dram_bytes=1 << 20) as target:
        store = RemoteStore(target)
        assert store.list_banks() == []
        store.close()
    stopper.join()
