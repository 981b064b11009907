"""`ooc-moe bench cache`: what it costs to train with experts in a cache.

benchmark.py measures training steps, switches between games and fetches through a real daemon. layer.py measures one MoE layer without a
daemon, compared with a dense FFN.
"""
