"""Adam for experts that live in a store: moments and step count travel with each expert's record.

Only experts with gradients are fetched, changed and made dirty; the others are not touched, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ooc_moe.moe import PARAMETERS, ExpertGradients
from ooc_moe_client.cache import ExpertCache


class ExpertAdam:
    """As `torch.optim.Adam` (Kingma and Ba 2015), but an expert's step count advances only when it gets tokens.

    Args:
        caches: the agent's caches.
        gradients: what backward left for each of them, in the same order.
        lr: the learning rate; may be set anew at any time.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        caches: Sequence[ExpertCache],
        gradients: Sequence[ExpertGradients],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self._pairs = list(zip(caches, gradients, strict=True))

    @torch.no_grad()
    def step(self) -> None:
        """Updates every expert that has gradients, in waves that fit the cache."""
        for cache, gradients in self._pairs:
            for wave in cache.waves(gradients.experts):
                with cache.updating(wave) as slots:
                    cache.views["step"][slots] += 1
                    steps = cache.views["step"][slots, 0].tolist()
                    for expert, slot, step in zip(wave, slots, steps, strict=True):
                        self._update(cache.views, slot, gradients.of(expert), step)

    def zero_grad(self) -> None:
        """Forgets all gradients of experts."""
        for _, gradients in self._pairs:
            gradients.zero()

    @torch.no_grad()
    def clip_grad_norm(self, dense: Iterable[Tensor], max_norm: float) -> float:
        """Scales all gradients, the dense parameters' and the experts', to a common norm of at most `max_norm`; returns the norm before.

        Squares are summed in float64, parameter by parameter and then expert by expert in order of ids: residency cannot change the sum.
        """
        flats = [parameter.grad for parameter in dense if parameter.grad is not None]
        flats += [gradients.flat(expert) for _, gradients in self._pairs for expert in gradients.experts]
        if not flats:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(flat, dtype=torch.float64) for flat in flats])
        norm = sum(norms.square().tolist()) ** 0.5
        if norm > max_norm:
            torch._foreach_mul_(flats, max_norm / (norm + 1e-6))
        return float(norm)

    def _update(self, views: dict[str, Tensor], slot: int, gradients: dict[str, Tensor], step: int) -> None:
        beta1, beta2 = self.betas
        for name in PARAMETERS:
            mean, square = views[f"{name}.exp_avg"][slot], views[f"{name}.exp_avg_sq"][slot]
            mean.lerp_(gradients[name], 1 - beta1)
            square.mul_(beta2).addcmul_(gradients[name], gradients[name], value=1 - beta2)
            denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(self.eps)
            views[name][slot].addcdiv_(mean, denominator, value=-self.lr / (1 - beta1**step))
