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
    """Writes one event for each thing that happens in a run: a switch of games, an update, an evaluation, checksums, the end."""

    def __init__(self, session: Session, writer: MetricsWriter) -> None:
        self._session, self._writer = session, writer
        self._fetched = [cache.fetches() for cache in session.caches]

    def switch(self, at: Progress, *, phase: int, previous: str | None, game: str) -> None:
        """Training changes from the game `previous` (None: the run begins) to `game`, the run's game number `phase`."""
        self._writer.log("switch", step=at.step, update=at.update, game=game, phase=phase, **{"from": previous, "to": game})

    def update(self, at: Progress, game: str, rollout: Rollout, losses: dict[str, float], detected: dict[str, float], s: float) -> None:
        """One PPO update is done; with its rollout it took `s` seconds."""
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
            steps_per_s=self._session.config.steps_per_update / s,
            cache=self._session.cache_stats().to_dict(),
            store=self._session.store_stats(),
            usage=routed_tokens(rollout.experts_BTLK),
            fetches=self.new_fetches(),
            detector=detected,
        )

    def evaluation(self, at: Progress, *, phase: int, game: str, fields: dict[str, Any]) -> None:
        """One game was evaluated after `game`, the run's game number `phase`, was trained."""
        self._writer.log("evaluation", step=at.step, update=at.update, game=game, phase=phase, **fields)

    def checksums(self, at: Progress, game: str) -> None:
        """The checksums (parameters, optimizer) in the store of every expert that was ever written, by bank.

        A reader sees from two such events which experts stayed equal bit for bit.
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
        """The run came to its end."""
        cache, store = self._session.cache_stats().to_dict(), self._session.store_stats()
        self._writer.log("done", step=at.step, update=at.update, cache=cache, store=store)

    def new_fetches(self) -> dict[int, Counter[int]]:
        """How often each expert was fetched since the last call, by bank."""
        before, self._fetched = self._fetched, [cache.fetches() for cache in self._session.caches]
        return {bank: now - then for bank, (now, then) in enumerate(zip(self._fetched, before, strict=True))}
