"""A run in numbers: the sentences and tables that the terminal and the HTML report share.

Made from a RunRecord; tier_tables.py has those of the tiers. A dash stands for what was not logged or cannot be said.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ooc_moe.metrics import measures
from ooc_moe.metrics.baselines import best_constants
from ooc_moe.metrics.log import Event
from ooc_moe.metrics.run import RunRecord, Scores
from ooc_moe.report.text_table import (
    DASH,
    TextTable,
    format_duration,
    format_part,
    format_ratio,
    format_score,
    format_seconds,
    format_share,
    listed,
)
from ooc_moe.report.tier_tables import overlap_table, prefetch_table, tier_table

_CONSTANT = "Best constant: of the best of the 18 actions, held for ever."
_BY_SINGLE = "0 %: random play; 100 %: what a network of its own learns of the game in as many steps."
_BY_ITSELF = "0 %: random play; 100 %: the best this run itself reached in that game, so that learning is near 100 % by construction."
_REFERENCE = "Of reference: 0 % is the published score of random play, 100 % a human's (pixel games: best play); for whole episodes only."
# If the columns of the phases took more letters than this, a table would not fit a terminal; only the own and the last one are shown.
_PHASE_LETTERS_MAX = 40


def tables(record: RunRecord) -> list[TextTable]:
    """All tables of a run, in order of reading."""
    return [
        score_table(record),
        measures_table(record),
        tier_table(record),
        prefetch_table(record),
        overlap_table(record),
        detector_table(record),
    ]


def evaluation_tables(record: RunRecord) -> list[TextTable]:
    """Those of a record that is nothing but one evaluation."""
    return [evaluation_table(record), tier_table(record), prefetch_table(record), overlap_table(record), detector_table(record)]


def headline(record: RunRecord) -> str:
    """A few sentences: what is being run, or was."""
    agent = record.config.get("agent", {})
    games = f"learns {listed(record.schedule)}" if record.schedule else "learns games"
    budget = f", {record.config['steps_per_game']:,} steps each" if "steps_per_game" in record.config else ""
    text = f"One agent {games}{', one after another' if len(record.schedule) > 1 else ''}{budget}."
    if agent.get("num_experts"):
        rooms = [f"{agent[key]} in {tier}" for key, tier in (("hbm_experts", "HBM"), ("dram_experts", "DRAM")) if agent.get(key)]
        room = f"; room for {' and '.join(rooms)} at a time" if rooms else ""
        per = " per layer" if agent.get("banks") == "per-layer" else ""
        text += f" It has {agent['num_experts']} experts{per}, kept on NVMe by the storage daemon{room}."
    if record.evaluations:
        told = "told" if record.config.get("recognise") == "oracle" else "without being told"
        text += f" After each game it plays all it knows, {told} which is on the screen."
    return text


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what describes the run as a whole."""
    if not record.updates:
        return []
    first, last, scores = record.events[0], record.events[-1], record.scores
    clear = [game for game in range(len(scores.games)) if learned_clearly(scores, game)]
    kept_G = measures.retention(scores.mean_PG, scores.trained_P, scores.random_G)[clear] if clear else ()
    recognised = [_recognised(event) for event in record.last_evaluations]
    speed = record.series("steps_per_s")
    return [
        ("games clearly learned", f"{len(clear)} of {len(scores.games)}" if len(scores.mean_PG) else DASH),
        ("of these, kept at the end", format_share(measures.mean(kept_G))),
        ("played as the right game", format_share(measures.mean(recognised))),
        ("HBM hit rate", format_ratio(record.total("cache", "hits"), record.total("cache", "accesses"))),
        ("waited for experts", format_seconds(record.total("cache", "stall_s"))),
        ("cold experts equal bit for bit", format_part(*record.cold_unchanged)),
        ("wall time", format_duration(max(last["time"] - first["time"], 0))),
        ("environment steps", f"{record.updates[-1]['step']:,}"),
        ("steps per second", DASH if np.isnan(speed).all() else f"{np.nanmedian(speed):,.0f}"),
    ]


