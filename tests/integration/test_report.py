"""The page that dpo-report writes: what stands on it, and, where there is a Chromium, what a browser makes of it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_row
from click.testing import CliRunner
from dpo_cache.cli import dpo_report
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.data.tokenizer import vocabulary_sha256
from dpo_cache.stages.report import report
from dpo_cache.stages.reporting import report_cache
from run_factory import EVAL_FIELDS, NUM_PAIRS, STEP_FIELDS, write_run
from tiny_model import tiny_tokenizer

HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=1>\u202e\x1b[31m{{7*7}}&amp;'\"--><!--"
ALLOWED_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "article", "noscript"),
    *("h1", "h2", "h3", "h4", "h5", "p", "small", "code", "strong", "span", "div", "mark"),
    *("ul", "li", "dl", "dt", "dd"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption", "script", "button"),
    *("form", "fieldset", "legend", "label", "input", "svg", "path", "g", "desc"),
}


class Page(HTMLParser):
    """A page taken apart without a browser: its tags, its text and its numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.texts).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def page_of(tmp_path: Path, *folders: Path) -> Page:
    summary = report(folders, tmp_path / "report.html")
    assert summary.page_bytes == (tmp_path / "report.html").stat().st_size
    return Page(tmp_path / "report.html")


@pytest.fixture(scope="module")
def trained_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A cache whose pairs are hostile text, and what a run that trained from it would have recorded."""
    folder = tmp_path_factory.mktemp("trained-from")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    cache = make_cache(folder / "cache")
    random = np.random.RandomState(0)
    rows = [hostile_row(number, tokenizer, random) for number in range(NUM_PAIRS)]
    mixture = fill_cache(cache, rows, shard_rows=30)
    settings = {"tokenizer": str(folder / "tokenizer"), "tokenizer_revision": None, "mask": HOSTILE}
    for name in ("train", "held-out"):
        cache.write_mixture(
            name,
            mixture.rows(),
            key_index=cache.shards.key_index(),
            tokenization={"settings": settings, "vocabulary_sha256": vocabulary_sha256(tokenizer)},
            sources=[{"path": HOSTILE, "picked_rows": NUM_PAIRS}],
            dropped={HOSTILE: 3},
        )
    return {
        "rows": rows,
        "settings": {"cache": str(folder / "cache")},
        "resolved": {"reference_id": cache.reference_id, "mixture_digest": cache.read_mixture("train").digest},
        "margins": [(row.key.hex(), 0.5 * number) for number, row in enumerate(rows)],
    }


def hostile_row(number: int, tokenizer: Any, random: np.random.RandomState) -> ScoredPair:
    def ids(text: str) -> Any:
        return np.array(tokenizer.encode(text), dtype=np.int32)

    pair = TokenPair(
        prompt_ids=ids(f"question {number} {HOSTILE}"),
        chosen_ids=ids(f"answer {number} {HOSTILE}" + " on and on" * 50 * (number % 5)),
        rejected_ids=ids(f"no {number}"),
    )
    return make_row(pair, random)


def recorded(trained_from: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: trained_from[name] for name in names}


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_the_numbers_on_the_page_are_those_of_the_metrics(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", evaluate_every=None, updates=4)]
    page = page_of(tmp_path, *runs)
    assert page.data["runs"] == ["one", "two"]
    found = {
        (curve["run"], curve["field"]): list(zip(curve["steps"], curve["values"], strict=True))
        for chart in page.data["charts"]
        for curve in chart["curves"]
    }
    for number, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for field in (*STEP_FIELDS, *EVAL_FIELDS):
            expected = [(line["training_step"], line[field]) for line in lines if field in line]
            assert found.pop((number, field), []) == expected, field
    assert not found


def test_what_strangers_wrote_stays_text(tmp_path: Path, trained_from: dict[str, Any]) -> None:
    hostile_name = HOSTILE.replace("/", "|")
    run = write_run(
        tmp_path / hostile_name,
        settings={**trained_from["settings"], "loss": HOSTILE, "model": [HOSTILE]},
        **recorded(trained_from, "resolved", "margins"),
    )
    other = write_run(tmp_path / "other", settings={"cache": HOSTILE, "mixture": HOSTILE})
    (tmp_path / "other" / "step0.json").write_text(json.dumps({"within_bound": HOSTILE}), encoding="utf-8")
    page = page_of(tmp_path, run, other)
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "action")]
    readable = HOSTILE.replace("\u202e", "�").replace("\x1b", "�")
    assert page.data["runs"] == [readable.replace("/", "|"), "other"]
    assert f"question 0 {readable}" in page.text
    assert not {"\x1b", "\u202e"} & set(page.html)
    assert "default-src 'none'" in page.html


def test_the_pairs_told_apart_best_and_worst_are_shown_with_their_margins(
    tmp_path: Path, trained_from: dict[str, Any]
) -> None:
    run = write_run(tmp_path / "run", **recorded(trained_from, "settings", "resolved", "margins"))
    text = page_of(tmp_path, run).text
    shown = text[text.index("By the reward margin") :]
    questions = [int(number) for number in re.findall(r"question (\d+) ", shown)]
    assert questions == [99, 98, 97, 0, 1, 2]
    assert re.findall(r"margin (\S+) key", shown) == ["49.5", "49", "48.5", "0", "0.5", "1"]
    for number in questions:
        assert f"key {trained_from['rows'][number].key.hex()[:16]}" in shown
    assert "more characters" in shown


def test_the_cache_is_described_and_its_pairs_are_counted(tmp_path: Path, trained_from: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", **recorded(trained_from, "settings", "resolved"))
    page = page_of(tmp_path, run)
    assert "Distributions over all 100 pairs." in page.text
    assert "made up" in page.text  # the reference's name
    prompts, answers, logps = page.data["histograms"]
    rows = trained_from["rows"]
    assert sum(prompts["counts"]["prompt"]) == len(rows)
    assert {name: sum(counts) for name, counts in answers["counts"].items()} == {"chosen": 100, "rejected": 100}
    assert logps["edges"][0] == min(
        min(row.ref_chosen_logps / row.chosen_tokens, row.ref_rejected_logps / row.rejected_tokens) for row in rows
    )


def test_of_a_large_mixture_a_bounded_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_cache, "SAMPLED_BLOCKS", 2)
    monkeypatch.setattr("dpo_cache.pipeline.cache.mixture_table.BLOCK_ROWS", 10)
    cache = make_cache(tmp_path / "cache")
    random = np.random.RandomState(1)
    pairs = [
        TokenPair(prompt_ids=random.randint(0, 99, 5, np.int32), chosen_ids=one, rejected_ids=one[:2])
        for one in random.randint(0, 99, (95, 3), np.int32)
    ]
    mixture = fill_cache(cache, [make_row(pair, random) for pair in pairs], shard_rows=20)
    resolved = {"reference_id": cache.reference_id, "mixture_digest": mixture.digest}
    run = write_run(tmp_path / "run", settings={"cache": str(tmp_path / "cache")}, resolved=resolved)
    page = page_of(tmp_path, run)
    assert "a sample: 15 of 95 pairs, from 2 places" in page.text  # the last block is short
    assert "here are their ids" in page.text  # no tokenizer is named


@pytest.mark.parametrize("spoil", ["gone", "other-reference", "other-pairs", "damaged"])
def test_a_cache_that_cannot_be_read_leaves_the_rest_of_the_page(
    tmp_path: Path, trained_from: dict[str, Any], spoil: str
) -> None:
    settings, resolved = dict(trained_from["settings"]), dict(trained_from["resolved"])
    shutil.copytree(settings["cache"], tmp_path / "cache")
    settings["cache"] = str(tmp_path / "cache")
    match spoil:
        case "gone":
            shutil.rmtree(tmp_path / "cache")
        case "other-reference":
            resolved["reference_id"] = "e" * 64
        case "other-pairs":
            resolved["mixture_digest"] = "e" * 64
        case "damaged":
            for shard in ReferenceCache.open(tmp_path / "cache").shards.paths():
                shard.write_bytes(shard.read_bytes()[:-1])
    run = write_run(tmp_path / "run", settings=settings, resolved=resolved, margins=trained_from["margins"])
    page = page_of(tmp_path, run)
    assert "The cache cannot be read, so only what the run recorded is shown: " in page.text
    assert not page.data["histograms"]
    assert page.data["charts"]
    assert ("held-out pairs cannot be shown" in page.text) == (spoil != "other-pairs")


def test_a_killed_run_and_one_that_never_began_say_so(tmp_path: Path) -> None:
    killed, waiting = write_run(tmp_path / "killed", updates=7), write_run(tmp_path / "waiting", updates=0)
    (killed / "metrics.jsonl").write_bytes((killed / "metrics.jsonl").read_bytes()[:-9])
    (waiting / "metrics.jsonl").unlink()
    text = page_of(tmp_path, killed, waiting).text
    assert "killed: 1 line of metrics.jsonl incomplete and left out" in text
    assert "unfinished, 6 of 13 updates" in text
    assert "waiting: no update has been logged yet" in text


def test_a_sweep_is_a_table_with_the_best_point_first(tmp_path: Path) -> None:
    sweep = tmp_path / "beta-sweep"
    for beta, level in ((2.0, 0.1), (5.0, 0.3), (10.0, 0.2)):
        write_run(sweep / f"beta-{beta:g}", level=level, settings={"beta": beta})
    write_run(sweep / "beta-30", level=0.5, settings={"beta": 30.0}, updates=3)
    rows = [
        {"name": "beta-2", "status": "given up", "fault": None},
        {"name": "beta-99", "status": "failed", "fault": f"out of memory {HOSTILE}\nmore"},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    page = page_of(tmp_path, sweep)
    text = "|".join(page.texts)
    table = text[text.index(f"Sweep in {tmp_path.name}/beta-sweep") : text.index("Check before the first update")]
    assert re.findall(r"(beta-\d+)\|[^|]* updates\|(\d+)\.0\|(\d+\.\d%)", table) == [
        ("beta-5", "5", "93.0%"),
        ("beta-10", "10", "83.0%"),
        ("beta-2", "2", "73.0%"),
        ("beta-30", "30", "100.0%"),  # before its first update; it never ended
    ]
    assert "given up, 13 updates" in table
    assert "beta-99 failed: out of memory" in table
    assert "run|state|beta|held-out accuracy|" in table  # the loss is the same in all points


def test_a_larger_margin_does_not_bring_a_point_of_a_sweep_before_one_of_the_same_accuracy(tmp_path: Path) -> None:
    for beta, margin in ((2.0, 0.2), (20.0, 2.0)):
        run = write_run(tmp_path / "sweep" / f"beta-{beta:g}", settings={"beta": beta})
        metrics = run / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[-1]["eval/rewards/margin"] = margin
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page_of(tmp_path, tmp_path / "sweep").text
    assert "equal accuracies are ties" in text
    table = text[text.index("equal accuracies are ties") :]
    assert table.index("beta-2") < table.index("beta-20")


def test_a_run_without_held_out_pairs_has_none_and_not_a_default(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", settings={"eval_mixture": None})]
    text = "|".join(page_of(tmp_path, *runs).texts)
    assert "run|state|eval mixture|" in text
    assert "two|finished, 13 updates|none|" in text


def test_what_one_run_was_trained_with_and_checked_against_stands_on_its_page(tmp_path: Path) -> None:
    text = "|".join(filter(str.strip, page_of(tmp_path, write_run(tmp_path / "run")).texts))
    settings = text[text.index("Settings") : text.index("Check before the first update")]
    for name, value in (("loss", "dpo_norm"), ("beta", "5"), ("pairs per update", "8"), ("seed", "42")):
        assert f"|{name}|{value}|" in settings
    assert "evaluation mixture|held-out" in settings
    assert "run|result|loss|expected|mean difference|largest|bound|largest / bound|dtype|pairs" in text
    assert "run|within the bound|0.693147|0.693147|1e-07|3.2e-07|0.0001|0.32%|float32|8" in text


def test_figures_of_other_betas_are_said_not_to_compare(tmp_path: Path) -> None:
    text = page_of(tmp_path, write_run(tmp_path / "run")).text
    assert text.count("comparable only within one loss and beta") == 3


def test_long_curves_are_thinned_and_said_to_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=2500, total=2500, evaluate_every=None)
    page = page_of(tmp_path, run)
    (curve,) = page.data["charts"][0]["curves"]
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 2500)
    assert len(curve["steps"]) <= 1000
    assert "curves of up to 2,500 points" in page.text


def test_a_page_of_many_runs_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.stages.report.POINTS_OF_A_PAGE", 30_000)
    for number in range(20):
        write_run(tmp_path / "sweep" / str(number), updates=400, total=400, evaluate_every=None)
    charts = page_of(tmp_path, tmp_path / "sweep").data["charts"]
    assert sum(len(curve["values"]) for chart in charts for curve in chart["curves"]) <= 30_000


def test_a_page_that_cannot_be_written_leaves_nothing_half_written(tmp_path: Path) -> None:
    page = tmp_path / "pages" / "report.html"
    page.mkdir(parents=True)  # a folder in its place refuses it in the last moment
    with pytest.raises(DpoCacheError, match=f"cannot write {page}"):
        report([write_run(tmp_path / "run")], page)
    assert list(page.parent.iterdir()) == [page]


def test_a_run_of_two_names_is_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "run")
    for link in (tmp_path / "link", tmp_path / "sweep" / "link"):
        link.symlink_to(run)
    summary = report([run, tmp_path / "link", tmp_path / "sweep" / ".." / "sweep" / "run"], tmp_path / "page.html")
    assert summary.runs == [run.resolve()]
    assert report([tmp_path / "sweep"], tmp_path / "page.html").runs == [run.resolve()]


def test_the_command_reports_what_it_wrote_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out, pictures = tmp_path / "sub" / "page.html", tmp_path / "png"
    done = CliRunner().invoke(dpo_report, [str(run), "-o", str(out), "--png", str(pictures), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["page"], said["runs"]) == (str(out), [str(run)])
    assert {path.name for path in pictures.iterdir()} == {
        f"{field.replace('/', '-')}.png" for field in STEP_FIELDS
    }  # evaluation lies in the same picture
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "is not a run and holds none"), ("missing", "there is no folder")):
        refused = CliRunner().invoke(dpo_report, [str(tmp_path / folder), "-o", str(out)])
        assert refused.exit_code == 1
        assert message in refused.stderr


def test_a_page_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A run from elsewhere, or a shared folder, can hold one under any name that is known beforehand."""
    run = write_run(tmp_path / "run")
    (tmp_path / "precious").write_text("a key")
    for name in ("report.html", "report.html.partial"):
        (run / name).symlink_to(tmp_path / "precious")
    report([run], run / "report.html")
    assert (tmp_path / "precious").read_text() == "a key"
    assert not (run / "report.html").is_symlink()


