"""The probe's lines as tables.

python -m bench.cuda.probe_table probe.log > probe.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

Figure = dict[str, object]
MEASURED = ("figure", "value", "unit", "how", "failed", "skipped")


def figures(lines: Iterable[str]) -> list[Figure]:
    """Those lines that are figures; a program that crashed may have left others."""
    return [json.loads(line) for line in lines if line.startswith('{"figure"')]


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return number(float(figure["value"])) if "value" in figure else "failed"


def exchanges(found: list[Figure]) -> list[str]:
    """A table for each protocol and number of groups, long buffers on their own: us a step."""
    tables: dict[tuple[object, ...], dict[object, dict[int, Figure]]] = {}
    for f in found:
        if "payload_bytes" not in f:
            continue
        groups = "one group" if f["groups"] == 1 else "all SMs in groups"
        key = f["protocol"], groups, "long buffer" if f["steps"] == 4096 else ""
        tables.setdefault(key, {}).setdefault(f["ctas"], {})[f["payload_bytes"]] = f
    lines = []
    for (protocol, groups, long), table in tables.items():
        sizes = sorted({size for row in table.values() for size in row})
        lines += [f"### {protocol}, {groups}{', ' + long if long else ''}: us a step", ""]
        lines.append("| CTAs | " + " | ".join(f"{size / 1024:g} KB" for size in sizes) + " |")
        lines.append("|--:" * (len(sizes) + 1) + "|")
        for ctas, row in table.items():
            cells = [cell(row.get(size)) for size in sizes]
            lines.append(f"| {ctas} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def others(found: list[Figure]) -> list[str]:
    lines = ["| figure | | value | unit |", "|:--|:--|--:|:--|"]
    for f in found:
        if "payload_bytes" in f:
            continue
        about = ", ".join(f"{k} {number(v)}" for k, v in f.items() if k not in MEASURED)
        value = cell(f) if "value" in f else f.get("failed", f.get("skipped"))
        lines.append(f"| {f['figure']} | {about} | {value} | {f.get('unit', '')} |")
    return [*lines, ""]


def markdown(found: list[Figure]) -> str:
    failed = [json.dumps(f) for f in found if "failed" in f]
    lines = ["# What the GPU gives", "", *others(found), *exchanges(found)]
    if failed:
        lines += ["Failed:", "", *(f"- `{line}`" for line in failed), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(figures(Path(sys.argv[1]).read_text().splitlines())))
