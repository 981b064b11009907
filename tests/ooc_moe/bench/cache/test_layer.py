"""The benchmark of the MoE layer checks what it times, and its table says which rows have targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from ooc_moe.bench.cache import layer
from ooc_moe.bench.cache.layer import NOTES, Row, save
from ooc_moe.bench.cache.options import LayerBench
from ooc_moe.bench.harness import Spread, WrongBytes
from ooc_moe.moe.layer import TieredExperts
from tests.ooc_moe.commands import exit_code

QUICK = ("--sizes", "tiny", "--tokens", "64", "--pools", "2,5", "--rounds", "1", "--device", "cpu")


def test_a_quick_run_times_every_pool_beside_the_same_dense_layer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer, "SAMPLE_FLOPS", 1)
    threads = torch.get_num_threads()
    assert exit_code("bench", "cache", *QUICK, "--threads", "2", "--json", "--results", str(tmp_path)) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads(capsys.readouterr().out)["layer"]
    assert [(row["pool"], row["tokens"], row["dim"], row["hidden"]) for row in rows] == [(2, 64, 16, 32), (5, 64, 16, 32)]
    assert rows[0]["dense_ms"] == rows[1]["dense_ms"]
    assert all(row["moe_ms"]["median"] > 0 for row in rows)
    saved = (tmp_path / "layer.md").read_text()
    assert "- device: cpu, 2 threads, float32" in saved
    assert str(tmp_path) not in saved


def test_a_layer_that_computes_something_else_is_not_timed(monkeypatch):
    right = TieredExperts.__call__
    monkeypatch.setattr(TieredExperts, "__call__", lambda self, x_ND, routed, **how: 1.01 * right(self, x_ND, routed, **how))
    with pytest.raises(WrongBytes, match=r"pool of 4: the output is \d.\de-\d+ away"):
        layer.run(LayerBench(sizes=("tiny",), tokens=(8,), device="cpu", rounds=1), Console(quiet=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "layer,layers"], "parts: 'layers' is not one of layer"),
        (["--sizes", "huge"], "sizes: 'huge' is not one of tiny, demo, full"),
        (["--pools", "1"], "pools: 1 experts are fewer than top_k 2"),
        (["--tokens", "many"], "tokens: 'many' is not a whole number"),
        (["--rounds", "0"], "rounds: 0 is not at least 1"),
        (["--threads", "0"], "threads: 0 is not at least 1"),
        (["--device", "tpu"], "device: 'tpu' is not one of auto, cpu, cuda"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, words, said):
    assert exit_code("bench", "cache", *words) == 2
    assert said in capsys.readouterr().err


def test_only_the_full_size_on_a_cpu_is_judged_and_notes_are_kept(tmp_path):
    spread = Spread(median=10.0, q1=9.0, q3=11.0)
    row = Row(size="full", dim=512, hidden=2048, top_k=2, pool=4, tokens=512, moe_ms=spread, dense_ms=spread, judged=True)
    for median, reached in ((11.0, "aim"), (12.5, "must"), (12.6, "no")):
        slower = replace(row, moe_ms=Spread(median=median, q1=median, q3=median))
        assert slower.reached == reached
        assert replace(slower, judged=False).reached == ""
    path = tmp_path / "layer.md"
    for _ in range(2):
        save([row], LayerBench(device="cpu"), path, command="ooc-moe bench cache")
        assert "| full | 512 x 2048, 2 | 512 | 4 | 10 [9, 11] | 10 [9, 11] | 1.00 | 1.25 | 1.1 | aim |" in path.read_text()
        path.write_text(path.read_text().partition(NOTES)[0] + f"{NOTES}\n\nThe GEMMs do.\n")
    save([row], LayerBench(device="cpu"), path, command="ooc-moe bench cache")
    assert path.read_text().endswith(f"{NOTES}\n\nThe GEMMs do.\n")
