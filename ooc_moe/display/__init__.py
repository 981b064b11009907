"""How numbers, tables and progress look, in one place for every command, report and result page.

Offers `formats` (numbers as text), `table` (one table value, drawn for a terminal, a pipe, HTML or Markdown) and `progress` (bars). The
room needs only the base install (rich and humanize), and it imports no other room.
"""
