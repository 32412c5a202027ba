"""The reference page and the READMEs say what the code does."""

from pathlib import Path

from fs.nodes import Directory, describe
from fs.reference import PAGES, page
from fs.root import Root


def test_the_page_is_what_the_code_writes() -> None:
    written = Path(__file__).parents[2] / "docs" / "tree.md"
    assert written.read_text() == page(), "run: python -m fs.reference > docs/tree.md"


def test_every_file_has_a_help_text() -> None:
    directories: list[type[Directory]] = [directory for _, directory in PAGES]
    assert Root in directories
    for directory in directories:
        for node in directory.files:
            assert len(node.help()) > 15, (directory, node)
            assert f"\n{node.name}  (" in describe(directory)
