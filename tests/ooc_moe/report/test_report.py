"""The report of a made-up run: every picture and every number is there, also when half of the run is not."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ooc_moe.display.formats import format_bytes, format_score
from ooc_moe.display.table import Table
from ooc_moe.evaluation.baselines import play_baselines
from ooc_moe.metrics.baselines import DIRECTORY, Protocol
from ooc_moe.metrics.log import MetricsWriter
from ooc_moe.metrics.run import RunRecord
from ooc_moe.metrics.single_task import with_single_task
from ooc_moe.report import learning_charts, summary, tier_charts, tier_tables
from ooc_moe.report.charts import CHARTS
from ooc_moe.report.report import _PARTS, print_summary, write_report
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.made_up_run import EXPERT_BYTES, UPDATES_PER_GAME

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Path:
    return write_report(finished_run)


def text_of(page: Path) -> str:
    """What a reader sees, markup and pictures left out."""
    html = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.read_text())
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def printed(run_dir: Path) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run_dir, console)
    return console.export_text()


def rows(table: Table) -> dict[str, list[str]]:
    return {name: cells for name, *cells in table.rows}


class Sources(HTMLParser):
    """Every address that the page would load or link."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_finished_run_shows_every_picture_in_the_page_and_beside_it(page: Path) -> None:
    sources = Sources()
    sources.feed(page.read_text())
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources.found}
    beside = {path.name: path.read_bytes() for path in page.parent.glob("*.png")}
    assert set(beside) == {f"{chart.name}.png" for chart in CHARTS}
    assert embedded == set(beside.values())
    assert all(content.startswith(PNG) for content in embedded)


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    html = page.read_text()
    sources = Sources()
    sources.feed(html)
    assert all(source.startswith("data:") for source in sources.found)
    assert "@import" not in html
    assert "url(" not in html


def test_no_picture_is_blank(page: Path) -> None:
    for path in page.parent.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path.name


def test_the_page_says_what_was_run(page: Path) -> None:
    text = text_of(page)
    assert "One agent learns krull, road_runner and crazy_climber, one after another, 20,480 steps each." in text
    assert "It has 32 experts, kept on NVMe by the storage daemon; room for 8 in HBM and 16 in DRAM at a time." in text
    assert "not finished" not in text
    assert "agent.hbm_experts 8" in text
    for chart in CHARTS:
        assert chart.title in text
        assert chart.reading.replace("'", "&#39;") in text


def test_returns_stand_beside_random_play_after_each_phase(finished_run: Path) -> None:
    table = summary.score_table(RunRecord.read(finished_run))
    assert table.columns == ["game", "random", "after krull", "after road_runner", "after crazy_climber", "learned", "kept"]
    assert rows(table) == {
        "krull": ["1,000", "2,600", "2,400", "2,200", "+1,600", "75.0 %"],
        "road_runner": ["50.0", "–", "1,250", "1,250", "+1,200", "100.0 %"],
        "crazy_climber": ["3,000", "–", "–", "6,000", "+3,000", "–"],
    }


def test_long_names_leave_only_the_own_phase_and_the_last_for_the_table_to_fit_a_terminal(tmp_path: Path) -> None:
    games = ["a_long_name", "a_longer_name", "the_longest_name"]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for phase, game in enumerate(games):
        writer.log("switch", step=phase, update=phase, game=game, phase=phase, **{"from": None, "to": game})
        where = {"step": 1, "update": 1, "phase": phase, "evaluated": game}
        writer.log("evaluation", **where, returns=[phase, 4.0], return_mean=phase / 2 + 2, random_mean=0.0)
    table = summary.score_table(RunRecord.read(tmp_path))
    assert table.columns == ["game", "random", "after its training", "at the end", "learned", "kept"]
    assert rows(table)["a_long_name"][:3] == ["0", "2.00", "–"]
    assert rows(table)["the_longest_name"][:3] == ["0", "3.00", "3.00"]


