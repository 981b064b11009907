"""The command line against a real daemon; every mistake is one line that names it, and exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ooc_moe.cli.dashboard import render
from ooc_moe.cli.main import PROGRAM, main
from ooc_moe.cli.runs import EVALUATION
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import RunConfig
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Push
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import stats_pb2

LAYOUT = Layout(parameters=(TensorSpec(name="w", shape=(4, 8)),), optimizer=(TensorSpec(name="w.exp_avg", shape=(4, 8)),))


class Ran:
    """What a command printed, spaces run together, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.raw, self.out, self.err = code, out, " ".join(out.split()), err


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the console script in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("OOC_MOE_STORE", raising=False)

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Ran(int(end.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture
def store(shared_daemon: Any) -> Iterator[RemoteStore]:
    """A client of the daemon that these tests share."""
    opened = RemoteStore(shared_daemon.target, trainer="tester")
    yield opened
    opened.close()


@pytest.fixture
def bank(store: RemoteStore, request: pytest.FixtureRequest) -> str:
    """A bank of 6 experts, 2 of them written, named after its test."""
    name = request.node.name[:100]
    store.create_bank(BankSpec(name=name, num_experts=6, layout=LAYOUT))
    body = np.zeros(LAYOUT.body_bytes, np.uint8)
    assert store.push(name, [Push(expert=expert, base_version=0, body=body) for expert in (0, 3)]) == [*_versions(store, name)]
    store.release(name)
    return name


def _versions(store: RemoteStore, bank: str) -> list[int]:
    return [expert.version for expert in store.list_experts(bank) if expert.version]


def assert_refused(ran: Ran, *words: str) -> None:
    """One line on stderr, starting with "error: ", that holds the words; exit code 2; nothing on stdout."""
    assert ran.code == 2
    assert ran.raw == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    for word in words:
        assert word in ran.err


# Statistics


def test_stats_shows_tiers_banks_and_trainers(run: Run, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    hbm = stats_pb2.HbmStats(bank=bank, capacity_experts=8, resident_experts=5, expert_bytes=1024, hits=3, misses=1, prefetch_useful=7)
    store.report_trainer([hbm], "training krull, step 12288")
    ran = run("stats", "--store", shared_daemon.target)
    assert ran.code == 0
    for part in ("DRAM", "32.0M", "NVMe", "HBM", "8.0K", bank, "tester", "training krull, step 12288", "5/8 75.0% 7 0 0 87.5%", "push"):
        assert part in ran.out


def test_stats_in_a_pipe_have_whole_names(run: Run, shared_daemon: Any, bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    ran = run("stats", "--store", shared_daemon.target)
    (line,) = [line for line in ran.raw.splitlines() if line.startswith(f"{bank} ")]
    assert line.split()[2] == "24.0K"
    assert "…" not in ran.raw


def test_stats_fit_80_columns_whatever_the_names_and_the_numbers() -> None:
    many = 999_999
    access = stats_pb2.AccessStats(hits=many, fetched_experts=many, pushed_experts=many, push_refused=many, nvme_reads=many, seeded=10**12)
    tier = stats_pb2.TierStats(
        capacity_bytes=999 << 30, used_bytes=999 << 20, num_records=many, evictions=many, read_bytes=999 << 30, written_bytes=999 << 30
    )
    hbm = stats_pb2.HbmStats(bank="b" * 100, capacity_experts=512, resident_experts=512, hits=1, prefetch_useful=many, stall_s=9999)
    now = stats_pb2.Stats(uptime_s=9, total=access, dram=tier, nvme=tier, data_dir="/d" * 100)
    now.dram.dirty_bytes, now.queues.local_sessions = 999 << 20, 64
    now.trainers.add(trainer="t" * 100, access=access, hbm=[hbm], activity="a" * 100)
    now.banks.add(bank="b" * 100, access=access, nvme_bytes=999 << 30, writer_id="w" * 32)
    for name in ("commit", "fetch_dram", "fetch_nvme", "fetch_seed", "nvme_read", "push"):
        now.latency[name].CopyFrom(stats_pb2.Latency(count=1, p50_ms=999, p99_ms=9999))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(now, stats_pb2.Stats(uptime_s=8)))
    lines = console.export_text().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "999.0M not yet on NVMe" in lines[0]
    assert any(line.startswith("Waiting") and line.endswith("local 64") for line in lines)
    headings = "used size records served hits evicted in/s out/s doing resident prefetch useful late wasted stalled refused writer push p99"
    assert {*headings.split(), "recall"} <= set(" ".join(lines).split())
    assert [line.split().count("999,999") for line in lines if line.startswith(("DRAM", "NVMe", "b"))] == [3, 3, 3]


def test_stats_as_json_is_one_document_with_the_names_of_the_proto(run: Run, shared_daemon: Any, bank: str) -> None:
    document = json.loads(run("stats", "--store", shared_daemon.target, "--json").raw)
    assert document["dram"]["capacity_bytes"] == 32 << 20
    assert document["total"]["prefetch_wasted"] == 0
    assert bank in [entry["bank"] for entry in document["banks"]]
    assert [text for text in strings_in(document) if text.lstrip("-").isdecimal()] == []


def strings_in(document: Any) -> Iterator[str]:
    """Every string that is a value somewhere in a JSON document."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, list | dict):
        for each in document.values() if isinstance(document, dict) else document:
            yield from strings_in(each)


def test_stats_watched_as_json_prints_a_document_a_line_until_ctrl_c(shared_daemon: Any) -> None:
    command = [sys.executable, "-m", "ooc_moe", "stats", "--store", shared_daemon.unix_target, "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        uptimes = [json.loads(process.stdout.readline())["uptime_s"] for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert uptimes == sorted(uptimes)
    assert uptimes[0] < uptimes[2]
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_the_store_may_be_named_by_the_environment(run: Run, shared_daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOC_MOE_STORE", shared_daemon.unix_target)
    assert run("stats").code == 0


@pytest.mark.parametrize("command", [("stats",), ("stats", "--watch"), ("bank", "ls"), ("snapshot", "ls")])
def test_a_daemon_that_is_away_is_one_line(run: Run, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ooc_moe_client.remote.connection.FIRST_CONTACT_S", 0.2)
    target = f"unix:{tmp_path}/nobody.sock"
    assert_refused(run(*command, "--store", target), "daemon at", target)


@pytest.mark.parametrize("interval", [0.01, "nan", "inf"])
def test_an_interval_that_cannot_be_is_refused(run: Run, shared_daemon: Any, interval: object) -> None:
    assert_refused(run("stats", "--store", shared_daemon.target, "--watch", "--interval", interval), "interval", str(interval))


@pytest.mark.parametrize("address", ["storage", "127.0.0.1:99999", "127.0.0.1:0", "unix:", ":50051"])
def test_an_address_that_is_none_is_refused(run: Run, address: str) -> None:
    assert_refused(run("stats", "--store", address), "store", repr(address))


# Banks and snapshots


def test_banks_are_listed_with_their_sizes(run: Run, shared_daemon: Any, bank: str) -> None:
    ran = run("bank", "ls", "--store", shared_daemon.target)
    assert ran.code == 0
    assert f"{bank} 6 2 24.0 KiB 12.0 KiB" in ran.out


def test_a_listing_in_a_pipe_is_one_line_for_each_bank_with_its_whole_name(
    run: Run, shared_daemon: Any, store: RemoteStore, bank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    names = [f"{letter * 40}/{letter * 80}" for letter in "xy"]
    for name in names:
        store.create_bank(BankSpec(name=name, num_experts=1, layout=LAYOUT))
    snapshot = store.create_snapshot(names, name="n" * 90)
    heading, *lines = run("bank", "ls", "--store", shared_daemon.target).raw.splitlines()
    assert heading.split() == ["bank", "experts", "written", "bytes", "record", "writer", "created"]
    assert {bank, *names} <= {line.split()[0] for line in lines}
    assert [line.split()[:4] for line in run("snapshot", "ls", "--store", shared_daemon.target).raw.splitlines() if "n" * 90 in line] == [
        [str(snapshot.id), "n" * 90, ",".join(names), "0"]
    ]
    assert any(
        line.endswith("made from the seed when they are fetched")
        for line in run("bank", "show", names[0], "--store", shared_daemon.target).raw.splitlines()
    )


def test_listings_as_json_have_numbers(run: Run, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    here = ("--store", shared_daemon.target, "--json")
    (listed,) = [each for each in json.loads(run("bank", "ls", *here).raw) if each["bank"] == bank]
    assert (listed["num_experts"], listed["num_written"], listed["written_bytes"], listed["record_bytes"]) == (6, 2, 24576, 12288)
    shown = json.loads(run("bank", "show", bank, *here).raw)
    assert shown["tiers"] == {"dram": 2, "nvme": 2, "seed": 4}
    assert [(tensor["tensor"], tensor["shape"], tensor["bytes"]) for tensor in shown["tensors"]] == [
        ("w", [4, 8], 128),
        ("w.exp_avg", [4, 8], 128),
    ]
    snapshot = store.create_snapshot([bank])
    (kept,) = json.loads(run("snapshot", "ls", "--bank", bank, *here).raw)
    assert (kept["id"], kept["banks"], kept["num_experts"], kept["bytes"]) == (snapshot.id, [bank], 2, 24576)


def test_several_banks_make_one_snapshot(run: Run, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    other = f"{bank[:90]}-other"
    store.create_bank(BankSpec(name=other, num_experts=1, layout=LAYOUT))
    for words in ((bank, other), (f"{bank},{other}",)):
        assert f"of {bank}, {other}: 2 experts" in run("snapshot", "create", *words, "--store", shared_daemon.target).out


def test_a_bank_is_shown_with_its_tensors_and_where_its_experts_are(run: Run, shared_daemon: Any, bank: str) -> None:
    out = run("bank", "show", bank, "--store", shared_daemon.target).out
    assert "6, 2 of them written" in out
    assert "2 on NVMe" in out
    assert "w.exp_avg 4 x 8 float32" in out


def test_a_fork_of_a_snapshot_has_its_experts(run: Run, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    snapshot = store.create_snapshot([bank], name=f"{bank}-now")
    copy = f"{bank[:90]}-copy"
    assert (
        f"made {copy} with 6 experts, 2 of them written"
        in run("bank", "fork", bank, copy, "--snapshot", snapshot.id, "--store", shared_daemon.target).out
    )
    assert store.get_bank(copy).num_written == 2


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what the user types on the terminal."""
    return lambda typed: monkeypatch.setattr("sys.stdin", io.StringIO(typed))


def test_removing_a_bank_asks_first(run: Run, answer: Any, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    command = ["bank", "rm", bank, "--store", shared_daemon.target]
    for no in ("n\n", "\n", ""):
        answer(no)
        refused = run(*command)
        assert refused.code == 1
        assert "2 written experts" in refused.out
        assert store.get_bank(bank).num_written == 2
    answer("y\n")
    assert run(*command).code == 0
    assert bank not in [left.spec.name for left in store.list_banks()]


def test_a_snapshot_is_created_listed_restored_and_removed(run: Run, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    here = ("--store", shared_daemon.target)
    assert f"({bank}-kept) of {bank}: 2 experts" in run("snapshot", "create", bank, "--name", f"{bank}-kept", *here).out
    (snapshot,) = store.list_snapshots(bank)
    assert f"{snapshot.id} {bank}-kept {bank} 2 24.0 KiB" in run("snapshot", "ls", "--bank", bank, *here).out
    store.push(bank, [Push(expert=5, base_version=0, body=np.zeros(LAYOUT.body_bytes, np.uint8))])
    store.release(bank)
    assert run("snapshot", "restore", snapshot.id, "--yes", *here).code == 0
    assert store.get_bank(bank).num_written == 2
    assert run("snapshot", "rm", snapshot.id, "--yes", *here).code == 0
    assert store.list_snapshots(bank) == []


def test_restoring_a_snapshot_asks_first(run: Run, answer: Any, shared_daemon: Any, store: RemoteStore, bank: str) -> None:
    snapshot = store.create_snapshot([bank], name=f"{bank}-asked")
    before = _versions(store, bank)
    answer("n\n")
    assert run("snapshot", "restore", snapshot.id, "--store", shared_daemon.target).code == 1
    assert _versions(store, bank) == before


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("bank", "show", "nosuch"), "'nosuch'"),
        (("bank", "rm", "nosuch", "--yes"), "'nosuch'"),
        (("bank", "fork", "nosuch", "other"), "'nosuch'"),
        (("snapshot", "create", "nosuch"), "'nosuch'"),
        (("snapshot", "ls", "--bank", "nosuch"), "'nosuch'"),
        (("snapshot", "restore", "4711", "--yes"), "4711"),
        (("snapshot", "rm", "4711", "--yes"), "4711"),
    ],
)
def test_what_does_not_exist_is_named(run: Run, shared_daemon: Any, command: tuple[str, ...], named: str) -> None:
    assert_refused(
        run(*command, "--store", shared_daemon.target), named, "snapshot" if command[0] == "snapshot" and named == "4711" else "bank"
    )


def test_a_fork_to_a_name_that_is_taken_is_refused(run: Run, shared_daemon: Any, bank: str) -> None:
    assert_refused(run("bank", "fork", bank, bank, "--store", shared_daemon.target), bank)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("bank show", "BANK"),
        ("bank rm", "BANK"),
        ("bank fork", "SOURCE"),
        ("bank fork first/experts", "NEW"),
        ("snapshot create", "BANK"),
        ("snapshot restore", "ID"),
        ("branch", "RUN_DIR"),
        ("branch runs/first", "NEW_DIR"),
        ("eval", "RUN_DIR"),
        ("report", "RUN_DIR"),
    ],
)
def test_an_argument_that_is_missing_is_named_as_in_the_help(run: Run, words: str, missing: str) -> None:
    command = " ".join(words.split()[: 1 if words.split()[0] in PROGRAM.commands else 2])
    assert_refused(run(*words.split()), f"error: {missing} is required; see `ooc-moe {command} --help`\n")