def test_pictures_without_matplotlib_are_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = [str(write_run(tmp_path / "run")), "-o", str(tmp_path / "page.html"), "--png", str(tmp_path / "png")]
    refused = CliRunner().invoke(dpo_report, arguments)
    assert refused.exit_code == 1
    assert 'pip install "dpo-cache[report]"' in refused.stderr
    assert not (tmp_path / "page.html").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------

BROWSER_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver is on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*BROWSER_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    running.get("about:blank")
    yield running
    running.quit()


def resize(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requested(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def opened(browser: Any, tmp_path: Path, trained_from: dict[str, Any]) -> Any:
    """Three runs in a browser: one that did all, one killed early, one without evaluation and with a hostile name."""
    runs = [
        write_run(tmp_path / "whole", **recorded(trained_from, "settings", "resolved", "margins")),
        write_run(tmp_path / "killed", updates=6),
        write_run(tmp_path / HOSTILE.replace("/", "|"), evaluate_every=None),
    ]
    report(runs, tmp_path / "report.html")
    requested(browser)
    browser.get_log("browser")
    resize(browser, 1280)
    browser.get((tmp_path / "report.html").as_uri())
    return browser


def test_a_browser_opens_the_page_without_an_error_a_request_or_a_stranger_s_script(opened: Any) -> None:
    assert opened.get_log("browser") == []
    assert [url.partition(":")[0] for url in requested(opened)] == ["file"]
    assert opened.execute_script("return typeof hacked") == "undefined"
    drawn = opened.execute_script(
        "return [...document.querySelectorAll('path.curve')].map(p => [Number(p.dataset.run), p.dataset.field])"
    )
    fields = {0: (*STEP_FIELDS, *EVAL_FIELDS), 1: (*STEP_FIELDS, *EVAL_FIELDS), 2: STEP_FIELDS}
    expected = sorted([number, field] for number, names in fields.items() for field in names)
    assert sorted(drawn) == expected
    empty = opened.execute_script("return document.querySelectorAll('path.curve[d=\"\"], path[d*=NaN]').length")
    assert empty == 0


def test_the_page_fits_a_phone_and_every_chart_says_in_words_what_it_draws(opened: Any) -> None:
    for width in (375, 1280):
        resize(opened, width)
        found = opened.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done("
            "[document.documentElement.scrollWidth, innerWidth,"
            " [...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.viewBox.baseVal.width])])))"
        )
        assert found[0] <= found[1] == width
        assert all(0 < shown == drawn for shown, drawn in found[2])
    described = opened.execute_script(
        "return [...document.querySelectorAll('figure svg')]"
        ".map(s => s.getAttribute('aria-labelledby').split(' ').map(id => document.getElementById(id).textContent))"
    )
    assert all(title and words for title, words in described)
    assert described[0][1].startswith("whole: 0.013 at update 1, 0.169 at update 13")


def test_values_are_read_with_mouse_and_keys_and_runs_are_hidden_and_put_over_time(opened: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    chart = opened.find_element(By.CSS_SELECTOR, "figure[data-chart='0']")
    svg, readout = chart.find_element(By.CSS_SELECTOR, "svg"), chart.find_element(By.CSS_SELECTOR, ".readout")
    svg.send_keys(Keys.END)
    assert readout.text.splitlines()[:3] == ["update 13", "whole", "0.169"]
    svg.send_keys(Keys.HOME)
    assert readout.text.splitlines()[0] == "update 0"
    svg.send_keys(Keys.ARROW_RIGHT)
    assert readout.text.splitlines()[:3] == ["update 1", "whole", "0.013"]
    svg.send_keys(Keys.ESCAPE)
    assert not readout.is_displayed()
    ActionChains(opened).move_to_element(svg).perform()
    assert re.match(r"update \d+\nwhole\n0\.\d+\nkilled", readout.text)

    opened.find_element(By.CSS_SELECTOR, "input[name='run'][value='1']").click()
    opened.find_element(By.CSS_SELECTOR, "input[name='axis'][value='seconds']").click()
    assert not opened.find_elements(By.CSS_SELECTOR, "path.curve[data-run='1']")
    svg.send_keys(Keys.END)
    seconds = sum(1 + 0.25 * step for step in range(1, 14))
    assert readout.text.splitlines()[0] == f"{seconds:.3g} s"
    assert math.isclose(seconds, 35.75)
    opened.find_element(By.CSS_SELECTOR, "button[value='none']").click()
    assert not opened.find_elements(By.CSS_SELECTOR, "path.curve")
    opened.find_element(By.CSS_SELECTOR, "button[value='all']").click()
    assert len(opened.find_elements(By.CSS_SELECTOR, "path.curve[data-field='train_loss']")) == 3
    assert opened.get_log("browser") == []
