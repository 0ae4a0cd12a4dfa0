"""The report: what it shows, hostile text, nothing external, bare results; the terminal table."""

import html.parser
import json
import re
import warnings
from typing import Any

import numpy as np
import pytest

from laif_jax.studies import figures, report, rl_figures, svg
from laif_jax.studies.kl_reward import analysed
from laif_jax.studies.table import ranked_comparisons, results_table
from tests.studies import fake_rl
from tests.studies.fake import ARMS, fake_curves, fake_results, fake_samples

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}</style></svg>&amp;"
    "$\\frac{1}{2}$\x00\x1b[31m\ud800\u202e"
)
BARE = {"name": "empty", "arms": {}, "comparisons": []}


class _Page(html.parser.HTMLParser):
    """Collects tags, attributes and visible text; checks that tags nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "path", "use", "rect"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(fake_results(), fake_curves(), fake_samples())


def test_shows_the_study(page):
    seen = _Page(page)
    assert not seen.stack
    results = fake_results()
    for name, arm in results["arms"].items():
        assert name in seen.text
        assert arm["description"] in seen.text
        assert f"{arm['win_rate']:.1f}" in seen.text
    for row in results["answers"]:
        assert row["verdict"] in seen.text
    assert seen.text.index(results["answers"][0]["verdict"]) < seen.text.index("Arms")
    for words in (
        "not clearly better than picking the longer answer",
        "Sharma et al.",
        "refused the connection",
    ):
        assert words in seen.text
    for title in (
        "Arms",
        "Comparisons",
        "How far the judge",
        "Labels",
        "Training",
        "Cost and time",
        "Samples",
    ):
        assert title in seen.text
    assert seen.tags.count("svg") == 3
    assert seen.tags.count("details") >= 4
    assert "p = 0.91" in seen.text
    assert "no verdict" in seen.text


def test_needs_nothing_from_outside(page):
    seen = _Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(seen.tags)
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith("#"), (tag, name, value)
        if name == "style":
            assert re.findall(r"url\((?!#)", value) == []
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles
    assert "default-src 'none'" in page


def test_ids_are_unique_and_found(page):
    ids = [value for _, name, value in _Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in _Page(page).attributes:
        for target in re.findall(r"url\(#([^)]*)\)", value) + ([value[1:]] if "href" in name else []):
            assert target in ids


def _hostile(value):
    """Replaces every text in a structure by hostile text, numbers apart; keys of arms too."""
    if isinstance(value, str):
        return HOSTILE + value
    if isinstance(value, dict):
        return {key: _hostile(item) for key, item in value.items()}
    return [_hostile(item) for item in value] if isinstance(value, list) else value


def test_hostile_text_everywhere_stays_text(tmp_path):
    results, samples = _hostile(fake_results()), _hostile(fake_samples())
    rename = {name: HOSTILE + name for name in ARMS}
    results["arms"] = {rename[name]: arm for name, arm in results["arms"].items()}
    results["labels"] = {HOSTILE + name: row for name, row in results["labels"].items()}
    for sample in samples:
        for field in ("outputs", "verdicts"):
            sample[field] = {rename[name]: value for name, value in sample[field].items()}
    curves = {rename[name]: seeds for name, seeds in fake_curves(1).items()}
    path = report.write_report(tmp_path / "report" / "index.html", results, curves, samples)
    text = path.read_text()  # encodable: no half surrogate is left
    seen = _Page(text)
    assert not seen.stack
    assert not {"script", "img"} & set(seen.tags)
    assert all(not name.startswith("on") for _, name, _ in seen.attributes)
    assert "alert(1)" in seen.text  # shown, not run
    assert "{{ 7*7 }}" in seen.text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert seen.tags.count("svg") == 3


def test_bare_results():
    """Before anything has finished there is a page too, and it says so."""
    seen = _Page(report.render(BARE, {}, []))
    assert "No arm has finished" in seen.text
    assert "no answer yet" in seen.text
    assert "svg" not in seen.tags
    assert "empty" in results_table(BARE)


def test_unknown_numbers_are_dashes():
    results = fake_results(seeds=1)
    for name in ("win_rate", "standard_error", "mean_length", "true_quality"):
        results["arms"]["sft-weak-10"][name] = None
    row = _Page(report.render(results, {}, [])).text
    assert "nan" not in row.lower()
    assert "None" not in row
    assert "–" in row


def test_survives_the_trip_through_json(page):
    data = json.loads(json.dumps([fake_results(), fake_curves(), fake_samples()], allow_nan=False))
    assert report.render(*data) == page


def test_comparisons_start_with_the_questions_turned_towards_laif():
    rows = ranked_comparisons(fake_results())
    assert (rows[0]["a"], rows[0]["b"]) == ("laif-weak-strong", "sft-strong-100")
    assert (rows[1]["a"], rows[1]["b"]) == ("laif-strong-strong", "sft-weak-100")
    original = {frozenset((r["a"], r["b"])): r for r in fake_results()["comparisons"]}
    for row in rows:
        source = original[frozenset((row["a"], row["b"]))]
        sign = 1 if source["a"] == row["a"] else -1
        assert row["delta"] == sign * source["delta"]
        assert row["ci95"] == sorted(sign * value for value in source["ci95"])
    assert len(rows) == len(original)


def test_shared_stages_count_once():
    totals = {row["kind"]: row for row in report.stage_totals(fake_results()["stages"])}
    assert totals["prompts"]["runs"] == 1
    assert totals["sft"]["runs"] == 18
    assert totals["sft"]["seconds"] == pytest.approx(18 * 21.4)
    assert totals["sft"]["cost"] == pytest.approx(18 * 0.12)
    assert totals["label"]["states"] == "1 failed"


def test_label_row():
    row = report.label_row("x", {"n": 3, "ok": 2, "failed": 1, "mean_margin": 0.4, "seed": 0})
    assert (row["n"], row["ok"], row["tie"], row["failed"], row["mean_margin"]) == (3, 2, 0, 1, 0.4)
    assert row["swap_consistency"] is None


def test_long_names_leave_room_for_the_data():
    results = fake_results()
    rows = [{**row, "a": "a-very-long-name-of-an-arm-" * 5} for row in results["comparisons"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "…" in figures.comparisons_figure(rows)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.42, "0.4 s"), (12.3, "12 s"), (185, "3 min 05 s"), (3600 * 2 + 7 * 60, "2 h 07 min")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_curves_leave_out_what_is_not_a_number_and_thin_long_ones():
    steps = list(range(5000))
    values = [None if step % 7 == 0 else float("nan") if step % 11 == 0 else step for step in steps]
    x, y = svg.thin(steps, values)
    assert len(x) == len(y) == svg.MAX_POINTS
    assert x == pytest.approx(y)
    long = {"arm": {"0": {"stage": "sft", "step": steps, "loss": values}}}
    assert len(figures.curves_figure(long)) < 40_000
    assert figures.curves_figure({"arm": {"0": {"stage": "sft", "step": [], "loss": []}}}) == ""


@pytest.mark.parametrize("name", ["laif-weak-strong-gpt-3.5", "x" * 40, "a b", "-", "one_two/three+four"])
def test_names_are_wrapped_not_changed(name):
    lines = svg.wrap(name, 10).split("\n")
    assert all(len(line) <= 10 for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")


def test_figures_are_deterministic():
    assert figures.arms_figure(fake_results()) == figures.arms_figure(fake_results())


def test_terminal_table():
    text = results_table(fake_results())
    for name in ARMS:
        assert name in text
    assert "laif-weak-strong - sft-strong-100" in text
    assert "more in the report" in text
    assert "\x1b" not in text
    odd = fake_results()
    odd["name"], odd["answer"], odd["answers"] = "[bold]x[/bold]", "[red]plain[/red] \x1b[31mtext", []
    assert "[red]plain[/red]" in results_table(odd)
    assert "[bold]x[/bold]" in results_table(odd)
    assert "\x1b" not in results_table(odd)


def test_costs_that_are_not_known_are_not_zero_dollars():
    results = fake_results()
    for stage in results["stages"]:
        stage.pop("cost", None)
        (stage.get("usage") or {}).pop("cost", None)
    row = re.search(r'<tr class="asked"><td>all</td>.*?</tr>', report.render(results, {}, []), re.DOTALL)
    assert row
    assert row[0].endswith("<td>–</td></tr>")


# ---- reward models, reinforcement learning, rounds -------------------------------------------------------------


@pytest.fixture(scope="module")
def reinforced() -> str:
    figures_ = {"reward": fake_rl.fake_curves(), "ppo": fake_rl.fake_runs()}
    results = {**fake_results(), **fake_rl.fake_reinforced()}
    return report.render(results, fake_curves(), fake_samples(), figures_)


def test_a_study_of_reinforcement_learning_shows_its_figures_and_tables(reinforced):
    for title in ("Reward models", "Reinforcement learning", "Rounds", "Best of n"):
        assert f"<h2>{title}</h2>" in reinforced
    labels = re.findall(r'aria-label="([^"]+)"', reinforced)
    for label in (
        "Reward-model accuracy over steps per learning rate",
        "Train reward of PPO per KL coefficient and learning rate",
        "Validation reward of PPO per KL coefficient and learning rate",
        "Reward and true quality against the square root of KL",
        "Win rate and true quality after each round",
    ):
        assert label in labels
    assert "learning rate 3e-5" in reinforced
    assert "laif-weak-strong (one round)" in reinforced
    assert "890 comparisons more would pass `&lt;b&gt;max&lt;/b&gt;`" in reinforced
    assert "at KL 17.50" in reinforced  # the turn of the run without a penalty
    assert "1.83" in reinforced  # log 16 - 15/16


def test_a_study_without_them_shows_none_of_it():
    page = report.render(fake_results(), fake_curves(), fake_samples())
    for title in ("Reward models", "Reinforcement learning", "Rounds", "Best of n"):
        assert f"<h2>{title}</h2>" not in page


def kl_run(label: str, kl: list[float], quality: list[float] | None = None) -> dict[str, Any]:
    reward = [0.1 * place for place in range(len(kl))]
    return analysed({"label": label, "kl": kl, "reward": reward, "true_quality": quality})


def legend_of(figure: str) -> dict[str, tuple[float, float]]:
    """The legend's entries and where they begin."""
    part = figure[figure.index('id="kl-legend_1"') :]
    found = re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', part)
    return {html.unescape(text): (float(x), float(y)) for x, y, text in found}


