"""Result files that were cut, edited or written by something else: a page, or one line that says what to do."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.report.page import page
from litgpt_memsinks.report.report import read_results
from litgpt_memsinks.report.table import as_csv, as_markdown
from tests.made_results import make_results

EXAMPLES = int(os.environ.get("DAMAGED_FILES", "30"))
OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([[], {}, [None], [{}], {"value": None}, "\0", "x" * 300, 0, -1, [[1]], {"": {}}]),
)


def places(value, at=()):
    """Where there is a value, from the root down."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*at, name))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of three arms and few points, so that a page takes a moment."""
    folder = tmp_path_factory.mktemp("damaged")
    path = make_results(folder, seeds=(1,), number=3, points=4)
    content = json.loads(path.read_text())
    kept = ("standard", "left_out", "memsinks_repeated")
    for group in ("models", "comparison"):
        content[group] = [one for one in content[group] if one["arm"] in kept]
    for model in content["models"]:
        for entry in model["parts"]["extraction"]:
            entry["examples"] = entry["examples"][:1]
    path.write_text(json.dumps(content))
    return path, content, list(places(content))[1:]


def damaged(content, place, other, delete):
    """A copy in which a field is another value, or is not there."""
    copy = json.loads(json.dumps(content))
    holder = copy
    for name in place[:-1]:
        holder = holder[name]
    if delete:
        del holder[place[-1]]
    else:
        holder[place[-1]] = other
    return copy


def shown(path):
    """All that is made of a file, or the line that says why nothing is."""
    said = None
    try:
        results = read_results([path])
        return page(results), as_csv(results).encode(), as_markdown(results).encode()
    except MemSinksError as error:
        said = str(error)
    assert "\n" not in said
    assert path.stem in said
    return None


def test_whole_file_is_shown(small):
    assert shown(small[0])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), other=OTHER, delete=st.booleans())
def test_any_field_that_lacks_or_is_something_else(small, data, other, delete):
    path, content, fields = small
    copy = path.with_name("copy.json")
    copy.write_text(json.dumps(damaged(content, data.draw(st.sampled_from(fields)), other, delete)))
    shown(copy)


@settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), other=OTHER, delete=st.booleans())
def test_any_field_of_a_document(small, data, other, delete):
    path, _, _ = small
    lines = path.with_suffix(".documents.jsonl").read_text().splitlines()
    document = json.loads(lines[0])
    place = data.draw(st.sampled_from(list(places(document))[1:]))
    copy = path.with_name("beside.json")
    copy.write_text(path.read_text())
    changed = json.dumps(damaged(document, place, other, delete))
    copy.with_name("beside.documents.jsonl").write_text("\n".join([changed, *lines[1:]]))
    shown(copy)


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(content=st.one_of(OTHER, st.lists(OTHER), st.dictionaries(st.text(max_size=5), OTHER)))
def test_any_json(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "any.json"
    path.write_text(json.dumps(content))
    assert shown(path) is None


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (
            ("models", 1, "parts", "losses", "repeated"),
            [1],
            "models[1].parts.losses.repeated is a list, but it must be an object",
        ),
        (("models", 0, "arm"), None, "models[0].arm is missing"),
        (("models",), None, "models is missing"),
        (("models",), {}, "models is an object, but it must be a list"),
        (("models",), [], "holds no models"),
        (
            ("models", 0, "parts", "membership", 1, "roc", "fpr", 2),
            1.5,
            "models[0].parts.membership[1].roc.fpr[2] is 1.5, but it must be a number from 0 to 1",
        ),
        (("comparison", 0, "gap_closed"), 0.5, "comparison[0].gap_closed is 0.5, but it must be a list"),
        (("verdict", "checks", 0, "pass"), "yes", "verdict.checks[0].pass is text, but it must be true or false"),
        (
            ("models", 0, "parts", "curve", 0, "step"),
            1e301,
            "models[0].parts.curve[0].step is 1e+301, but it must be a number",
        ),
        (("format",), 1, "is not a result file"),
    ],
)
def test_the_line_names_file_field_and_what_to_do(place, other, message, small):
    path, content, _ = small
    copy = path.with_name("named.json")
    copy.write_text(json.dumps(damaged(content, place, other, False)))
    with pytest.raises(MemSinksError) as error:
        read_results([copy])
    assert message in str(error.value)
    assert str(copy) in str(error.value)
    assert str(error.value).endswith(("or take the file from a copy.", "wrote.", "Name its --out_file."))


def test_what_is_null_was_not_measured(small):
    path, content, _ = small
    copy = path.with_name("null.json")
    for place in (
        ("models", 0, "parts", "losses", "repeated"),
        ("models", 0, "parts"),
        ("verdict", "checks", 0, "why"),
    ):
        copy.write_text(json.dumps(damaged(content, place, None, False)))
        assert shown(copy)


def test_log_that_is_none_is_named(small):
    path, content, _ = small
    log = path.parent / "run/logs/csv/version_10/metrics.csv"
    log.parent.mkdir(parents=True)
    copy = path.with_name("log.json")
    changed = damaged(content, ("models", 0, "parts", "curve"), None, True)
    copy.write_text(
        json.dumps(damaged(changed, ("models", 0, "checkpoint_dir"), str(path.parent / "run/final"), False))
    )
    log.write_text("step,val_loss\n1,2.5\n")
    assert shown(copy)
    for junk in ("step,val_loss\nx,1.0\n", "val_loss\n1.0\n", "step,val_loss\n1,y\n"):
        log.write_text(junk)
        with pytest.raises(MemSinksError, match="is no CSV log of LitGPT") as error:
            page(read_results([copy]))
        assert "\n" not in str(error.value)


def test_command_ends_in_the_line(small, tmp_path):
    _, content, _ = small
    copy = tmp_path / "broken.json"
    copy.write_text(json.dumps(damaged(content, ("models", 0, "seed"), "one", False)))
    with pytest.raises(SystemExit, match=r"Error: .*broken.json' cannot be read: models\[0\]\.seed is text"):
        main(["report", str(copy), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
