"""What is done to the data directory of a stopped daemon: `verify` checks all of it, `rebuild` makes a lost index anew.

Offers the functions behind the two subcommands of `ooc-moe-server`.
"""
