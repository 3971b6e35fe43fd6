"""The rows of a run as Markdown: ``python bench/gpu/table.py bench/results/gpu/RUN/rows.jsonl``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def in_place(rows: list[dict[str, Any]]) -> list[str]:
    """Steps in place of the largest sizes, in a graph, beside AdamW."""
    lines = [
        "| step in place | coordinates | ns a coordinate | share of a copy |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        operation = str(row.get("operation"))
        if row.get("phase") != "speed" or row.get("n", 0) < 10**7 or "share_of_copy" not in row:
            continue
        if operation.startswith("AdamW"):
            name = operation
        elif operation == "student_step_" and not row.get("configuration"):
            kind = "" if row["kind"] == "plain" else f", {row['kind']}"
            name = f"{row['student']}, {row['cells']} cells{kind}, `{row['backend']}`"
        else:
            continue
        each, share = row["ns_per_coordinate"], row["share_of_copy"]
        lines.append(f"| {name} | {row['n']:,} | {each:.3f} | {share:.0%} |")
    return lines


def windows(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of an inner step of meta-training, on the GPU and on that machine's cores."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row.get("phase") == "windows" and "ms_per_step" in row:
            where = "graph" if row.get("graph") else row["device"]
            beside = found.setdefault((row["task"], row["replicates"], row["order"]), {})
            beside[where] = row["ms_per_step"]
    lines = [
        "| task | replicates | order | GPU, in a graph, ms | GPU, ms | CPU, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (task, replicates, order), ms in found.items():
        three = " | ".join(str(ms.get(where, "")) for where in ("graph", "cuda", "cpu"))
        lines.append(f"| {task} | {replicates} | {order} | {three} |")
    return lines


def models(rows: list[dict[str, Any]]) -> list[str]:
    """A training step of a model, with and without a graph."""
    lines = ["| optimizer | graph | step, ms | optimizer alone, ms |", "|---|---|---:|---:|"]
    for row in rows:
        if row.get("phase") == "model" and "us" in row:
            step, alone = row["us"] / 1e3, row["optimizer_us"] / 1e3
            graph = "yes" if row["graph"] else "no"
            lines.append(f"| `{row['optimizer']}` | {graph} | {step:.2f} | {alone:.2f} |")
    return lines


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    for table in (in_place(rows), models(rows), windows(rows)):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
