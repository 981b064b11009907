"""Checks and repairs the data directory of a stopped daemon: `verify` reads and checks all of it, `rebuild` makes a lost index anew.

Offers `verify.verify` and `rebuild.rebuild`, which the subcommands of `ooc-moe-server` with these names call.
"""