# Reports


def test_a_report_of_a_run_is_written_and_its_path_printed(run: Run, half_a_run: Path) -> None:
    ran = run("report", half_a_run)
    assert ran.code == 0
    assert ran.raw.strip() == f"report: {half_a_run}/report/index.html"
    assert (half_a_run / "report" / "index.html").exists()


def test_a_report_of_no_run_is_refused(run: Run, tmp_path: Path) -> None:
    assert_refused(run("report", tmp_path / "nothing"), str(tmp_path / "nothing"))


# Training


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that `train` was asked to train; nothing is trained."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("ooc_moe.run.train.train", lambda config, console: configs.append(config))
    return configs


def test_every_flag_of_train_reaches_the_configuration(run: Run, configured: list[RunConfig], tmp_path: Path) -> None:
    flags = {
        "--games": "krull,pixel/catch",
        "--preset": "tiny",
        "--run-dir": tmp_path / "r",
        "--steps-per-game": 512,
        "--seed": 3,
        "--store": "storage:50051",
        "--plane": "stream",
        "--from-bank": "older/experts",
        "--checkpoint-every": 5,
        "--eval-envs": 2,
        "--eval-episodes": 4,
        "--eval-steps": 77,
        "--device": "cuda",
        "--threads": 1,
        "--frame-size": 64,
        "--num-experts": 24,
        "--hbm-experts": 6,
        "--dram-experts": 12,
        "--prefetch": "schedule",
        "--prefetch-admission": "observe",
        "--routing": "token",
        "--banks": "per-layer",
        "--num-envs": 4,
        "--rollout-steps": 32,
        "--epochs": 2,
        "--learning-rate": 0.003,
        "--router-noise": 0,
        "--balance-weight": 0,
        "--recognise": "oracle",
        "--exemplars-per-game": 0,
        "--belief-smoothing": 0,
        "--belief-switch-at": 0.5,
    }
    switches = ("--no-grow", "--no-anneal", "--no-replay-routing", "--no-detect-unknown")
    ran = run("train", *(word for flag in flags.items() for word in flag), *switches)
    assert (ran.code, ran.err) == (0, "")
    (config,) = configured
    assert (config.games, config.run_dir, config.store, config.plane, config.from_bank) == (
        ("krull", "pixel/catch"),
        tmp_path / "r",
        "storage:50051",
        "stream",
        "older/experts",
    )
    assert (config.steps_per_game, config.seed, config.checkpoint_every) == (512, 3, 5)
    assert (config.eval_envs, config.eval_episodes, config.eval_steps) == (2, 4, 77)
    assert (config.device, config.threads, config.prefetch, config.prefetch_admission) == ("cuda", 1, "schedule", "observe")
    agent, ppo = config.agent, config.ppo
    assert (agent.frame_size, agent.num_experts, agent.hbm_experts, agent.dram_experts) == (64, 24, 6, 12)
    assert (agent.routing, agent.banks) == ("token", "per-layer")
    assert (ppo.num_envs, ppo.rollout_steps, ppo.epochs, ppo.learning_rate) == (4, 32, 2, 0.003)
    assert (agent.router_noise, agent.balance_weight) == (0, 0)
    assert (config.recognise, config.exemplars_per_game) == ("oracle", 0)
    assert (config.belief_smoothing, config.belief_switch_at) == (0, 0.5)
    assert (agent.grow, ppo.anneal, ppo.replay_routing, config.detect_unknown) == (False,) * 4


