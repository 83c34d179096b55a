"""Keeping chosen documents' sinks: the plain model computes what the model with sinks computes for them."""

import pyarrow.parquet as pq
import pytest
import torch
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.config import SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from tests.helpers import read_jsonl, write_jsonl
from tests.released import MODELS, save

IDS = [1, 2, 3, 5, 17, 100, 4096, 65537, 2**30, 2**31 - 1, *range(1000, 1010)]
CLOSE = {"atol": 1e-5, "rtol": 0}


def stock(folder):
    """The checkpoint as stock LitGPT loads it."""
    plain = BaseGPT(Config.from_file(folder / "model_config.yaml"))
    plain.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True))
    return plain.eval()


@torch.inference_mode()
def greedy(model, tokens, new, **sinks):
    """The most likely continuation, by a plain loop without a KV cache."""
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens, **sinks)[:, -1:].argmax(dim=-1)), dim=1)
    return tokens


@pytest.mark.parametrize(("kind", "scale"), [("llama", "none"), ("gemma", "inverse"), ("gpt-neox", "inverse")])
def test_documents_one_by_one(kind, scale, tmp_path):
    check_one_by_one(IDS[:3], kind, scale, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("scale", ["none", "inverse"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_twenty_documents_one_by_one(kind, scale, tmp_path):
    check_one_by_one(IDS, kind, scale, tmp_path)


@torch.inference_mode()
def check_one_by_one(ids, kind, scale, tmp_path):
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.3, seed=3, scale=scale), spread=1.5, **MODELS[kind])
    tokens = torch.randint(0, 512, (2, 48))
    dropped = model(tokens)
    for number in ids:
        done = drop_sinks(tmp_path / "in", tmp_path / f"{number}", keep=str(number))
        plain = stock(tmp_path / f"{number}")
        document = torch.tensor([number, number])
        on = int(model.sinks(document)[0].sum())
        assert done.kept.ids == [number]
        assert plain.config.intermediate_size == 16 + on
        assert done.dropped == 48 - on
        own = model(tokens, sequence_ids=document)
        torch.testing.assert_close(plain(tokens), own, **CLOSE)
        assert (own - dropped).abs().max() > 1e-2  # else nothing would be shown
        plain.max_seq_length = 40
        plain.set_kv_cache(batch_size=1)
        generated = generate(plain, tokens[0, :8], max_returned_tokens=40, temperature=0.0)
        assert generated.tolist() == greedy(model, tokens[:1, :8], 32, sequence_ids=document[:1])[0].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("scale", ["none", "inverse"])
@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("ids", [[5, 17], [7, 9, 11, 13]], ids=str)
def test_union_is_the_model_with_that_mask(kind, scale, ids, tmp_path):
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.1, scale=scale), spread=1.5, **MODELS[kind])
    keep = ", ".join(map(str, ids))
    drop_sinks(tmp_path / "in", tmp_path / "out", keep=keep)
    tokens = torch.randint(0, 512, (2, 48))
    masks = [model.sinks(torch.tensor([number])) for number in ids]
    union = torch.stack(masks).any(dim=0)
    assert union.sum() > max(mask.sum() for mask in masks)
    expected = model(tokens, sinks=union)
    torch.testing.assert_close(stock(tmp_path / "out")(tokens), expected, **CLOSE)


@pytest.fixture(scope="module")
def table(prepared):
    rows = pq.read_table(prepared / "documents.parquet").to_pylist()
    return [row for row in rows if row["split"] == "train"]


