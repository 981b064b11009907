"""The events that a run logs to metrics.jsonl while it trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ooc_moe.agent.agent import routed_tokens
from ooc_moe.learning.rollout import Rollout
from ooc_moe.metrics.log import MetricsWriter
from ooc_moe.session.checkpoint import Progress
from ooc_moe.session.session import Session


class RunEvents:
    """Logs the events of a run to its metrics file. Each method but `new_fetches` logs one kind of event."""

    def __init__(self, session: Session, writer: MetricsWriter) -> None:
        self._session, self._writer = session, writer
        self._fetched = [cache.fetches() for cache in session.caches]

    def switch(self, at: Progress, *, phase: int, previous: str | None, game: str) -> None:
        """Logs that training changes from the game `previous` to `game`, whose place in the run's list of games is `phase`, from 0.

        `previous` is None when the run begins.
        """
        self._writer.log("switch", step=at.step, update=at.update, game=game, phase=phase, **{"from": previous, "to": game})

    def update(
        self, at: Progress, game: str, rollout: Rollout, *, losses: dict[str, float], detector: dict[str, float], duration_s: float
    ) -> None:
        """Logs one PPO update.

        Args:
            at: where the run stands after the update.
            game: the game in training.
            rollout: the rollout that the update learned from.
            losses: the losses and measures of the update.
            detector: what the detector measured while it learned from the rollout.
            duration_s: the time that rollout and update took together.
        """
        episodes = rollout.episode_returns
        self._writer.log(
            "update",
            step=at.step,
            update=at.update,
            game=game,
            losses=losses,
            episode_return_mean=sum(episodes) / len(episodes) if episodes else None,
            episodes=len(episodes),
            reward_per_step=rollout.reward_per_step,
            steps_per_s=self._session.config.steps_per_update / duration_s,
            cache=self._session.cache_stats().to_dict(),
            store=self._session.store_stats(),
            usage=routed_tokens(rollout.experts_BTLK),
            fetches=self.new_fetches(),
            detector=detector,
        )

    def evaluation(self, at: Progress, *, phase: int, game: str, fields: dict[str, Any]) -> None:
        """Logs the result of evaluating one game (`fields`) after training `game`, whose number in the run's list of games is `phase`."""
        self._writer.log("evaluation", step=at.step, update=at.update, game=game, phase=phase, **fields)

    def checksums(self, at: Progress, game: str) -> None:
        """Logs the checksums of all experts in the store that were ever written, by bank and expert.

        An expert has two checksums: of its parameters and of its optimizer moments. Two such events show which experts stayed equal bit for
        bit between them.
        """
        written = {
            bank: {
                info.expert: (f"{info.parameter_xxh3:016x}", f"{info.optimizer_xxh3:016x}")
                for info in self._session.store.list_experts(cache.bank)
                if info.version
            }
            for bank, cache in enumerate(self._session.caches)
        }
        self._writer.log("checksums", step=at.step, update=at.update, game=game, experts=written)

    def done(self, at: Progress) -> None:
        """Logs that the run has come to its end, with the final counters of caches and store."""
        cache, store = self._session.cache_stats().to_dict(), self._session.store_stats()
        self._writer.log("done", step=at.step, update=at.update, cache=cache, store=store)

    def new_fetches(self) -> dict[int, Counter[int]]:
        """Counts how often each expert was fetched into the caches since the last call of this method, by bank and expert."""
        before, self._fetched = self._fetched, [cache.fetches() for cache in self._session.caches]
        return {bank: now - then for bank, (now, then) in enumerate(zip(self._fetched, before, strict=True))}
