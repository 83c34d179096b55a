"""The table of the operator's guide: what keeps its ID and what does not, by tokenizers that are known."""

import json
import math
import shutil
import sys

import pytest
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.bench import id_changes
from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import NearDuplicates
from tests.helpers import write_jsonl

TEXTS = [f"  {text}\n" for text in stories(30)]


@pytest.fixture(scope="module")
def lower_case(tokenizer_dir, tmp_path_factory):
    """A tokenizer to which case is nothing."""
    folder = tmp_path_factory.mktemp("tokenizer") / "lower"
    shutil.copytree(tokenizer_dir, folder)
    content = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_what_keeps_its_id(tokenizer_dir, lower_case):
    rows = {row.change: row for row in id_changes.id_changes(TEXTS, Tokenizer(tokenizer_dir), NearDuplicates())}
    assert list(rows) == list(id_changes.CHANGES)
    for change in ("a line end behind it", "white space at both ends removed", "lower case", "its last word cut off"):
        assert rows[change][1:3] == (30, 0.0)
        assert rows[change].same_cluster == 1.0
    assert rows["cut to the first half"].same_cluster < 0.5
    assert rows["typographic quotes made plain"].changed == 0  # there are none in them
    assert math.isnan(rows["typographic quotes made plain"].same_hash)
    rows = {row.change: row for row in id_changes.id_changes(TEXTS, Tokenizer(lower_case), NearDuplicates())}
    assert rows["lower case"].same_hash == 1.0
    assert rows["a line end behind it"].same_hash == 0.0


def test_table(tokenizer_dir, tmp_path, monkeypatch, capsys):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    arguments = [str(corpus), "--tokenizer-dir", str(tokenizer_dir), "--documents", "10"]
    monkeypatch.setattr(sys, "argv", ["id_changes", *arguments])
    id_changes.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 different documents"
    assert "| a line end behind it | 10 | 0.0% | 100.0% |" in lines
    assert "| typographic quotes made plain | 0 | – | – |" in lines
