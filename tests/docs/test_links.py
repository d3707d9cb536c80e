import pytest
from documents import PAGES, broken_links, name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_existing_files_and_headings(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# Other\n\n## The `ops`, and more\n\n## The `ops`, and more\n\n```text\n# no heading\n```\n")
    good = ["other.md", "other.md#the-ops-and-more", "other.md#the-ops-and-more-1", "#here", "https://example.org/#x"]
    bad = ["missing.md", "other.md#ops", "other.md#no-heading", "other.md#the-ops-and-more-2", "#there", "missing.md#x"]
    page.write_text("# Here\n\n" + "\n".join(f"[a `b` c]({link})" for link in good + bad) + "\n`[no](link)`\n")
    assert broken_links(page) == bad