def test_the_most_important_numbers_stand_at_the_top(finished_run: Path) -> None:
    facts = dict(summary.facts(RunRecord.read(finished_run)))
    assert facts["games clearly learned"] == "3 of 3"
    # krull kept 1200 of 1600, road_runner all; crazy_climber is the last.
    assert facts["of what they learned, kept"] == "87.5 %"
    assert facts["played as the right game"] == "96.0 %"


def test_hit_rates_fetches_and_bytes_are_those_of_the_counters(finished_run: Path) -> None:
    record = RunRecord.read(finished_run)
    cache = record.updates[-1]["cache"]
    fetched = cache["fetched_from"]
    table = rows(tier_tables.tier_table(record))
    assert table["HBM"][2:4] == [f"{cache['hits']:,}", f"{100 * cache['hits'] / cache['accesses']:.1f} %"]
    assert table["DRAM"][3] == f"{100 * fetched['dram'] / (fetched['dram'] + fetched['seed']):.1f} %"
    assert table["NVMe"][2:4] == ["0", "0.0 %"]
    assert table["HBM"][4] == format_bytes(cache["bytes_in"])
    assert table["NVMe"][4] == format_bytes(record.updates[-1]["store"]["nvme"]["written_bytes"])


def test_prefetches_are_useful_late_or_wasted(finished_run: Path) -> None:
    table = tier_tables.prefetch_table(RunRecord.read(finished_run))
    assert table.title == "Prefetch into HBM (by detector)"
    ahead = 2 * 3 * UPDATES_PER_GAME
    found = {"issued": (12, ahead), "useful": (6, ahead), "late": (3, 0), "wasted": (3, 0)}
    for what, cells in rows(table).items():
        experts, foretold = found.get(what, (0, 0))
        sizes = [format_bytes(count * EXPERT_BYTES) for count in (experts, foretold)]
        share = "–" if what == "refused" else f"{100 * experts / 12:.1f} %"
        assert cells == [f"{experts}", sizes[0], share, f"{foretold}", sizes[1]], what
    assert list(rows(table)) == ["issued", "useful", "late", "wasted", "cancelled", "unused yet", "refused"]
    cache = RunRecord.read(finished_run).updates[-1]["cache"]
    assert "Precision (useful, of useful, late and wasted): 50.0 %" in table.note
    assert f"{100 * 6 / (6 + cache['misses']):.1f} %" in table.note


def test_overlap_is_measured_in_training_and_in_evaluation(finished_run: Path) -> None:
    assert rows(tier_tables.overlap_table(RunRecord.read(finished_run))) == {
        # Evaluated, each game uses three experts, one of them the next game's: 1 of 5 in common, and 20 of 500 tokens.
        "top-10 experts in common": ["0.0 %", "20.0 %"],
        "routed mass in common": ["0.0 %", "4.0 %"],
    }


def test_the_detector_is_judged_by_the_games_it_was_not_told(finished_run: Path) -> None:
    table = rows(summary.detector_table(RunRecord.read(finished_run)))
    assert table["road_runner"] == ["96.0 %", "99.0 %", "88.0 %", "12.5", "1.5", "75.0 %"]
    assert table["krull"][3] == "–", "nothing switches to the first game"


