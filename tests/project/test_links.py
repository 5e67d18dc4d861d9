"""Every file that a page of the project names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "lowprec").rglob("*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")
# In backticks, what begins with a folder of the project or ends as its pages do.
PATH = re.compile(r"`((?:configs|docs|jobs|kernels|lowprec|tests)/[\w./-]*|[A-Z]+\.md|Makefile|constraints\.txt)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    linked = [page.parent / link for link in LINK.findall(text) if "://" not in link]
    named = [ROOT / path for path in PATH.findall(text)]
    assert not [str(path) for path in [*linked, *named] if not path.exists()]


def test_the_readme_has_links_and_paths() -> None:
    readme = (ROOT / "README.md").read_text()
    assert LINK.search(readme) and len(PATH.findall(readme)) > 5
