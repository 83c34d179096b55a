"""The page, the pictures and the tables of made-up results: what they show, and that foreign text stays text."""

import base64
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.report.charts import Axis, Chart, Guide, Series, as_table, mean_line, printable, sections, thin
from litgpt_memsinks.report.examples import version_of
from litgpt_memsinks.report.figures import draw
from litgpt_memsinks.report.page import FOLDER, PARTS, page
from litgpt_memsinks.report.report import report
from litgpt_memsinks.report.results import estimate, read_results
from litgpt_memsinks.report.svg import SHAPES, chart_svg, legend
from litgpt_memsinks.report.table import METRICS, as_csv, as_markdown
from litgpt_memsinks.report.verdict import verdict
from tests.console import run
from tests.made_results import HOSTILE, make_results


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def html(made):
    return page(read_results([made]))


def change(path, edit, name="changed"):
    """A copy of a result file, edited."""
    content = json.loads(path.read_text())
    edit(content)
    copy = path.with_name(f"{name}.json")
    copy.write_text(json.dumps(content))
    copy.with_suffix(".documents.jsonl").write_bytes(path.with_suffix(".documents.jsonl").read_bytes())
    return copy


class Page(HTMLParser):
    """The elements of a page in order: name, attributes, text of it and in it."""

    VOID = ("meta", "link", "img", "br", "input", "path", "line")

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs), "inside": [outer["tag"] for outer in self.open]}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1]["tag"] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if any(element["tag"] == tag for element in self.open):
            while self.open.pop()["tag"] != tag:
                pass

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]


# ------------------------------------------------------------------------------------------------------- what it shows


def test_figures_are_those_of_the_file(made, html):
    row = next(row for row in json.loads(made.read_text())["comparison"] if row["arm"] == "memsinks_repeated")
    tiles = [element["text"] for element in Page(html).all("dd") if "b" not in element["inside"]]
    gap, low, high = sum(row["gap_closed"]) / 3, *(row["intervals"]["gap_closed"][end] for end in ("low", "high"))
    assert f"{gap:.0%} [{low:.0%}, {high:.0%}]" in tiles[0]
    assert f"−{abs(sum(row['validation_change']) / 3):.1%} [" in tiles[1]
    assert "95% → 2%" in tiles[2]
    assert "0.53 [0.48, 0.58]" in tiles[3]


@pytest.mark.parametrize(("passed", "word"), [(True, "Pass"), (False, "Fail")])
def test_verdict_is_on_top(passed, word, tmp_path):
    html = page(read_results([make_results(tmp_path, seeds=(1,), passed=passed, parts=["losses"])]))
    top = Page(html).all("h2")[0]["text"]
    assert word in top
    assert ("misses 2 of 5 thresholds: gap closed, extraction." in top) is not passed
    assert f"<title>{word}: memsinks repeated" in html


def test_file_without_a_verdict_says_what_lacks(made):
    def edit(content):
        del content["verdict"]
        content["models"] = [model for model in content["models"] if model["role"] != "left_out"]

    found = verdict(read_results([change(made, edit)]))
    assert found.word == "No verdict"
    assert found.sentence == (
        "memsinks: there is no model that never saw the documents to compare with. Give evaluate --left_out DIR."
    )


def test_open_verdict_is_none(made):
    found = verdict(read_results([change(made, lambda content: content["verdict"].update({"pass": None}))]))
    assert (found.word, found.sentence) == ("No verdict", "memsinks repeated: the gap was not measured.")


def test_several_files_pass_only_together(tmp_path):
    paths = [
        make_results(tmp_path, name, (seed,), ["losses"], passed=ok)
        for name, seed, ok in (("a", 1, True), ("b", 2, False))
    ]
    found = verdict(read_results(paths))
    assert (found.word, [name for name, _ in found.checks]) == ("Fail", ["a.json", "b.json"])


def names(results):
    return {chart.name for section in sections(results) for chart in section.charts}


