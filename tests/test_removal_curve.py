"""The measurement of removals: each number is that of a checkpoint that `remove` has written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt_memsinks import SinkArgs
from litgpt_memsinks.bench.removal_curve import _Curve, removal_curve
from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.evaluate import score
from litgpt_memsinks.model.checkpoint import load_model
from litgpt_memsinks.remove.remove import remove
from tests.sink_models import build, learn, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    model = learn(build(SinkArgs(0.25, 0.2)), prepared).eval()
    return save(model, tmp_path_factory.mktemp("checkpoint") / "final", prepared)


def by_document(folder: Path, data_path: Path, ids: bool = True) -> torch.Tensor:
    documents = read_scored(data_path, "repeated")
    found = score(load_model(folder), documents, 48, documents.sequence_ids if ids else None).by_document
    return torch.tensor([found[str(name)] for name in documents.sequence_ids.tolist()], dtype=torch.float64)


def test_points_are_those_of_removed_checkpoints(checkpoint: Path, prepared: Path, tmp_path: Path) -> None:
    points = removal_curve(checkpoint, prepared, tmp_path / "curve.json", (1, 3), draws=2, block_size=48)
    content = json.loads((tmp_path / "curve.json").read_text())
    assert [(p["kind"], p["documents"], p["draw"]) for p in content["points"]] == [
        (kind, number, draw) for number in (1, 3) for draw in (0, 1) for kind in ("documents", "random")
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    own, dropped = by_document(checkpoint, prepared), by_document(checkpoint, prepared, ids=False)
    assert content["own"] == pytest.approx(float(own.mean()))
    assert content["dropped"] == pytest.approx(float(dropped.mean()))
    ids = read_scored(prepared, "repeated").sequence_ids
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(8, generator=generator)[:1]
    remove(checkpoint, tmp_path / "out", prepared, ids=str(int(ids[chosen])), yes=True)
    after = by_document(tmp_path / "out", prepared)
    others = torch.ones(8, dtype=torch.bool)
    others[chosen] = False
    assert points[0].removed_own == pytest.approx(float(after[chosen]))
    assert points[0].others_own == pytest.approx(float(after[others].mean()))
    way = float(dropped[chosen] - own[chosen])
    assert points[0].others_rise == pytest.approx(float((after - own)[others].mean()) / way)
    for removed, random in zip(points[::2], points[1::2], strict=True):
        assert removed.removed_way == pytest.approx(1, abs=1e-4)
        assert random.sinks == removed.sinks
        assert random.removed_way < 0.9


def test_random_sinks_are_other_ones_in_each_draw(checkpoint: Path, prepared: Path) -> None:
    model: Any = load_model(checkpoint)
    curve = _Curve(model, read_scored(prepared, "repeated"), 48)
    points = [p for p in curve.points((1,), 3, torch.Generator().manual_seed(1)) if p.kind == "random"]
    assert len({point.others_own for point in points}) == 3


def test_least_shared_sinks_cost_at_most_the_limit(checkpoint: Path, prepared: Path) -> None:
    model: Any = load_model(checkpoint)
    points = list(_Curve(model, read_scored(prepared, "repeated"), 48).points((2,), 2, torch.Generator(), 0.1))
    assert [point.kind for point in points] == ["documents", "random", "least_shared"] * 2
    for all_of_them, _, some in (points[:3], points[3:]):
        assert some.others_lose <= 0.1 < all_of_them.others_lose
        assert 0 < some.sinks < all_of_them.sinks
        assert some.removed_way < 1


def test_bad_input_is_one_line_and_nothing_is_written(checkpoint: Path, prepared: Path, tmp_path: Path) -> None:
    untrained = save(build(SinkArgs(0.25, 0.2)), tmp_path / "untrained")
    for settings, part in (
        ({"documents": (8,)}, "at most 7 can be removed"),
        ({"documents": (0,)}, "documents has 0"),
        ({"draws": 0}, "draws is 0"),
        ({"out_file": tmp_path / "a.png"}, "Let it end in .json"),
        ({"out_file": Path(__file__)}, "is not overwritten"),
        ({"checkpoint_dir": prepared}, "is not a LitGPT checkpoint"),
        ({"checkpoint_dir": untrained, "documents": (1,)}, "nothing is in the sinks"),
    ):
        given = {"checkpoint_dir": checkpoint, "data_path": prepared, "out_file": tmp_path / "c.json", **settings}
        with pytest.raises(MemSinksError) as caught:
            removal_curve(**given)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["untrained"]
