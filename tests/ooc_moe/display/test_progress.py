"""The two kinds of progress bars."""

import io

from rich.console import Console

from ooc_moe.display.progress import lasting_bars, passing_bar


def console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=80, force_terminal=True, color_system=None, legacy_windows=False), file


def test_a_lasting_bar_stays_with_its_count_and_note_and_fits_80_columns() -> None:
    on, file = console()
    with lasting_bars(on) as progress:
        task = progress.add_task("road_runner", total=40, note="")
        progress.update(task, completed=40, note="return 1,200, HBM hits 99.9 %")
    last = [line for line in file.getvalue().splitlines() if "road_runner" in line][-1]
    assert "40/40" in last
    assert "return 1,200, HBM hits 99.9 %" in last


def test_a_passing_bar_is_erased_at_the_end() -> None:
    on, file = console()
    with passing_bar(on) as progress:
        progress.update(progress.add_task("fetch", total=2), completed=1)
    assert "fetch" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")  # The last thing written erases the bar's line.


def test_where_there_is_no_terminal_a_passing_bar_writes_nothing() -> None:
    file = io.StringIO()
    with passing_bar(Console(file=file, width=80)) as progress:
        progress.update(progress.add_task("fetch", total=2), completed=1)
    assert file.getvalue().strip() == ""