NEEDS = {
    "losses": {"losses_repeated", "losses_validation"},
    "extraction": {"extraction_32_32", "extraction_50_50", "extraction_64_48"},
    "membership": {"membership_auc", "roc", "roc_log"},
    "relearning": {"relearning_1", "relearning_4", "relearning_16"},
    "curve": {"curve_validation", "curve_repeated_dropped", "curve_repeated_own"},
    "calibrated": set(),
    "quantised": set(),
    "teacher_forced": set(),
}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_what_was_not_measured_is_not_drawn_but_named_with_its_command(part, made):
    whole = read_results([made])

    def edit(content):
        for model in content["models"]:
            del model["parts"][part]

    results = read_results([change(made, edit)])
    assert names(whole) - names(results) == NEEDS[part]
    (entry,) = [element for element in Page(page(results)).all("dd") if "--out_file" in element["text"]]
    assert "--checkpoint_dir runs/made/memsinks_repeated-seed1/final --data_path runs/made/data/stream" in entry["text"]
    assert ("--curve runs/made/memsinks_repeated-seed1" if part == "curve" else f"--parts {part}") in entry["text"]
    assert "--standard runs/made/standard-seed1/final --left_out runs/made/left_out-seed1/final" in entry["text"]
    assert ">Not measured<" not in page(whole)


def test_part_that_some_models_lack_is_named_with_them(made):
    def edit(content):
        del content["models"][0]["parts"]["relearning"]

    assert "Relearning of standard" in " ".join(
        Page(page(read_results([change(made, edit)]))).all("main")[0]["text"].split()
    )


def test_why_a_part_was_left_out_is_said(made):
    def edit(content):
        for model in content["models"]:
            del model["parts"]["relearning"]
            model["skipped"] = {"relearning": "There are fewer than two repeated documents."}

    text = page(read_results([change(made, edit)]))
    assert "<dd>There are fewer than two repeated documents.</dd>" in text
    assert "--parts relearning" not in text


def nulls(value):
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return float("nan") if isinstance(value, float) else value


def test_nan_and_null_are_no_figures(made, tmp_path):
    content = nulls(json.loads(made.read_text()))
    (tmp_path / "n.json").write_text(json.dumps(content))  # NaN, which is no JSON
    assert "NaN" in (tmp_path / "n.json").read_text()
    for path in (tmp_path / "n.json", change(made, lambda content: [m.update(parts={}) for m in content["models"]])):
        results = read_results([path])
        assert not re.search(r"\bnan\b", page(results).replace("isNaN", ""))
        assert "NaN" not in page(results).partition("<script>")[0]
        report(path, tmp_path / f"{path.stem}.png")
        as_markdown(results)


def test_minimal_file_makes_a_page(tmp_path):
    model = {
        "arm": "mine",
        "checkpoint_dir": "out/final",
        "parts": {"losses": {"repeated": {"dropped": {"value": 1.5}}}},
    }
    (tmp_path / "r.json").write_text(json.dumps({"format": 2, "models": [model]}))
    text = page(read_results([tmp_path / "r.json"]))
    assert "1.500" in text
    assert "No verdict" in text
    (tmp_path / "r.json").write_text(json.dumps({"format": 2, "models": [{"arm": "mine"}]}))
    assert "No verdict" in page(read_results([tmp_path / "r.json"]))


def test_sample_of_many_documents_is_said_and_small(tmp_path):
    path = make_results(tmp_path, seeds=(1,), parts=["losses", "membership"], number=10_000, points=4_000)
    text = page(read_results([path]))
    assert "a sample of 1,500 of 30,000" in " ".join(text.split())
    assert len(text.encode()) < 2_000_000
    assert 1500 < text.count('class="point"') < 1700


