"""`ooc-moe bench learning`: the speed and the returns of our PPO, compared with those of Stable-Baselines3's PPO in the same games.

The command's options and measurements are in benchmark.py. peers.py sets up Stable-Baselines3 with our network and our games.
"""
