"""Training runs: `train` begins a run, `resume` continues it from a checkpoint, `branch` begins another run from a run's checkpoint.

trainer.py has the loop over games and updates. The other modules keep the learners and environments of the games in training, write
checkpoints and log events.
"""
