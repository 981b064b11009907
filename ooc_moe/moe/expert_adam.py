"""Adam for experts that live in a store: moments and step count travel with each expert's record.

Only experts with gradients are fetched, changed and made dirty; the others are not touched, bit for bit. What an earlier optimizer left in
a record is dropped when this one first updates the expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ooc_moe.moe.layer import PARAMETERS, ExpertGradients
from ooc_moe_client.hbm.cache import ExpertCache


class ExpertAdam:
    """As a new `torch.optim.Adam` (Kingma and Ba 2015), but an expert's step count advances only when it gets tokens.

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
        self._begun: list[set[int]] = [set() for _ in self._pairs]  # by cache: whose moments are this optimizer's

    @torch.no_grad()
    def step(self) -> None:
        """Updates every expert that has gradients, in waves that fit the cache."""
        for (cache, gradients), begun in zip(self._pairs, self._begun, strict=True):
            for wave in cache.waves(gradients.experts):
                with cache.updating(wave) as slots:
                    self._begin(cache.views, [slot for slot, expert in zip(slots, wave, strict=True) if expert not in begun])
                    begun.update(wave)
                    self._update(cache.views, slots, [gradients.of(expert) for expert in wave])

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
        norms = torch.stack(torch._foreach_norm(flats, dtype=torch.float64))
        norm = sum(norms.square().tolist()) ** 0.5
        if norm > max_norm:
            torch._foreach_mul_(flats, max_norm / (norm + 1e-6))
        return float(norm)

    def state_dict(self) -> list[list[int]]:
        """For each cache, the experts whose records hold this optimizer's moments."""
        return [sorted(begun) for begun in self._begun]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Goes on with the moments that these experts' records hold."""
        self._begun = [set(experts) for experts in state]

    def _begin(self, views: dict[str, Tensor], slots: list[int]) -> None:
        """Sets their moments and step counts to zero."""
        if slots:
            for name in ("step", *(f"{name}.{moment}" for name in PARAMETERS for moment in ("exp_avg", "exp_avg_sq"))):
                views[name][slots] = 0

    def _update(self, views: dict[str, Tensor], slots: list[int], gradients: list[dict[str, Tensor]]) -> None:
        """All tensors of all slots in one fused operation, in which no element depends on another: waves make no difference."""
        views["step"][slots] += 1
        # As floats, because the fused kernel of CUDA reads such.
        steps = views["step"][slots, 0].float().unbind()
        pairs = [(slot, name) for slot in slots for name in PARAMETERS]
        torch._fused_adam_(
            [views[name][slot] for slot, name in pairs],
            [gradient[name] for gradient in gradients for name in PARAMETERS],
            [views[f"{name}.exp_avg"][slot] for slot, name in pairs],
            [views[f"{name}.exp_avg_sq"][slot] for slot, name in pairs],
            [],
            [step for step in steps for _ in PARAMETERS],
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
