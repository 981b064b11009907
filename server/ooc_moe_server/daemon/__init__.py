"""The daemon as a process: its configuration, its command line, its data directory, and its life from the start to the orderly stop.

Offers `cli.main`, the command `ooc-moe-server`, and `lifecycle.run`, which runs a daemon. No other part of the daemon imports this package.
"""
