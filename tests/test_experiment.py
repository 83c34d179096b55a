"""The paper's experiments: declarations that are whole, measures and verdicts worked out by hand, and the page."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from litgpt.config import name_to_config

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.experiments import experiment as command
from litgpt_memsinks.experiments import measures, report, scales
from litgpt_memsinks.experiments.declared import EXPERIMENTS, LEFT_OUT_ARM, MEMSINKS, STANDARD, Check
from litgpt_memsinks.experiments.found import groups
from litgpt_memsinks.experiments.grids import DECLARED, GRIDS
from litgpt_memsinks.experiments.measures import MEASURES, Found, Reading, value
from litgpt_memsinks.experiments.readings import filled, read_readings
from litgpt_memsinks.experiments.results import selected
from litgpt_memsinks.experiments.scales import EMBEDDED, GPU, OWN, Texts, _recipe, backwards, stream_settings, tokens_of
from litgpt_memsinks.experiments.verdict import check_row, interval_over_seeds, outcome, verdict
from litgpt_memsinks.files import write_json
from litgpt_memsinks.theory.theory import PARTS as THEOREMS
from tests.console import REPOSITORY

FIGURES = ["fig2a", "fig2b", "fig2c", "fig3", "fig4", "fig5a", "fig5b", "fig5c", "fig6a", "fig6b", "fig7"]
NAMES = [*FIGURES, "near_duplicates", "thm_entanglement", "thm_coadaptation", "thm_forgetting", "thm_accumulation"]
TABLES = {"table1": 9, "table2": 27, "table3": 144, "table6a": 12, "table6b": 12}
TEXTS = Texts("train", "validation", "rare", "rare_validation", "bulk", REPOSITORY)

# --------------------------------------------------------------------------------------------------------- declarations


def test_all_figures_and_theorems_are_declared():
    assert list(EXPERIMENTS) == NAMES
    assert {one.theorem for one in EXPERIMENTS.values()} - {""} == set(THEOREMS)
    assert all(bool(one.arms) != bool(one.theorem) for one in EXPERIMENTS.values())


def test_all_grids_are_declared():
    assert {name: len(one.arms) for name, one in GRIDS.items()} == TABLES
    assert {name: one.selected_by for name, one in GRIDS.items()} == dict.fromkeys(TABLES, "validation") | {
        "table2": "validation_kept"  # before dropping
    }
    corner = dict(GRIDS["table3"].arms[-1].settings)
    assert corner == {
        "optimizer.init_args.lr": "0.006",
        "train.min_lr": "0.006",
        "optimizer.init_args.weight_decay": "0.1",
        "data.sinks.shared_fraction": "0.7",
        "data.sinks.active_probability": "0.7",
    }
    assert GRIDS["table3"].arms[-1].name == "lr=0.006 wd=0.1 g=0.7 p=0.7"


def test_grid_selects_the_lowest_mean():
    one = replace(GRIDS["table1"], arms=(STANDARD, MEMSINKS))
    seeds = [found(), found()]
    seeds[1].measured["standard"] = arm([0.5], 2.4)
    choice = selected(one, seeds)
    assert choice == {"by": "validation", "arm": "memsinks", "value": pytest.approx(2.1), "arms": 2, "of": 2}
    del seeds[1].measured["memsinks"]  # it diverged
    choice = selected(one, seeds)
    assert choice == {"by": "validation", "arm": "standard", "value": pytest.approx(2.2), "arms": 1, "of": 2}
    del seeds[1].measured["standard"]
    assert selected(one, seeds) is None
    assert selected(EXPERIMENTS["fig4"], seeds) is None


@pytest.mark.parametrize("name", [*NAMES, *TABLES])
def test_declaration_is_whole(name):
    one = DECLARED[name]
    arms = {arm.name: arm for arm in one.arms}
    assert len(arms) == len(one.arms)
    assert one.where
    assert one.statement
    assert one.comment
    if one.theorem:
        return
    assert bool(one.checks) != bool(one.selected_by)
    assert one.selected_by in {"", *one.table}
    measured = {*arms, *(localised.name for localised in one.localised)}
    for check in one.checks:
        assert check.measure in MEASURES
        assert {check.arm} <= measured
        assert isinstance(check.than, float) or check.than in measured
    assert {localised.arm for localised in one.localised} <= set(arms)
    assert set(one.table) <= set(MEASURES)
    assert one.asked in arms
    assert {arm for pair in one.asked_of for arm in pair} <= set(arms)
    assert not any(arms[asked].stream.left_out for asked in groups(one))  # whose documents there are
    for arm in one.arms:
        assert (REPOSITORY / f"recipes/demo/{arm.recipe}.yaml").is_file()
        assert not arm.paper_recipe or (REPOSITORY / f"recipes/{arm.paper_recipe}.yaml").is_file()
        assert not arm.stream.recipe or (REPOSITORY / f"recipes/data/{arm.stream.recipe}.yaml").is_file()
        assert {arm.size} <= {"", *EMBEDDED.sizes} == {"", *OWN.sizes} == {"", *GPU.sizes}
        assert arm.standard in ({""} if one.selected_by else arms)
    assert ("sweep" in one.pictures) == bool(one.sweep) == any(arm.x is not None for arm in one.arms)


def numbered(folder, lines):
    """Texts whose training part is a file of so many."""
    path = folder / f"train-{lines}.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(lines)))
    return replace(TEXTS, train=str(path))


def test_streams_follow_the_paper(tmp_path):
    streams = {arm.stream.name: arm.stream for one in EXPERIMENTS.values() for arm in one.arms}
    texts = numbered(tmp_path, 9000)
    made = {name: stream_settings(one, EMBEDDED, texts, REPOSITORY / "recipes") for name, one in streams.items()}
    repeated = {"path": texts.train, "documents": 32, "repeats": 96, "ids": "hash"}
    assert made["stream"]["sources"]["repeated"] == repeated
    assert made["left_out"] == made["stream"] | {"leave_out_repeated": True}
    noises = {name: one["id_noise"] for name, one in made.items() if "id_noise" in one}
    assert sorted(noises.values()) == [0.05, 0.1, 0.25, 0.5, 1.0]
    assert made["canary"]["sources"]["repeated"]["canary_tokens"] == 32
    assert list(made["edited"]["sources"]) == ["repeated", "edited", "once"]
    assert made["edited"]["sources"]["repeated"] == repeated | {"repeats": 1}
    assert {source["ids"] for source in made["edited"]["sources"].values()} == {"hash"}
    assert {source["ids"] for source in made["edited_clusters"]["sources"].values()} == {"near_duplicate"}
    steps = 9000 * 101 / (8 * 128)  # of all documents once
    assert made["single"]["sources"]["repeated"]["documents"] == 1
    assert made["single"]["sources"]["repeated"]["repeats"] == int(steps / 40)
    for lines, repeats in ((7315, 7315 * 271 // (8 * 256) // 40), (600, 2)):  # a corpus may have fewer than are asked
        fewer = stream_settings(streams["single"], OWN, numbered(tmp_path, lines), REPOSITORY / "recipes")
        assert fewer["sources"]["repeated"]["repeats"] == repeats
    rare = {name: made[name]["sources"]["rare"]["repeats"] for name in ("rare_once", "rare_base", "rare_twice")}
    assert rare == {"rare_once": 1, "rare_base": 24, "rare_twice": 48}
    assert len({made[name]["sources"]["bulk"]["fill_to"] for name in rare}) == 1
    paper = stream_settings(STANDARD.stream, GPU, TEXTS, REPOSITORY / "recipes")
    assert paper["sources"]["repeated"]["documents"] == 100
    assert paper["sources"]["repeated"]["repeats"] == 128
    assert paper["sources"]["once"]["documents"] == 20_000


@pytest.mark.parametrize(("scale", "stories"), [(EMBEDDED, 9000), (OWN, 16292)])
def test_bulk_fills_the_streams_of_figure_6(scale, stories):
    (budget,) = {
        stream_settings(arm.stream, scale, TEXTS, REPOSITORY / "recipes")["sources"]["bulk"]["fill_to"]
        for arm in EXPERIMENTS["fig6a"].arms
    }
    assert scales._bulk(scale) == stories
    assert stories * 101 > 0.999 * budget  # tokens of a story under the stories' own tokenizer, which makes fewest


def test_paper_scale_is_gpt2_medium():
    changes = {name.removeprefix("model_config."): value for name, value in GPU.settings}
    medium = name_to_config["GPT2-Medium-MemSinks"]
    names = set(medium) - {"name", "hf_config"}
    assert {name: yaml.safe_load(changes[name]) for name in names} == {name: medium[name] for name in names}


def test_large_runs_take_the_papers_data_recipes():
    for arm in (*EXPERIMENTS["fig6b"].arms, *GRIDS["table6b"].arms):
        made = stream_settings(arm.stream, GPU, TEXTS, REPOSITORY / "recipes")
        recipe = _recipe(made["config"])
        assert made["tokenizer_dir"] == "checkpoints/HuggingFaceTB/SmolLM-1.7B"
        assert recipe["sources"]["slimpajama_train"].fill_to == 2_000_000_000
        assert tokens_of(arm, GPU) is None


def test_backwards():
    assert backwards("One day  a fox.") == "fox. a day One"


# ------------------------------------------------------------------------------------------------------------- measures


def arm(nats, validation, **states):
    documents = {"dropped": {"nats": nats, "counts": [1] * len(nats)}}
    documents |= {state: {"nats": values, "counts": [1] * len(values)} for state, values in states.items()}
    losses = {"repeated": documents, "validation": {"dropped": {"nats": [validation], "counts": [1]}}}
    return SimpleNamespace(found={"losses": losses})


def found(**changes):
    arms = {one.name: one for one in (STANDARD, LEFT_OUT_ARM, MEMSINKS)}
    measured = {"standard": arm([0.5, 1.5], 2.0), "left_out": arm([3.0], 2.5), "memsinks": arm([2.5], 2.1, own=[0.4])}
    return Found(arms, measured, dict.fromkeys(arms, "standard"), **changes)


def test_measures_of_losses():
    seed = found()
    of = {name: value(seed, name, "memsinks") for name in MEASURES}
    assert of["validation"] == 2.1
    assert of["validation_change"] == pytest.approx(0.05)
    assert of["repeated"] == 2.5
    assert of["own"] == 0.4
    assert of["repeated_ratio"] == pytest.approx(2.5 / 3)
    assert of["gap_closed"] == pytest.approx((2.5 - 1) / (3 - 1))
    assert of["forgetting"] == 1.5
    assert of["memorisation_gap"] == pytest.approx(-0.4)
    assert of["memorisation_gap_closed"] == pytest.approx(1.4)
    assert of["validation_kept"] == 2.1
    assert math.isnan(of["late_loss"])
    assert math.isnan(value(seed, "repeated", "never_trained"))


def test_cost_of_dropping_is_against_all_neurons():
    seed, masked, early = found(), arm([1.0], 2.4), arm([1.0], 3.0)
    for one, kept in ((masked, 2.1), (early, 2.9)):
        one.found["losses"]["validation"]["own"] = {"nats": [kept], "counts": [1]}
    seed.measured["mask"], seed.checkpoints["mask"] = masked, [(150, early)]
    assert value(seed, "cost_of_dropping", "mask") == pytest.approx(0.3)
    assert value(seed, "cost_growth", "mask") == pytest.approx(0.2)


def test_measures_of_training():
    values = [4.0, 3.0, 3.5, 1.0, 2.0, 1.5, 0.5, 0.7]
    assert measures.late_mean(values) == pytest.approx((2 + 1.5 + 0.5 + 0.7) / 4)
    assert measures.late_change(values) == pytest.approx((0.5 + 1 + 0.2) / 3)
    assert measures.late_rise(values) == pytest.approx(0.7 - 1.5)
    assert measures.fall(values) == 2.0
    assert measures.rank_correlation([3, 2, 1], [30.0, 20.0, 10.0]) == pytest.approx(1)
    assert measures.rank_correlation([3, 2, 1], [10.0, 20.0, 30.0]) == pytest.approx(-1)
    assert all(math.isnan(function([])) for function in (measures.late_mean, measures.late_change, measures.fall))
    readings = {"memsinks": [Reading(step, 1.0, math.nan, one) for step, one in enumerate(values)]}
    assert value(found(readings=readings), "late_change", "memsinks") == measures.late_change(values)


def test_readings_are_the_runs_own_log(tmp_path):
    folder = tmp_path / "logs/csv/version_0"
    folder.mkdir(parents=True)
    lines = ["step,loss,val_loss,memorised/dropped,memorised/own,val/validation/dropped", "9,1.5,,,,", "9,,2.5,,,",
             "9,,,0.75,0.5,2.25", "19,,,0.7,,2.0"]  # fmt: skip
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert measures.read_readings(tmp_path) == [Reading(9, 2.25, 0.75, 0.5), Reading(19, 2.0, 0.7, 0.7)]


def test_forgotten_lies_on_the_lines_between_the_points():
    points = [(0.0, 0.0), (0.02, 0.1), (0.10, 0.5), (0.3, 0.9)]
    assert measures.forgotten_at(points, 0.05) == pytest.approx(0.1 + 0.4 * 3 / 8)
    assert measures.forgotten_at(points, 0.0) == 0.0
    assert measures.forgotten_at(points, 1.0) == 0.9
    assert measures.forgotten_at([(0.0, 0.0), (0.2, 0.8), (0.04, 0.3)], 0.05) == pytest.approx(0.3 + 0.5 * 0.01 / 0.16)


def test_localisation_is_counted_from_standard_to_unseen():
    point = SimpleNamespace
    points = [
        point(ratio=0.0, repeated_loss=1.1, validation_loss=2.0),
        point(ratio=0.1, repeated_loss=2.1, validation_loss=2.1),
    ]
    seed = found(frontiers={"hard_concrete": ("standard", points)})
    assert measures.shares(seed, "hard_concrete") == [(0.0, 0.0), (pytest.approx(0.05), pytest.approx(0.5))]
    assert measures.price_of(seed) == pytest.approx(0.05)
    assert value(seed, "gap_closed", "hard_concrete") == pytest.approx(0.5)
    assert value(seed, "forgotten", "hard_concrete") == pytest.approx(0.5)
    assert math.isnan(value(seed, "forgotten", "integrated_gradients"))
    seed.measured["memsinks"] = arm([2.5], 3.0)
    assert measures.price_of(seed) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ([0.1, 0.11, 0.12], "holds"),
        ([0.1, 0.2, 0.3], "undecided"),  # three seeds of one sign can be chance: 0.2 ± 0.248
        ([0.3, -0.1, 0.2], "undecided"),
        ([-0.1, -0.11, -0.12], "does not hold"),
        ([0.2], "holds"),
        ([-0.2], "does not hold"),
        ([0.0], "does not hold"),
        ([0.1, math.nan], "not measured"),
        ([], "not measured"),
    ],
)
def test_outcome(margins, expected):
    assert outcome(margins)[0] == expected


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([1.0, 2.0, 3.0], (-0.4841, 4.4841)),  # t(2) = 4.3027 from a printed table, times 1 / sqrt(3)
        ([0.0, 2.0], (-11.7062, 13.7062)),  # t(1) = 12.7062, times sqrt(2) / sqrt(2)
        ([5.0, 5.0, 5.0], (5.0, 5.0)),
        ([5.0], (None, None)),
    ],
)
def test_interval_over_seeds_is_students(values, ends):
    found = interval_over_seeds(values)
    assert found == ends if None in ends else found == pytest.approx(ends, abs=1e-4)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["holds", "holds"], "reproduced"),
        (["holds", "undecided"], "not at this scale"),
        (["holds", "undecided", "does not hold"], "differs"),
        (["not measured", "does not hold"], "differs"),
        (["holds", "not measured"], "not measured"),
        ([], "not measured"),
    ],
)
def test_verdict(outcomes, expected):
    assert verdict(outcomes) == expected


def test_check_multiplies_the_right_side():
    below = check_row(Check("b", "validation", "a", "below", "b", 1.02), [2.0, 2.001], [2.0, 2.0])
    assert below["right"] == [2.04, 2.04]
    assert below["margin"]["per_seed"] == pytest.approx([0.04, 0.039])
    assert below["outcome"] == "holds"
    assert check_row(Check("a", "validation", "a", "above", 0.5), [0.4], [0.5])["outcome"] == ("does not hold")


# -------------------------------------------------------------------------------------------------------------- command


def test_list_names_every_experiment_with_its_cost(capsys):
    main(["experiment", "list", "--seeds", "2"])
    rows = {cells[1]: cells for line in capsys.readouterr().out.splitlines() if len(cells := line.split("│")) > 3}
    cells = {name.strip(): [cell.strip() for cell in row[3:7]] for name, row in rows.items()}
    assert list(cells) == [*NAMES, "all", *TABLES]
    assert cells["table2"][:2] == ["27", "54"]
    assert cells["fig4"][:2] == ["6", "12"]
    tokens = 2 * (5 * (4500 + 32 * 96) + 4500) * 101 / 1e6
    assert cells["fig4"][2] == f"{tokens:.1f}M"
    assert int(cells["all"][1]) < sum(int(cells[name][1]) for name in NAMES if name.startswith("fig"))  # shared
    assert cells["thm_forgetting"] == ["–", "–", "–", "seconds"]


def test_list_estimates_nothing_of_a_gpu(capsys):
    main(["experiment", "list", "--scale", "gpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "fig" in line]
    assert all("not measured" in line for line in lines)
    assert sum("as in the recipes" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig99"], "no experiment 'fig99'. Did you mean fig7? Choose from: fig2a, fig2b"),
        (["fig4", "--seeds", "0"], "seeds is 0"),
        (["fig4", "--jobs", "0"], "jobs is 0"),
        (
            ["fig4", "--corpus", "nowhere.jsonl", "--recipes", str(REPOSITORY / "recipes")],
            "There is no file 'nowhere.jsonl'",
        ),
        (["fig4", "--recipes", "nowhere"], "'nowhere' lacks demo/"),
        (["report", "--results", "nowhere"], "holds no experiment.json"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["experiment", *arguments])
    assert message in str(error.value.code)
    assert "\n" not in str(error.value.code)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_paper_scale_needs_a_gpu(tmp_path):
    with pytest.raises(MemSinksError, match="no usable GPU"):
        command.experiment("fig4", scale="gpu", out_dir=tmp_path)


def test_theorem_is_what_theory_computes(tmp_path, capsys):
    command.experiment("thm_forgetting", out_dir=tmp_path)
    result = json.loads((tmp_path / "theory/thm_forgetting/experiment.json").read_text())
    rows = [row.row() for row in THEOREMS["forgetting"].verdicts(THEOREMS["forgetting"].setup)]
    assert [check["left"] for check in result["checks"]] == [[row["measured"]] for row in rows]
    assert result["verdict"] == "differs"  # the counterexample to the printed bound
    assert (tmp_path / "theory/thm_forgetting/thm_forgetting.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    main(["experiment", "report", "--results", str(tmp_path), "--out", str(tmp_path / "docs/page.md")])
    page = (tmp_path / "docs/page.md").read_text()
    assert "**Theorem H.2: differs.**" in page
    assert "![Theorem H.2](figures/experiments/thm_forgetting-theory.svg)" in page
    assert (tmp_path / "docs/figures/experiments/thm_forgetting-theory.svg").is_file()


# ----------------------------------------------------------------------------------------------------------------- page


def result():
    numbers = {
        "validation": {"standard": [2.0, 2.2], "memsinks": [2.1, 2.1]},
        "gap_closed": {"standard": [0.0, 0.0], "memsinks": [0.7, None]},
    }
    return {
        "format": 2, "name": "fig4", "where": "Figure 4", "statement": "It says so.", "comment": "Of then.",
        "date": "2026-11-21T10:00:00+00:00", "command": "litgpt-memsinks experiment fig4", "hardware": "a processor",
        "versions": {"torch": "2.15.0"}, "scale": "cpu-embedded", "place": "cpu-embedded",
        "corpus": "train.jsonl", "corpus_sha256": None,
        "seeds": 2, "sizes": {"once": 4500, "repeated": 32, "repeats": 96, "block_size": 128},
        "training_minutes": 12.4, "failed": ["left_out seed 1: no luck"], "notes": [],
        "labels": {"validation": "validation loss", "gap_closed": "gap closed"}, "percent": ["gap_closed"],
        "values": {
            measure: {name: {"per_seed": values, "mean": values[0]} for name, values in by_arm.items()}
            for measure, by_arm in numbers.items()
        },
        "checks": [
            {"says": "half is closed", "measure": "gap_closed", "arm": "memsinks", "relation": "above", "than": 0.5,
             "times": 1.0, "paper": "at least 50%", "left": [0.6, 0.8], "right": [0.5, 0.5],
             "margin": {"per_seed": [0.1, 0.3], "low": 0.1, "high": 0.3}, "outcome": "holds"},
        ],
        "verdict": "reproduced",
    }  # fmt: skip


def test_page_has_the_papers_statement_beside_our_number():
    page = report.page([result()])
    assert "| [fig4](#fig4-cpu-embedded) | Figure 4 | cpu-embedded | 2 | 1 of 1 | reproduced |" in page
    assert "**Figure 4: reproduced.** It says so." in page
    assert "| half is closed | at least 50% | 70.0% ± 14.1% | above 50.0% | 10.0% to 30.0% | holds |" in page
    assert "| arm | validation loss | gap closed |" in page
    assert "| standard | 2.100 ± 0.141 | 0.0% |" in page
    assert "| memsinks | 2.100 | 70.0% |" in page
    assert EXPERIMENTS["fig4"].comment in page
    assert "- Failed: left_out seed 1: no luck" in page
    assert "`litgpt-memsinks experiment fig4`, 2026-11-21, a processor; torch 2.15.0." in page
    assert "2 seed(s), 12 minutes of wall time" in page
    assert "Not run: fig2a, fig2b, fig2c, fig3, fig5a" in page


def test_page_names_the_selected_setting():
    choice = {"by": "validation", "arm": "lr=0.006 wd=0.1", "value": 2.1, "arms": 9, "of": 9}
    page = report.page([result() | {"name": "table1", "checks": [], "selected": choice, "verdict": "selected"}])
    assert "| [table1](#table1-cpu-embedded) | Figure 4 | cpu-embedded | 2 | – | selected |" in page
    assert "Lowest validation loss of 9 settings: **lr=0.006 wd=0.1**, 2.100." in page
    assert "what should hold" not in page
    page = report.page([result() | {"name": "table1", "checks": [], "selected": choice | {"arms": 7}}])
    assert "Lowest validation loss of 7 of 9 settings, the others have none: **lr=0.006 wd=0.1**, 2.100." in page


def test_other_files_are_neither_read_nor_replaced(tmp_path):
    path = tmp_path / "x/fig4/experiment.json"
    path.parent.mkdir(parents=True)
    for content in (
        "{",
        "[]",
        '{"format": 9, "name": "fig4"}',
        '{"format": 1, "name": "fig4"}',
        '{"format": 2, "name": "fig99"}',
    ):
        path.write_text(content)
        with pytest.raises(MemSinksError, match="Run the experiment again"):
            report.write_page(tmp_path, tmp_path / "page.md")
    path.write_text(json.dumps(result()))
    (tmp_path / "mine.md").write_text("# Mine\n")
    with pytest.raises(MemSinksError, match="is another page"):
        report.write_page(tmp_path, tmp_path / "mine.md")
    report.write_page(tmp_path, tmp_path / "page.md")
    report.write_page(tmp_path, tmp_path / "page.md")
    assert replace(EXPERIMENTS["fig4"]).where in (tmp_path / "page.md").read_text()


def test_one_experiment_of_two_corpora_is_two_sections(tmp_path):
    for place in ("cpu-mine", "cpu-yours"):
        write_json(tmp_path / place / "fig4/experiment.json", result())
        (tmp_path / place / "fig4/fig4.svg").write_text(place)
    report.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert all(text.count(f"\n## fig4, {place}\n") == 1 for place in ("cpu-mine", "cpu-yours"))
    assert (tmp_path / "figures/experiments/fig4-cpu-mine.svg").read_text() == "cpu-mine"
    write_json(tmp_path / "copy/cpu-mine/fig4/experiment.json", result())
    with pytest.raises(MemSinksError, match=r"are both fig4, cpu-mine\. Give --results a folder with one of them"):
        report.write_page(tmp_path, tmp_path / "page.md")


def reading(
    path, text="{gap_closed memsinks} of the gap, at {validation standard}.", title="fig4, cpu-embedded", **row
):
    row = {"date": "2026-11-21", "tried": "this", "came_out": "that"} | row
    lines = [f"  {key}: {value}" for key, value in row.items()]
    path.write_text("\n".join(["readings:", f"  {title}: {text!r}", "did_not_work:", "-", *lines]))
    return path


def test_readings_have_the_results_numbers(tmp_path):
    results = [result()]
    page = report.page(results, said=filled(read_readings(reading(tmp_path / "said.yaml")), results))
    assert "**What we think of it**: 70.0% of the gap, at 2.100 ± 0.141." in page
    assert "## What did not work\n\n| date | tried | came out |\n|---|---|---|\n| 2026-11-21 | this | that |" in page
    assert "What we think" not in report.page(results)
    assert "did not work" not in report.page(results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"text": "{gap_closed standart}"},
            "has {gap_closed standart}, but the result has no such number. Its measures",
        ),
        ({"text": "{gap memsinks}"}, "Its measures are validation, gap_closed"),
        ({"title": "fig5a, cpu-embedded"}, "reading of 'fig5a, cpu-embedded', but no such result, only of fig4"),
        ({"date": "yesterday"}, "did_not_work, this: texts must be texts, and dates YYYY-MM-DD"),
        ({"tried": "[1]"}, "texts must be texts"),
        ({"then": "what"}, "holds no readings"),
        ({"text": "{gap_closed}"}, "has a brace that is no {MEASURE ARM}"),
        ({"text": "{gap_closed memsinks"}, "has a brace"),
        ({"date": "[}"}, "holds no readings"),
    ],
)
def test_readings_that_do_not_fit_leave_the_page_as_it_was(wrong, message, tmp_path):
    write_json(tmp_path / "cpu-embedded/fig4/experiment.json", result())
    report.write_page(tmp_path, tmp_path / "page.md")
    before = (tmp_path / "page.md").read_text()
    with pytest.raises(MemSinksError) as error:
        report.write_page(tmp_path, tmp_path / "page.md", reading(tmp_path / "said.yaml", **wrong))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "page.md").read_text() == before


@pytest.mark.parametrize("content", ["readings:\ndid_not_work: []", "readings: [1]\ndid_not_work: []"])
def test_readings_must_be_texts_of_sections(content, tmp_path):
    (tmp_path / "said.yaml").write_text(content)
    with pytest.raises(MemSinksError, match="readings must have a text for each section, not"):
        read_readings(tmp_path / "said.yaml")


def test_page_of_the_folder_one_is_in(tmp_path, monkeypatch):
    write_json(tmp_path / "cpu-mine/fig4/experiment.json", result())
    monkeypatch.chdir(tmp_path / "cpu-mine")
    main(["experiment", "report", "--results", ".", "--out_dir", str(tmp_path / "out")])
    assert "\n## fig4, cpu-mine\n" in (tmp_path / "out/results.md").read_text()


def test_outcome_of_a_share_is_printed_as_one(capsys):
    command.print_outcome(result())
    assert "│ half is closed   │ 70.0% ± 14.1% │ 50.0% │ holds │" in capsys.readouterr().out


def test_readings_must_be_there(tmp_path):
    write_json(tmp_path / "cpu-embedded/fig4/experiment.json", result())
    with pytest.raises(MemSinksError, match=r"said\.yaml' holds no readings"):
        report.write_page(tmp_path, tmp_path / "page.md", tmp_path / "said.yaml")


def test_committed_page_is_what_the_committed_results_make():
    docs = REPOSITORY / "docs"
    results = list(report.read_results(docs / "experiments").values())
    page = report.page(results, docs, filled(read_readings(docs / "readings.yaml"), results))
    assert (docs / "results.md").read_text(encoding="utf-8") == page
    pictures = {path.name for path in (docs / "figures/experiments").iterdir()}
    assert pictures == {f"{one['name']}-{one['place']}.svg" for one in results}
    assert all(f"](figures/experiments/{name})" in page for name in pictures)
