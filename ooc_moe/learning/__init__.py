"""Learning: playing the games, updating the agent by PPO, and working against forgetting.

`Collector` lets the agent play and returns a `Rollout`. `Learner` updates the agent from that rollout. A `Protection` is a method against
forgetting: it keeps later games from damaging the parameters that all games share and that earlier games need. lookahead.py tells the
caches in advance which experts come next.
"""
