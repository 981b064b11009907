"""Adam for experts that live in a store. Adam's moments and step count are part of each expert's record there.

A step fetches and changes only the experts that have gradients. All other experts stay the same, bit for bit. A new optimizer begins with
zero moments: when it first updates an expert, it discards the moments that an earlier optimizer left in the expert's record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ooc_moe.moe.layer import PARAMETERS, ExpertGradients
from ooc_moe_client.hbm.cache import ExpertCache


class ExpertAdam:
    """Adam (Kingma and Ba 2015) for experts, as in `torch.optim.Adam`. An expert's step count advances only when the expert gets tokens.

    Args:
        caches: the caches through which the experts are read and changed.
        gradients: the experts' gradients, one entry for each cache in the same order.
        lr: the learning rate. It may be changed at any time.
        betas: decay rates of the first and second moments.
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
        # For each cache, the experts whose records hold this optimizer's moments.
        self._begun: list[set[int]] = [set() for _ in self._pairs]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every expert that has gradients, in waves: groups of experts that fit the cache at once."""
        for (cache, gradients), begun in zip(self._pairs, self._begun, strict=True):
            for wave in cache.waves(gradients.experts):
                with cache.updating(wave) as slots:
                    self._begin(cache.views, [slot for slot, expert in zip(slots, wave, strict=True) if expert not in begun])
                    begun.update(wave)
                    self._update(cache.views, slots, [gradients.of(expert) for expert in wave])

    def zero_grad(self) -> None:
        """Drops the gradients of all experts."""
        for _, gradients in self._pairs:
            gradients.zero()

    @torch.no_grad()
    def clip_grad_norm(self, dense: Iterable[Tensor], max_norm: float) -> float:
        """Scales all gradients down so that their global norm, over dense parameters and experts together, is at most `max_norm`.

        Squares are summed in float64, parameter by parameter and then expert by expert in order of ids, so that the sum does not depend on
        which experts are in the cache.

        Args:
            dense: the parameters that are not experts'. Those without a gradient are ignored.
            max_norm: the largest norm allowed.

        Returns:
            The global norm before scaling.
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
        """Lists, for each cache, the experts that this optimizer has updated. Their moments are in their records in the store."""
        return [sorted(begun) for begun in self._begun]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Continues from a saved state: the experts that it lists keep the moments in their records; all others begin with zero moments."""
        self._begun = [set(experts) for experts in state]

    def _begin(self, views: dict[str, Tensor], slots: list[int]) -> None:
        """Sets the moments and step counts in these slots to zero."""
        if slots:
            for name in ("step", *(f"{name}.{moment}" for name in PARAMETERS for moment in ("exp_avg", "exp_avg_sq"))):
                views[name][slots] = 0

    def _update(self, views: dict[str, Tensor], slots: list[int], gradients: list[dict[str, Tensor]]) -> None:
        """Updates all tensors of the experts in these slots in one fused operation.

        No element of the result depends on another, so the division into waves does not change it.
        """
        views["step"][slots] += 1
        # As floats, because CUDA's fused kernel reads step counts as floats.
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
