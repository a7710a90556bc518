"""The small texts that the examples learn from; data/README.md says where they come from."""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"


def load(name: str, split: str) -> list[dict[str, str]]:
    """Records of `data/<name>.jsonl`.

    Args:
        split: "train" or "test".
    """
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]
