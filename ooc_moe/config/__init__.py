"""The configurations: sizes of an agent (`agent.py`), a training run (`run.py`), and seeds (`seeds.py`).

Frozen dataclasses that check their values when they are made. The rooms above read them; the command line is generated from their fields.
"""
