"""What the tutorials have their readers type, works: run from the first line to the last in an empty folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .tutorials import ROOT, Reader, read_blocks

TUTORIALS = ("getting-started.md", "your-own-model.md")
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.long
@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_does_what_it_says(page: str, tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        for block in read_blocks(ROOT / "docs" / page):
            reader.do(block)


@pytest.mark.parametrize("page", TUTORIALS)
def test_blocks_of_a_tutorial_are_of_a_known_kind(page: str) -> None:
    blocks = list(read_blocks(ROOT / "docs" / page))
    assert sum(block.runs for block in blocks) >= 5
    for block in blocks:
        assert block.language in ("sh", "python", "text", "toml"), block.page
        assert block.runs or block.marker == "prints" or block.marker.startswith("not run: ") or not block.marker, block.page
        if block.language == "python":
            compile(block.text, block.page, "exec")
        elif block.language == "sh":
            subprocess.run(["bash", "-n", "-c", block.text], check=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", text):
        target = (ROOT / "docs" / link) if link else ROOT / "docs" / page
        assert target.exists(), f"{page} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page} links to {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them: small letters, dashes for blanks, nothing else but letters and digits."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_lists_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    reached, waiting = set(), set(re.findall(r"\]\(docs/([\w-]+\.md)", text))
    while waiting:
        page = waiting.pop()
        reached.add(page)
        waiting |= set(re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / page).read_text(encoding="utf-8"))) - reached
    assert reached >= set(PAGES), "pages that no link leads to"


def test_what_a_page_shows_is_compared_with_what_was_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nprintf 'one 17 three\\nmore\\nfour\\n' > said; cat said\n```\n\n<!-- prints -->\n```text\none … three\nfour\n```\n\n"
        "<!-- not run: it would end the test -->\n```sh\nexit 1\n```\n\n<!-- prints -->\n```text\nfour\none … three\n```\n"
    )
    with Reader(tmp_path) as reader:
        shell, right, skipped, wrong = read_blocks(page)
        for block in (shell, right, skipped):
            reader.do(block)
        with pytest.raises(AssertionError, match="page.md:17"):
            reader.do(wrong)
    assert not skipped.runs and shell.runs
