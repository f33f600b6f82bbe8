"""Tables in CSV format: UTF-8, a header, and values in quotation marks where they contain commas or line breaks.

Text is written unchanged, so that programs get the real names of files. A name may therefore begin with `=`, which
spreadsheets interpret as a formula, or contain escape sequences of terminals: import such a table as text.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from examples.common.regular_files import read_regular_file

MAX_BYTES = 100_000_000
"""Largest size of a table."""


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a table that has at least the given columns, in any order. Empty lines are skipped.

    Args:
        path: File to read.
        columns: Names of the columns that are needed.

    Yields:
        Number of the line in the file, from 1, and its values by column.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is not a table in CSV format and UTF-8, or larger than `MAX_BYTES`; the message names the file
            and the line.
    """
    header: list[str] | None = None
    for number, values in _read_lines(path):
        if header is None:
            header = values
            _check_header(header, columns, f"{path}, line {number}")
        elif len(values) != len(header):
            raise ValueError(f"{path}, line {number}: it has {len(values)} values, need {len(header)} as in the header")
        else:
            yield number, dict(zip(header, values, strict=True))


def to_csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    r"""Return the text of a table with lines that end in `\n`.

    Names of files that are not valid text are written with escapes such as `\udcff`.
    """
    text: list[str] = []
    # The writer calls `write` once for each line. Until Python 3.12 it quotes only line breaks of its own line end.
    writer = csv.writer(_Lines(text), lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows(lines)
    return "".join(line[:-2] + "\n" for line in text).encode("utf-8", "backslashreplace").decode()


class _Lines:
    """File-like object that collects lines in a list."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def _read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the values of each record that is not empty."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {number}: the line is not in CSV format ({error}); check its quotation marks"
            ) from error
        if values is None:
            return
        if values:
            yield number, values


def _read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark."""
    try:
        content = read_regular_file(path, MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}, line 1: the file is in UTF-16 or UTF-32; save it in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = _line_of(content[: error.start])
        raise ValueError(
            f"{path}, line {number}: byte 0x{content[error.start]:02x} is not valid in UTF-8; save the file in UTF-8"
        ) from None
    if "\0" in text:
        number = _line_of(content[: content.index(b"\0")])
        raise ValueError(f"{path}, line {number}: the line contains a null character; save the file as text in UTF-8")
    return text


def _line_of(before: bytes) -> int:
    """Return the number of the line that follows `before`, whose lines end in CR, LF or CRLF."""
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")


def _check_header(header: Sequence[str], columns: Sequence[str], where: str) -> None:
    needed = ",".join(columns)
    for column in columns:
        if header.count(column) != 1:
            problem = "missing" if column not in header else "duplicated"
            raise ValueError(f"{where}: column {column!r} is {problem}, need {needed}")
