"""Learning: playing the games, updating the agent by PPO, and protecting what the games share.

`Collector` lets the agent play and returns a `Rollout`. `Learner` updates the agent from it. A `Protection` keeps later games from changing
the shared parameters that earlier games need. lookahead.py tells the caches in advance which experts come next.
"""
