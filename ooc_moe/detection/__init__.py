"""Recognises which game is on the screen, and predicts which experts that game will need.

`Detector` learns to predict the game and the experts from frames, `NearestClassMean` is a simpler predictor to compare it with, and
`Belief` smooths the predictions over time. By these predictions experts are prefetched, and evaluation chooses the experts of each
environment.
"""
