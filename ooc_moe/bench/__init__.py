"""Benchmarks: what `ooc-moe bench store`, `cache`, `learning` and `policies` measure.

- `store` compares fetches from the daemon and pushes to it with other ways to move or store bytes.
- `cache` compares training through the cache with training that has all experts in device memory.
- `learning` compares our PPO with Stable-Baselines3's.
- `policies` compares eviction policies.

The modules of this directory are what the four benchmarks share: how the compared ways to do the same work (called paths in the code) are
timed (harness.py), child processes, and result pages. Only `cache` and `learning` need torch.

The systems that ours is compared with ("peers") come from the `bench` extra. A peer of the store benchmark that is not installed is not
measured, and the results say so.
"""
