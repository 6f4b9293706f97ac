"""Texts of .parquet files, by row groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_recursive.data.spans import Span, open_source
from megatron_recursive.errors import UserError

_ROWS = 1024


class DamagedTableError(UserError):
    """The file is there and can be read, but is no table, or only a part of one."""


def row_group_sizes(path: str) -> list[int]:
    """Bytes of each row group (compressed), from the file's footer.

    Raises:
        UserError: the file is not a .parquet, or cannot be read.
    """
    import pyarrow

    try:
        with open_source(path) as stream:
            footer = _open(stream).metadata
            groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
            return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_rows(span: Span, json_key: str, reject: Callable[[UserError], None]) -> Iterator[tuple[str, int]]:
    """Yield (text, bytes on disk) of the rows of a span; rows without a text go to ``reject``.

    Raises:
        UserError: the file is damaged or has no such column.
    """
    def columns(names: list[str]) -> list[str]:
        if json_key not in names:
            raise UserError(
                f"{span.path} has no column {json_key!r} (its columns: {', '.join(names[:8])}); "
                "name the text's with --json-key"
            )
        return [json_key]

    for number, row, size in read_table(span, columns):
        text = row[json_key]
        if isinstance(text, str):
            yield text, size
        else:
            kind = type(text).__name__
            reject(UserError(f"{span.path}: row {number} has a {kind} under {json_key!r}; it must be a string"))


def read_table(span: Span, columns: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield (number from 1, row, bytes on disk) of the rows of a span, with those of its columns that are chosen.

    The bytes are the span's, spread evenly over its rows.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow

    try:
        with open_source(span.path) as stream:
            table = _open(stream)
            chosen = columns(table.schema_arrow.names)
            stop = table.metadata.num_row_groups if span.stop is None else span.stop
            rows = [table.metadata.row_group(number).num_rows for number in range(stop)]
            number, size = sum(rows[: span.start]), span.size // max(sum(rows[span.start :]), 1)
            groups = range(span.start, stop)
            for batch in table.iter_batches(_ROWS, list(groups), chosen, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, size
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(span.path, error) from error


def _open(stream: Any) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(stream)


def _damaged(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:150].rstrip(".")
    return DamagedTableError(f"{path} is no readable .parquet file ({reason}); mend it or leave it out")