def test_without_flags_the_preset_and_the_defaults_hold(run: Run, configured: list[RunConfig]) -> None:
    assert run("train", "--games", "krull").code == 0
    (config,) = configured
    assert config.agent == PRESETS["demo"]
    assert config == RunConfig(run_dir=config.run_dir, games=("krull",), agent=PRESETS["demo"])
    assert config.run_dir.parent == Path("runs")


def test_a_name_is_a_directory_below_runs(run: Run, configured: list[RunConfig]) -> None:
    assert run("train", "--games", "krull", "--name", "first").code == 0
    assert configured[0].run_dir == Path("runs/first")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--games", "krul"], ["krul", "krull"]),
        (["--games", ","], ["games", "','"]),
        (["--games", "krull,,pong"], ["games", "'krull,,pong'"]),
        ([], ["--games is required, for example --games krull,road_runner. `ooc-moe games` lists them."]),
        (["--games", "krull", "--preset", "huge"], ["preset: 'huge' is not one of tiny, demo, full"]),
        (["--games", "krull", "--hbm-experts", "0"], ["hbm_experts", "0"]),
        (["--games", "krull", "--dram-experts", "-1"], ["dram_experts", "-1"]),
        (["--games", "krull", "--hbm-experts", "1", "--banks", "per-layer"], ["hbm_experts", "1"]),
        (["--games", "krull", "--prefetch", "maybe"], ["prefetch: 'maybe' is not one of off, detector, schedule"]),
        (["--games", "krull", "--routing", "maybe"], ["routing: 'maybe' is not one of pool, token"]),
        (["--games", "krull", "--rollout-steps", "7"], ["rollout_steps", "7"]),
        (["--games", "krull", "--learning-rate", "0"], ["learning_rate", "0"]),
        (["--games", "krull", "--learning-rate", "inf"], ["learning_rate", "inf"]),
        (["--games", "krull", "--seed", "x"], ["seed: 'x' is not a whole number"]),
        (["--games", "krull,boxing", "--num-experts", "8", "--no-grow"], ["num_experts: 8 is not at least 16", "pool_size 4", "grow"]),
        (["--games", "krull", "--exemplars-per-game", "0"], ["exemplars_per_game: 0", "detect_unknown"]),
        (["--games", "krull", "--gmaes", "x"], ["unknown option --gmaes; did you mean --games?"]),
        (["--games", "krull", "--device", "tpu"], ["device", "'tpu'"]),
        (["--games", "krull", "--device", "cuda:99"], ["device", "'cuda:99'"]),
        (["--games", "krull", "--store", "storage"], ["store", "'storage'"]),
        (["--games", "krull", "--plane", "maybe"], ["plane: 'maybe' is not one of auto, stream, local"]),
        (["--games", "krull", "--frame-size", "5"], ["frame_size", "5"]),
        (["--games", "krull", "--name", "other"], ["other"]),
        (["--resume", "--games", "krull"], ["resume", "--games"]),
        (["--resume", "--num-experts", "4"], ["leave out --num-experts"]),
        (["--resume"], ["resume"]),
    ],
)
def test_a_mistake_on_the_command_line_of_train_is_one_line(run: Run, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    assert_refused(run("train", "--run-dir", tmp_path / "r", *flags) if flags != ["--resume"] else run("train", *flags), *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["bad name", "é", "x" * 101, ".."])
def test_a_run_whose_banks_cannot_carry_its_name_is_refused_before_anything_is_made(run: Run, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name if name != ".." else Path("/")
    assert_refused(run("train", "--games", "pixel/catch", "--preset", "tiny", "--run-dir", directory), "run_dir", str(directory))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_is_one_directory(run: Run, configured: list[RunConfig], name: str) -> None:
    assert_refused(run("train", "--games", "krull", "--name", name), "name", repr(name))
    assert configured == []


def test_without_ale_py_a_game_that_needs_it_is_refused_before_anything_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ale_py.vector_env", None)
    assert_refused(run("train", "--games", "pixel/catch,krull", "--run-dir", tmp_path / "r"), "'krull' needs ale-py", "ooc-moe[atari]")
    assert not (tmp_path / "r").exists()


def test_a_run_directory_that_cannot_be_made_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--games", "pixel/catch", "--preset", "tiny", "--run-dir", tmp_path / "file" / "r")
    assert_refused(run("train", *flags), "run_dir", str(tmp_path / "file" / "r"))


def test_a_full_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: RunConfig, console: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/r/metrics.jsonl")

    monkeypatch.setattr("ooc_moe.run.train.train", full)
    assert_refused(run("train", "--games", "krull"), "runs/r/metrics.jsonl", "No space left")


def test_a_run_that_diverges_is_one_line_and_its_bank_holds_only_numbers(
    run: Run, tmp_path: Path, shared_daemon: Any, store: RemoteStore
) -> None:
    flags = ("--games", "pixel/catch", "--preset", "tiny", "--run-dir", tmp_path / "diverging", "--store", shared_daemon.target, "--quiet")
    ran = run("train", *flags, "--num-envs", 4, "--rollout-steps", 16, "--epochs", 2, "--learning-rate", 1e30)
    assert_refused(ran, "learning_rate", "1e+30")
    bank = store.get_bank("diverging/experts")
    into = np.empty((bank.spec.num_experts, bank.spec.layout.body_bytes), np.uint8)
    for _ in store.fetch("diverging/experts", range(len(into)), into=lambda expert: into[expert].data):
        pass
    assert all(bank.spec.layout.nonfinite_tensor(body.data) is None for body in into)


def test_resuming_what_is_not_a_run_names_the_directory(run: Run, tmp_path: Path) -> None:
    assert_refused(run("train", "--resume", "--run-dir", tmp_path / "r"), str(tmp_path / "r"))


def test_a_daemon_that_is_away_when_training_begins_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ooc_moe_client.remote.connection.FIRST_CONTACT_S", 0.2)
    target = f"unix:{tmp_path}/nobody.sock"
    assert_refused(run("train", "--games", "pixel/catch", "--preset", "tiny", "--run-dir", tmp_path / "r", "--store", target), target)


def test_a_run_begun_from_an_unknown_bank_is_refused(run: Run, tmp_path: Path, shared_daemon: Any) -> None:
    flags = ("--games", "pixel/catch", "--preset", "tiny", "--run-dir", tmp_path / "r", "--store", shared_daemon.target)
    assert_refused(run("train", *flags, "--from-bank", "nosuch"), "'nosuch'")


def test_a_stopped_run_exits_with_130_and_says_where_it_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ooc_moe.run import train

    def stopped(config: RunConfig, console: object) -> None:
        raise train.Interrupted(f"stopped at step 64 of krull; saved in {config.run_dir}")

    monkeypatch.setattr(train, "train", stopped)
    ran = run("train", "--games", "krull", "--run-dir", tmp_path / "r")
    assert ran.code == 130
    assert f"saved in {tmp_path / 'r'}" in ran.raw


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: RunConfig, console: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("ooc_moe.run.train.train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--games", "krull"])


# Evaluation


def test_eval_asks_for_the_run_and_what_was_given(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = []
    monkeypatch.setattr("ooc_moe.evaluation.evaluate.evaluate_run", lambda run_dir, console, **options: asked.append((run_dir, options)))
    flags = ("--store", "storage:50051", "--plane", "local", "--eval-envs", 3, "--recognise", "oracle", "--constants")
    assert run("eval", tmp_path, *flags).code == 0
    options = {"store": "storage:50051", "plane": "local", "eval_envs": 3, "recognise": "oracle", "constants": True}
    assert asked == [(tmp_path, options)]


@pytest.mark.parametrize(
    ("flags", "unseen"), [((), {}), (("--eval-unseen",), {"eval_unseen": True}), (("--no-eval-unseen",), {"eval_unseen": False})]
)
def test_eval_keeps_the_values_of_the_run_unless_a_flag_changes_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], unseen: dict[str, bool]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("ooc_moe.evaluation.evaluate.evaluate_run", lambda run_dir, console, **options: asked.append(options))
    assert run("eval", tmp_path, *flags).code == 0
    assert asked == [{"store": None, "constants": False, **unseen}]


def test_eval_describes_its_options_as_train_does() -> None:
    of_eval, of_train = (
        {option.name: option for group in PROGRAM.commands[name].groups() for option in group.options} for name in ("eval", "train")
    )
    for name in EVALUATION:
        assert (of_eval[name].help, of_eval[name].type) == (of_train[name].help, of_train[name].type)


def test_report_asks_for_the_run_and_those_that_it_is_measured_by(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, list[Path]]] = []
    monkeypatch.setattr(
        "ooc_moe.report.report.write_report", lambda run_dir, single_task: asked.append((run_dir, list(single_task))) or run_dir
    )
    assert run("report", tmp_path, "--single-task", tmp_path / "a", "--single-task", tmp_path / "b").code == 0
    assert run("report", tmp_path).code == 0
    assert asked == [(tmp_path, [tmp_path / "a", tmp_path / "b"]), (tmp_path, [])]


