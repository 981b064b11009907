"""The tiered mixture-of-experts layer: a router, experts that live in a store and are computed from an HBM cache, and their optimizer.

It works inside any torch model: `TieredMoE` is the layer with norm and residual, `ExpertAdam` trains the experts that got tokens.
"""
