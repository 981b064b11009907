"""Simulates the memory tiers without a GPU and without torch: replays traces, and predicts a run's bytes and stalls before it starts.

Offers `replay` (plays one trace, a recorded sequence of accesses to experts, through tiers of given sizes), `sweep` (many such replays,
and their table), `chart` (their chart), `synthetic_traces` (made traces), and `plan` (what a run will demand of its tiers).
"""
