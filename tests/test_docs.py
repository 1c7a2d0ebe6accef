"""What the documents point to is there, and what the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/results/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_the_readme_links_to_something() -> None:
    assert len(LINK.findall((ROOT / "README.md").read_text())) > 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    missing = [
        link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()
    ]
    assert not missing


def test_the_readmes_examples_run() -> None:
    """One after another, as a reader would: later ones use the names of earlier ones."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 5
    names = {"model": nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(4, 5))}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (50, 128)
