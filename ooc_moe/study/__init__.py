"""Does the claim hold? A study is a list of runs (variant x order of the games x seed), and what they show together.

definitions.py and variants.py say what is run, runner.py runs it; the others read what the runs logged: scores.py, costs.py, verdicts.py,
tables.py, figures.py. home.py writes the results.

Run: ooc-moe study synthetic
"""
