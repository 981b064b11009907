"""The agent: a network that turns frames of a game into action logits and values.

A convolutional stem turns each frame into a token. Transformer blocks with causal attention follow; their feed-forward parts are mixtures
of experts that live outside the GPU, in a store. `Agent` gives each game its own experts and its own dense parameters (all parameters that
are not experts'). The package `ooc_moe.learning` trains an agent, `ooc_moe.evaluation` evaluates it.
"""
