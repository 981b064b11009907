"""Lets `python -m ooc_moe_server` run the command `ooc-moe-server`, which starts the storage daemon."""

from ooc_moe_server.daemon.cli import main

if __name__ == "__main__":
    main()
