"""The store benchmark checks that bytes were moved, names the peers that it lacks, and leaves no process and no file behind."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, measure, warm_up
from ooc_moe.bench.store import benchmark
from ooc_moe.bench.store.benchmark import TITLES, StoreBench
from ooc_moe.bench.store.records import Records, filled_records
from ooc_moe.bench.store.results import NOTES, Latency, Ratio, Results, StatsRow, markdown, save, with_ratios
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.commands import exit_code

MIB = 1 << 20
# Our own paths and the peers that need nothing installed.
BUILT_IN = (
    "fetch/local,fetch/local-xxh3,fetch/stream,fetch/stream-unix,fetch/memcpy,fetch/tcp,fetch/grpc,"
    "push/local,push/stream,push/raw,nvme/local,nvme/raw"
)


def bench(*words: str) -> int:
    return exit_code("bench", "store", "--quick", "--sizes", "64KiB", *words)


def test_a_quick_run_measures_both_planes_and_the_peers_that_need_nothing(tmp_path, capsys):
    assert bench("--data-dir", str(tmp_path / "disk"), "--rounds", "2", "--paths", BUILT_IN, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert [f"{row['group']}/{row['path'].replace(' ', '-')}" for row in measured["rows"]] == BUILT_IN.split(",")
    assert measured["missing"] == []
    assert all(0 < row["spread"]["q1"] <= row["spread"]["median"] <= row["spread"]["q3"] for row in measured["rows"])
    rows = {(row["group"], row["path"]): row for row in measured["rows"]}
    for group, path, peer in (("fetch", "local", "memcpy"), ("fetch", "stream", "tcp"), ("push", "local", "raw"), ("nvme", "local", "raw")):
        ratio = next(ratio for ratio in rows[group, path]["ratios"] if ratio["peer"] == peer)
        medians = [rows[group, name]["spread"]["median"] for name in (path, peer)]
        assert ratio["value"] == pytest.approx(medians[0] / medians[1])
    assert list((tmp_path / "disk").iterdir()) == []


def test_statistics_are_timed_while_four_clients_stream(tmp_path, capsys):
    assert bench("--data-dir", str(tmp_path), "--rounds", "1", "--paths", "stats", "--json") == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert stats["streams"] == 4
    assert stats["served"] > 0
    assert stats["calls"] > 0
    for latency in (stats["latency"], stats["echo"]):
        assert 0 < latency["p50_ms"] <= latency["p99_ms"] <= latency["max_ms"]


@pytest.fixture
def records():
    with filled_records(64 << 10, 4) as four:
        yield four


def copies(records: Records, moved: range) -> Callable[[], None]:
    def run() -> None:
        for index in moved:
            records.into(index)[:] = records.body(index)

    return run


def test_a_path_that_does_not_move_every_record_is_not_measured(records):
    warm_up([TimedPath(name="whole", run=copies(records, range(4)), check=records.check)], before_each=records.blank)
    for moved in (range(0), range(3)):
        # An earlier path has left the right bytes in the destination. They must not count for this path.
        copies(records, range(4))()
        with pytest.raises(WrongBytes, match="lazy: record"):
            warm_up([TimedPath(name="lazy", run=copies(records, moved), check=records.check)], before_each=records.blank)


def test_every_round_runs_every_path_once_in_an_order_of_its_own():
    ran: list[str] = []
    paths = [TimedPath(name=name, run=lambda name=name: ran.append(name), check=lambda: None) for name in "abcd"]  # type: ignore[misc]
    samples = measure(paths, num_bytes=1, calls=1, rounds=8, order=random.Random(0), on_run=lambda: None)
    rounds = [tuple(ran[start : start + 4]) for start in range(0, 32, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 1
    assert [len(values) for values in samples.values()] == [8] * 4


def test_a_path_with_a_clock_of_its_own_is_measured_by_it():
    prepared: list[int] = []
    path = TimedPath(name="own", run=lambda: 0.5, check=lambda: None, prepare=lambda: prepared.append(1))
    samples = measure([path], num_bytes=10**9, calls=3, rounds=2, order=random.Random(0), on_run=lambda: None)
    assert samples == {"own": [2.0, 2.0]}
    assert len(prepared) == 6


def test_peers_that_are_not_installed_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    find_spec, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("pyarrow", "ray") else find_spec(name, *rest))
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if name == "fio" else which(name, *rest))
    assert bench("--data-dir", str(tmp_path), "--paths", "fetch/memcpy,fetch/flight,fetch/flight-put,fetch/ray,push/fio") == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("missing")] == [
        "missing: ray (pip install 'ooc-moe[bench]')",
        "missing: pyarrow (pip install 'ooc-moe[bench]')",
        "missing: fio (apt install fio)",
    ]
    assert "memcpy" in shown
    assert "flight" not in shown.partition("missing")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--paths", "fetch/memcopy"], "paths: 'fetch/memcopy' is not one of fetch, push"),
        (["--sizes", "5000"], "sizes: 5000 bytes is not a multiple of 4096"),
        (["--rounds", "0"], "rounds: 0 is not 1 to 1000"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys, words, said):
    assert bench("--data-dir", str(tmp_path), *words) == 2
    assert said in capsys.readouterr().err


def test_a_disk_or_a_memory_that_is_too_small_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.provenance, "available_memory_bytes", lambda: 1 << 30)
    with pytest.raises(InvalidRequest, match=r"memory: 7.75 GiB are needed for sets of 768 MiB, 1 GiB"):
        benchmark.run(StoreBench(data_dir=tmp_path), None)  # type: ignore[arg-type]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match=r"disk at .* are free; smaller --sizes need less"):
        benchmark.run(StoreBench(data_dir=tmp_path), None)  # type: ignore[arg-type]


def test_ratios_are_judged_against_what_must_be_reached_and_what_is_aimed_at():
    medians = {"local": [8.6], "memcpy": [10.0], "ray": [8.7], "tcp": [1.0]}
    local, *others = with_ratios("fetch", 8 * MIB, medians)
    assert [(ratio.peer, round(ratio.value, 2), ratio.reached) for ratio in local.ratios] == [("memcpy", 0.86, "must"), ("ray", 0.99, "no")]
    assert all(row.ratios == () for row in others)
    assert with_ratios("fetch", 8 * MIB, medians | {"local": [9.5]})[0].ratios[0].reached == "aim"
    assert with_ratios("fetch", 24 * MIB, medians)[0].ratios[0].reached == ""
    assert Ratio(peer="ray", value=1.5, must=1.0).reached == "must"


def test_spreads_are_medians_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(median=3.0, q1=2.0, q3=4.0)
    assert Spread.of([7.0]) == Spread(median=7.0, q1=7.0, q3=7.0)


def test_the_saved_table_says_how_it_was_made_and_keeps_the_notes(tmp_path):
    stats = StatsRow(
        record_bytes=MIB,
        calls=10,
        latency=Latency(p50_ms=2.0, p99_ms=12.0, max_ms=30.0),
        echo=Latency(p50_ms=1.0, p99_ms=8.0, max_ms=9.0),
        streams=4,
        served=2.5,
    )
    rows = with_ratios("fetch", 8 * MIB, {"local": [9.0, 9.0], "memcpy": [10.0, 10.0]})
    results = Results(
        rows=tuple(rows), stats=stats, missing=("fio (apt install fio)",), facts={"command": "`ooc-moe bench store`"}, rounds=2
    )
    path = tmp_path / "results" / "store.md"
    save(results, TITLES, path)
    text = path.read_text()
    assert "- command: `ooc-moe bench store`" in text
    assert "- missing: fio (apt install fio)" in text
    assert "| **fetch from DRAM** | local | 8 MiB | 9.00 [9.00, 9.00] | 0.90 x memcpy | 0.85 | 0.95 | must |" in text
    assert "p99 12.0 ms (p50 2.0); an idle server's 8.0 ms | 25 ms | 10 ms | must |" in text
    path.write_text(text[: text.index(NOTES)] + f"{NOTES}\n\nThe copy does.\n")
    save(results, TITLES, path)
    assert path.read_text() == markdown(results, TITLES, notes=f"{NOTES}\n\nThe copy does.\n")


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path):
    command = [sys.executable, "-m", "ooc_moe.cli.main", "bench", "store", "--quick", "--sizes", "64KiB", "--rounds", "1000"]
    command += ["--data-dir", str(tmp_path / "disk"), "--paths", "fetch/local,fetch/tcp"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(started) < 2 and process.poll() is None and time.monotonic() < deadline:  # The daemon and the sender.
        started = [child for child in psutil.Process(process.pid).children() if _stays(child)]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert len(started) == 2
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert list((tmp_path / "disk").iterdir()) == []


def _stays(child: psutil.Process) -> bool:
    """Whether the child neither has ended nor is the process that fills the records and then ends."""
    try:
        return "ooc_moe.bench.store.records" not in child.cmdline()
    except psutil.Error:
        return False
