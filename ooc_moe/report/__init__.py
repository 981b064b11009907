"""Shows the results of a run: as an HTML page with charts and tables, and as tables on the terminal.

Offers `report.write_report` (writes the page), `report.print_summary` (prints the tables on the terminal), `summary` and `tier_tables` (a
run's numbers as tables), `charts` (a run's charts) and `drawing` (the style that all charts of the package share).
"""
