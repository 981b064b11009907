"""Formats numbers, tables and progress bars, so that they look alike in every command, report and result page.

Offers `formats` (numbers as text), `table` (a table of text, which can be drawn for a terminal, a pipe, HTML or Markdown) and `progress`
(bars). It needs only the base install (rich and humanize), and imports no other part of ooc_moe.
"""
