"""Simulates the memory tiers without a GPU and without torch: replays traces, and predicts a run's bytes and stalls before it starts.

A trace is a sequence of accesses to experts, recorded in a run or made artificially. To replay it is to do its accesses again in simulated
tiers of given sizes. Offers `replay` (one replay), `sweep` (many replays, and their table), `chart` (their chart), `synthetic_traces`
(artificial traces), and `plan` (what a run will demand of its tiers).
"""
