"""The examples learn what they say they learn, and their notebooks are those of the scripts."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8")
WITHIN_S = 800.0
"""Each takes one to two minutes on two cores that have nothing else to do."""


def _load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts/make_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_notebooks = _load_maker()
SCRIPTS = {path.stem: path for path in make_notebooks.scripts()}


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines of a notebook's outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream"}
    return [line for output in outputs for line in output.text.splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_notebook_is_that_of_its_script_and_was_run(name: str) -> None:
    notebook = nbformat.read(SCRIPTS[name].with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    expected = make_notebooks.notebook_of(SCRIPTS[name].read_text(encoding="utf-8"))
    changed = "run scripts/make_notebooks.py"
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [(cell.cell_type, cell.source) for cell in expected.cells], changed
    runs = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert runs == list(range(1, len(runs) + 1))
    assert not re.search(r"/home/|/root/|/work/|/tmp/", nbformat.writes(notebook)), "a path of the machine that made it"


def test_the_page_shows_what_the_notebooks_print() -> None:
    lines = {line for path in SCRIPTS.values() for line in printed(nbformat.read(path.with_suffix(".ipynb"), as_version=4))}
    shown = [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert shown and [line for line in shown if line not in lines] == []


def run(name: str, folder: Path) -> str:
    """What a script prints, in a process of its own whose servers end with it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PETALNET_")}
    own = {"OMP_NUM_THREADS": "1", "PETALNET_STATE_DIR": str(folder / "state"), "PETALNET_CONFIG": str(folder / "config.toml")}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS[name])],
        cwd=folder,
        env=clean | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=WITHIN_S)
    except BaseException:  # whatever it is goes on; the script's servers would outlive it
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return said


@pytest.mark.long
@pytest.mark.timeout(WITHIN_S + 60)
def test_prompts_make_a_dialogue_partner(tmp_path: Path) -> None:
    said = run("dialogue_prompt_tuning", tmp_path)
    before, after = numbers(r"loss on test exchanges: (\S+) before, (\S+) after", said)
    assert after < before - 0.5
    answers = re.findall(r"^You: .+\nPlayer: \S.*$", said, re.MULTILINE)
    assert len(answers) == 4, said


@pytest.mark.long
@pytest.mark.timeout(WITHIN_S + 60)
def test_deep_prompts_tell_authors_apart(tmp_path: Path) -> None:
    said = run("classification_deep_prompts", tmp_path)
    before, after = numbers(r"right on passages from other works: (\d+)% before, (\d+)% after", said)
    assert before < 70 and after >= 85  # of 120, half of them by either author


@pytest.mark.long
@pytest.mark.timeout(WITHIN_S + 60)
def test_a_lora_learns_to_write_definitions(tmp_path: Path) -> None:
    said = run("lora", tmp_path)
    before, after = numbers(r"loss on entries that it has not seen: (\S+) before, (\S+) after", said)
    assert after < before - 1.0
    for where in ("on a local model", "after loading", "from the hosts' adapter"):
        assert f"the same {where}: True" in said


def numbers(pattern: str, said: str) -> list[float]:
    """The numbers of the one line that has them."""
    (found,) = re.findall(pattern, said)
    return [float(number) for number in found]
