"""The daemon as a process: its configuration, its command line, its data directory, and its life from the start to the orderly stop.

Offers the console script `ooc-moe-server` (`cli.main`) and `lifecycle.run`. No other part of the daemon imports this package.
"""
