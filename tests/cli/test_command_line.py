"""The command line as far as it goes without a swarm: parsing, Petals' spellings, wrong use, and how little it imports."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from petalnet.cli import cli, run
from petalnet.cli.options import SettingsCommand
from petalnet.config import TABLE, Settings


def parse(*arguments: str) -> Settings:
    """The settings that `petalnet node` would run with."""
    seen: list[Settings] = []
    SettingsCommand("node", settings=TABLE, callback=lambda settings: seen.append(settings)).main(list(arguments), standalone_mode=False)
    return seen[0]


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "config.toml"))


def test_lists_take_all_that_follows() -> None:
    settings = parse("model", "--initial-peers", "/a", "/b", "--serve", "0:3", "--host-maddrs=/c", "--initial-peers", "/d")
    assert (settings.model, settings.initial_peers, settings.host_maddrs, settings.serve) == ("model", ("/a", "/b", "/d"), ("/c",), (0, 3))


def test_commands_copied_from_petals() -> None:
    settings = parse(
        "--converted_model_name_or_path", "some/model", "--block_indices", "3:7", "--torch_dtype", "float16", "--public_name=me"
    )
    assert (settings.model, settings.serve, settings.dtype, settings.public_name) == ("some/model", (3, 7), "float16", "me")
    assert parse("--num_blocks=8").serve == 8
    assert parse("--cache_dir", "/with_underscore").cache_dir.name == "with_underscore"


@pytest.mark.parametrize(
    ("arguments", "quantization"),
    [
        ("", "none"),
        ("--quantization nf4", "nf4"),
        ("--quant_type int8 model", "int8"),
        ("--load_in_8bit model", "int8"),
        ("--load-in-8bit True model", "int8"),
        ("--load_in_8bit=false model", "none"),
        ("model --load_in_8bit", "int8"),
    ],
)
def test_quantization_as_petals_spells_it(arguments: str, quantization: str) -> None:
    settings = parse(*arguments.split())
    assert settings.quantization == quantization
    assert settings.model == ("model" if "model" in arguments else None)


def test_the_same_thing_said_twice() -> None:
    with pytest.raises(click.UsageError, match="serve is given twice"):
        parse("--num-blocks", "8", "--serve", "0:8")
    with pytest.raises(click.UsageError, match="quantization is given twice"):
        parse("--load-in-8bit", "--quant-type", "nf4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "bogus"),
        (["nod"], "did you mean node?"),
        (["node", "--serve", "0:3", "--quantization", "int3"], "needs one of none, int8, nf4"),
        (["node"], "--serve A:B, --client or --bootstrap"),
        (["node", "--serve", "0:3", "--client"], "--serve and --client"),
        (["node", "--serve", "3:0"], "--serve needs"),
        (["node", "--serve"], "--serve"),
        (["node", "--no-such-flag"], "--no-such-flag"),
        (["node", "--serve", "0:3", "a", "b"], "b"),
        (["node", "--serve", "0:3", "--new-swarm", "--initial-peers", "/a"], "exclude each other"),
        (["version", "extra"], "extra"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and says in said.err and said.err.startswith("petalnet: ")
    assert not said.out


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in cli.list_commands(click.Context(cli)))


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.list_commands(click.Context(cli)):
        assert run([verb, "--help"]) == 0
        assert "Usage: petalnet" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    assert versions["libp2p"].startswith("0.8") and versions.keys() >= {"petalnet", "python", "torch", "transformers", "trio"}


@pytest.mark.parametrize("arguments", ([], ["node", "--help"], ["status", "--help"], ["demo", "--help"], ["version"]))
def test_nothing_heavy_is_imported_to_explain(arguments: list[str]) -> None:
    code = (
        "import sys; from petalnet.cli import run; run(sys.argv[1:]);"
        "print(*sorted({'torch', 'transformers', 'libp2p', 'trio', 'starlette', 'rich'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_debugging_hears_petalnet_and_not_every_line_of_others() -> None:
    code = (
        "import logging; from petalnet.cli.logs import set_up; set_up('debug', 'json');"
        "logging.getLogger('petalnet.p2p').debug('ours %s', 1); logging.getLogger('multiaddr').debug('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["message"], line["logger"], line["level"]) == ("ours 1", "petalnet.p2p", "debug")