def missing(record: RunRecord) -> list[str]:
    """What a reader should know is not there; empty for a finished run."""
    if record.done:
        return []
    begun = [event["to"] for event in record.switches]
    said = [f"The run is not finished: {len(begun)} of {len(record.schedule)} games were begun."]
    if not record.updates:
        said.append("No update was logged yet.")
    unseen = [game for game in record.games if game not in {event["evaluated"] for event in record.evaluations}]
    if unseen:
        said.append(f"Not evaluated: {listed(unseen)}.")
    return said


def score_table(record: RunRecord) -> TextTable:
    """Mean returns by game: random play, after each phase, what was learned and what is left of it."""
    scores, constants = record.scores, best_constants(record)
    names, shown_SG = _shown(record, scores.mean_PG)
    own_G = measures.learning(scores.mean_PG, scores.trained_P)
    kept_G = measures.retention(scores.mean_PG, scores.trained_P, scores.random_G)
    reference_G = [of_reference(record, game, own) for game, own in zip(scores.games, own_G, strict=True)]
    has_reference = not np.isnan(reference_G).all()
    rows = []
    for column, game in enumerate(scores.games):
        learned = own_G[column] - scores.random_G[column]
        clear = learned_clearly(scores, column)
        rows.append(
            [
                game,
                format_score(scores.random_G[column]),
                *([format_score(constants.get(game, np.nan))] if constants else []),
                *(format_score(score) for score in shown_SG[:, column]),
                (format_score(learned, sign=True) + ("" if clear else " ?")) if not np.isnan(learned) else DASH,
                format_share(float(kept_G[column])) if clear else DASH,
                *([format_share(reference_G[column])] if has_reference else []),
            ]
        )
    return TextTable(
        "Returns",
        _columns(["game", "random"], constants, [*names, "learned", "kept"], has_reference),
        rows,
        "Mean score of a game, as the game counts it, played without telling the agent which game it is. Random: of random actions. "
        f"{_CONSTANT + ' ' if constants else ''}"
        "Learned: right after the game's own training, above random (?: by less than two standard errors). Kept: the share of that "
        f"which is left at the end.{' ' + _REFERENCE if has_reference else ''}",
    )


def evaluation_table(record: RunRecord) -> TextTable:
    """Mean returns by game of a single evaluation."""
    events, constants = record.last_evaluations, best_constants(record)
    reference = [of_reference(record, event["evaluated"], event["return_mean"]) for event in events]
    has_reference = not np.isnan(reference).all()
    rows = []
    for event, share in zip(events, reference, strict=True):
        game, score, random = event["evaluated"], event["return_mean"], event["random_mean"]
        clear = measures.clearly_above(event["returns"], random)
        rows.append(
            [
                game if event["known"] else f"{game} (unseen)",
                format_score(random),
                *([format_score(constants.get(game, np.nan))] if constants else []),
                format_score(score),
                format_score(score - random, sign=True) + ("" if clear else " ?"),
                format_share(_said(event, "dormant")),
                *([format_share(share)] if has_reference else []),
            ]
        )
    cut, played = sum(event["episodes_truncated"] for event in events), sum(len(event["returns"]) for event in events)
    return TextTable(
        "Returns",
        _columns(["game", "random"], constants, ["mean return", "above random", "dormant units"], has_reference),
        rows,
        "",
        caption=f"?: by less than two standard errors. {cut} of {played} episodes were cut at the step limit.",
    )


def _columns(first: list[str], constants: Mapping[str, float], then: list[str], has_reference: bool) -> list[str]:
    return [*first, *(["best constant"] if constants else []), *then, *(["of reference"] if has_reference else [])]


def single_task_table(record: RunRecord) -> TextTable:
    """The score matrix between random play and a network of its own for each game; empty where no such network is known."""
    scores, constants = record.scores, best_constants(record)
    single_G = _single_task(record)
    names, normal_SG = _shown(record, measures.normalise(scores.mean_PG, scores.random_G, single_G))
    constant_G = measures.normalise([constants.get(game, np.nan) for game in scores.games], scores.random_G, single_G)
    rows = [
        [
            game,
            format_score(single_G[column]),
            *([format_share(constant_G[column])] if constants else []),
            *(format_share(share) for share in normal_SG[:, column]),
        ]
        for column, game in enumerate(scores.games)
    ]
    return TextTable(
        "Scores as shares of single-task training",
        _columns(["game", "single-task"], constants, names, has_reference=False),
        rows if record.single_task else [],
        "Single-task: the raw mean return of the runs that learned this game alone; a dash where there is none. The other columns: the "
        f"returns above.{' ' + _CONSTANT if constants else ''}",
        caption=_BY_SINGLE,
    )


