"""The benchmark of training through the cache checks what it compares, and its table says which targets were met."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ooc_moe.bench.cache import bandwidth, training
from ooc_moe.bench.cache.options import CacheBench
from ooc_moe.bench.cache.results import NOTES, Ratio, Row, save
from ooc_moe.bench.cache.testbed import LAYERS, Setting
from ooc_moe.bench.cache.trainer import Trainer, check_equal
from ooc_moe.bench.cache.training import steps_per_game
from ooc_moe.bench.harness import Spread, WrongBytes
from ooc_moe.bench.store import daemon_paths
from ooc_moe.config.agent import AgentConfig
from ooc_moe.config.run import RunConfig
from ooc_moe.moe.layer import TieredExperts
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.commands import exit_code


@pytest.fixture
def setting(tmp_path):
    return Setting(size="tiny", device=torch.device("cpu"), rounds=1, directory=tmp_path)


def trainer(setting: Setting, capacity: int) -> Trainer:
    store = InMemoryStore()
    (spec,) = setting.config.bank_specs("bench", seed=0)
    store.create_bank(spec)
    return Trainer(setting, TieredExperts(ExpertCache(store, spec.name, capacity_experts=capacity)), game=1)


def test_a_trainer_with_half_the_room_computes_the_same_and_asks_for_all_of_its_game(setting):
    trainers = [trainer(setting, setting.working_set), trainer(setting, setting.working_set // 2)]
    for each in trainers:
        with each.cache:
            each.begin_update(2)
            each.step()
            each.step()
            assert each.cache.stats().accesses == 2 * setting.working_set
    assert len(trainers[0].losses) == 2
    check_equal(trainers)
    trainers[1].losses[1] += 1e-7
    with pytest.raises(WrongBytes, match="the loss of step 1 is"):
        check_equal(trainers)


def test_the_bank_is_eight_times_a_game_and_a_game_as_long_as_train_has_it(setting):
    assert setting.config.num_experts == 8 * setting.working_set == 8 * LAYERS * setting.config.pool_size
    run = RunConfig(run_dir=setting.directory / "run", games=("a",), agent=AgentConfig())
    segments = run.ppo.num_envs * run.ppo.rollout_steps // run.agent.context
    assert steps_per_game() == run.updates_per_game * run.ppo.epochs * segments // run.ppo.minibatch_segments


def test_a_quick_run_through_a_daemon_measures_the_fetches_of_each_tier(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bandwidth.DRAM_CALLS, "tiny", 1)
    words = ("--parts", "bandwidth", "--sizes", "tiny", "--quick", "--device", "cpu", "--json")
    assert exit_code("bench", "cache", *words, "--data-dir", str(tmp_path / "disk"), "--results", str(tmp_path)) == 0
    rows = json.loads(capsys.readouterr().out)["cache"]
    assert [row["path"] for row in rows] == [
        *("DRAM, local", "DRAM, local unverified", "DRAM, stream", "DRAM, copy", "NVMe, local", "NVMe, stream", "NVMe, raw")
    ]
    assert all(row["spread"]["median"] > 0 for row in rows)
    assert [row["path"] for row in rows if row["ratios"] and row["ratios"][0]["aim"]] == ["DRAM, local"]
    assert list((tmp_path / "disk").iterdir()) == []
    assert str(tmp_path) not in (tmp_path / "cache.md").read_text()
    assert not (tmp_path / "layer.md").exists()


def test_a_quick_run_of_the_other_parts_times_every_path_beside_its_baseline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "SAMPLE_FLOPS", 1)
    words = ("--parts", "steady,oversubscribed,switch", "--sizes", "tiny", "--quick", "--device", "cpu", "--json")
    assert exit_code("bench", "cache", *words, "--data-dir", str(tmp_path)) == 0
    rows = json.loads(capsys.readouterr().out)["cache"]
    assert [row["part"] for row in rows] == ["steady"] * 4 + ["oversubscribed"] * 4 + ["switch"] * 12
    paths = {row["path"]: row for row in rows if row["part"] == "switch"}
    assert list(paths)[:4] == [
        "fetch into a clean HBM",
        *(f"dirty pool to warm, by {way}" for way in ("demand", "prefetch", "prefetch, and demand at once")),
    ]
    demand = paths["dirty pool to warm, by demand"]
    ratio = demand["spread"]["median"] / paths["fetch into a clean HBM"]["spread"]["median"]
    assert demand["ratios"][0]["value"] == pytest.approx(ratio)


def test_a_fetch_of_other_bytes_or_from_another_tier_is_not_timed(setting, monkeypatch):
    right = daemon_paths.push_records

    def shifted(daemon, records):
        right(daemon, SimpleNamespace(ids=records.ids, body=lambda index: records.body((index + 1) % records.count)))

    monkeypatch.setattr(daemon_paths, "push_records", shifted)
    with pytest.raises(WrongBytes, match="local: record 0 of 8 did not arrive as it was sent"):
        bandwidth.bandwidth(setting, lambda: None)
    monkeypatch.setattr(daemon_paths, "push_records", lambda daemon, records: None)
    other = replace(setting, directory=setting.directory / "other")
    other.directory.mkdir()
    with pytest.raises(WrongBytes, match=r"local: the experts were found in \{.seed.: 8\}, not all in dram"):
        bandwidth.bandwidth(other, lambda: None)


@pytest.mark.parametrize(
    ("ratio", "reached"),
    [
        (Ratio(of="its rate", value=0.97, must=0.97), "must"),
        (Ratio(of="its rate", value=0.96, must=0.97), "no"),
        (Ratio(of="a bound", value=1.15, aim=1.15, at_most=True), "aim"),
        (Ratio(of="a bound", value=1.16, aim=1.15, at_most=True), "no"),
        (Ratio(of="a bound", value=1.2, aim=1.1, must=1.5, at_most=True), "must"),
        (Ratio(of="a bound", value=9.0, at_most=True), ""),
    ],
)
def test_a_rate_is_to_be_at_least_its_target_and_a_time_at_most(ratio, reached):
    assert ratio.reached == reached


def test_the_table_is_kept_with_its_notes(tmp_path):
    path = tmp_path / "cache.md"
    ratio = Ratio(of="the fetch", value=1.23, must=1.5, at_most=True)
    row = Row(part="switch", size="full", path="by demand", unit="ms", spread=Spread(median=10, q1=9, q3=11), ratios=(ratio,))
    save([row], {"command": "ooc-moe bench cache"}, path)
    assert "| switch | full | by demand | 10 [9, 11] ms | 1.23 x the fetch | <= 1.5 |  | must |" in path.read_text()
    path.write_text(path.read_text().partition(NOTES)[0] + f"{NOTES}\n\nThe disk does.\n")
    save([replace(row, size="demo")], {}, path)
    assert "| switch | demo |" in path.read_text()
    assert path.read_text().endswith(f"{NOTES}\n\nThe disk does.\n")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sizes": ("huge",)}, "sizes: 'huge' is not one of tiny, demo, full"),
        ({"rounds": 0}, "rounds: 0 is not at least 1"),
        ({"threads": 0}, "threads: 0 is not at least 1"),
        ({"device": "tpu"}, "device: 'tpu' is neither cpu nor cuda"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here: "),
    ],
)
def test_a_mistake_is_named(wrong, said):
    with pytest.raises(InvalidRequest, match=said):
        CacheBench(**wrong)
