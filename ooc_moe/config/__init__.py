"""The configurations: the sizes of an agent (`agent.py`), a training run (`run.py`), and how seeds are derived (`seeds.py`).

They are frozen dataclasses that check their values when they are made. The rest of the package reads them. The options of the command line
are made from their fields.
"""
