"""The command `ooc-moe`: turns flags, the environment and files into configurations, and calls the functions that do the work.

`main.py` lists the commands; every other module holds the commands of one kind. In ooc_moe, only this package reads flags, the environment
and configuration files. No other package of ooc_moe imports it.
"""
