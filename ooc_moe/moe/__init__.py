"""The tiered mixture-of-experts layer: a router, experts that live in a store and are computed from a cache in GPU memory, and their
optimizer.

It works inside any torch model. `TieredMoE` is the layer, with its normalisation and residual connection. `ExpertAdam` trains the experts
that got tokens.
"""
