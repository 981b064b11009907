"""Summarises a run in sentences and tables, for the terminal and the HTML report. tier_tables.py has the tables of the memory tiers.

A dash stands for a value that was not logged or is not defined.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ooc_moe.display.formats import DASH, format_duration, format_part, format_ratio, format_score, format_seconds, format_share, listed
from ooc_moe.display.table import Table
from ooc_moe.metrics import measures
from ooc_moe.metrics.baselines import best_constants
from ooc_moe.metrics.log import Event
from ooc_moe.metrics.run import RunRecord, Scores
from ooc_moe.report.tier_tables import overlap_table, prefetch_table, tier_table

_CONSTANT = "Best constant: the same action in every step, the best of the 18."
_BY_SINGLE = "0 %: random play; 100 %: an agent that learned only this game, in as many steps."
_BY_ITSELF = "0 %: random play; 100 %: the best this run itself reached in that game, so learning is close to 100 % by construction."
_REFERENCE = (
    "Of reference: 0 % is the published score of random play, 100 % a human's (pixel games: the best possible); only where whole episodes "
    "were played."
)
# If the names of the phases have more letters than this, a column for each would not fit a terminal. Two columns are shown instead.
_PHASE_LETTERS_MAX = 40


def tables(record: RunRecord) -> list[Table]:
    """Makes all tables of a run, in reading order: scores, measures, tiers, prefetches, overlap, detector."""
    return [
        score_table(record),
        measures_table(record),
        tier_table(record),
        prefetch_table(record),
        overlap_table(record),
        detector_table(record),
    ]


def evaluation_tables(record: RunRecord) -> list[Table]:
    """Makes all tables of a single evaluation. `record` holds that evaluation alone, and no training."""
    return [evaluation_table(record), tier_table(record), prefetch_table(record), overlap_table(record), detector_table(record)]


def headline(record: RunRecord) -> str:
    """Describes in a few sentences what the run learns, with how many experts, and how it is evaluated."""
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
        told = "It is told" if record.config.get("recognise") == "oracle" else "It is not told"
        text += f" After each game it plays all games that it knows. {told} which game is on the screen."
    return text


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """The figures of the whole run, such as games learned, hit rate and speed: (name, value as text). Empty before the first update."""
    if not record.updates:
        return []
    first, last, scores = record.events[0], record.events[-1], record.scores
    clear = [game for game in range(len(scores.games)) if learned_clearly(scores, game)]
    kept_G = measures.retention(scores.mean_PG, scores.trained_P, scores.random_G)[clear] if clear else ()
    recognised = [_recognised(event) for event in record.last_evaluations]
    speed = record.series("steps_per_s")
    return [
        ("games clearly learned", f"{len(clear)} of {len(scores.games)}" if len(scores.mean_PG) else DASH),
        ("of what they learned, kept", format_share(measures.mean(kept_G))),
        ("played as the right game", format_share(measures.mean(recognised))),
        ("HBM hit rate", format_ratio(record.total("cache", "hits"), record.total("cache", "accesses"))),
        ("waited for experts", format_seconds(record.total("cache", "stall_s"))),
        ("cold experts equal bit for bit", format_part(*record.cold_unchanged)),
        ("wall time", format_duration(max(last["time"] - first["time"], 0))),
        ("environment steps", f"{record.updates[-1]['step']:,}"),
        ("steps per second", DASH if np.isnan(speed).all() else f"{np.nanmedian(speed):,.0f}"),
    ]


def missing(record: RunRecord) -> list[str]:
    """Says, in sentences, what is missing from the results of an unfinished run. Empty for a finished run."""
    if record.done:
        return []
    begun = [event["to"] for event in record.switches]
    sentences = [f"The run is not finished: {len(begun)} of {len(record.schedule)} games were begun."]
    if not record.updates:
        sentences.append("No update was logged yet.")
    unseen = [game for game in record.games if game not in {event["evaluated"] for event in record.evaluations}]
    if unseen:
        sentences.append(f"Not evaluated: {listed(unseen)}.")
    return sentences


def score_table(record: RunRecord) -> Table:
    """Makes the table of scores. Its row for a game has the mean returns of random play and of the agent after the training in each game.

    Two more columns say how much of the game was learned, and how much of what was learned is left at the end. Scores of constant actions
    (the same one in every step) and of people are added where they are known.
    """
    scores, constants = record.scores, best_constants(record)
    names, shown_SG = _phase_columns(record, scores.mean_PG)
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
    return Table(
        "Returns",
        _columns(["game", "random"], constants, [*names, "learned", "kept"], has_reference),
        rows,
        "Mean returns, in the game's own points; evaluations do not name the game to the agent. Random: random actions. "
        f"{_CONSTANT + ' ' if constants else ''}"
        "Learned: the return right after the game's own training, minus random; a ? means that the difference is less than two standard "
        f"errors. Kept: the share of what was learned that is left at the end.{' ' + _REFERENCE if has_reference else ''}",
    )


def evaluation_table(record: RunRecord) -> Table:
    """Makes the table of a single evaluation: for each game the agent's mean return and, for comparison, the mean return of random play."""
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
                format_share(_number(event, "dormant")),
                *([format_share(share)] if has_reference else []),
            ]
        )
    cut, played = sum(event["episodes_truncated"] for event in events), sum(len(event["returns"]) for event in events)
    return Table(
        "Returns",
        _columns(["game", "random"], constants, ["mean return", "above random", "dormant units"], has_reference),
        rows,
        "",
        caption=f"?: above random play by less than two standard errors. {cut} of {played} episodes were cut at the step limit.",
    )