def test_games_that_look_the_same_are_called_ambiguous(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for game, mine, other in (("a", 0.6, 0.4), ("b", 0.3, 0.7), ("c", 0.0, 0.0)):
        known = {"a": mine, "b": other, "c": 0.0} if game != "c" else {"a": 0.0, "b": 0.0, "c": 1.0}
        writer.log("switch", step=0, update=0, game=game, phase=0, **{"from": None, "to": game})
        writer.log(
            "evaluation", step=1, update=1, phase=0, evaluated=game, return_mean=1.0, random_mean=0.0, returns=[1.0], probabilities=known
        )
    assert summary.detector_table(RunRecord.read(tmp_path)).caption == "Ambiguous: a and b, confusion 0.70."


def test_measures_are_on_the_scale_of_the_run_with_and_without_the_last_game(finished_run: Path) -> None:
    # krull: 1600 above random, then 1400, then 1200; road_runner keeps 1200; crazy_climber is the last. As CORA has it, krull lost
    # 200 of 2600 twice, road_runner nothing.
    assert rows(summary.measures_table(RunRecord.read(finished_run))) == {
        "average": ["91.7 %", "87.5 %"],
        "learning": ["100.0 %", "100.0 %"],
        "retention": ["87.5 %", "87.5 %"],
        "forgetting": ["12.5 %", "12.5 %"],
        "worst forgetting": ["25.0 %", "25.0 %"],
        "isolated forgetting": ["3.8 %", "3.8 %"],
        "zero-shot transfer": ["–", "–"],
        "forward transfer": ["–", "–"],
        "dormant units": ["–", "–"],
    }


def test_transfer_and_dormant_units_are_those_of_games_played_before_their_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"games": ["a", "b"]}')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    # Random play scores 10 in both; the best of the run is 30 in a and 50 in b. Learning a brought b from 10 to 20: a quarter of the way
    # from random play to its best, a fifth of the best; learning b took a sixth of its best from a.
    for phase, scores in enumerate(({"a": 30.0, "b": 20.0}, {"a": 25.0, "b": 50.0})):
        for game, score in scores.items():
            where = {"step": 1, "update": 1, "phase": phase, "evaluated": game}
            writer.log("evaluation", **where, returns=[score], return_mean=score, random_mean=10.0, dormant={"a": 0.1, "b": 0.3}[game])
    found = rows(summary.measures_table(RunRecord.read(tmp_path)))
    assert found["forward transfer"] == ["25.0 %", "–"]
    assert found["zero-shot transfer"] == ["20.0 %", "–"]
    assert found["isolated forgetting"] == ["16.7 %", "16.7 %"]
    assert found["dormant units"] == ["20.0 %", "10.0 %"]


def test_the_best_constant_action_stands_beside_random_play_once_it_was_played_by_the_same_protocol(tmp_path: Path) -> None:
    protocol = {"eval_envs": 2, "eval_episodes": 1, "eval_steps": 8, "seed": 3}
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for game in ("pixel/toward", "pixel/away"):
        where = {"step": 1, "update": 1, "phase": 0, "evaluated": game}
        writer.log("evaluation", **where, known=True, returns=[4.0, 4.0], return_mean=4.0, random_mean=0.0, episodes_truncated=1)
    played = play_baselines("pixel/toward", tmp_path / DIRECTORY, Protocol(**protocol))

    def table_of(make, **changed) -> Table:
        (tmp_path / "config.json").write_text(json.dumps({"games": ["pixel/toward", "pixel/away"], **protocol, **changed}))
        return make(RunRecord.read(tmp_path))

    for make in (summary.score_table, summary.evaluation_table):
        table = table_of(make)
        assert table.columns[:3] == ["game", "random", "best constant"]
        assert rows(table)["pixel/toward"][:3] == ["0", format_score(played.best_constant_mean), "4.00"]
        assert rows(table)["pixel/away"][:3] == ["0", "–", "4.00"]
        for name in protocol:
            assert "best constant" not in table_of(make, **{name: protocol[name] + 1}).columns


def test_one_evaluation_has_its_returns_and_what_a_run_says_of_its_last(tmp_path: Path) -> None:
    config = {"games": ["pixel/toward", "pixel/away", "pixel/catch"], "prefetch": "detector"}
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for game, known, returns in (("pixel/toward", True, [8.0, 9.0]), ("pixel/away", True, [-1.0, 9.0]), ("pixel/catch", False, [0.0])):
        writer.log(
            "evaluation",
            step=0,
            update=0,
            phase=0,
            evaluated=game,
            known=known,
            returns=returns,
            return_mean=float(np.mean(returns)),
            random_mean=0.5,
            episodes_truncated=int(game == "pixel/away"),
            believed={"pixel/toward": 1.0},
            unknown=0.0 if known else 0.9,
            cache={"accesses": 10, "hits": 9, "stall_s": 1.5, "prefetch_issued": 2, "prefetch_late": 1},
            **({"dormant": 0.25} if known else {}),
        )
    (tmp_path / "config.json").write_text(json.dumps(config))
    returns, tiers, prefetches, _, detector = summary.evaluation_tables(RunRecord.read(tmp_path))
    assert returns.columns == ["game", "random", "mean return", "above random", "dormant units", "of reference"]
    assert rows(returns)["pixel/away"] == ["0.50", "4.00", "+3.50 ?", "25.0 %", "–"]  # One game was cut.
    assert rows(returns)["pixel/catch (unseen)"][:4] == ["0.50", "0", "-0.50 ?", "–"]
    assert rows(returns)["pixel/toward"][:4] == ["0.50", "8.50", "+8.00", "25.0 %"]
    assert "1 of 5 episodes were cut" in returns.caption
    assert rows(tiers)["HBM"][2:4] == ["27", "90.0 %"]
    assert tiers.caption == "Waited for experts: 4.5 s."
    assert rows(prefetches)["late"][0] == "3"
    assert rows(detector)["pixel/away"][0] == "0.0 %"
    assert detector.caption == "The detector takes pixel/catch for an unknown game in 90.0 % of its frames."


