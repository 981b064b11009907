"""`ooc-moe study`: does the claim hold? A study is a list of runs (variant x order of the games x seed) and what they show together.

    variants.py, study.py, studies.py              say what is run
    runner.py, run_process.py                      make the runs
    scores.py, costs.py, caching.py, verdicts.py   read the finished runs and judge them
    tables.py, figures.py                          show the results as tables and figures
    results.py, result_files.py                    read, judge and tabulate one study; write its files

Only the command line uses this directory: find_study, run_all, results_of and write.

Run: ooc-moe study synthetic
"""
