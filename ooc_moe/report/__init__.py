"""Shows a run to people: an HTML page with charts, and tables for the terminal.

Offers `report.write_report` and `report.print_summary`; `summary` and `tier_tables` (a run's numbers as tables), `charts` (its pictures)
and `drawing` (the style that all charts of the package share).
"""
