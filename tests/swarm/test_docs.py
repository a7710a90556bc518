"""The commands and the programs of the README and of the pages are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from petalnet.cli import cli
from petalnet.models.checkpoint import DEMO_MODEL

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md", "docs/nodes.md", "docs/reachability.md", "docs/using-the-swarm.md", "docs/your-own-swarm.md", "docs/surviving.md",
    "docs/incentives.md", "docs/fine-tuning.md", "docs/getting-started.md", "docs/your-own-model.md",
    "docs/models.md",
)  # fmt: skip
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*PAGES, "Makefile")}
COMMANDS = [line for name in PAGES for line in re.findall(r"^    (petalnet [^#\n]+)", TEXTS[name], re.MULTILINE)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag exists and takes the value that is shown."""
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "config.toml"))
    verb, *arguments = shlex.split(line)[1:]
    with cli.make_context("petalnet", [verb]) as outer:
        command = cli.get_command(outer, verb)
        while isinstance(command, click.Group):  # as in `petalnet key new`
            command = command.get_command(outer, arguments.pop(0))
        assert command is not None
        seen: list[object] = []
        monkeypatch.setattr(command, "callback", lambda **given: seen.append(given))
        command.main(arguments, standalone_mode=False)
    assert seen


def test_flags_and_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", TEXTS["Makefile"], re.MULTILINE))
    flags = {flag for verb in cli.list_commands(None) for param in cli.get_command(None, verb).params for flag in param.opts}  # type: ignore
    for name in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)", TEXTS[name])) <= targets
        ours = re.sub(r"^.*\b(docker|systemctl|journalctl)\b.*$", "", TEXTS[name], flags=re.MULTILINE)
        assert {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)} <= flags | {"--help"}
        prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_map_of_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text[text.index("## Where everything is") : text.index("Imports point one way")]))
    verbs = {"version", *cli.list_commands(None)}  # type: ignore[arg-type]  # "one module a verb"
    modules = {path.stem for path in (ROOT / "petalnet").rglob("*.py") if not path.stem.startswith("__")}
    assert modules - verbs <= named


def test_the_programs_of_the_pages_run(nodes) -> None:
    server = nodes.start("--serve", "0:12", "--new-swarm", "--throughput", "50")
    programs = {}
    for page in ("README.md", "docs/using-the-swarm.md", "docs/surviving.md", "docs/your-own-swarm.md"):
        (program,) = re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)
        program = program.replace('"org/model or folder"', repr(str(DEMO_MODEL)))
        program = re.sub(r'\["/ip4/[^]]*\]', repr(server.addrs), program)
        programs[page] = program.replace('["@peers.txt"], swarm_key="swarm.key"', repr(server.addrs))
    # One after the other in one process: most of the time of each is for imports.
    run = f"for page, program in {programs!r}.items():\n    print('\\0' + page)\n    exec(program, {{}})"
    done = subprocess.run([sys.executable, "-c", run], env=nodes.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = dict(part.split("\n", 1) for part in done.stdout.split("\0")[1:])
    assert "A cat sat" in said["README.md"] and "torch.Size([1, 8, 160])" in said["README.md"]
    assert "0 recoveries in this session" in said["docs/surviving.md"] and "A cat sat" in said["docs/your-own-swarm.md"]
    assert "20 tokens in " in said["docs/using-the-swarm.md"] and "most of it: " in said["docs/using-the-swarm.md"]


@pytest.mark.long
def test_the_program_of_fine_tuning_runs(nodes, tmp_path: Path) -> None:
    """Its parts one after the other, as somebody would try them who reads the page."""
    server = nodes.start("--serve", "0:12", "--new-swarm", "--throughput", "50")
    program = "".join(re.findall(r"```python\n(.*?)```", TEXTS["docs/fine-tuning.md"], re.DOTALL))
    program = program.replace('"org/model or folder"', repr(str(DEMO_MODEL)))
    program = re.sub(r'\["/ip4/[^]]*\]', repr(server.addrs), program)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=nodes.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+ entries, 16 of them prompts$", done.stdout, re.MULTILINE)
    assert "torch.Size([160, 160]) torch.Size([2048, 160])" in done.stdout and "torch.Size([1, " in done.stdout
    assert {path.name for path in (tmp_path / "my-prompts").iterdir()} == {"model.safetensors", "petalnet.json"}
    assert (tmp_path / "my-adapter/adapter_model.safetensors").exists()
