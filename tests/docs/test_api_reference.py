"""The reference is what the docstrings and the table of settings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_api_reference", ROOT / "scripts/make_api_reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.make_reference()
    assert made == script.PAGE.read_text(encoding="utf-8"), "run scripts/make_api_reference.py"
    for name in script.AUTO_CLASSES:
        assert f"- `{name}`: " in made
