"""Writes what happens in a run to files, reads the files back, and computes measures from them.

Offers `log` (the events of a run), `trace` (the experts that the run asked its caches for, in order), `run` (a run's files as arrays),
`measures` (of learning, forgetting, and how much games share experts), `statistics` (of several runs), `baselines` (scores of random play
and of constant actions), `single_task` (scores of agents that learned only one game) and `provenance` (the machine, versions and commit
that a result comes from).
"""
