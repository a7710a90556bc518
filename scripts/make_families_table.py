"""Write the table of families in docs/models.md from what tests/swarm/test_families.py has found.

    PETALNET_FAMILIES_RESULTS=FOLDER python -m pytest -m long tests/swarm/test_families.py
    python scripts/make_families_table.py FOLDER

`make families` does both. A row that has no result, because its test failed or did not run, is an error: the table says nothing that was
not tried.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: made by scripts/make_families_table.py -->", "<!-- families end -->"
COLUMNS = ("Family", "Variant", "Prompt", "Answer", "Side by side", "Gradients", "Classification", "Shared passes")


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def row_of(found: dict[str, Any]) -> str:
    """A line of the table."""
    family = f"`{found['family']}`"
    if found["refused"]:
        return line([family, found["variant"], *["no"] * 5, f"refused: {found['refused']}"])
    classification = "none there" if found["classification"] is None else "yes"
    return line([family, found["variant"], *["yes"] * 4, classification, "yes" if found["packs"] else "one by one"])


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """The table, and what it says of differences."""
    served = [found for found in results if not found["refused"]]
    forward = max(max(found["prefill"], found["decode"], found["sessions"], found["classification"] or 0) for found in served)
    backward = max(found["gradients"] for found in served)
    return "\n".join(
        [
            line(COLUMNS),
            line(["---"] * len(COLUMNS)),
            *map(row_of, results),
            "",
            f"The largest difference from the model on one machine was {forward:.0e} of the logits' spread, and {backward:.0e} of the "
            "gradients'.",
        ]
    )


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tests" / "swarm"))
    from family_rows import ROWS

    read = [json.loads(file.read_text()) for file in Path(arguments[0]).glob("*.json")]
    results = {(found["family"], found["variant"]): found for found in read}
    lacking = [row.name for row in ROWS if (row.family, row.variant) not in results]
    if lacking:
        print(f"no result for {'; '.join(lacking)}: run the test first", file=sys.stderr)
        return 1
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    table = table_of([results[row.family, row.variant] for row in ROWS])
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
