"""The trainer's HBM cache of experts.

`ExpertCache` (cache.py) is what trainers call. Behind it, demand.py fetches what is asked for now, prefetch.py what will be asked for, and
write_back.py pushes what was changed. `CacheStats` says how well that went, and `Reporter` sends it to the daemon.
"""
