"""The process: its configuration, command line, data directory and life, from start to drain.

Offers the console script `ooc-moe-server` (`cli.main`) and `lifecycle.run`. No other room imports this one.
"""
