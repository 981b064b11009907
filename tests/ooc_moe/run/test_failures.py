"""What goes wrong around a run: it waits, or stops with one line and a checkpoint to go on from; either way it ends as if nothing had been.

A real daemon process; HBM holds less than an optimizer step needs, and DRAM a part of the experts, so that all tiers are always in use.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ooc_moe.cli.main import main
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.run.train import resume, train
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Push
from ooc_moe_server.repair.scan import Slabs
from ooc_moe_wire.errors import CorruptRecord, NotTheWriter, OocMoeError, StaleVersion, TierFull
from tests.conftest import DaemonProcess
from tests.ooc_moe.runs import SILENT, assert_same_end, bodies, end_of, play, tiny_run, updates, wait_for, without_clock
from tests.torture.proxy import LossyProxy

pytestmark = pytest.mark.timeout(120, method="thread")
DRAM = "112KiB"
AGENT = dataclasses.replace(PRESETS["tiny"], pool_size=3, hbm_experts=4)
PPO = PPOConfig(num_envs=4, rollout_steps=4, epochs=1, minibatch_segments=2)


def run_of(run_dir: Path, target: str, **changes: Any) -> RunConfig:
    """Two games of four updates; a checkpoint in the middle of each, and at its end."""
    games = ("pixel/catch", "pixel/avoid")
    return tiny_run(
        run_dir, agent=AGENT, ppo=PPO, store=target, games=games, steps_per_game=64, eval_steps=0, checkpoint_every=2, **changes
    )


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ooc_moe.run.train.write_report", lambda run_dir: run_dir)
    monkeypatch.setattr("ooc_moe.run.train.print_summary", lambda run_dir, console: None)


@dataclasses.dataclass(frozen=True)
class Calm:
    """The run that nothing happens to."""

    run_dir: Path
    experts: dict[int, bytes]

    def assert_equals(self, run_dir: Path, store: RemoteStore) -> None:
        assert without_clock(run_dir) == without_clock(self.run_dir)
        assert_same_end(run_dir, self.run_dir)
        assert bodies(store, f"{run_dir.name}/experts") == self.experts


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, shared_daemon: DaemonProcess) -> Calm:
    run_dir = tmp_path_factory.mktemp("calm")
    store = RemoteStore(shared_daemon.target)
    stats = play(run_of(run_dir, shared_daemon.target), store)
    assert stats.evictions > len(updates(run_dir)) * 20, "experts leave within an update"
    experts = bodies(store, f"{run_dir.name}/experts")
    store.close()
    return Calm(run_dir, experts)


class Training:
    """A run in a thread of its own: `error` is what ended it, None if it came to its end."""

    def __init__(self, target: Callable[[], object], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(target,), daemon=True)
        self._thread.start()

    def _run(self, target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:
            self.error = error

    def wait_for_update(self, number: int) -> None:
        wait_for(lambda: self.error or len(updates(self.run_dir)) >= number)
        assert self.error is None

    def join(self) -> BaseException | None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the run hangs"
        return self.error


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Training]:
    def begin(target: str, **changes: Any) -> Training:
        run_dir = tmp_path / "run"
        return Training(lambda: train(run_of(run_dir, target, **changes), SILENT), run_dir)

    return begin


@pytest.fixture
def proxy(shared_daemon: DaemonProcess) -> Iterator[LossyProxy]:
    proxy = LossyProxy(shared_daemon.target)
    yield proxy
    proxy.close()


def assert_says_how_to_go_on(error: BaseException | None, training: Training, kind: type[OocMoeError], *words: str) -> None:
    assert isinstance(error, kind)
    saved = end_of(training.run_dir, "latest.pt").progress
    (note,) = error.__notes__
    assert f"checkpoint of step {saved.step} with ooc-moe train --resume --run-dir {training.run_dir}" in note
    assert [word for word in words if word not in str(error)] == []


# It waits


def test_cut_connections_are_only_a_pause(begin, calm, proxy, shared_daemon):
    training = begin(proxy.target, plane="stream")
    for after in (1, 3, 6):
        training.wait_for_update(after)
        proxy.lose_answers()
        time.sleep(0.05)  # Something is on its way, and its answer will not come.
        proxy.cut()
    assert training.join() is None
    store = RemoteStore(shared_daemon.target)
    calm.assert_equals(training.run_dir, store)
    store.delete_bank("run/experts")
    store.close()


def test_a_trainer_that_is_killed_goes_on_where_its_daemon_lived_on(calm, shared_daemon, tmp_path):
    """kill -9 between two checkpoints: leases and pushes are left behind, and experts newer than the checkpoint."""
    run_dir = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; from ooc_moe.run.train import train, RunConfig;"
        "train(RunConfig.from_json(sys.argv[1], Path(sys.argv[2])), Console(quiet=True))"
    )
    config = run_of(run_dir, shared_daemon.target, plane="local")
    with subprocess.Popen([sys.executable, "-c", program, config.to_json(), str(run_dir)]) as process:
        wait_for(lambda: len(updates(run_dir)) >= 3)
        process.kill()
    resume(run_dir, SILENT)
    store = RemoteStore(shared_daemon.target)
    calm.assert_equals(run_dir, store)
    store.delete_bank("run/experts")
    store.close()


@pytest.mark.slow  # The soak has a slow disk too.
def test_a_slow_disk_only_takes_time(begin, calm, start_daemon):
    daemon = start_daemon(dram_bytes=DRAM, command=(sys.executable, "-m", "tests.torture.slow_disk", "0.004"))
    training = begin(daemon.target)
    assert training.join() is None
    store = RemoteStore(daemon.target)
    assert store.stats().total.nvme_reads > 0
    calm.assert_equals(training.run_dir, store)
    store.close()


# It stops


def test_a_daemon_that_stays_away_stops_the_run_with_one_line(begin, calm, start_daemon, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ooc_moe.session.session.RemoteStore", functools.partial(RemoteStore, patience_s=1.0))
    monkeypatch.setattr("ooc_moe_client.remote.connection.FIRST_CONTACT_S", 0.5)
    daemon = start_daemon(dram_bytes=DRAM)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    arguments = ["train", "--resume", "--run-dir", str(run_dir), "--quiet"]
    training = begin(daemon.target)
    training.wait_for_update(3)
    daemon.kill()
    assert_says_how_to_go_on(training.join(), training, OocMoeError, daemon.target)
    with pytest.raises(SystemExit) as still_away:
        main(arguments)
    assert still_away.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    daemon.start()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    store = RemoteStore(daemon.target)
    calm.assert_equals(run_dir, store)
    store.close()


@pytest.mark.parametrize("writes", [pytest.param(False, id="holds the bank", marks=pytest.mark.slow), pytest.param(True, id="wrote to it")])
def test_another_writer_stops_the_run(begin, calm, proxy, shared_daemon, writes):
    training = begin(proxy.target, plane="stream")
    training.wait_for_update(3)
    proxy.refuses = True
    proxy.cut()
    other = RemoteStore(shared_daemon.target)
    wait_for(lambda: takes_over(other, "run/experts"))
    if writes:
        experts = bodies(other, "run/experts")
        written = {info.expert: info.version for info in other.list_experts("run/experts") if info.version}
        outcomes = other.push("run/experts", [Push(expert=e, base_version=v, body=experts[e ^ 1]) for e, v in written.items()])
        assert all(isinstance(outcome, int) for outcome in outcomes)
        other.release("run/experts")
    proxy.refuses = False
    error = training.join()
    assert_says_how_to_go_on(error, training, StaleVersion if writes else NotTheWriter, "run/experts")
    other.close()
    resume(training.run_dir, SILENT, store=shared_daemon.target)
    store = RemoteStore(shared_daemon.target)
    calm.assert_equals(training.run_dir, store)
    store.delete_bank("run/experts")
    store.close()


def takes_over(store: RemoteStore, bank: str) -> bool:
    try:
        store.open_for_writing(bank)
    except NotTheWriter:
        return False
    return True


def test_a_second_trainer_of_a_bank_is_refused_at_once(begin, shared_daemon, tmp_path):
    holder = RemoteStore(shared_daemon.target)
    (spec,) = AGENT.bank_specs("held", seed=7)
    holder.create_bank(spec)
    holder.open_for_writing(spec.name)
    with pytest.raises(NotTheWriter):
        train(run_of(tmp_path / "held", shared_daemon.target), SILENT)
    assert updates(tmp_path / "held") == []
    holder.close()


def test_a_corrupt_expert_stops_the_run_and_its_checkpoint_is_sound(begin, calm, start_daemon):
    daemon = start_daemon(dram_bytes=DRAM)
    training = begin(daemon.target)
    store = RemoteStore(daemon.target)
    # More than once: an expert that is in HBM, or on its way, is written anew before anybody reads what was damaged.
    for number in (3, 5, 6, 7):
        wait_for(lambda number=number: training.error or len(updates(training.run_dir)) >= number)
        if training.error:
            break
        snapshot_id = end_of(training.run_dir, "latest.pt").snapshot_id
        changed = changed_since(store, "run/experts", snapshot_id)
        daemon.kill()
        if end_of(training.run_dir, "latest.pt").snapshot_id == snapshot_id:
            flip_newest(daemon.data_dir, changed)
        daemon.start()
    assert_says_how_to_go_on(training.join(), training, CorruptRecord, "run/experts", "expert")
    resume(training.run_dir, SILENT)
    calm.assert_equals(training.run_dir, store)
    store.close()


def changed_since(store: RemoteStore, bank: str, snapshot_id: int) -> set[int]:
    def sums(name: str) -> dict[int, int]:
        return {info.expert: info.optimizer_xxh3 for info in store.list_experts(name) if info.version}

    store.fork_bank(bank, "then", snapshot_id=snapshot_id)
    then, now = sums("then"), sums(bank)
    store.delete_bank("then")
    return {expert for expert, checksum in now.items() if then.get(expert) != checksum}


def flip_newest(data_dir: Path, experts: set[int]) -> None:
    """Flips one byte in the newest record of each."""
    slabs = Slabs(data_dir)
    headers = {slot: header for slot in slabs.slots() if (header := slabs.header(slot)) is not None and header.expert in experts}
    slabs.close()
    for expert in experts:
        slot = max((slot for slot in headers if headers[slot].expert == expert), key=lambda slot: headers[slot].version)
        with (data_dir / "slabs" / f"{slot.record_bytes}.slab").open("r+b") as file:
            place = slot.index * slot.record_bytes + 5000
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1]))


def test_a_full_store_stops_the_run_until_there_is_room(begin, calm, start_daemon, tmp_path):
    full = start_daemon(data_dir=tmp_path / "store", dram_bytes=DRAM, arguments=("--nvme-bytes", "220KiB"))  # Nine records.
    training = begin(full.target)
    assert_says_how_to_go_on(training.join(), training, TierFull)
    assert len(updates(training.run_dir)) < 8
    full.stop()
    roomy = start_daemon(data_dir=tmp_path / "store", dram_bytes=DRAM)
    resume(training.run_dir, SILENT, store=roomy.target)
    store = RemoteStore(roomy.target)
    calm.assert_equals(training.run_dir, store)
    store.close()
