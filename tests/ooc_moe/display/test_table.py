"""One table in every form: what a terminal, a pipe, a Markdown page and a web page show of it."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from ooc_moe.display.table import Table, html_table, markdown_table, plain_table, print_table, rich_table

BANKS = Table(
    "Banks",
    ["bank", "experts", "writer"],
    [["first/experts", "1,024", "a\nb"], ["second", "8", "[bold] & <i>"], ["third", "16", ":smile:"]],
    note="How to read it.",
    caption="One bank is missing.",
    alignment="lrl",
    sections=(2,),
)


def printed(table: Table, *, terminal: bool, width: int = 80) -> str:
    file = io.StringIO()
    print_table(table, Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False))
    return file.getvalue()


def test_a_pipe_gets_one_row_a_line_with_whole_names_however_narrow_it_is() -> None:
    expected = """\
Banks
bank           experts  writer
first/experts    1,024  a; b
second               8  [bold] & <i>
third               16  :smile:
One bank is missing.
"""
    assert printed(BANKS, terminal=False) == expected
    assert printed(BANKS, terminal=False, width=10) == expected


def test_a_pipe_gets_no_empty_line_for_a_title_that_is_not_there() -> None:
    assert plain_table(Table("", ["a"], [["1"]])) == "a\n1"
    assert plain_table(Table("", ["a", "b"], [])) == "a  b"


def test_a_terminal_shows_title_rows_sections_and_caption_and_takes_no_cell_for_markup() -> None:
    lines = [line.rstrip() for line in printed(BANKS, terminal=True).splitlines()]
    assert lines[0].strip() == "Banks"
    assert sum("first/experts" in line for line in lines) == 1
    assert any("[bold] & <i>" in line for line in lines)
    assert any(":smile:" in line for line in lines)
    third = next(index for index, line in enumerate(lines) if "third" in line)
    assert not lines[third - 1].strip(" ─")  # The section of the third row begins with an empty line or a rule.
    assert lines[-1].strip() == "One bank is missing."


def test_a_narrow_terminal_folds_the_widest_column_and_loses_nothing() -> None:
    wide_text = printed(Table("", ["bank", "what"], [["a/rather/long/name", "word " * 20]]), terminal=True, width=40)
    assert "a/rather/long/name" in wide_text
    name = "a-run-with-a-name-that-is-as-long-as-the-names-of-runs-may-be/experts"
    wide_name = printed(Table("", ["bank", "experts", "bytes"], [[name, "1,024", "24.0 MiB"]]), terminal=True, width=40)
    assert "1,024" in wide_name
    assert "24.0 MiB" in wide_name
    assert "".join(line.split(" ")[0] for line in wide_name.splitlines()[2:]) == name


def test_markdown_has_a_row_a_line_and_aligns_its_columns() -> None:
    assert markdown_table(BANKS).splitlines() == [
        "| bank | experts | writer |",
        "|---|---:|---|",
        "| first/experts | 1,024 | a<br>b |",
        "| second | 8 | [bold] & <i> |",
        "| third | 16 | :smile: |",
    ]
    assert markdown_table(Table("", ["a"], [["x | y"]])).splitlines()[-1] == "| x \\| y |"


def test_html_escapes_its_cells_and_marks_the_columns_on_the_left() -> None:
    html = html_table(BANKS)
    assert '<tr><th class="left">bank</th><th>experts</th><th class="left">writer</th></tr>' in html
    assert '<td class="left">[bold] &amp; &lt;i&gt;</td>' in html
    assert '<td class="left">a<br>b</td>' in html


def test_by_default_the_first_column_is_on_the_left_and_the_others_are_on_the_right() -> None:
    assert Table("", ["a", "b", "c"], []).alignment == "lrr"
    assert [column.justify for column in rich_table(Table("", ["a", "b"], [])).columns] == ["left", "right"]


@pytest.mark.parametrize("alignment", ["l", "lrr", "lx"])
def test_an_alignment_that_does_not_fit_the_columns_is_refused(alignment: str) -> None:
    with pytest.raises(ValueError, match="alignment"):
        Table("", ["a", "b"], [], alignment=alignment)


def test_the_room_imports_only_what_the_base_install_has() -> None:
    code = (
        "import sys, ooc_moe.display.formats, ooc_moe.display.progress, ooc_moe.display.table; "
        "sys.exit(bool({'torch', 'numpy', 'matplotlib', 'jinja2', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
