"""`ooc-moe study`: makes many runs, and judges by them whether the project's claim holds.

The claim: when each game activates experts of its own, games separate into different experts (separation), the experts of the game being
played cache well (caching), and the experts of other games cannot be overwritten (protection). A study is a list of runs: variants of the
configuration, each with several orders of the games and several seeds.

    variants.py, study.py, studies.py              say which runs a study has
    runner.py, run_process.py                      make the runs
    scores.py, costs.py, caching.py, verdicts.py   read the finished runs and judge them
    tables.py, figures.py                          show the results as tables and figures
    results.py, result_files.py                    read, judge and tabulate one study; write its files

Only the command line uses this directory: find_study, run_all, results_of and write.

Run: ooc-moe study synthetic
"""
