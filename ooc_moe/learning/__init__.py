"""Learning: rollouts, PPO updates, and the protection of what games share.

`Collector` plays the agent and returns a `Rollout`, `Learner` updates the agent from it, and a `Protection` keeps later games from
changing what earlier games need. lookahead.py tells the caches in advance which experts come next.
"""