def test_without_a_part_of_its_own_the_curve_is_the_runs_log(made, tmp_path):
    log = tmp_path / "run/logs/csv/version_0/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("loss,step,val_loss,memorised/dropped,memorised/own\n5,0,,,\n4,49,4.5,4.4,4.3\n3,99,3.5,nan,2.5\n")

    def edit(content):
        for model in content["models"]:
            del model["parts"]["curve"]
        content["models"][0]["checkpoint_dir"] = str(tmp_path / "run/final")

    charts = {chart.name: chart for section in sections(read_results([change(made, edit)])) for chart in section.charts}
    assert (charts["curve_validation"].series[0].x, charts["curve_validation"].series[0].y) == ([50, 100], [4.5, 3.5])
    assert charts["curve_repeated_dropped"].series[0].y == [4.4]
    assert charts["curve_repeated_own"].series[0].y == [4.3, 2.5]


@pytest.mark.parametrize(
    ("truth", "generated", "marked", "kept"),
    [
        ("a b c d e", "a b c d e", ["a b c d e"], 5),
        ("a b c d e", "x b c d y", ["b c d "], 3),
        ("a b c d e", "a b x d e", [], 0),  # runs of two
        ("a b c", "", [], 0),
        ("", "a b c", [], 0),
        ("a b", "a b", ["a b"], 2),  # all there is
    ],
)
def test_marked_are_the_documents_own_runs(truth, generated, marked, kept):
    version = version_of("", truth, generated)
    assert [text for text, taken in version.spans if taken] == marked
    assert "".join(text for text, _ in version.spans) == generated
    assert version.kept == kept


# ----------------------------------------------------------------------------------------------------- several files


def test_seeds_of_several_files_stand_side_by_side(tmp_path):
    one, two = (make_results(tmp_path, f"seed{seed}", (seed,)) for seed in (1, 2))
    results = read_results([one, two])
    assert [(model["arm"], model["seed"]) for model in results.models[4:6]] == [("id_noise", 1), ("standard", 2)]
    rows = [
        next(row for row in json.loads(path.read_text())["comparison"] if row["arm"] == "memsinks")
        for path in (one, two)
    ]
    merged = results.row("memsinks")
    assert merged["gap_closed"] == rows[0]["gap_closed"] + rows[1]["gap_closed"]
    intervals = [row["intervals"]["gap_closed"] for row in rows]
    assert merged["intervals"]["gap_closed"]["low"] == min(found["low"] for found in intervals)
    assert merged["intervals"]["gap_closed"]["high"] == max(found["high"] for found in intervals)
    assert results.n_documents == 2 * 3 * 32
    assert any("Several files" in note for note in results.notes)


def test_what_was_measured_later_of_the_same_weights_is_put_to_them(tmp_path):
    one = make_results(tmp_path, "one", (1,), ["losses"])

    def edit(content):
        (later,) = content["models"] = [model for model in content["models"] if model["arm"] == "memsinks"]
        later |= {"arm": "evaluated", "parts": {"teacher_forced": {"dropped": {"exact_match": {"value": 0.5}}}}}
        row = {
            "arm": "evaluated",
            "gap_closed": [0.1],
            "extraction": [0.25],
            "intervals": {"extraction": {"value": 0.25}},
        }
        content["comparison"], content["verdict"] = [row], {"pass": None, "model": "evaluated", "checks": []}

    results = read_results([one, change(one, edit)])
    assert results.arms == ["standard", "left_out", "memsinks", "memsinks_repeated", "id_noise"]
    assert set(results.of("memsinks")[0]["parts"]) == {"losses", "teacher_forced"}
    row = results.row("memsinks")
    assert len(row["gap_closed"]) == 1
    assert row["gap_closed"] != [0.1]  # known from the first file
    assert row["extraction"] == [0.25]  # which did not measure it
    assert verdict(results).word == "Pass"
    twice = read_results([one, change(one, lambda content: None, "same")])
    assert results.n_documents == twice.n_documents == 3 * 32
    assert len(twice.row("memsinks")["gap_closed"]) == 1


def test_one_name_for_two_checkpoints_is_refused(tmp_path):
    one = make_results(tmp_path, "one", (1,), ["losses"])
    other = change(one, lambda content: content["models"][0].update(checkpoint_sha256="0" * 64), "other")
    with pytest.raises(MemSinksError, match=r"other.json' holds another model 'standard' of seed 1 than") as error:
        read_results([one, other])
    assert "\n" not in str(error.value)


