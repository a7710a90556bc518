"""What the container and the service are made of is there, and the commands in them are understood."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from petalnet.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICE = ROOT / "packaging" / "petalnet.service"


def test_the_image_is_made_of_files_that_are_there() -> None:
    let_in = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--from).+$", DOCKERFILE, re.MULTILINE)]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists() and name in let_in, name
    assert (ROOT / "petalnet").is_dir() and {"README.md", "LICENSE"} <= let_in  # what the package's metadata is made of


def test_the_commands_of_the_image_are_shell() -> None:
    commands = re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)
    torch = next(command for command in commands if "DEVICE" in command)
    for device, says in (("cpu", "download.pytorch.org/whl/cpu torch=="), ("cuda", "install torch==")):
        tried = torch.replace("/opt/petalnet/bin/pip", "echo")
        done = subprocess.run(["sh", "-c", tried], env={**os.environ, "DEVICE": device}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout
    assert subprocess.run(["sh", "-c", torch], env={**os.environ, "DEVICE": "gpu"}, cwd=ROOT, capture_output=True).returncode == 1


def test_the_image_runs_without_rights_and_keeps_its_state() -> None:
    from petalnet.config import config_path, state_dir

    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "\nUSER petalnet\n" in last and "\nVOLUME /state\n" in last and "EXPOSE 31330" in last
    environ = dict(re.findall(r"(\w+)=(\S+)", last[last.index("ENV ") : last.index("USER ")]))
    assert state_dir(environ) == Path("/state") and config_path(environ) == Path("/state/config.toml")
    assert environ["PETALNET_CACHE_DIR"].startswith("/state/") and environ["HF_HOME"].startswith("/state/")


def test_the_service_starts_a_command_that_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "config.toml"))
    unit = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(SERVICE)
    program, verb, *arguments = shlex.split(unit["Service"]["ExecStart"].replace("${SERVE}", "auto"))
    assert program == "%h/.local/bin/petalnet"
    seen: list[object] = []
    with cli.make_context("petalnet", [verb]) as outer:
        command = cli.get_command(outer, verb)
        assert isinstance(command, click.Command)
        monkeypatch.setattr(command, "callback", lambda **given: seen.append(given))
        command.main(arguments, standalone_mode=False)
    assert seen


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_service(tmp_path: Path) -> None:
    program = tmp_path / ".local/bin/petalnet"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(runtime)}
    command = ["systemd-analyze", "--user", "verify", "--recursive-errors=no", str(SERVICE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
