"""`ooc-moe bench cache`: what it costs to train with experts in a cache.

The options and the command's code are in benchmark.py. The command measures training steps, switches between games, and fetches, all
through a real daemon. layer.py measures one MoE layer without a daemon, compared with a dense FFN.
"""