def test_files_of_other_data_are_noted(tmp_path):
    one = make_results(tmp_path, "one", (1,), ["losses"])
    two = make_results(tmp_path, "two", (2,), ["losses"])
    assert not any("different data" in note for note in read_results([one, two]).notes)
    two = change(two, lambda content: content["data"].update(manifest_sha256="cd" * 32), "two")
    assert any("different data" in note for note in read_results([one, two]).notes)


# --------------------------------------------------------------------------------------------- foreign text, access


def test_foreign_text_stays_text(tmp_path):
    path = make_results(tmp_path, seeds=(1,))
    text = path.read_text().replace('"id_noise"', json.dumps(HOSTILE))
    for harmless in ("0.5.13", "It may cost 2% of the validation loss.", "runs/made/data/stream", "min_k_plus_plus"):
        assert f'"{harmless}"' in text
        text = text.replace(f'"{harmless}"', json.dumps(HOSTILE))
    path.write_text(text)
    beside = path.with_suffix(".documents.jsonl")
    beside.write_text(beside.read_text().replace('"id_noise"', json.dumps(HOSTILE)))
    html = page(read_results([path]))
    parsed = Page(html)
    assert not parsed.all("img")
    assert len(parsed.all("script")) == len(parsed.all("style")) == 1
    assert not [key for element in parsed.elements for key in element if key.startswith("on")]
    assert html.count("&lt;img src=x onerror=") >= 50
    html.encode()  # no lone surrogate
    assert "\x00" not in html
    assert "\u202e" not in html
    few = change(
        path, lambda content: [model.update(parts={"losses": model["parts"]["losses"]}) for model in content["models"]]
    )
    report(few, tmp_path / "folder")  # matplotlib and file names, too
    assert all(re.fullmatch(r"[\w.]+", file.name) for file in (tmp_path / "folder/figures").iterdir())


def test_printable():
    assert printable("a\n\tb\x00\u202e\ud800\u200d") == "a b\ufffd\ufffd\ufffd\u200d"