def _single_task(record: RunRecord) -> measures.Floats:
    """(G,) NaN where no other run tells."""
    return np.array([record.single_task.get(game, np.nan) for game in record.games])


def _shown(record: RunRecord, scores_PG: measures.Floats) -> tuple[list[str], measures.Floats]:
    """Names of the columns (S) that a table shows of the phases, and the scores in them (S, G)."""
    trained = record.schedule[: len(scores_PG)]
    if sum(3 + len(game) for game in trained) <= _PHASE_LETTERS_MAX:
        return [f"after {game}" for game in trained], scores_PG
    own_and_final = (measures.learning(scores_PG, record.scores.trained_P), measures.final(scores_PG))
    return ["after its training", "at the end"], np.stack(own_and_final)


def detector_table(record: RunRecord) -> TextTable:
    """How well the games are recognised that nobody named."""
    rows = []
    for index, event in enumerate(record.last_evaluations):
        shares = [_said(event, name) for name in ("detector_accuracy", "nearest_mean_accuracy", "prefetch_recall")]
        steps, false = (_said(event, name) for name in ("steps_to_detect", "false_switches"))
        rows.append(
            [
                event["evaluated"],
                format_share(_recognised(event)),
                *(format_share(share) for share in shares[:2]),
                DASH if np.isnan(steps) or index == 0 else f"{steps:.1f}",
                DASH if np.isnan(false) else f"{false:.1f}",
                format_share(shares[2]),
            ]
        )
    return TextTable(
        "Detector in the last evaluation",
        ["game", "acted as it", "detector", "nearest mean", "steps to detect", "false switches", "prefetch recall"],
        rows,
        "Acted as it: share of steps played with the game's own experts and head. Detector, nearest mean: share of frames whose most "
        "probable game is the right one, whoever acted. Steps to detect: from the game's first frame until its own pool of experts is in "
        "use, mean over the environments where it ever was; nothing switches to the first game. False switches: away from the right game, "
        "per 1000 frames. Prefetch recall: of the experts that the game needed, those named before their first use.",
        caption=" ".join(
            [f"Ambiguous: {one} and {other}, confusion {confusion:.2f}." for one, other, confusion in ambiguous(record)]
            + [f"Like no known game: {game}, in {format_share(share)} of its frames." for game, share in _unknown(record)]
        ),
    )


def ambiguous(record: RunRecord) -> list[tuple[str, str, float]]:
    """Pairs of games that the last evaluation could not tell apart, with their confusion (1: nothing tells them apart)."""
    from ooc_moe.detection.tally import ambiguous_pairs

    probabilities = {event["evaluated"]: event["probabilities"] for event in record.last_evaluations if event.get("probabilities")}
    return ambiguous_pairs({game: row for game, row in probabilities.items() if game in row})


def _unknown(record: RunRecord) -> list[tuple[str, float]]:
    """Games that looked like no known one in most frames of the last evaluation, and in what share."""
    shares = [(event["evaluated"], _said(event, "unknown")) for event in record.last_evaluations]
    return [(game, share) for game, share in shares if share > 0.5]


