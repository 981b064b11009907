"""`ooc-moe bench cache --parts layer`: the time of a MoE layer on the cache's slots, compared with a dense FFN of the same active FLOPs.

The time is that of a forward and a backward pass. The MoE layer and the dense FFN are pre-norm with a residual connection. A pass starts
without gradients and computes the gradients of the input and of every weight. The dense FFN is top_k * hidden wide inside. The MoE layer
routes the tokens, sorts them by expert, computes on the cache's slots and combines the results; all its experts are resident in the cache.
On a GPU both layers run under autocast to bfloat16. The layers are timed in interleaved rounds (harness.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import gelu

from ooc_moe.bench.cache.options import LayerBench
from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, timed_rounds, warm_up
from ooc_moe.bench.result_page import kept_notes, met_target
from ooc_moe.bench.torch_setup import torch_threads
from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.display.table import Table, markdown_table
from ooc_moe.metrics import provenance
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore

# Targets for (the MoE layer's time / the dense FFN's time) at the full preset's sizes on a CPU.
RATIO_MUST, RATIO_AIM = 1.25, 1.1
SAMPLE_FLOPS = 5e8  # Work of one sample. A sample has several runs where one run of a small layer is too short to time.
NOTES = "## What bounds it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the result table: how long the MoE layer and the dense FFN take for a forward and backward pass, in milliseconds.

    A row belongs to one preset (`size`), which fixes `dim`, `hidden` and `top_k`; one number of experts in the layer (`pool`); and one
    number of tokens.
    """

    size: str
    dim: int
    hidden: int
    top_k: int
    pool: int
    tokens: int
    moe_ms: Spread
    dense_ms: Spread
    judged: bool  # Whether the targets apply to this row.

    @property
    def ratio(self) -> float:
        """The MoE layer's median time divided by the dense FFN's."""
        return self.moe_ms.median / self.dense_ms.median

    @property
    def reached(self) -> str:
        """Which target the ratio meets: "aim" (the stricter one), "must" or "no"; "" where no target applies."""
        if not self.judged:
            return ""
        return met_target(self.ratio, must=RATIO_MUST, aim=RATIO_AIM, at_most=True)


def run(bench: LayerBench, console: Console) -> list[Row]:
    """Times the MoE layer and the dense FFN for every combination of a preset and a number of tokens. Returns the rows of the table.

    `console` shows which combination is being measured.

    Raises:
        WrongBytes: a layer's result differs from what plain torch computes with the same parameters.
    """
    rows: list[Row] = []
    with torch_threads(bench.threads), console.status("") as status:
        for size in bench.sizes:
            for tokens in bench.tokens:
                status.update(f"{size}, {tokens} tokens")
                rows += _measure_size(bench, size, tokens)
    return rows


def _measure_size(bench: LayerBench, size: str, tokens: int) -> list[Row]:
    """Measures the dense FFN and a MoE layer for each pool size, for one preset and number of tokens, all in the same rounds."""
    config = PRESETS[size]
    device, flops = bench.torch_device, 3 * 2 * 2 * tokens * config.top_k * config.dim * config.hidden
    generator = torch.Generator().manual_seed(0)
    x_ND, grad_ND = (torch.randn(tokens, config.dim, generator=generator).to(device) for _ in range(2))
    names = {pool: f"pool of {pool}" for pool in bench.pools}
    with _layers(config, bench.pools, device) as layers:
        paths = [_dense_path(config, x_ND, grad_ND)]
        paths += [_moe_path(names[pool], *layers[pool], x_ND, grad_ND) for pool in bench.pools]
        warm_up(paths, before_each=lambda: None)
        calls = max(1, round(SAMPLE_FLOPS / flops))
        seconds = timed_rounds(paths, calls=calls, rounds=bench.rounds, order=random.Random(0), on_run=lambda: None)
    ms = {name: Spread.of([1e3 * value for value in values]) for name, values in seconds.items()}
    shape = {"dim": config.dim, "hidden": config.hidden, "top_k": config.top_k}
    judged = size == "full" and device.type == "cpu"
    return [
        Row(size=size, **shape, pool=pool, tokens=tokens, moe_ms=ms[names[pool]], dense_ms=ms["dense"], judged=judged)
        for pool in bench.pools
    ]


@contextmanager
def _layers(config: AgentConfig, pools: Sequence[int], device: torch.device) -> Iterator[Mapping[int, tuple[TieredMoE, TieredExperts]]]:
    """Yields, by pool size, a MoE layer whose experts are all resident in a cache, and the TieredExperts that it computes with."""
    caches, layers = [], {}
    try:
        for pool in pools:
            store = InMemoryStore()
            (spec,) = replace(config, num_experts=pool, pool_size=pool, banks="shared").bank_specs("bench", seed=0)
            store.create_bank(spec)
            caches.append(ExpertCache(store, spec.name, capacity_experts=pool, device=device))
            torch.manual_seed(0)
            router = Router(config.dim, range(pool), top_k=config.top_k, noise=config.router_noise)
            # Random weights spread the tokens over the pool evenly enough that every expert gets some.
            nn.init.normal_(router.weight, std=config.dim**-0.5)
            experts = TieredExperts(caches[-1])
            layers[pool] = TieredMoE(experts, router).to(device), experts
        yield layers
    finally:
        for cache in caches:
            cache.close()