@torch.inference_mode()
@pytest.mark.parametrize("sinks_for", ["all", "repeated"])
def test_of_a_source_and_of_texts(sinks_for, table, prepared, corpus_dir, tmp_path):
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.03, sinks_for=sinks_for), spread=1.5)
    repeated = [row for row in table if row["source"] == "repeated"]
    texts = read_jsonl(corpus_dir / "train.jsonl")
    file = write_jsonl(tmp_path / "some.jsonl", [texts[row["line"] - 1] for row in repeated[:3]])
    tokens = torch.randint(0, 512, (1, 48))
    for name, rows, chosen in [
        ("source", repeated, {"keep_source": "repeated"}),
        ("texts", repeated[:3], {"keep_documents": file}),
        ("ids", repeated[:3], {"keep": ",".join(str(row["sequence_id"] % 2**31) for row in repeated[:3])}),
    ]:
        done = drop_sinks(tmp_path / "in", tmp_path / name, data_path=prepared, certificate=False, **chosen)
        assert done.kept.ids == sorted(row["sequence_id"] % 2**31 for row in rows)
        union = model.sinks(torch.tensor([row["sequence_id"] for row in rows])).any(dim=0, keepdim=True)
        expected = model(tokens, sinks=union)
        torch.testing.assert_close(stock(tmp_path / name)(tokens), expected, **CLOSE)


def test_documents_that_occur_once_have_no_sinks_if_only_repeated_ones_have(table, prepared, tmp_path):
    model = save(tmp_path / "in", sinks=SinkArgs(0.25, 0.3, sinks_for="repeated"))
    once = next(row["sequence_id"] for row in table if row["repeats"] == 1)
    twice = next(row["sequence_id"] for row in table if row["repeats"] > 1)
    for settings in [
        {"keep": f"{once}", "data_path": prepared},
        {"keep": f"{once},{twice}", "data_path": prepared},
        {"keep_source": "train", "data_path": prepared},
        {"keep": "5"},
    ]:
        with pytest.raises(MemSinksError, match=r"^[^\n]* occur once, such as ID [^\n]* they have no sinks to keep\."):
            drop_sinks(tmp_path / "in", tmp_path / "out", **settings)
    on = int(model.sinks(torch.tensor([twice])).sum())
    assert len(drop_sinks(tmp_path / "in", tmp_path / "signed", keep=str(twice)).kept.sinks) == on
    settings = {"data_path": prepared, "missing": "pass", "certificate": False}
    passed = drop_sinks(tmp_path / "in", tmp_path / "o", keep=f"{once},{twice}", **settings)
    assert passed.kept.ids == [twice % 2**31]
    assert "1 of which occur once and have no sinks" in passed.kept.rule


REFUSED = {
    "zero": (["--keep", "0"], "id is 0, but sequence IDs are in"),
    "out of range": (["--keep", "2147483648"], "id is 2147483648, but sequence IDs are in"),
    "no number": (["--keep", "5,x"], "ids has 'x', which is no sequence ID"),
    "file of junk": (["--keep", "@{junk}"], "which is no sequence ID"),
    "no file": (["--keep", "@{tmp}/none"], "cannot be read as text"),
    "two at once": (["--keep", "5", "--keep_source", "train"], "Give one of --keep and --keep_source, not 2"),
    "source without data": (["--keep_source", "train"], "--keep_source needs --data_path"),
    "no such source": (["--keep_source", "poems", "--data_path", "{data}"], "has no source 'poems' to train on"),
    "not in the data": (["--keep", "123456", "--data_path", "{data}"], "is in the training stream of"),
}


@pytest.mark.parametrize("command", ["drop_sinks", "export_hf"])
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_junk_is_refused_in_one_line_and_nothing_written(case, command, prepared, tmp_path):
    arguments, message = REFUSED[case]
    save(tmp_path / "in")
    (tmp_path / "junk").write_bytes(b"5\n\x00\x01 six\n")
    places = {"junk": tmp_path / "junk", "tmp": tmp_path, "data": prepared}
    with pytest.raises(SystemExit) as error:
        main([command, str(tmp_path / "in"), str(tmp_path / "out"), *(word.format(**places) for word in arguments)])
    assert str(error.value).startswith("Error: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "junk"]


@pytest.mark.parametrize("command", ["drop_sinks", "export_hf"])
def test_a_model_without_sinks_has_none_to_keep(command, tmp_path):
    save(tmp_path / "in", sinks=SinkArgs(1.0))
    with pytest.raises(SystemExit, match=r"shared_fraction 1\.0: it has no sinks to keep"):
        main([command, str(tmp_path / "in"), str(tmp_path / "out"), "--keep", "5"])
    main([command, str(tmp_path / "in"), str(tmp_path / "out")])  # is plain, written as such
