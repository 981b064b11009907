"""Evaluation: plays games without telling the agent which one is on the screen, and measures what it scores.

`Evaluator` serves a run in training, `evaluate_run` a finished one. Random play and constant actions, played by the same protocol, are the
baselines.
"""
