"""The store itself, without gRPC: serves fetches, loads records into DRAM, commits pushes, and changes banks and snapshots.

Offers `Engine`, which puts these parts together with the tiers (DRAM and NVMe) and the index. All of it runs on one event loop.
"""