def _dense_path(config: AgentConfig, x_ND: Tensor, grad_ND: Tensor) -> TimedPath:
    width = config.top_k * config.hidden
    ffn = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, width), nn.GELU(), nn.Linear(width, config.dim)).to(x_ND.device)

    def step() -> None:
        ffn.zero_grad()
        _forward_backward(lambda x: x + ffn(x), x_ND, grad_ND)

    return TimedPath(name="dense", run=step, check=lambda: None)


def _moe_path(name: str, layer: TieredMoE, experts: TieredExperts, x_ND: Tensor, grad_ND: Tensor) -> TimedPath:
    def step() -> None:
        layer.zero_grad()
        experts.gradients.zero()
        _forward_backward(lambda x: layer(x).y, x_ND, grad_ND)

    def check() -> None:
        tolerance = 1e-3 if x_ND.device.type == "cpu" else 5e-2
        for what, value, expected in zip(("output", "input's gradient"), _step(lambda x: layer(x).y), _step(plain), strict=True):
            error = float((value - expected).norm() / expected.norm())
            if not error < tolerance:
                raise WrongBytes(f"the {what} is {error:.1e} away from what plain torch makes of the same parameters")

    def _step(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return _forward_backward(function, x_ND, grad_ND)

    def plain(x: Tensor) -> Tensor:
        normal_ND = layer.norm(x)
        routed = layer.router(normal_ND)
        ids = list(range(experts.cache.num_experts))
        with experts.cache.reading(ids) as slots:
            views = {name: view[slots] for name, view in experts.cache.views.items()}
        for expert in ids:
            gate_N = (routed.gates_NK * (routed.experts_NK == expert)).sum(1, keepdim=True)
            hidden = gelu(torch.addmm(views["b1"][expert], normal_ND, views["w1"][expert]))
            x = x + gate_N * torch.addmm(views["b2"][expert], hidden, views["w2"][expert])
        return x

    return TimedPath(name=name, run=step, check=check)


def _forward_backward(function: Callable[[Tensor], Tensor], x_ND: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Runs `function` on the tokens and backpropagates `grad_ND`. Returns the output and the input's gradient once the device is done."""
    x_ND = x_ND.detach().requires_grad_()
    with torch.autocast(x_ND.device.type, torch.bfloat16, enabled=x_ND.is_cuda):
        y_ND = function(x_ND)
    torch.autograd.backward(y_ND, grad_ND)
    if x_ND.is_cuda:
        torch.cuda.synchronize(x_ND.device)
    assert x_ND.grad is not None
    return y_ND.detach(), x_ND.grad


HEADINGS = (
    "layer",
    "dim x hidden, top-k",
    "tokens",
    "pool",
    "MoE ms [quartiles]",
    "dense ms [quartiles]",
    "ratio",
    "must",
    "aim",
    "reached",
)


def table(rows: Sequence[Row]) -> Table:
    """Makes the result table, one line for each row."""
    return Table("", HEADINGS, [_cells(row) for row in rows], alignment="ll" + "r" * (len(HEADINGS) - 3) + "l")


def save(rows: Sequence[Row], bench: LayerBench, path: Path, *, command: str) -> None:
    """Writes the result page to `path`: command, machine and versions, and the table. Notes that people added to an existing page stay."""
    facts = provenance.facts(Path(), command=command)
    facts |= {"torch": torch.__version__, "device": _device_text(bench), "rounds": f"{bench.rounds}, interleaved"}
    notes = kept_notes(path, NOTES, missing="to be written: the profile")
    lines = [
        "# ooc-moe bench cache: the MoE layer",
        "",
        "Forward and backward of the tiered layer, compared with a dense FFN of the same active FLOPs.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", markdown_table(table(rows))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", notes.rstrip(), ""]))


def _device_text(bench: LayerBench) -> str:
    if bench.torch_device.type == "cuda":
        return f"{torch.cuda.get_device_name(bench.torch_device)}, autocast to bfloat16"
    return f"cpu, {bench.threads} thread{'s' if bench.threads > 1 else ''}, float32"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.size,
        f"{row.dim} x {row.hidden}, {row.top_k}",
        str(row.tokens),
        str(row.pool),
        row.moe_ms.text,
        row.dense_ms.text,
        f"{row.ratio:.2f}",
        f"{RATIO_MUST:g}" if row.judged else "",
        f"{RATIO_AIM:g}" if row.judged else "",
        row.reached,
    )