@pytest.mark.parametrize("quality", [None, [0.5, 0.6, 0.7, 0.8]])
def test_every_run_is_in_the_legend_and_inside_the_figure(quality):
    start = "a-rather-long-name-of-an-arm-of-the-study"
    labels = [f"{start}: KL coefficient {coef:g}, rate 1.41e-5" for coef in (0, 0.02, 0.05, 0.1, 0.2)]
    runs = [kl_run(label, [0.0, 0.01, 0.02, 0.0], quality) for label in labels[:3]]
    runs += [kl_run(label, [0.0, 1.0, 2.0, 3.0], quality) for label in labels[3:]]
    figure = rl_figures.kl_figure(runs)
    entries = legend_of(figure)
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure)[0])
    reasons = [" (no fit: KL moved by less than 0.1 nats)" in text for text in entries]
    assert reasons == [True, True, True, False, False]
    for label, (text, (x, y)) in zip(labels, entries.items(), strict=True):
        assert label[-26:] in text  # a name that is cut keeps the settings
        assert x + 5.5 * len(text) < width
        assert 0 < y < height / 2


def test_a_turn_is_marked_on_the_runs_line():
    kl = np.linspace(0, 30, 16)
    quality = 0.8 + 0.06 * np.sqrt(kl) - 0.0075 * kl
    figure = rl_figures.kl_figure([kl_run("run", kl.tolist(), quality.tolist())])
    marks = re.findall(r'<use xlink:href="#([^"]+)" x="([\d.]+)" y="([\d.]+)" style="([^"]+)"', figure)
    (ring,) = [(x, y) for _, x, y, style in marks if "fill-opacity: 0" in style]
    assert ring in [(x, y) for _, x, y, style in marks if "fill: #" in style]


