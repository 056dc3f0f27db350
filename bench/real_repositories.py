"""What real repositories come to: one row each, measured from outside, as a Markdown table.

For every repository: build with one worker, verify, build again (must do nothing), and build with
two workers into another folder (must give the same bytes). Prints the table of
docs/measurements.md and exits with 1 when one of the two does not hold.

    python bench/real_repositories.py path/to/flask.git path/to/click.git …
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    "repository", "mainline", "commits mined", "triples", "proven", "kept", "documents", "tokens",
    "rows", "fill %", "CPU s", "wall s, 1 worker", "wall s, 2 workers", "peak MiB", "data MB",
    "run again s", "same bytes",
)  # fmt: skip


def main(repositories: list[str]) -> int:
    if not repositories:
        print("name at least one local repository: python bench/real_repositories.py flask.git")
        return 2
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    lists = [[r] for r in repositories]
    if len(repositories) > 1:
        lists.append(repositories)
    ok = True
    for entries in lists:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), entries)
        ok &= bool(row["proven"] == "100 %" and row["same bytes"] == "yes")
        print("| " + " | ".join(str(row[c]) for c in COLUMNS) + " |", flush=True)
    return 0 if ok else 1


def measure(folder: Path, entries: list[str]) -> dict[str, Any]:
    listing = folder / "list.txt"
    listing.write_text("".join(f"{Path(e).resolve()}\n" for e in entries))
    build = ["build", "--repos", str(listing), "--json", "--out"]
    cpu = children_cpu()
    summary, wall_1 = codeflow(*build, str(folder / "one"), "--workers", "1")
    cpu = children_cpu() - cpu
    verified, _ = codeflow("verify", str(folder / "one"), "--json")
    again, wall_again = codeflow(*build, str(folder / "one"), "--workers", "1")
    _, wall_2 = codeflow(*build, str(folder / "two"), "--workers", "2")
    journal = (folder / "one" / "journal.jsonl").read_text().splitlines()
    peak = max(json.loads(line)["peak_rss"] for line in journal)
    same = data_hashes(folder / "one") == data_hashes(folder / "two") and again["units_run"] == 0
    proven = 100 * verified["proven"] / verified["triples"]
    name = Path(entries[0]).name.removesuffix(".git")
    return {
        "repository": name if len(entries) == 1 else f"all {len(entries)} together",
        "mainline": f"{summary['mainline_commits']:,}",
        "commits mined": f"{summary['commits']:,}",
        "triples": summary["triples"],
        "proven": f"{proven:.0f} %" if not verified["problems"] else "NO",
        "kept": summary["kept"],
        "documents": summary["documents"],
        "tokens": f"{summary['tokens']:,}",
        "rows": summary["rows"],
        "fill %": f"{100 * summary['fill']:.1f}",
        "CPU s": f"{cpu:.1f}",
        "wall s, 1 worker": f"{wall_1:.1f}",
        "wall s, 2 workers": f"{wall_2:.1f}",
        "peak MiB": peak >> 20,
        "data MB": f"{summary['bytes'] / 1e6:.1f}",
        "run again s": f"{wall_again:.2f}",
        "same bytes": "yes" if same else "NO",
    }


def codeflow(*arguments: str) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    command = [sys.executable, "-m", "codeflow", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout), time.monotonic() - started


def data_hashes(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("tables", "shards", "markers")
        for path in sorted((dataset / folder).rglob("*"))
        if path.is_file()
    }


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
