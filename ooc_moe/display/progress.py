"""Makes progress bars of two kinds: one disappears when the work is done; the other stays, with counts and a note that can be changed.

with passing_bar(console) as progress:       # fetch 8 MiB  ━━━━━━━╸━━━━  63% 0:00:12
    task = progress.add_task("fetch 8 MiB", total=100)
    progress.advance(task)

with lasting_bars(console) as progress:      # krull  ━━━━━━━━━  40/40 0:01:07 0:00:00 return 1,200
    task = progress.add_task("krull", total=40, note="")
    progress.update(task, completed=40, note="return 1,200")
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

BAR_WIDTH = 30
NOTED_BAR_WIDTH = 12
"""The width of a bar with a note. It leaves most of a line of 80 characters to the note."""


def passing_bar(console: Console) -> Progress:
    """Makes a progress display that is erased when the work is done. Each task has a bar with its percentage and remaining time.

    The description of a task may be changed while it is in progress.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def lasting_bars(console: Console) -> Progress:
    """Makes a progress display that stays on the screen. Each task has a bar with counts, elapsed and remaining time, and a note.

    Every call of `add_task` must give a `note`, "" for none.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(NOTED_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
