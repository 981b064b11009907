"""The store without gRPC: fetches, promotions to DRAM, pushes and their commits, changes of banks and snapshots.

Offers `Engine`, which puts the tiers, the index and these parts together. Everything runs on one event loop.
"""