def test_evaluating_what_is_not_a_run_names_the_directory(run: Run, tmp_path: Path) -> None:
    assert_refused(run("eval", tmp_path / "r"), str(tmp_path / "r"))


# Help


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_the_help_of_each_command_shows_an_example_of_it(run: Run, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert ran.code == 0
    assert f"$ ooc-moe {command}" in ran.out


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "train",
            {
                "seed": "0",
                "steps-per-game": "20480",
                "num-experts": "32",
                "pools": "per-layer",
                "routing": "pool",
                "learning-rate": "0.001",
                "protection": "replay",
                "stem-channels": "16,32,32",
            },
        ),
        ("bench store", {"rounds": "15; 3 with --quick"}),
        ("bench cache", {"rounds": "15 of the layer, 5 of the others; 3 and 1 with --quick"}),
        ("bench learning", {"games": "krull,pixel/catch", "steps": "61440; 204800 with --full"}),
    ],
)
def test_help_shows_what_holds_where_an_option_is_not_given(run: Run, command: str, shown: dict[str, str]) -> None:
    options = {option.flag[2:]: option for group in PROGRAM.commands[command].groups() for option in group.options}
    for name, default in shown.items():
        assert (options[name].shown.default or options[name].text(options[name].default)) == default
        assert f"[default: {default}]" in run(*command.split(), "--help").raw


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_every_option_has_a_help_text_and_no_two_have_one_name(command: str) -> None:
    options = [option for group in PROGRAM.commands[command].groups() for option in group.options]
    assert [option.name for option in options if not option.help.endswith((".", "..."))] == []
    flags = [flag for option in options for flag in (option.flag, *option.shown.aliases)]
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("bench store", ("store.benchmark.StoreBench",)),
        ("bench cache", ("cache.options.LayerBench", "cache.options.CacheBench")),
        ("bench learning", ("learning.options.LearningBench",)),
    ],
)
def test_a_benchmark_has_an_option_for_each_field_of_its_configuration(command: str, configs: tuple[str, ...]) -> None:
    options = {option.name for group in PROGRAM.commands[command].groups() for option in group.options}
    for name in configs:
        module, _, config = name.rpartition(".")
        found = getattr(importlib.import_module(f"ooc_moe.bench.{module}"), config)
        assert options >= {field.name for field in dataclasses.fields(found)}


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_help_says_compared_with_and_not_beside(command: str) -> None:
    chosen, topic = PROGRAM.commands[command], PROGRAM.topics.get(command.split()[0], "")
    texts = [topic, chosen.description, *(option.help for group in chosen.groups() for option in group.options)]
    assert [text for text in texts if re.search(r"\bbeside\b", text)] == []


