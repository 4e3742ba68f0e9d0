"""What the command line prints: tables for people, JSON for programs, progress for the patient.

Place      admin floor. Standard output carries the result and nothing else; progress and notes go to
           standard error.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from csvfs.units import format_size

# Where the width of the reader's screen is not known (a pipe, a file) lines may be this long.
WIDTH_WITHOUT_TERMINAL = 110

STYLES = {
    "up": "green",
    "online": "green",
    "Healthy": "green",
    "down": "red",
    "partitioned": "red",
    "starting": "yellow",
    "draining": "yellow",
    "paused": "yellow",
    "redirected": "yellow",
    "No redundancy": "red",
    "failed": "red",
    "Degraded": "yellow",
    "Unknown": "yellow",
    "creating": "yellow",
    "deleting": "yellow",
}


def stdout_console() -> Console:
    """Made anew for each command: standard output may be another one."""
    terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        width=None if terminal else WIDTH_WITHOUT_TERMINAL,
        highlight=False,
        emoji=False,
        markup=False,
    )


def plain(value: Any) -> Any:
    """`value` as JSON can say it: bytes in hex, dataclasses as maps, sets and tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    return value


def print_json(value: Any) -> None:
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """A table without borders; `empty` is printed when there are no rows."""
    console = stdout_console()
    if not rows:
        console.print(empty)
        return
    console.print(make_table(columns, rows))


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Columns whose title begins with `>` are numbers: to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        number = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(styled(cell) for cell in row))
    return table


def styled(cell: Any) -> Text:
    text = "-" if cell is None else str(cell)
    text = text.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text
    return Text(text, style=STYLES.get(text, ""))


def size_or_unknown(size: int | None) -> str:
    return "unknown" if size is None else format_size(size)


def format_duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; `?` for None."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def note(text: str) -> None:
    """One line for the human beside the result."""
    click.echo(text, err=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Say what is being waited for: a spinner on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(file=sys.stderr, highlight=False, markup=False).status(text):
        yield
