"""The open parts of a run: its connection to the store, its caches in GPU memory, its agent and its detector.

`open_session` puts the parts together for training and evaluation. `load` opens a run as it was at one of its checkpoints, without changing
the run. Checkpoint files, the embedded daemon and the handling of Ctrl-C are in this package too.
"""
