"""Command-line options made from dataclasses, and settings from the environment and files. The programs of this project use this package.

    hbm_experts: int = 8
    \"""Experts that fit into HBM.\"""          ->  --hbm-experts N   Experts that fit into HBM. [default: 8]

The library tyro parses the words that the user types, prints the help and writes shell completions. This package adds what tyro does not
do: lists with commas, sizes such as 8GiB, error messages of one line, which options the user gave, and settings from environment variables
and files.
"""

from ooc_moe_wire.command_line.mistakes import closest
from ooc_moe_wire.command_line.options import Flag, Option, options_of, with_defaults, with_metavars
from ooc_moe_wire.command_line.parsing import Group, Parsed, parse
from ooc_moe_wire.command_line.program import Command, Program, command_of
from ooc_moe_wire.command_line.settings import Setting, from_environment, from_file

__all__ = [
    "Command",
    "Flag",
    "Group",
    "Option",
    "Parsed",
    "Program",
    "Setting",
    "closest",
    "command_of",
    "from_environment",
    "from_file",
    "options_of",
    "parse",
    "with_defaults",
    "with_metavars",
]