def test_page_needs_and_runs_nothing_else(html):
    parsed = Page(html)
    for element in parsed.elements:
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            assert element.get(name, "#").startswith(("#", "data:"))
        assert "style" not in element
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = (element["content"] for element in parsed.all("meta") if element.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_page_can_be_read_aloud(html):
    parsed = Page(html)
    assert parsed.all("html")[0]["lang"] == "en"
    levels = [int(element["tag"][1]) for element in parsed.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [element["id"] for element in parsed.elements if "id" in element]
    assert len(ids) == len(set(ids))
    for element in parsed.elements:
        for name in ("aria-labelledby", "popovertarget"):
            assert set(element.get(name, "").split()) <= set(ids)
        if element.get("href", "").startswith("#"):
            assert element["href"][1:] in ids
    charts = [element for element in parsed.all("svg") if element["class"] == "chart"]
    assert len(charts) == len(parsed.all("figure")) == 18
    assert all(element["role"] == "img" and len(element["aria-labelledby"].split()) == 2 for element in charts)
    described = [element["text"] for element in parsed.all("title", "desc") if "svg" in element["inside"]]
    assert all(described)
    assert all(element.get("scope") in ("row", "col") for element in parsed.all("th"))
    assert all(element["text"].strip() or element.get("aria-label") for element in parsed.all("button", "a", "summary"))
    assert all(element["aria-label"] for element in parsed.elements if element.get("role") == "region")


def test_every_point_tells_its_figures(html):
    points = re.findall(r'<g class="point"[^>]*><title>([^<]*)</title>', html)
    assert len(points) == html.count('class="point"') > 300
    assert all(re.search(r"\d", text) for text in points)
    assert sum("&lt;img src=x" in text for text in points) == 9  # documents: three arms of three seeds


def scheme(css, dark):
    """The colours of a scheme by name."""
    light, dim = (re.search(f"{head}(.*?)}}", css, re.DOTALL)[1] for head in (r"^:root {", r"dark\) {\s*:root {"))
    colours = dict(re.findall(r"--(\w[\w-]*): (#\w{6});", light))
    return {**colours, **(dict(re.findall(r"--(\w[\w-]*): (#\w{6});", dim)) if dark else {})}


def contrast(one, other):
    """WCAG 2.2's contrast ratio."""

    def luminance(colour):
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_meets_wcag_aa(dark):
    colours = scheme((FOLDER / "page.css").read_text(), dark)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("page", "card"):
        for text in ("ink", "soft", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for text, ground in (("pass", "pass-card"), ("fail", "fail-card"), ("none", "none-card"), ("ink", "marked"),
                         ("ink", "fail-card"), ("fail", "card"), ("pass", "card"), ("page", "ink")):  # fmt: skip
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for slot in range(len(SHAPES)):
        assert contrast(colours[f"s{slot}"], colours["card"]) >= 3, slot


def seen_by_deuteranopes(colour):
    """Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    matrix = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
    return [max(0.0, sum(a * b for a, b in zip(row, linear, strict=True))) ** (1 / 2.2) for row in matrix]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_of_five_arms_differ_to_the_colour_blind(dark):
    colours = scheme((FOLDER / "page.css").read_text(), dark)
    seen = [seen_by_deuteranopes(colours[f"s{slot}"]) for slot in range(5)]
    for one, other in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.1


# ------------------------------------------------------------------------------------------------- charts and tables


def test_points_lie_at_their_figures():
    """A point at a tick's value lies at the tick, linear and logarithmic, and an interval ends at its ends."""
    for log in (False, True):
        values = [0.1, 1.0, 10.0] if log else [0.0, 5.0, 10.0]
        series = Series("a", values, values, 0, x_range=[None, (values[0], values[2]), None])
        svg = chart_svg(Chart("c", "C", "", Axis("x", log), Axis("y", log), [series], [Guide("g", y=values[1])]), "c")
        points = [tuple(map(float, found)) for found in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", svg)]
        ticks = {
            (text, anchor): float(x)
            for x, anchor, text in re.findall(r'<text x="([\d.]+)"[^>]*anchor="(\w+)">([^<]+)<', svg)
        }
        assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)
        assert points[0][1] > points[1][1] > points[2][1]  # up is more
        for value, point in zip(values, points, strict=True):
            assert ticks[f"{value:g}", "middle"] == point[0]
        interval = re.search(r'class="s0">\s*<line x1="([\d.]+)"[^>]*x2="([\d.]+)"', svg)
        assert (float(interval[1]), float(interval[2])) == (points[0][0], points[2][0])
        assert f'y1="{points[1][1]:.1f}" x2="366.0" y2="{points[1][1]:.1f}"' in svg  # the guide


def test_lines_that_meet_bear_their_shapes_apart():
    lines = [Series(name, [0.0, 1.0, 2.0, 3.0], [1.0] * 4, slot, kind="line") for slot, name in enumerate("ab")]
    svg = chart_svg(Chart("c", "C", "", Axis("x"), Axis("y"), lines), "c")
    marks = re.findall(r'translate\(([\d.]+) [\d.]+\)"><title>[^<]*</title><path class="(mark|dot)"', svg)
    assert [kind for _, kind in marks] == ["dot", "mark", "dot", "dot", *["dot"] * 3, "mark"]


def test_every_seed_has_a_line_and_the_mean_is_over_them(made):
    """Each seed's losses lie by 0.1 apart, so that the mean is the second's."""

    def edit(content):
        for model in content["models"]:
            for point in model["parts"]["curve"]:
                point["validation"] += 0.1 * model["seed"]
            for taught in model["parts"]["relearning"]["runs"]:
                taught["other"] = [loss + 0.1 * model["seed"] for loss in taught["other"]]

    results = read_results([change(made, edit)])
    charts = {chart.name: chart for section in sections(results) for chart in section.charts}
    for name in ("curve_validation", "relearning_4", "roc", "roc_log"):
        chart = charts[name]
        assert chart.reading.endswith("Thick lines: means over seeds; thin lines: single seeds.")
        thick = [series for series in chart.series if not series.faint]
        assert len(thick) == len(results.arms)
        assert [series.label for series in legend(chart)] == [series.label for series in thick]
        for mean in thick:
            seeds = [series for series in chart.series if series.faint and series.label == mean.label]
            assert [series.seed for series in seeds] == [1, 2, 3]
            assert mean.x == seeds[1].x
            assert mean.y == pytest.approx(seeds[1].y)
            assert (mean.y != pytest.approx(seeds[0].y)) == (not name.startswith("roc"))
        svg = chart_svg(chart, "c")
        assert svg.count('faint"><path class="line"') == 3 * len(thick)
        for seed in (1, 2, 3):
            assert len(re.findall(rf"<title>[^<]*, seed {seed}: [^<]*</title>", svg)) == len(thick)
        rows = [row[0] for row in as_table(chart)[1]]
        assert rows.count(f"{thick[0].label}, seed 2") == 1
        assert rows.count(thick[0].label) > 5


def test_one_seed_is_one_line(tmp_path):
    results = read_results([make_results(tmp_path, seeds=(1,), parts=["losses", "curve", "relearning"])])
    charts = {chart.name: chart for section in sections(results) for chart in section.charts}
    for name in ("curve_validation", "relearning_4"):
        assert charts[name].reading.endswith("One seed.")
        assert not any(series.faint for series in charts[name].series)


def test_mean_of_lines_by_hand():
    one, other = [(0.0, 0.0), (0.0, 2.0), (4.0, 6.0)], [(-1.0, 9.0), (0.0, 0.0), (2.0, 4.0), (8.0, 4.0)]
    assert mean_line([one, other]) == [(0.0, 1.0), (2.0, 4.0), (4.0, 5.0)]
    assert mean_line([[(0.0, 1.0)], [(5.0, 1.0)]]) == []  # nowhere are both known
    with_gap = mean_line([[(0.0, 1.0), (2.0, 3.0)], [(0.0, 3.0), (1.0, 3.0), (2.0, 3.0)]])
    assert with_gap == [(0.0, 2.0), (1.0, 2.5), (2.0, 3.0)]


def test_strongest_attack_is_that_of_the_mean_over_seeds(made):
    def edit(content):
        for model in content["models"]:
            for entry in model["parts"]["membership"]:
                strong = {"loss": 0.99 if model["seed"] == 1 else 0.5, "min_k": 0.8, "zlib": 0.45}
                entry["auc"]["value"] = strong.get(entry["attack"], 0.5)

    charts = {c.name: c for s in sections(read_results([change(made, edit)])) for c in s.charts}
    assert {series.label for series in charts["roc"].series if not series.faint} >= {"memsinks: Min-K%"}


def test_thin_lines_are_in_the_figures_too(tmp_path):
    path = make_results(tmp_path, seeds=(1, 2), parts=["losses", "curve"])
    chart = next(c for s in sections(read_results([path])) for c in s.charts if c.name == "curve_validation")
    axes = Figure().subplots()
    draw(axes, chart)
    lines = axes.get_lines()
    assert len(lines) == 5 * 3
    assert sorted({line.get_linewidth() for line in lines})[0] < 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [one.label for one in legend(chart)]


def test_thin_keeps_the_ends_and_is_even_along_the_axis():
    line = [(float(x), float(x)) for x in range(1, 100_001)]
    for log in (False, True):
        kept = thin(line, log, most=100)
        assert len(kept) <= 100
        assert (kept[0], kept[-1]) == (line[0], line[-1])
        below = sum(x < 1000 for x, _ in kept) / len(kept)
        assert (below > 0.4) if log else (below < 0.05)
    assert thin(line[:50], most=100) == line[:50]


def test_csv_holds_every_estimate_of_the_file(made):
    rows = list(csv.DictReader(io.StringIO(as_csv(read_results([made])))))
    content = json.loads(made.read_text())

    def walk(value):
        if isinstance(value, dict):
            if "value" in value:
                yield value
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)

    parts = [found for model in content["models"] for found in walk(model["parts"])]
    written = [row for row in rows if row["low"]]
    assert sorted((found["value"], found["low"], found["high"], found["n"]) for found in parts) == sorted(
        (float(row["value"]), float(row["low"]), float(row["high"]), int(row["documents"])) for row in written
    )
    compared = [row for row in rows if row["metric"] == "gap_closed" and row["arm"] == "memsinks"]
    (row,) = (row for row in content["comparison"] if row["arm"] == "memsinks")
    assert [(float(found["value"]), found["seed"]) for found in compared] == list(
        zip(row["gap_closed"], "123", strict=True)
    )
    assert {row["metric"] for row in rows} == set(METRICS)


def test_csv_holds_no_formula(made):
    def edit(content):
        for item in (*content["models"], *content["comparison"]):
            item["arm"] = item["arm"].replace("id_noise", "=HYPERLINK(1)")

    text = as_csv(read_results([change(made, edit)]))
    assert "HYPERLINK" in text
    assert {row["arm"][0] for row in csv.DictReader(io.StringIO(text))} == {"s", "l", "m", "'"}


def test_markdown_is_a_table_whatever_the_names(made):
    def edit(content):
        for item in (*content["models"], *content["comparison"]):
            item["arm"] = item["arm"].replace("id_noise", "a|b\n<i>")

    lines = as_markdown(read_results([change(made, edit)])).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}  # measure and five arms
    assert not [line for line in lines if "<i>" in line]
    assert any(re.match(r"\| gap closed \| 0% .* 76% \[72%, 80%\]", line) for line in table)


@pytest.mark.parametrize(
    "given", [None, {}, {"value": None}, {"value": "1"}, {"value": True}, {"value": float("inf")}, 3]
)
def test_what_is_no_figure_is_none(given):
    assert estimate(given) is None


# ---------------------------------------------------------------------------------------------------------- the command


def test_folder_holds_page_figures_and_tables(made, tmp_path, capsys):
    small = change(made, lambda content: [m.update(parts={"losses": m["parts"]["losses"]}) for m in content["models"]])
    main(["report", str(small), "--out", str(tmp_path / "out")])
    assert "Page: " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figures",
        "report.html",
        "table.csv",
        "table.md",
    ]
    drawn = names(read_results([small]))
    files = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    assert "<text" in (tmp_path / "out/figures/frontier.svg").read_text()  # text that a paper's font can set
    assert (tmp_path / "out/figures/frontier.png").read_bytes().startswith(b"\x89PNG")
    report(small, tmp_path / "again")
    for file in ("report.html", "figures/frontier.svg", "table.csv"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        report(small, tmp_path / "out")


def test_several_files_are_given_by_position(tmp_path):
    files = [str(make_results(tmp_path, f"seed{seed}", (seed,), ["losses"])) for seed in (1, 2)]
    main(["report", *files, "--out", str(tmp_path / "both.html")])
    assert "2 result\nfiles" in (tmp_path / "both.html").read_text()
    main(["report", *files, "--out", str(tmp_path / "both.svg")])
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")


def test_other_ending_is_refused(made, tmp_path):
    with pytest.raises(MemSinksError, match=r"it must end in \.html, \.png, \.svg, \.pdf, or name a folder"):
        report(made, tmp_path / "report.docx")


def test_torn_documents_are_named(tmp_path):
    path = make_results(tmp_path, seeds=(1,), parts=["losses"])
    with open(path.with_suffix(".documents.jsonl"), "a") as file:
        file.write('{"arm": "mem')
    with pytest.raises(MemSinksError, match=r"Line 97 of .*documents.jsonl' is not JSON"):
        read_results([path])


def test_report_imports_no_pytorch(made, tmp_path):
    code = f"""
import sys
from pathlib import Path
from litgpt_memsinks.report.report import report
report(Path({str(made)!r}), Path({str(tmp_path / "page.html")!r}))
print(sorted({{"torch", "litgpt", "lightning", "litdata"}} & set(sys.modules)))
"""
    assert run([sys.executable, "-c", code]).stdout.splitlines()[-1] == "[]"
