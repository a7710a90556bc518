#!/usr/bin/env python3
"""Make the notebooks of examples/ from the scripts there, and run them, so that each holds what it printed.

    python scripts/make_notebooks.py                     all of them: minutes
    python scripts/make_notebooks.py examples/lora.py    this one

A line `# %%` begins a cell of code, `# %% [markdown]` one of text. What goes to standard error (warnings and progress of libraries) is left
out: it says more about the machine than about the example.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def scripts() -> list[Path]:
    """The examples that have cells."""
    return [path for path in sorted(EXAMPLES.glob("*.py")) if CELL.search(path.read_text(encoding="utf-8"))]


def notebook_of(script: str) -> nbformat.NotebookNode:
    """A notebook of a script's cells, not run; equal scripts give equal notebooks."""
    _, *parts = CELL.split(script)
    cells = []
    for number, (kind, source) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if kind.strip() == "[markdown]":
            text = re.sub(r"^# ?", "", source.strip(), flags=re.MULTILINE)
            cells.append(new_markdown_cell(text, id=f"cell-{number}"))
        else:
            cells.append(new_code_cell(source.strip(), id=f"cell-{number}"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def run(notebook: nbformat.NotebookNode) -> None:
    """Fill in what the cells print.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    metadata = dict(notebook.metadata)
    place = {"metadata": {"path": EXAMPLES}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, coalesce_streams=True, resources=place)
    client.execute()
    notebook.metadata = nbformat.from_dict(metadata)  # without the kernel's, which name the machine's Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", type=Path, nargs="*", help="those to make notebooks of [default: all]")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment, whatever the user has
    for script in parser.parse_args().scripts or scripts():
        began = time.monotonic()
        notebook = notebook_of(script.read_text(encoding="utf-8"))
        run(notebook)
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.with_suffix('.ipynb').name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
