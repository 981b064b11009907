"""Benchmarks: `ooc-moe bench store` measures the daemon against its peers in one run, `ooc-moe bench policies` the DRAM tier's policies.

`ooc-moe bench cache` measures the trainer's side, `ooc-moe bench learning` the learner; only these two need torch. Peers come from the
`bench` extra; one of the store that is not installed is named and left out.
"""
