"""`python -m ooc_moe` is the command `ooc-moe`."""

from ooc_moe.cli.main import main

if __name__ == "__main__":
    main()
