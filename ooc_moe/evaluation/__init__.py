"""Evaluation: lets the agent play games without telling it which one is on the screen, and measures its scores.

`Evaluator` evaluates a run during its training, `evaluate_run` a run from its last checkpoint. The baselines, random play and constant
actions, are measured in the same way.
"""
