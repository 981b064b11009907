"""Recognises which game is on the screen, and predicts which experts that game will need.

`Detector` learns to predict both from frames, `NearestClassMean` is its baseline, and `Belief` smooths predictions over time. Sessions
prefetch by them, and evaluation chooses each environment's experts by them.
"""
