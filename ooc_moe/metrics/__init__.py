"""What a run writes about itself, how it is read back, and what is computed from it.

Offers `log` (the events of a run), `trace` (the experts that it asked for), `run` (a run's directory as arrays), `measures` and
`statistics` (what the numbers mean), `single_task` (scores of agents that learned one game) and `provenance` (machine, versions, commit).
"""
