"""The tiered mixture-of-experts layer: a router, experts that live in a store and are computed from a cache, and their optimizer.

The cache is in GPU memory (HBM). The layer works inside any torch model. `TieredMoE` is the layer, with its normalisation and residual
connection. `ExpertAdam` trains the experts that got tokens.
"""
