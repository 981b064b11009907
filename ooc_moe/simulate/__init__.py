"""Simulates the memory tiers without a GPU and without torch: replays traces, and predicts a run's bytes and stalls before it starts.

Offers `replay` (one trace through tiers of given sizes), `sweep` (many such replays, and their table), `synthetic_traces`, `chart`, and
`plan` (what a run will demand of its tiers).
"""
