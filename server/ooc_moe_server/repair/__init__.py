"""Checks and repairs the data directory of a stopped daemon: `verify` reads and checks all of it, `rebuild` makes a lost index anew.

Offers the functions behind these two subcommands of `ooc-moe-server`.
"""
