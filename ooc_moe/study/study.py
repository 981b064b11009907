"""What a study is: a list of runs, in which variants of one recipe (configuration) learn the same games, in several orders and with several
seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ooc_moe.config.run import RunConfig
from ooc_moe.study.variants import VARIANTS, Variant
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """One run of a study: a variant that learns the games in one order, with one seed.

    Its directory, `config.run_dir`, is <studies>/<study>/<variant>/<order>/seed-<n>.
    """

    variant: str
    order: str
    """The name of the order in which the run learns the games; the name of the game where a variant learns each game alone."""
    config: RunConfig

    @property
    def label(self) -> str:
        """The run's name as people read it, for example "full, catch-first, seed 0"."""
        return f"{self.variant}, {self.order}, seed {self.config.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A question about the project's claim (see verdicts.py), and the runs that are to answer it.

    It says which variants are run, in which orders of the games, and with how many seeds. `variants` has all variants by name.
    """

    name: str
    asks: str
    """The study's question, as a sentence."""
    limits: str
    """What the study cannot show, in sentences for the results page."""
    recipe: RunConfig
    """The configuration of the full recipe; every variant changes something in it."""
    orders: Mapping[str, tuple[str, ...]]
    """By name of the order: the games in the order in which they are learned."""
    seeds: Mapping[str, int]
    """By variant: how many seeds it is run with. The most important variant comes first."""
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    verdict_seeds: int = 5
    """With fewer seeds than this there is no verdict on separation or protection."""
    verdict_orders: int = 2
    """With fewer complete orders than this there is no verdict on protection."""

    @property
    def games(self) -> tuple[str, ...]:
        """All games of the study, each once, in the order in which `orders` first names them."""
        return tuple(dict.fromkeys(game for games in self.orders.values() for game in games))

    def runs(
        self,
        studies_dir: Path,
        *,
        variants: Sequence[str] = (),
        seeds: int | None = None,
        steps_per_game: int | None = None,
    ) -> list[StudyRun]:
        """Lists the study's runs in the order in which they are to be made.

        All variants come with seed 0 first, then all with seed 1, and so on, so that an unfinished study already compares variants.

        Args:
            studies_dir: holds a directory for each study.
            variants: list only the runs of these variants; of all variants if empty.
            seeds: list at most this many seeds of each variant; all of them if None.
            steps_per_game: environment steps in each game, instead of the recipe's.

        Raises:
            InvalidRequest: the study has no variant of that name.
        """
        for name in variants:
            if name not in self.seeds:
                raise InvalidRequest(f"variants: {name!r} is not one of {', '.join(self.seeds)}")
        wanted = {name: min(count, seeds or count) for name, count in self.seeds.items() if not variants or name in variants}
        recipe = self.recipe if steps_per_game is None else replace(self.recipe, steps_per_game=steps_per_game)
        return [
            run
            for seed in range(max(wanted.values(), default=0))
            for name, count in wanted.items()
            if seed < count
            for run in self._runs_of_seed(studies_dir / self.name, self.variants[name], recipe, seed)
        ]

    def _runs_of_seed(self, directory: Path, variant: Variant, recipe: RunConfig, seed: int) -> Iterator[StudyRun]:
        orders = {game.replace("/", "-"): (game,) for game in self.games} if variant.alone else self.orders
        for order, games in orders.items():
            run_dir = directory / variant.name / order / f"seed-{seed}"
            config = replace(variant.change(recipe), run_dir=run_dir, games=games, seed=seed)
            if config.trace is not None:
                config = replace(config, trace=str(run_dir / config.trace))
            yield StudyRun(variant=variant.name, order=order, config=config)