def test_a_flag_without_a_value_is_shown_without_one(run: Run) -> None:
    text = run("bank", "rm", "--help").raw
    assert "--yes" in text
    assert "--no-yes" not in text
    assert "TRUE" not in text.upper().replace("TRUE GAME", "")


def test_the_program_lists_its_commands_and_names_what_is_unknown(run: Run) -> None:
    listed = run("--help")
    assert listed.code == 0
    assert all(name.split()[0] in listed.out for name in PROGRAM.commands)
    assert all(word in run("bank", "--help").out for word in ("ls", "show", "rm", "fork"))
    assert_refused(run("trian"), "unknown command 'trian'; did you mean 'train'?")
    assert_refused(run("bank", "xyz"), "unknown command 'xyz'; `ooc-moe bank --help` lists the commands")
    assert_refused(run("--json"), "unknown option --json; `ooc-moe --help` lists the commands")
    assert_refused(run("bank", "--x"), "unknown option --x; `ooc-moe bank --help` lists the commands")


def test_the_program_prints_its_version(run: Run) -> None:
    ran = run("--version")
    assert (ran.code, ran.raw, ran.err) == (0, f"ooc-moe {version('ooc-moe')}\n", "")


def test_a_completion_script_knows_the_options(run: Run) -> None:
    script = run("--tyro-print-completion", "bash").raw
    assert "--hbm-experts" in script
    assert "snapshot" in script


def test_help_and_statistics_do_not_import_torch() -> None:
    code = (
        "import sys; from ooc_moe.cli.main import PROGRAM; [command.groups() for command in PROGRAM.commands.values()]; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_python_m_is_the_command(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "ooc_moe", "train"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: --games is required")


def test_an_unknown_flag_is_a_usage_error(run: Run) -> None:
    ran = run("train", "--gmaes", "krull")
    assert_refused(ran, "--gmaes")
