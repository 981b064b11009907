"""The JSONL record survives a kill, a resume and numbers that JSON does not have; TensorBoard shows the same scalars."""

import json
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from ooc_moe.metrics.log import MetricsWriter, read_metrics
from ooc_moe_wire.errors import InvalidRequest


def writer(run_dir: Path) -> MetricsWriter:
    return MetricsWriter(run_dir, tensorboard=False)


def steps(run_dir: Path) -> list[int]:
    return [event["step"] for event in read_metrics(run_dir)]


def test_an_event_comes_back_as_it_was_logged(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("update", step=64, update=1, game="krull", losses={"policy": 0.5}, usage={0: {3: 7}})
    (event,) = read_metrics(tmp_path)
    assert event.pop("time") > 1e9
    assert event == {
        "event": "update",
        "step": 64,
        "update": 1,
        "game": "krull",
        "losses": {"policy": 0.5},
        "usage": {"0": {"3": 7}},
    }


def test_a_logged_event_is_readable_before_the_writer_closes(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("switch", step=0, update=0, to="krull")
    assert len(read_metrics(tmp_path)) == 1


class Tier(Enum):
    DRAM = 1


def test_numpy_numbers_enum_keys_and_numbers_that_are_none_become_plain_json(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("update", step=np.int64(1), update=1, lr=np.float32(0.5), worst=float("nan"), best=np.inf, row=np.arange(2), by={Tier.DRAM: 3})
    (event,) = read_metrics(tmp_path)
    assert (event["step"], event["lr"], event["worst"], event["best"], event["row"]) == (1, 0.5, None, None, [0, 1])
    assert event["by"] == {"dram": 3}


def test_truncating_takes_back_what_was_logged_after_the_position(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("update", step=1, update=1)
    position = log.position()
    log.log("update", step=2, update=2)
    log.close()

    resumed = writer(tmp_path)
    resumed.truncate(position)
    resumed.log("update", step=3, update=2)
    resumed.close()
    assert [(event["event"], event["step"]) for event in read_metrics(tmp_path)] == [("update", 1), ("resumed", 1), ("update", 3)]


def test_a_position_beyond_the_file_is_refused(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("update", step=1, update=1)
    with pytest.raises(InvalidRequest, match=r"metrics\.jsonl.*9999"):
        log.truncate(9999)


def test_a_torn_last_line_is_left_out_and_the_next_event_starts_a_line_of_its_own(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("update", step=1, update=1)
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "upda')
    assert steps(tmp_path) == [1]

    again = writer(tmp_path)
    again.log("update", step=2, update=2)
    assert steps(tmp_path) == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event":"done","step":1}\nnonsense\n{"event":"done","step":2}\n')
    with pytest.raises(InvalidRequest, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_a_run_that_logged_nothing_has_no_events(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_line_is_one_json_object(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log("evaluation", step=1, update=1, evaluated="a\nb", returns=[1.0, 2.0])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["evaluated"] == "a\nb"
    assert len(lines) == 1


def tensorboard_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_number_but_the_usage_counts(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path)
    log.log("update", step=64, update=1, game="krull", losses={"policy": 0.5}, usage={"0": {"3": 7}}, lr=0.25, episode_return_mean=None)
    log.log("evaluation", step=64, update=1, evaluated="krull", return_mean=3.0, returns=[3.0])
    log.close()
    assert tensorboard_scalars(tmp_path) == {
        "update/losses/policy": [(64, 0.5)],
        "update/lr": [(64, 0.25)],
        "evaluation/krull/return_mean": [(64, 3.0)],
    }


def test_a_resumed_run_takes_its_lost_steps_back_from_tensorboard_too(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path)
    log.log("update", step=1, update=1, lr=0.1)
    position = log.position()
    log.log("update", step=2, update=2, lr=0.2)
    log.close()
    resumed = MetricsWriter(tmp_path)
    resumed.truncate(position)
    resumed.log("update", step=2, update=2, lr=0.5)
    resumed.close()
    assert tensorboard_scalars(tmp_path)["update/lr"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.5))]
