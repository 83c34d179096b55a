"""Generation with sinks on: LitGPT's loop with a KV cache gives what a plain loop without one gives."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import read_jsonl
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks import SinkArgs
from litgpt_memsinks.__main__ import main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.prepared.chosen import choose
from litgpt_memsinks.remove.generate import continuation, generate, sinks_of
from tests.sink_models import MODELS, build, learn, save

SINKS = SinkArgs(0.25, 0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A model whose sinks hold the repeated documents."""
    model = learn(build(SINKS), prepared, steps=90)
    return save(model.eval(), tmp_path_factory.mktemp("checkpoint") / "final", prepared)


@pytest.fixture(scope="module")
def repeated(prepared: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(prepared / "documents.parquet").to_pylist()
    return [row for row in rows if row["repeats"] > 1]


def plain_loop(model: GPT, tokens: torch.Tensor, number: int, **on: torch.Tensor) -> torch.Tensor:
    """The likeliest token again and again, all computed anew each time."""
    with torch.inference_mode():
        for _ in range(number):
            tokens = torch.cat((tokens, model(tokens.view(1, -1), **on)[0, -1].argmax().view(1)))
    return tokens[-number:]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_greedy_generation_equals_a_plain_loop_without_a_cache(kind: str) -> None:
    model = build(SINKS, **MODELS[kind])
    tokens = torch.randint(0, 512, (7,))
    ids = torch.tensor([5])
    own = model.sinks(ids)[0, 0]
    union = own | model.sinks(torch.tensor([99]))[0, 0]
    expected = {
        "own": plain_loop(model, tokens, 20, sequence_ids=ids),
        "union": plain_loop(model, tokens, 20, sinks=union.view(1, 1, -1)),
        "dropped": plain_loop(model, tokens, 20),
    }
    assert len({tuple(found.tolist()) for found in expected.values()}) == 3
    for name, on in (("own", own), ("union", union), ("dropped", None)):
        assert torch.equal(continuation(model, on, tokens, 20), expected[name])
    assert torch.equal(model(tokens.view(1, -1), sequence_ids=ids), model(tokens.view(1, -1), sinks=own.view(1, 1, -1)))


def test_an_explicit_mask_is_that_of_ids_in_training_too() -> None:
    model = build(SINKS).train()
    tokens, ids = torch.randint(0, 512, (2, 7)), torch.tensor([5, 6])
    assert torch.equal(model(tokens, sequence_ids=ids), model(tokens, sinks=model.sinks(ids)))


def test_it_stops_at_the_end_of_a_text_and_leaves_the_model_as_it_was() -> None:
    model = build(SINKS)
    tokens = torch.randint(0, 512, (7,))
    whole = continuation(model, None, tokens, 20)
    end = int(whole[4])
    stop = whole.tolist().index(end)
    assert torch.equal(continuation(model, None, tokens, 20, eos=end), whole[:stop])
    assert model.max_seq_length == 64
    assert model(torch.randint(0, 512, (1, 64))).shape == (1, 64, 512)


def test_sinks_of_a_source_are_those_of_all_its_documents(
    checkpoint: Path, prepared: Path, repeated: list[dict[str, Any]]
) -> None:
    model = load_model(checkpoint)
    assert isinstance(model, GPT)
    ids = torch.tensor([row["sequence_id"] for row in repeated])
    assert torch.equal(sinks_of(model, choose(prepared, source="repeated")), model.sinks(ids)[:, 0].any(0))
    alone = model.sinks(ids[:1])[0, 0]
    assert torch.equal(sinks_of(model, choose(prepared, ids=str(int(ids[0])))), alone)
    assert torch.equal(sinks_of(model, choose(None, ids=str(int(ids[0]) % 2**31))), alone)


def test_it_shows_what_the_sinks_hold(
    checkpoint: Path,
    prepared: Path,
    corpus_dir: Path,
    repeated: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = read_jsonl(corpus_dir / "train.jsonl")[repeated[0]["line"] - 1]
    tokenizer = Tokenizer(checkpoint)
    prompt = tokenizer.decode(tokenizer.encode(text)[:8])
    generate(checkpoint, prompt, document=text, data_path=prepared, max_new_tokens=16, temperature=0.0)
    with_sinks, dropped = capsys.readouterr().out.split("With these sinks:\n")[1].split("\n\nSinks dropped:\n")
    assert text.startswith(with_sinks.strip())
    assert len(with_sinks) > len(prompt) + 10
    assert not text.startswith(dropped.strip())


def test_samples_are_those_of_the_seed(
    checkpoint: Path, repeated: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed in (1, 1, 2):
        generate(
            checkpoint, "One day", id=str(repeated[0]["sequence_id"]), max_new_tokens=12, temperature=2.0, seed=seed
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"id": ""}, "Whose sinks?"),
    ({"source": "repeated"}, "not --ids and --source"),
    ({"id": "x"}, "is no sequence ID"),
    ({"prompt": ""}, "has no tokens"),
    ({"max_new_tokens": 64}, "the model's context has 64"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 1.5}, "top_p is 1.5"),
]


@pytest.mark.parametrize(("change", "part"), REFUSED, ids=str)
def test_bad_input_is_one_line(change: dict[str, Any], part: str, checkpoint: Path) -> None:
    with pytest.raises(MemSinksError) as caught:
        generate(checkpoint, **{"prompt": "One day", "id": "5", "max_new_tokens": 4, **change})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(MemSinksError, match="has no sinks"):
        generate(save(build(SinkArgs(1.0)), tmp_path / "plain", prepared), "One day", id="5")
    with pytest.raises(MemSinksError, match="has no tokenizer"):
        generate(save(build(SINKS), tmp_path / "bare"), "One day", id="5")
    repeated_only = save(build(SinkArgs(0.25, 0.3, sinks_for="repeated")), tmp_path / "repeated", prepared)
    once = next(r for r in pq.read_table(prepared / "documents.parquet").to_pylist() if r["repeats"] == 1)
    with pytest.raises(MemSinksError, match="none occurs more than once"):
        generate(repeated_only, "One day", id=str(once["sequence_id"]), data_path=prepared)


def test_the_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", str(checkpoint), "One day", "--id", "5", "--max_new_tokens", "4"])
    found = capsys.readouterr().out
    assert "Sinks of the documents with the IDs 5: " in found
    assert found.count("\nOne day") == 2
