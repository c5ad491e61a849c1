from __future__ import annotations

from dpo_cache.stages.verifying.rescore_report import RescoreReport, Spread


def test_the_columns_of_the_table_stand_under_their_titles() -> None:
    ways = ("one pair at a time, padded", "4096 tokens a batch, prefix-shared")
    spreads = [Spread(way=way, mean_per_token=1e-7, max_per_token=3e-7, max_in_bounds=0.003) for way in ways]
    report = RescoreReport(pairs=8, dtype="float32", bound_per_token=1e-4, spreads=spreads, outliers={})
    titles, *rows = report.text().splitlines()[1:4]
    assert {len(line) for line in (titles, *rows)} == {len(titles)}
    assert len(titles) <= 80
