"""Trace files: what is written is read, torn ends are dropped, damage is refused; and a real run records one and goes on with it."""

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.evaluation.evaluate import evaluate_run
from ooc_moe.metrics.log import read_metrics
from ooc_moe.metrics.trace import CHUNK_ACCESSES, Mark, Span, Trace, TraceInfo, TraceWriter, read_trace, write_trace
from ooc_moe.run.train import resume, train
from ooc_moe_wire.errors import InvalidRequest

INFO = TraceInfo(source="test", num_banks=2, expert_bytes=4096, hbm_experts=8)


def recorded(path, num_accesses=10):
    writer = TraceWriter(path, INFO)
    writer.mark("krull", evaluating=False)
    writer.access(0, list(range(num_accesses)))
    writer.mark("krull", evaluating=True)
    writer.access(1, [3, 5])
    writer.close()
    return read_trace(path)


def test_accesses_and_marks_come_back_in_order(tmp_path):
    trace = recorded(tmp_path / "a.trace", num_accesses=3)
    assert trace.info == INFO
    assert trace.keys_A.tolist() == [0, 2, 4, 7, 11]
    assert trace.spans() == [Span("krull", False, 0, 3), Span("krull", True, 3, 5)]
    assert trace.num_experts == 5
    assert trace.torn_bytes == 0


def test_more_accesses_than_a_chunk_holds_come_back(tmp_path):
    trace = recorded(tmp_path / "a.trace", num_accesses=CHUNK_ACCESSES + 7)
    assert trace.keys_A[: CHUNK_ACCESSES + 7].tolist() == list(range(0, 2 * (CHUNK_ACCESSES + 7), 2))


def test_marks_that_change_nothing_and_spans_without_accesses_are_left_out():
    marks = (Mark(0, "a", True), Mark(2, "a", True), Mark(4, "b", False), Mark(4, "c", False))
    trace = Trace(info=INFO, keys_A=np.arange(6, dtype=np.uint32), marks=marks)
    assert trace.spans() == [Span("a", True, 0, 4), Span("c", False, 4, 6)]
    assert dataclasses.replace(trace, marks=marks[2:]).spans() == [Span("", False, 0, 4), Span("c", False, 4, 6)]


def test_a_file_torn_at_any_byte_gives_what_was_whole(tmp_path):
    path = tmp_path / "a.trace"
    TraceWriter(path, INFO).close()
    first = path.stat().st_size
    recorded(path)
    content = path.read_bytes()
    found = set()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        if cut < first:
            with pytest.raises(InvalidRequest):
                read_trace(path)
            continue
        trace = read_trace(path)
        found.add(tuple(trace.keys_A.tolist()))
        path.write_bytes(content[: cut - trace.torn_bytes])
        assert read_trace(path).torn_bytes == 0
    assert found == {(), tuple(range(0, 20, 2))}


def test_a_torn_end_is_said_in_the_log(tmp_path, caplog):
    recorded(tmp_path / "a.trace")
    content = (tmp_path / "a.trace").read_bytes()
    (tmp_path / "a.trace").write_bytes(content[:-3])
    with caplog.at_level(logging.WARNING):
        torn = read_trace(tmp_path / "a.trace").torn_bytes
    assert f"{torn} bytes at the end are skipped" in caplog.text
    assert torn == 16 + 8 - 3


def test_a_flipped_byte_before_the_end_is_refused(tmp_path):
    recorded(tmp_path / "a.trace")
    content = bytearray((tmp_path / "a.trace").read_bytes())
    content[200] ^= 1
    (tmp_path / "a.trace").write_bytes(content)
    with pytest.raises(InvalidRequest, match="damaged at byte"):
        read_trace(tmp_path / "a.trace")