def _columns(first: list[str], constants: Mapping[str, float], then: list[str], has_reference: bool) -> list[str]:
    return [*first, *(["best constant"] if constants else []), *then, *(["of reference"] if has_reference else [])]


def single_task_table(record: RunRecord) -> Table:
    """Makes the table that compares a run's scores with single-task scores: the scores of agents that each learned one game alone.

    A score is given as a share of the single-task score; 0 % is random play. The table has no rows if no single-task score is known.
    """
    scores, constants = record.scores, best_constants(record)
    single_G = _single_task(record)
    names, normal_SG = _phase_columns(record, measures.normalise(scores.mean_PG, scores.random_G, single_G))
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
    return Table(
        "Scores as shares of single-task training",
        _columns(["game", "single-task"], constants, names, has_reference=False),
        rows if record.single_task else [],
        "Single-task: the mean raw return of the runs that learned this game alone; a dash if there is no such run. The other columns are "
        f"the returns above, as shares.{' ' + _CONSTANT if constants else ''}",
        caption=_BY_SINGLE,
    )


def _single_task(record: RunRecord) -> measures.Floats:
    """The single-task score of each game, (G,). NaN for games without a single-task run."""
    return np.array([record.single_task.get(game, np.nan) for game in record.games])


def _phase_columns(record: RunRecord, scores_PG: measures.Floats) -> tuple[list[str], measures.Floats]:
    """Chooses the columns of a table of scores: one for each phase (training in one game), or two if the names are too long for a terminal.

    The two are: right after the game's own training, and at the end.

    Returns:
        The names of the S columns, and the scores in them, (S, G).
    """
    trained = record.schedule[: len(scores_PG)]
    if sum(3 + len(game) for game in trained) <= _PHASE_LETTERS_MAX:
        return [f"after {game}" for game in trained], scores_PG
    own_and_final = (measures.learning(scores_PG, record.scores.trained_P), measures.final(scores_PG))
    return ["after its training", "at the end"], np.stack(own_and_final)


def detector_table(record: RunRecord) -> Table:
    """Makes the table of how well the agent recognised each game in the last evaluation. The agent is not told which game it plays."""
    rows = []
    for index, event in enumerate(record.last_evaluations):
        shares = [_number(event, name) for name in ("detector_accuracy", "nearest_mean_accuracy", "prefetch_recall")]
        steps, false = (_number(event, name) for name in ("steps_to_detect", "false_switches"))
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
    return Table(
        "Detector in the last evaluation",
        ["game", "acted as it", "detector", "nearest mean", "steps to detect", "false switches", "prefetch recall"],
        rows,
        "Acted as it: share of steps that the agent played with this game's experts and head. Detector, nearest mean: share of frames for "
        "which this method finds the right game most probable. Steps to detect: from the game's first frame until its experts are in use; "
        "mean over environments, without those where this never happened; a dash for the first game, because no switch leads to it. False "
        "switches: from the right game to another, per 1000 frames. Prefetch recall: of the experts that the game needed, the share named "
        "before their first use.",
        caption=" ".join(
            [f"Ambiguous: {one} and {other}, confusion {confusion:.2f}." for one, other, confusion in ambiguous(record)]
            + [f"The detector takes {game} for an unknown game in {format_share(share)} of its frames." for game, share in _unknown(record)]
        ),
    )


