"""The command `ooc-moe games`."""

from __future__ import annotations

import json

import pytest

from ooc_moe.cli.main import main
from ooc_moe.envs import ATARI_GAMES, PIXEL_GAMES, REFERENCE_SCORES


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["games", *words])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_game_is_listed_with_its_scores_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    games = {game["game"]: game for game in json.loads(listed(capsys, "--json"))}
    assert list(games) == [*ATARI_GAMES, *PIXEL_GAMES]
    assert {name: (game["random"], game["reference"]) for name, game in games.items()} == REFERENCE_SCORES
    assert (games["krull"]["kind"], games["krull"]["reference_is"], games["krull"]["looks"]) == ("atari", "human", [])
    assert games["pixel/catch"]["needs"] == "nothing"
    assert "@flip" in games["pixel/catch"]["looks"]


def test_a_pattern_is_a_part_of_the_name_or_has_signs(capsys: pytest.CaptureFixture[str]) -> None:
    assert [game["game"] for game in json.loads(listed(capsys, "ROAD", "--json"))] == ["road_runner"]
    assert [game["game"] for game in json.loads(listed(capsys, "k*l", "--json"))] == ["krull"]
    lines = listed(capsys, "pixel").splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(PIXEL_GAMES)
    assert "pixel/catch@1" in lines[-1]


def test_a_pattern_of_no_game_is_one_line_that_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["games", "krulll"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: pattern: 'krulll' matches no game; did you mean 'krull'?\n"


def test_an_atari_game_says_whether_ale_py_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for found, needs, playable in ((object(), "ale-py (installed)", True), (None, "ale-py: pip install 'ooc-moe[atari]'", False)):
        monkeypatch.setattr("ooc_moe.cli.games.importlib.util.find_spec", lambda name, found=found: found)
        (krull,) = json.loads(listed(capsys, "krull", "--json"))
        assert (krull["needs"], krull["playable"]) == (needs, playable)
