"""Training runs: `train` begins one, `resume` continues it from a checkpoint, `branch` begins another run from its checkpoint.

trainer.py has the loop over games and updates. The parts below it keep the games in training, write checkpoints and log events.
"""
