"""Benchmarks: `ooc-moe bench store` measures the daemon against its peers in one run, `ooc-moe bench policies` the DRAM tier's policies.

Nothing here needs torch. Peers come from the `bench` extra; one that is not installed is named and left out.
"""
