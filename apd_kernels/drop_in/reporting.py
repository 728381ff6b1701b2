"""The report as a table of text."""

from __future__ import annotations

from apd_kernels.drop_in.replacing import Row, copies

_COLUMNS = ("project", "function", "state", "results", "calls", "seconds", "copies")


class Report:
    """Rows of what was replaced; a table as text."""

    def __init__(self, rows: list[Row], program: str = "") -> None:
        self.rows, self.program = rows, program

    def __str__(self) -> str:
        if not self.rows:
            return "drop_in: nothing replaced"
        table = [_COLUMNS, *map(_cells, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        reasons = sorted({f"{row.state} {_place(row)}: {row.why}" for row in self.rows if row.why})
        return "\n".join([*lines, *reasons])

    def __repr__(self) -> str:
        return str(self)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.replacement.project,
        _place(row),
        row.state,
        row.replacement.exactness if row.state in ("replaced", "waiting") else "",
        str(row.calls),
        f"{row.seconds:.2f}",
        str(len(copies(row))),
    )


def _place(row: Row) -> str:
    return f"{row.module}:{row.replacement.name}"
