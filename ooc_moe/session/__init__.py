"""The open parts of a run: its store, its HBM caches, its agent and its detector.

`open_session` puts the parts together for training and evaluation, `load` opens a run from one of its checkpoints without changing it.
Checkpoints, the embedded daemon and the handling of Ctrl-C are here too.
"""
