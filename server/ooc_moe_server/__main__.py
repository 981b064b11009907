"""`python -m ooc_moe_server` is the command `ooc-moe-server`."""

from ooc_moe_server.daemon.cli import main

if __name__ == "__main__":
    main()
