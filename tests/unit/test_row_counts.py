"""How many rows of a mixture's datasets were not used or were cut, added up and put into words."""

from __future__ import annotations

from dpo_cache.stages.building.row_counts import source_in_words, truncated_in_words, truncated_rows, truncation_warning


def test_datasets_are_added_up_and_one_that_says_nothing_counts_as_uncut() -> None:
    sources = [{"truncated": {"chosen": 1, "either": 1, "rejected": 0}}, {}, {"truncated": {"chosen": 2, "either": 3}}]
    assert truncated_rows(sources) == {"chosen": 3, "either": 4, "rejected": 0}
    assert truncated_rows([{"dropped": {"too-long": 3}}]) == {}


def test_two_splits_of_one_folder_are_told_apart() -> None:
    """``info`` and the report gave both as the folder alone."""
    pairs = {"path": "my-lab/pairs", "config": None, "split": "test_prefs", "picked_rows": 40}
    assert source_in_words(pairs) == "my-lab/pairs,split=test_prefs (40 rows)"
    assert source_in_words({**pairs, "config": "en", "split": "train"}) == "my-lab/pairs,config=en (40 rows)"
    assert source_in_words({"path": "theirs"}) == "theirs (all rows)"


def test_prompts_and_responses_that_were_cut_are_told_with_their_rows() -> None:
    assert truncated_in_words({"prompt": 1}) == "the prompt in 1 row"
    assert truncated_in_words({"prompt": 1200}, num_rows=4000) == "the prompt in 1,200 of 4,000 rows"
    assert truncated_in_words({"chosen": 3, "either": 3}) == "3 chosen and 0 rejected responses in 3 rows"


def test_more_than_a_tenth_of_the_rows_with_a_cut_response_is_warned_of() -> None:
    assert truncation_warning({"chosen": 4, "either": 4}, num_rows=40) is None
    warning = truncation_warning({"chosen": 5, "either": 5}, num_rows=40)
    assert warning is not None
    assert warning.startswith("5 of 40 rows have a response that was cut and so ends without its eos; raise")


def test_cut_prompts_are_what_was_asked_for() -> None:
    assert truncation_warning({"prompt": 40}, num_rows=40) is None
