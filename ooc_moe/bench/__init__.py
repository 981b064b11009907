"""Benchmarks: `ooc-moe bench store` measures the daemon against its peers in one run, `ooc-moe bench policies` the DRAM tier's policies.

`ooc-moe bench cache` measures the trainer's side, and only that needs torch. Peers of the store come from the `bench` extra; one that
is not installed is named and left out.
"""