def measures_table(record: RunRecord) -> TextTable:
    """The measures of continual learning, on the scale of single-task training, or else of this run."""
    scores = record.scores
    trained = scores.trained_P
    ceiling_G = _single_task(record) if record.single_task else measures.best_own(scores.mean_PG, trained)
    normal_PG = measures.normalise(scores.mean_PG, scores.random_G, ceiling_G)
    untrained_G = measures.normalise(scores.untrained_G, scores.random_G, ceiling_G)
    forgotten_G = measures.forgetting(normal_PG, trained)
    isolated_PG = measures.isolated_forgetting(scores.mean_PG, trained)
    shot_PG = measures.zero_shot_transfer(scores.mean_PG, trained, scores.untrained_G)
    by_game = {
        "average": measures.final(normal_PG),
        "learning": measures.learning(normal_PG, trained),
        "retention": measures.retention(scores.mean_PG, trained, scores.random_G),
        "forgetting": forgotten_G,
        "isolated forgetting": np.array([measures.mean(column) for column in isolated_PG.T]),
        "zero-shot transfer": np.array([measures.mean(column) for column in shot_PG.T]),
        "forward transfer": measures.forward_transfer(normal_PG, trained, untrained_G),
    }
    rows = [
        [name, format_share(measures.mean(values_G)), format_share(measures.mean(measures.without_last(values_G, trained)))]
        for name, values_G in by_game.items()
    ]
    known = forgotten_G[~np.isnan(forgotten_G)]
    worst = format_share(float(known.max())) if len(known) else DASH
    rows.insert(4, ["worst forgetting", worst, worst])
    dormant = {event["evaluated"]: _said(event, "dormant") for event in record.last_evaluations}
    dormant_G = np.array([dormant.get(game, float("nan")) for game in scores.games])
    unknown = [game for game in scores.games if game not in record.single_task]
    shares = (dormant_G, measures.without_last(dormant_G, trained))
    rows.append(["dormant units", *(format_share(measures.mean(values_G)) for values_G in shares)])
    return TextTable(
        "Learning and forgetting",
        ["mean over games", "all games", "without the last"],
        rows if len(scores.mean_PG) else [],
        "Average: the score at the end. Learning: right after the game's own training. Retention: the share of what was learned that is "
        "left at the end. Forgetting: from the best score on the way to the last. Isolated forgetting: lost while one later game was "
        "learned; zero-shot transfer: gained while one earlier game was; both as CORA has them (Powers et al. 2022), in shares of the "
        "run's highest raw return in the game, from 0 and not from random play. Forward transfer: the score just before "
        "the game's own training; both transfers need --eval-unseen. Dormant units: hidden units of the experts that hardly respond to "
        "the game any more. Without the last: of the game trained last nothing can be forgotten."
        + ("" if record.single_task else " ooc-moe report --single-task RUN measures by runs that learned one game alone."),
        caption=f"{_BY_SINGLE}{f' Without {listed(unknown)}: no such run.' if unknown else ''}" if record.single_task else _BY_ITSELF,
    )


def learned_clearly(scores: Scores, game: int) -> bool:
    """Whether the returns right after a game's own training lie two standard errors above random play."""
    phases = [phase for phase, trained in enumerate(scores.trained_P) if trained == game]
    return bool(phases) and measures.clearly_above(scores.returns.get((phases[-1], game), []), float(scores.random_G[game]))


def verdict(scores: Scores, game: int) -> str:
    """What became of a game, in a few words."""
    if not learned_clearly(scores, game):
        return "not clearly learned"
    gain = measures.learning(scores.mean_PG, scores.trained_P)[game] - scores.random_G[game]
    kept = float(measures.retention(scores.mean_PG, scores.trained_P, scores.random_G)[game])
    return f"learned {format_score(gain, sign=True)}" + ("" if np.isnan(kept) else f", kept {format_share(kept)}")


def of_reference(record: RunRecord, game: str, score: float) -> float:
    """The human-normalised score; NaN unless the evaluation played whole episodes and the references are known."""
    from ooc_moe.envs import REFERENCE_SCORES

    cut = [event.get("episodes_truncated") for event in record.evaluations if event["evaluated"] == game]
    if not cut or any(cut):
        return float("nan")
    floor, ceiling = REFERENCE_SCORES.get(game.partition("@")[0], (np.nan, np.nan))
    return float(measures.normalise([score], [floor], [ceiling])[0])


def _recognised(event: Event) -> float:
    """The share of an evaluation's steps that were played as the right game; NaN where that was not logged."""
    return float(event["believed"].get(event["evaluated"], 0.0)) if event.get("believed") else float("nan")


def _said(event: Event, name: str) -> float:
    """A number of an event; NaN where it was not logged or nothing could be said."""
    value = event.get(name)
    return float("nan") if value is None else float(value)
