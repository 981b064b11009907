"""Benchmarks: what `ooc-moe bench store`, `cache`, `learning` and `policies` measure.

`store` compares the daemon's data planes with other ways to move or keep bytes, `cache` training through the cache with training that has
all experts resident, `learning` our PPO with Stable-Baselines3's; `policies` compares eviction policies. The modules here are what these
share: how paths are timed (harness.py), child processes, and result pages. Only `cache` and `learning` need torch.

Peers come from the `bench` extra. A peer of the store benchmark that is not installed is named in the results and left out.
"""
