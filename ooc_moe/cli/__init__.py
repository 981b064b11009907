"""The command `ooc-moe`: turns flags, the environment and files into configurations, and calls the functions that do the work.

`main.py` lists the commands; every other module holds the commands of one kind. Only this room reads flags, the environment and
configuration files. It offers nothing to the other rooms.
"""