# Single-task runs: krull 3400 (two seeds), road_runner 1650; none of crazy_climber.


def single_run(directory: Path, game: str, score: float, **changed) -> Path:
    protocol = {"steps_per_game": 20_480, "eval_envs": 3, "eval_episodes": 1, "eval_steps": 50} | changed
    writer = MetricsWriter(directory, tensorboard=False)
    (directory / "config.json").write_text(json.dumps({"games": [game]} | protocol))
    where = {"step": 1, "update": 1}
    writer.log("evaluation", **where, phase=0, evaluated=game, returns=[score], return_mean=score, random_mean=0.0)
    writer.log("done", **where)
    return directory


@pytest.fixture
def comparable(finished_run: Path, tmp_path: Path) -> Path:
    """The made-up run, with a protocol of evaluation."""
    run_dir = tmp_path / "made-up"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_bytes((finished_run / "metrics.jsonl").read_bytes())
    config = json.loads((finished_run / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"eval_envs": 3, "eval_episodes": 1, "eval_steps": 50}))
    return run_dir


def test_runs_of_single_games_set_the_scale_of_those_games(comparable: Path, tmp_path: Path) -> None:
    singles = [single_run(tmp_path / f"krull-{score}", "krull", score) for score in (3000.0, 3800.0)]
    singles.append(single_run(tmp_path / "road_runner", "road_runner", 1650.0))
    record = with_single_task(RunRecord.read(comparable), singles)
    assert rows(summary.single_task_table(record)) == {
        "krull": ["3,400", "66.7 %", "58.3 %", "50.0 %"],  # Of 2400 points above random: 1600, 1400, 1200.
        "road_runner": ["1,650", "–", "75.0 %", "75.0 %"],
        "crazy_climber": ["–", "–", "–", "–"],
    }
    table = summary.measures_table(record)
    assert table.caption.startswith("0 %: random play; 100 %: an agent that learned only this game")
    assert table.caption.endswith(" Without crazy_climber: no such run.")
    found = rows(table)
    assert found["learning"] == ["70.8 %", "70.8 %"]  # (66.7 + 75) / 2: nobody knows what crazy_climber's is worth.
    assert found["average"] == ["62.5 %", "62.5 %"]
    assert found["worst forgetting"] == ["16.7 %", "16.7 %"]
    assert found["retention"] == rows(summary.measures_table(RunRecord.read(comparable)))["retention"]


def test_without_them_a_run_is_its_own_scale_and_says_so(comparable: Path) -> None:
    record = RunRecord.read(comparable)
    assert summary.single_task_table(record).rows == []
    assert "100 %: the best this run itself reached" in summary.measures_table(record).caption