def test_other_files_other_versions_and_none_are_refused_by_name(tmp_path):
    (tmp_path / "text").write_text("hello, this is no trace")
    with pytest.raises(InvalidRequest, match="text is not a trace"):
        read_trace(tmp_path / "text")
    with pytest.raises(InvalidRequest, match="text is not a trace"):
        TraceWriter(tmp_path / "text", INFO)
    recorded(tmp_path / "newer")
    content = bytearray((tmp_path / "newer").read_bytes())
    content[7] = 2
    (tmp_path / "newer").write_bytes(content)
    with pytest.raises(InvalidRequest, match="version 2, this program reads 1"):
        read_trace(tmp_path / "newer")
    with pytest.raises(InvalidRequest, match="none cannot be read"):
        read_trace(tmp_path / "none")


def test_what_came_after_a_checkpoint_is_taken_back_torn_or_whole(tmp_path):
    path = tmp_path / "a.trace"
    writer = TraceWriter(path, INFO)
    writer.mark("krull", evaluating=False)
    writer.access(0, [1, 2])
    position = writer.position()
    writer.access(0, [3])
    writer.close()
    path.write_bytes(path.read_bytes()[:-1])

    writer = TraceWriter(path, INFO)
    writer.truncate(position)
    writer.mark("krull", evaluating=False)
    writer.access(0, [4])
    writer.close()
    trace = read_trace(path)
    assert trace.keys_A.tolist() == [2, 4, 8]
    assert trace.spans() == [Span("krull", False, 0, 3)]
    with pytest.raises(InvalidRequest, match="was cut or moved"):
        TraceWriter(path, INFO).truncate(10**6)


def test_a_made_trace_is_written_whole_and_never_over_another(tmp_path):
    trace = recorded(tmp_path / "a.trace", num_accesses=CHUNK_ACCESSES + 1)
    write_trace(tmp_path / "b.trace", trace)
    copy = read_trace(tmp_path / "b.trace")
    assert copy.keys_A.tolist() == trace.keys_A.tolist()
    assert copy.spans() == trace.spans()
    with pytest.raises(InvalidRequest, match=r"b\.trace exists"):
        write_trace(tmp_path / "b.trace", trace)


# Of a real run


def traced_run(run_dir: Path, **changes) -> RunConfig:
    ppo = PPOConfig(num_envs=2, rollout_steps=4, epochs=1, minibatch_segments=2)
    fields = {"games": ("pixel/catch", "pixel/toward"), "steps_per_game": 8, "eval_envs": 2, "eval_steps": 5, "seed": 3, "prefetch": "off"}
    return RunConfig(run_dir=run_dir, agent=PRESETS["tiny"], ppo=ppo, trace=str(run_dir.parent / "run.trace"), **(fields | changes))


def test_a_run_records_each_access_that_its_cache_counts_and_a_resumed_one_records_the_same(tmp_path):
    config = traced_run(tmp_path / "run")
    train(config, Console(quiet=True))
    path = tmp_path / "run.trace"
    trace, recorded_bytes = read_trace(path), path.read_bytes()
    assert [(span.game, span.evaluating) for span in trace.spans()] == [
        ("pixel/catch", False),
        ("pixel/catch", True),
        ("pixel/toward", False),
        ("pixel/catch", True),
        ("pixel/toward", True),
    ]
    done = read_metrics(config.run_dir)[-1]
    assert len(trace.keys_A) == done["cache"]["accesses"] > 0
    assert trace.info.hbm_experts == 8
    first = trace.spans()[0]
    assert set(trace.keys_A[first.start : first.stop]) <= set(range(8))

    # A trace is written once; evaluating the run from outside adds nothing to it.
    with pytest.raises(InvalidRequest, match=r"run\.trace exists"):
        train(dataclasses.replace(config, run_dir=tmp_path / "other"), Console(quiet=True))
    assert not (tmp_path / "other").exists()
    evaluate_run(config.run_dir, Console(quiet=True))
    assert path.read_bytes() == recorded_bytes

    # Back to the end of the first game, as after a crash.
    shutil.copy(config.run_dir / "checkpoints" / "0-pixel-catch.pt", config.run_dir / "checkpoints" / "latest.pt")
    path.write_bytes(recorded_bytes[:-5])
    resume(config.run_dir, Console(quiet=True))
    again = read_trace(path)
    assert again.keys_A.tolist() == trace.keys_A.tolist()
    assert again.spans() == trace.spans()
