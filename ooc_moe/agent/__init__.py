"""The agent: frames go in, action logits and values come out.

A convolutional stem turns each frame into a token; causal transformer blocks with tiered mixture-of-experts layers follow. `Agent` gives
each game its own dense parameters and its own pool of experts. The rooms above train it (`learning`) and play it (`evaluation`).
"""
