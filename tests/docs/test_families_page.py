"""The page about model families says what the models show."""

import pytest

from tests.docs.families_page import PAGE, listed, page

HINT = "run: python -m tests.docs.families_page"


def test_the_table_of_the_listed_families_is_up_to_date():
    assert listed() in PAGE.read_text(encoding="utf-8"), HINT


@pytest.mark.slow
def test_the_whole_page_is_up_to_date():
    assert page() == PAGE.read_text(encoding="utf-8"), HINT