def ambiguous(record: RunRecord) -> list[tuple[str, str, float]]:
    """The pairs of games that the detector mixed up in the last evaluation: (game, other game, confusion).

    A confusion of 1 means that the detector cannot tell the two games apart.
    """
    from ooc_moe.detection.tally import ambiguous_pairs  # Needs torch, which most tables do not.

    probabilities = {event["evaluated"]: event["probabilities"] for event in record.last_evaluations if event.get("probabilities")}
    return ambiguous_pairs({game: row for game, row in probabilities.items() if game in row})


def _unknown(record: RunRecord) -> list[tuple[str, float]]:
    """The games that the detector took for unknown in most frames of the last evaluation: (game, share of its frames)."""
    shares = [(event["evaluated"], _number(event, "unknown")) for event in record.last_evaluations]
    return [(game, share) for game, share in shares if share > 0.5]


def measures_table(record: RunRecord) -> Table:
    """Makes the table of measures of learning, forgetting and transfer, as means over games.

    Scores are given as shares of single-task scores where these are known, else of the run's own best scores.
    """
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
    dormant = {event["evaluated"]: _number(event, "dormant") for event in record.last_evaluations}
    dormant_G = np.array([dormant.get(game, float("nan")) for game in scores.games])
    unknown = [game for game in scores.games if game not in record.single_task]
    shares = (dormant_G, measures.without_last(dormant_G, trained))
    rows.append(["dormant units", *(format_share(measures.mean(values_G)) for values_G in shares)])
    return Table(
        "Learning and forgetting",
        ["mean over games", "all games", "without the last"],
        rows if len(scores.mean_PG) else [],
        "Average: the score at the end. Learning: the score right after the game's own training. Retention: the share of what was learned "
        "that is left at the end. Forgetting: the fall from the game's best score to its last. Isolated forgetting: the fall while one "
        "later game was learned. Zero-shot transfer: the rise while one earlier game was learned. These two are CORA's (Powers et al. "
        "2022): shares of the run's highest raw return in the game, counted from 0 and not from random play. Forward transfer: the score "
        "just before the game's own training. Both transfers need --eval-unseen. Dormant units: hidden units of the game's experts that "
        "hardly respond to it any more. Without the last: the mean without the game trained last, which cannot be forgotten yet."
        + ("" if record.single_task else " To measure by runs that learned one game alone, use ooc-moe report --single-task RUN."),
        caption=f"{_BY_SINGLE}{f' Without {listed(unknown)}: no such run.' if unknown else ''}" if record.single_task else _BY_ITSELF,
    )


def learned_clearly(scores: Scores, game: int) -> bool:
    """Whether a game was clearly learned: right after its training, its mean return is above random play by more than two standard errors.

    `game` is the number of the game's column in `scores`.
    """
    phases = [phase for phase, trained in enumerate(scores.trained_P) if trained == game]
    return bool(phases) and measures.clearly_above(scores.returns.get((phases[-1], game), []), float(scores.random_G[game]))


def verdict(scores: Scores, game: int) -> str:
    """Says in a few words how much of a game (`game`: its column in `scores`) was learned and kept: "learned +1,600, kept 75.0 %"."""
    if not learned_clearly(scores, game):
        return "not clearly learned"
    gain = measures.learning(scores.mean_PG, scores.trained_P)[game] - scores.random_G[game]
    kept = float(measures.retention(scores.mean_PG, scores.trained_P, scores.random_G)[game])
    return f"learned {format_score(gain, sign=True)}" + ("" if np.isnan(kept) else f", kept {format_share(kept)}")


def of_reference(record: RunRecord, game: str, score: float) -> float:
    """Normalises a score by the game's reference scores: 0 is random play, 1 is a human (in pixel games the best possible play).

    NaN if the game was not evaluated, if an evaluation cut an episode of it at the step limit, or if it has no reference scores.
    """
    from ooc_moe.envs import REFERENCE_SCORES  # Needs gymnasium, which most tables do not.

    cut = [event.get("episodes_truncated") for event in record.evaluations if event["evaluated"] == game]
    if not cut or any(cut):
        return float("nan")
    floor, ceiling = REFERENCE_SCORES.get(game.partition("@")[0], (np.nan, np.nan))
    return float(measures.normalise([score], [floor], [ceiling])[0])


def _recognised(event: Event) -> float:
    """The share of an evaluation's steps in which the agent took the game for the right one. NaN if this was not logged."""
    return float(event["believed"].get(event["evaluated"], 0.0)) if event.get("believed") else float("nan")


def _number(event: Event, name: str) -> float:
    """The number in the event's field `name`. NaN if the field is missing or null."""
    value = event.get(name)
    return float("nan") if value is None else float(value)