def test_runs_that_cover_each_other_have_lines_of_different_widths():
    run = kl_run("a", [0.0, 1.0, 2.0, 3.0])
    figure = rl_figures.kl_figure([run, {**run, "label": "b"}, {**run, "label": "c"}])
    panel = figure[: figure.index('id="kl-legend_1"')]
    style = r'style="fill: none; stroke: (#[0-9a-f]{6}); stroke-width: ([\d.]+); stroke-linecap'
    widths = dict(re.findall(style, panel))
    assert len(widths) == 3
    drawn = [float(width) for width in widths.values()]
    assert drawn == sorted(set(drawn), reverse=True)


def test_a_page_of_an_older_study_draws_no_line_through_noise():
    row = kl_run("x", [0.0, -0.01, -0.006, 0.006])
    old = row | {
        "fit": {"slope": -3.64, "intercept": -0.13, "r2": 0.31, "n": 4, "max_kl": 0.0057},
        "arm": "a",
    }
    del old["no_fit"]
    found = fake_rl.fake_reinforced() | {"kl_reward": [old | {"seeds": [0]}]}
    page = report.render({**fake_results(), **found}, {}, [])
    assert "-3.64" not in page
    assert page.count("KL moved by less than 0.1 nats") == 2  # in the legend and in the table


def test_figures_without_data_are_none():
    assert rl_figures.reward_figure([]) == ""
    assert rl_figures.ppo_figure([], "train") == ""
    assert rl_figures.kl_figure([]) == ""
    assert rl_figures.rounds_figure({}, {}) == ""
    nothing = {"learning_rate": 1.0, "kl_coef": 1.0, "train": {}, "eval": {}}
    assert rl_figures.ppo_figure([nothing], "eval") == ""
    # Only the start was evaluated: no round to show.
    assert rl_figures.rounds_figure({"arm": [{"seed": 0, "round": 0, "win_rate": 40.0}]}, {}) == ""


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (1.41e-5, "1.41e-5"), (0.05, "5e-2"), (3.0, "3e0")]
)
def test_learning_rates_are_written_in_one_way(rate, text):
    assert rl_figures.scientific(rate) == text
