"""Results of a benchmark as CSV, JSON, a Markdown table and a PNG plot in one folder.

A record is one implementation on one row; `Layout` says which of its fields name the row.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """title: over table and plot. formula: of the plotted value, printed with it.

    row: fields that make up a row. panel: those of them that name a panel of the plot.
    x, value: axes; value is in `unit` and printed with so many digits.
    labels: implementation key -> name, in column order; the first is compared with the others.
    more: field -> name: columns of the first implementation, behind the values of all.
    """

    title: str
    formula: str
    row: tuple[str, ...]
    panel: tuple[str, ...]
    x: str
    value: str
    unit: str
    labels: Mapping[str, str]
    digits: int = 0
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        return next(iter(self.labels))


def _rows(records: Sequence[Record], layout: Layout) -> dict[tuple[Any, ...], dict[str, float]]:
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        cells = rows.setdefault(tuple(record[name] for name in layout.row), {})
        if record[layout.value] is not None:
            cells[record["implementation"]] = record[layout.value]
    return rows


def _text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def markdown_table(records: Sequence[Record], layout: Layout) -> str:
    """One line a row: the value of each implementation, then ours over each peer's."""
    seen = {r["implementation"] for r in records if r[layout.value] is not None}
    keys = [key for key in layout.labels if key in seen]
    peers = [key for key in keys if key != layout.subject]
    header = [*layout.row, *(layout.labels[k] for k in keys), *layout.more.values()]
    header += [f"{layout.labels[layout.subject]} / {layout.labels[k]}" for k in peers]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    more = {
        tuple(r[name] for name in layout.row): [r[name] for name in layout.more]
        for r in records
        if r["implementation"] == layout.subject
    }
    for row, cells in _rows(records, layout).items():
        line = [_text(x) for x in row]
        line += [f"{cells[k]:.{layout.digits}f}" if k in cells else "-" for k in keys]
        line += ["-" if x is None else _text(x) for x in more[row]]
        for peer in peers:
            both = layout.subject in cells and peer in cells
            line.append(f"{cells[layout.subject] / cells[peer]:.2f}" if both else "-")
        lines.append(" | ".join(line))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def summary(records: Sequence[Record], layout: Layout) -> str:
    """Per panel: geometric mean and minimum of our value over each peer's."""
    index = [layout.row.index(name) for name in layout.panel]
    ratios: dict[tuple[str, str], list[float]] = {}
    for row, cells in _rows(records, layout).items():
        panel = ", ".join(f"{n} {_text(row[i])}" for n, i in zip(layout.panel, index, strict=True))
        for peer in layout.labels:
            if peer != layout.subject and peer in cells and layout.subject in cells:
                ratios.setdefault((panel, peer), []).append(cells[layout.subject] / cells[peer])
    lines = ["| panel | against | geometric mean | lowest |", "| --- | --- | --- | --- |"]
    for (panel, peer), values in ratios.items():
        mean = math.exp(sum(math.log(x) for x in values) / len(values))
        lines.append(f"| {panel} | {layout.labels[peer]} | {mean:.2f} | {min(values):.2f} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, records: Sequence[Record], layout: Layout, subtitle: str) -> bool:
    """Draws one panel per value of `layout.panel`. Without matplotlib: False, no file."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _rows(records, layout)
    index = [layout.row.index(name) for name in layout.panel]
    x_index = layout.row.index(layout.x)
    panels = list(dict.fromkeys(tuple(row[i] for i in index) for row in rows))
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(3.6 * columns, 2.7 * lines + 0.8),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for key, label in layout.labels.items():
            points = [
                (row[x_index], cells[key])
                for row, cells in rows.items()
                if tuple(row[i] for i in index) == panel and key in cells
            ]
            if points:
                width = 2.2 if key == layout.subject else 1.2
                axis.plot(*zip(*sorted(points), strict=True), "o-", label=label, lw=width, ms=3)
        named = zip(layout.panel, panel, strict=True)
        axis.set_title(", ".join(f"{name} {_text(value)}" for name, value in named), fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(layout.unit)
    for axis in axes[-1]:
        axis.set_xlabel(layout.x)
    handles = {t: h for a in axes.flat for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{layout.title}\n{subtitle}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def write_csv(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def write(
    folder: Path,
    machine: Mapping[str, Any],
    records: Sequence[Record],
    layout: Layout,
    with_plot: bool = True,
) -> list[Path]:
    """Writes results.csv, results.json, README.md and, where matplotlib is installed, plot.png."""
    folder.mkdir(parents=True, exist_ok=True)
    table, facts = folder / "results.csv", folder / "results.json"
    page, picture = folder / "README.md", folder / "plot.png"
    write_csv(table, records)
    content = {"machine": machine, "formula": layout.formula, "records": list(records)}
    facts.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    subtitle = f"{machine['gpu']}, {machine['date']}, torch {machine['torch']}"
    drawn = with_plot and plot(picture, records, layout, subtitle)
    page.write_text(
        "\n".join(
            [
                f"# {layout.title}",
                "",
                *(f"- {name}: {value}" for name, value in machine.items()),
                f"- {layout.value}, in {layout.unit}: {layout.formula}",
                "",
                *(["![plot](plot.png)", ""] if drawn else []),
                "## Rows",
                "",
                markdown_table(records, layout),
                "## Ours against each peer",
                "",
                summary(records, layout).rstrip(),
                "",
            ]
        ),
        encoding="utf-8",
    )
    return [table, facts, page, *([picture] if drawn else [])]
