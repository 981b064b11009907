"""The store behind gRPC: fetches, promotions (loads into DRAM), pushes and their commits, and changes of banks and snapshots.

Offers `Engine`, which puts the tiers, the index and these parts together. Everything runs on one event loop.
"""
