"""`ooc-moe-server verify` finds what is damaged, and nothing else. It changes nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass

import pytest

from ooc_moe_server.catalog.catalog import Record
from ooc_moe_server.daemon import cli, data_dir
from ooc_moe_server.repair.verify import verify
from tests.server.engine_store import RECORD, body_of, flip, opened


@dataclass
class Filled:
    """A closed store: experts 1 and 2 written, a snapshot, a fork that shares them, and expert 1 written again."""

    path: object
    records: dict[int, Record]
    snapshot_record: Record

    @property
    def slab(self):
        return self.path / "slabs" / f"{RECORD}.slab"


@pytest.fixture
def filled(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push({1: body_of(1), 2: body_of(2)})
            await store.engine.changes.create_snapshot(["b"], "s")
            await store.engine.changes.fork_bank("b", "fork", 0)
            old = store.bank.record(1)
            await store.push_one(1, 11)
            return Filled(tmp_path, dict(store.bank.records), old)

    with data_dir.held(tmp_path):
        return asyncio.run(scenario())


def tree(path):
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and its output."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ooc-moe-server", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


def test_a_sound_store_is_clean_and_stays_as_it_is(filled):
    before = tree(filled.path)
    command = [sys.executable, "-m", "ooc_moe_server.daemon.cli", "verify", str(filled.path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "clean: 2 banks, 1 snapshots, 3 records of 24.0 KiB\n"
    assert tree(filled.path) == before


def test_a_store_that_was_killed_is_clean_and_an_empty_one_too(filled, tmp_path):
    """The killed store has a WAL, and lacks a manifest that the crash prevented."""
    next((filled.path / "snapshots").iterdir()).unlink()
    with closing(sqlite3.connect(filled.path / "index.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        result = verify(filled.path)
        assert result.is_clean
        assert result.notes == ["manifest snapshots/1.json is missing; the next start writes it"]
    with data_dir.held(tmp_path / "new"):
        assert verify(tmp_path / "new").is_clean


@pytest.mark.parametrize(
    ("offset", "words"),
    [(30, "the header block is damaged"), (5000, "the parameter section's checksum does not match")],
)
def test_a_flipped_byte_of_a_record_is_found_and_all_that_refer_to_it_are_named(filled, run, offset, words):
    flip(filled.slab, filled.snapshot_record.slot.index * RECORD + offset)
    code, printed, _ = run("verify", filled.path)
    assert code == 1
    lines = printed.splitlines()
    assert len(lines) == 3
    assert [line.partition(", expert 1,")[0] for line in lines[:2]] == ["bank 'fork'", "snapshot 1 's', bank 'b'"]
    assert all(words in line for line in lines[:2])
    assert lines[2].startswith("2 findings")


def test_a_record_in_the_place_of_another_is_found(filled):
    content = bytearray(filled.slab.read_bytes())
    one, two = (filled.records[expert].slot.index * RECORD for expert in (1, 2))
    content[one : one + RECORD], content[two : two + RECORD] = content[two : two + RECORD], content[one : one + RECORD]
    filled.slab.write_bytes(content)
    findings = verify(filled.path).findings
    assert len(findings) == 4  # Expert 1; expert 2 of the bank, its fork and its snapshot.
    assert all("it holds another record" in finding for finding in findings)


def test_a_slab_that_lost_its_end_is_found(filled):
    with filled.slab.open("r+b") as file:
        file.truncate(filled.records[1].slot.index * RECORD + 5000)
    (finding,) = verify(filled.path).findings
    assert "bank 'b', expert 1" in finding
    assert "the slab ends before the end of the slot" in finding


def test_a_damaged_index_is_found_and_rebuild_named(filled, run):
    with closing(sqlite3.connect(filled.path / "index.sqlite")) as db, db:
        db.execute("UPDATE records SET version = version + 1 WHERE expert = 2")
    code, printed, _ = run("verify", filled.path, "--json")
    assert code == 1
    answer = json.loads(printed)
    assert answer["clean"] is False
    assert "table records is damaged" in answer["findings"][0]
    assert f"`ooc-moe-server rebuild {filled.path}`" in answer["findings"][0]


@pytest.mark.parametrize("name", ["index.sqlite", "COMMITTED"])
def test_a_missing_file_is_found(filled, name):
    (filled.path / name).unlink()
    (finding,) = verify(filled.path).findings
    assert name in finding
    assert "rebuild" in finding


@pytest.mark.parametrize(("name", "position"), [("COMMITTED", 5), ("snapshots/1.json", 100)])
def test_damage_beside_the_index_is_found_and_a_start_repairs_it(filled, name, position):
    flip(filled.path / name, position)
    (finding,) = verify(filled.path).findings
    assert name in finding

    async def start():
        async with opened(filled.path) as store:
            await store.push({2: body_of(22)})
            await store.push({2: body_of(23)})

    asyncio.run(start())
    assert verify(filled.path).is_clean


def test_what_is_no_store_or_in_use_is_refused_with_two(filled, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    code, printed, error = run("verify", tmp_path / "nothing")
    assert (code, printed, error.startswith("error: ")) == (2, "", True)
    assert list((tmp_path / "nothing").iterdir()) == []
    with data_dir.held(filled.path):
        assert run("verify", filled.path)[0] == 2
    assert run("verify")[0] == 2
    assert run("--data-dir", filled.path, "verify", filled.path)[0] == 2