def test_a_page_shows_the_scale_it_was_given(comparable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ooc_moe.report.report.CHARTS", ())
    monkeypatch.setattr("ooc_moe.report.report._PARTS", tuple(dataclasses.replace(part, charts=()) for part in _PARTS))
    title = "Scores as shares of single-task training"
    assert title not in text_of(write_report(comparable))
    text = text_of(write_report(comparable, [single_run(tmp_path / "one", "krull", 3400.0)]))
    assert title in text
    assert "58.3 %" in text


def test_runs_that_set_no_scale_are_refused_by_name(comparable: Path, tmp_path: Path) -> None:
    record = RunRecord.read(comparable)
    refused = {
        "did not learn": single_run(tmp_path / "other", "boxing", 1.0),
        "has eval_steps 51": single_run(tmp_path / "longer", "krull", 1.0, eval_steps=51),
        "has steps_per_game 10": single_run(tmp_path / "shorter", "krull", 1.0, steps_per_game=10),
        "learned krull, road_runner": single_run(tmp_path / "two", "krull", 1.0, games=["krull", "road_runner"]),
        "holds no run": tmp_path / "nothing",
    }
    half = refused["is not finished"] = single_run(tmp_path / "half", "krull", 1.0)
    (half / "metrics.jsonl").write_text((half / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    for why, run_dir in refused.items():
        with pytest.raises(InvalidRequest, match=why) as error:
            with_single_task(record, [run_dir])
        assert str(run_dir) in str(error.value)


def test_the_terminal_shows_the_same_tables_as_the_page(finished_run: Path, page: Path) -> None:
    terminal, text = printed(finished_run), text_of(page)
    for table in summary.tables(RunRecord.read(finished_run)):
        assert table.title in terminal
        assert table.title in text
        assert table.caption in text
        assert table.caption in " ".join(terminal.split())
        for row in table.rows:
            for cell in row:
                assert cell in terminal
                assert cell in text


def test_a_terminal_of_80_columns_breaks_no_cell(finished_run: Path) -> None:
    console = Console(width=80, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(finished_run, console)
    lines = console.export_text().splitlines()
    for table in summary.tables(RunRecord.read(finished_run)):
        for name, *cells in table.rows:
            assert any(line.startswith(name) and all(cell in line for cell in cells) for line in lines), name


def test_a_half_finished_run_says_what_is_missing_and_shows_the_rest(half_a_run: Path) -> None:
    text = text_of(write_report(half_a_run))
    assert "The run is not finished: 1 of 3 games were begun. Not evaluated: road_runner and crazy_climber." in text
    assert (half_a_run / "report" / "score_matrix.png").exists()
    assert "The run is not finished" in printed(half_a_run)


def test_a_run_that_only_just_began_names_what_each_picture_needs(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "young", tensorboard=False).close()
    text = text_of(write_report(tmp_path / "young"))
    for chart in CHARTS:
        assert f"Not drawn: the run has not logged {chart.needs}." in text
    assert "No update was logged yet." in text


def test_a_report_made_anew_takes_away_pictures_that_can_no_longer_be_drawn(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log("update", step=1, update=1, game="a", cache={"accesses": 10, "hits": 9})
    write_report(tmp_path)
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == ["hit_rate.png"]
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    assert list((tmp_path / "report").glob("*.png")) == []


def test_a_game_in_which_no_episode_ended_leaves_its_panel_empty(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step, (game, mean) in enumerate((("a", 3.0), ("b", None))):
        writer.log("switch", step=step, update=step, phase=step, **{"from": None, "to": game})
        writer.log("update", step=step + 1, update=step + 1, game=game, reward_per_step=0.1, episode_return_mean=mean)
    figure = learning_charts.learning_curves(RunRecord.read(tmp_path))
    assert figure is not None
    assert [len(ax.lines[0].get_xdata()) for ax in figure.axes] == [1, 1, 1, 0]


@pytest.mark.parametrize(("games", "shape"), [(1, (1, 2)), (4, (1, 4)), (5, (2, 3)), (7, (2, 4))])
def test_panels_stand_in_rows_of_like_length(tmp_path: Path, games: int, shape: tuple[int, int]) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(games):
        writer.log("switch", step=step, update=step, phase=step, **{"from": None, "to": f"game_{step}"})
        writer.log("update", step=step + 1, update=step + 1, game=f"game_{step}", reward_per_step=0.1)
    figure = learning_charts.learning_curves(RunRecord.read(tmp_path))
    assert figure is not None
    assert figure.axes[0].get_gridspec().get_geometry() == shape


def test_names_from_the_run_are_escaped(tmp_path: Path) -> None:
    run_dir = tmp_path / "<script>alert(1)</script>".replace("/", "-")
    writer = MetricsWriter(run_dir, tensorboard=False)
    writer.log("switch", step=0, update=0, **{"from": None, "to": "<b>krull</b>"})
    html = write_report(run_dir).read_text()
    assert "<script>" not in html
    assert "<b>krull" not in html
    assert "&lt;b&gt;krull" in html


def test_a_directory_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_what_a_resumed_run_counts_begins_anew(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log("update", step=1, update=1, game="a", cache={"hits": 10})
    position = writer.position()
    writer.log("update", step=2, update=2, game="a", cache={"hits": 50})
    writer.truncate(position)
    writer.log("update", step=2, update=2, game="a", cache={"hits": 12})
    assert RunRecord.read(tmp_path).increments("cache", "hits").tolist() == [10, 12]


def test_what_an_evaluation_added_counts_for_the_run_but_not_for_the_update_after_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log("update", step=1, update=1, game="a", cache={"hits": 10})
    writer.log("evaluation", step=1, update=1, phase=0, evaluated="a", return_mean=1.0, random_mean=0.0, cache={"hits": 30})
    writer.log("update", step=2, update=2, game="a", cache={"hits": 45})
    writer.log("done", step=2, update=2, cache={"hits": 47})
    record = RunRecord.read(tmp_path)
    assert record.increments("cache", "hits").tolist() == [10, 5]
    assert record.increments("cache", "hits", evaluations=True).tolist() == [10, 35]
    assert record.total("cache", "hits") == 47
    assert record.last("cache", "hits") == 47


def test_counters_of_a_daemon_older_than_the_run_count_from_its_first_update(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"games": ["a"], "store": "storage:50051"}')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step, read in ((1, 1000), (2, 1600)):
        writer.log("update", step=step, update=step, game="a", store={"nvme": {"read_bytes": read}})
    record = RunRecord.read(tmp_path)
    assert np.isnan(record.increments("store", "nvme", "read_bytes")[0])
    assert record.total("store", "nvme", "read_bytes") == 600


def test_experts_of_the_same_number_in_different_banks_are_different_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"games": ["a", "b"], "agent": {"banks": "per-layer", "num_experts": 4}}')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log("update", step=1, update=1, game="a", usage={"0": {"3": 5}})
    writer.log("update", step=2, update=2, game="b", usage={"1": {"3": 5}})
    usage_GE = RunRecord.read(tmp_path).training_usage()
    assert usage_GE.shape == (2, 8)
    assert np.argwhere(usage_GE).tolist() == [[0, 3], [1, 7]]


def test_a_game_that_did_not_clearly_beat_random_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"games": ["a", "b"]}')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for phase, (score, returns) in enumerate(((12.0, [2.0, 22.0]), (12.0, [12.0, 12.0]))):
        writer.log("evaluation", step=1, update=1, phase=phase, evaluated="a", returns=returns, return_mean=score, random_mean=10.0)
    assert rows(summary.score_table(RunRecord.read(tmp_path)))["a"][-2:] == ["+2.00 ?", "–"]


def test_a_run_of_all_57_games_still_draws(tmp_path: Path) -> None:
    games = [f"game_{number}" for number in range(57)]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for phase, game in enumerate(games):
        where = {"step": phase + 1, "update": phase + 1, "game": game}
        writer.log("switch", **{**where, "step": phase}, phase=phase, **{"from": None, "to": game})
        writer.log("update", **where, reward_per_step=0.1, usage={"0": {str(phase): 1}})
        writer.log("evaluation", **where, phase=phase, evaluated=game, returns=[1.0, 2.0], return_mean=1.5, random_mean=0.0)
    record = RunRecord.read(tmp_path)
    for draw in (learning_charts.score_matrix, learning_charts.forgetting, learning_charts.learning_curves, tier_charts.expert_usage):
        figure = draw(record)
        assert figure is not None
        figure.savefig(BytesIO(), format="png", dpi=30)
