"""`ooc-moe bench learning`: the speed and the returns of our PPO, compared with those of Stable-Baselines3's PPO in the same games.

benchmark.py has the command's function; peers.py gives Stable-Baselines3 our network and our games.
"""
