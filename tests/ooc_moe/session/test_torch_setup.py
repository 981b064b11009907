"""Torch's settings at the start of a run: set in one place, whatever they were before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ooc_moe.session.session import open_session
from ooc_moe.session.torch_setup import CUBLAS_WORKSPACE, set_up_torch
from ooc_moe_client.in_memory import InMemoryStore
from tests.ooc_moe.runs import pixel_run


def settings() -> dict[str, object]:
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
    }


EXACT = {"matmul": "highest", "cudnn tf32": False, "cudnn benchmark": False, "fill": False}
DEFAULT = EXACT | {"cudnn deterministic": False, "deterministic": False}
REPEATABLE = EXACT | {"cudnn deterministic": True, "deterministic": True}


@pytest.fixture(autouse=True)
def left_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is set to the opposite before; afterwards it is as at the start of a run."""
    # Set first, so that it is as it was after the test, whatever the test sets.
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    yield
    set_up_torch(pixel_run(tmp_path / "after"))


def test_a_run_computes_float32_in_float32_and_lets_no_clock_choose_algorithms(tmp_path: Path) -> None:
    set_up_torch(pixel_run(tmp_path / "run"))
    assert settings() == DEFAULT
    assert CUBLAS_WORKSPACE not in os.environ


def test_a_deterministic_run_asks_torch_and_cublas_for_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_torch(pixel_run(tmp_path / "run", deterministic=True))
    assert settings() == REPEATABLE
    assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    set_up_torch(pixel_run(tmp_path / "run", deterministic=True))
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"


def test_a_session_begins_with_it(tmp_path: Path) -> None:
    """Training, evaluation and `load` open sessions."""
    config, store = pixel_run(tmp_path / "run"), InMemoryStore()
    for spec in config.agent.bank_specs(config.name, config.seed):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names(config.name)):
        assert settings() == DEFAULT


def test_the_runs_gpu_becomes_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        set_up_torch(pixel_run(tmp_path / "run", device=device))
    assert chosen == [torch.device("cuda", 1)]
