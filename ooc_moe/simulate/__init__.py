"""Replays traces through tiers of any size, by any policy, with any latency; needs neither a GPU nor torch."""
