"""The trainer's cache of experts in HBM (the GPU's memory).

`ExpertCache` (cache.py) is the class that trainers call. The parts of the cache: demand.py fetches the experts that the trainer asks for,
prefetch.py fetches experts before the trainer asks for them, and write_back.py pushes changed experts to the store. `CacheStats` has the
cache's counters (hits, misses, bytes, ...), and `Reporter` sends them to the daemon.
"""
