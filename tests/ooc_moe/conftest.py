"""Fixtures for all tests of `ooc_moe`: agents over an in-memory store (agents.py), and a made-up run (made_up_run.py)."""

from tests.ooc_moe.agents import frames, stored, twin, world  # noqa: F401
from tests.ooc_moe.made_up_run import finished_run, half_a_run  # noqa: F401
