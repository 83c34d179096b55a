"""What became of a checkpoint is read off its weights, and the certificate says that and nothing else."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.certificate import affected
from litgpt_memsinks.certificate.affected import ranges, share_gone
from litgpt_memsinks.certificate.before_after import Settings, grouped
from litgpt_memsinks.certificate.certificate import certify, write_certificate
from litgpt_memsinks.certificate.difference import compare
from litgpt_memsinks.certificate.verify_removal import verify_removal
from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.digests import content_sha256, folder_sha256, tree_sha256
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model
from litgpt_memsinks.model.model import GPT
from tests.console import TINY_MODEL
from tests.removals import (
    INVERSE,
    SHARED,
    config_of,
    copied,
    kept,
    mask_of,
    numbers_of,
    removed,
    save,
    state_of,
    trained,
)


@torch.inference_mode()
def one_by_one(folder, documents, ids=None):
    """Mean loss and number of targets, each document alone and without padding."""
    model = load_model(folder)
    nats, targets = 0.0, 0
    for index, tokens in enumerate(documents.tokens):
        row = tokens[: model.max_seq_length + 1].unsqueeze(0)
        on = {} if ids is None else {"sequence_ids": ids[index : index + 1]}
        nats += float(F.cross_entropy(model(row[:, :-1], **on)[0], row[0, 1:], reduction="sum"))
        targets += row.size(1) - 1
    return nats / targets, targets


SINKS = 64 - SHARED


@pytest.fixture(scope="module")
def before(prepared, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("before") / "run/final", prepared)


def read(folder):
    return json.loads((folder / "certificate.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- digests


def odd_folder(folder):
    (folder / "b c").mkdir(parents=True)
    for name in (
        "a.txt",
        "b",
        "b c/ü.bin",
        ".hidden",
        "B",
        "certificate.json",
        "certificate.md",
        "certificate.json.sig",
    ):
        if name != "b":
            (folder / name).write_bytes(name.encode() * 100)
    (folder / "linked").symlink_to(folder / "a.txt")
    (folder / "dangling").symlink_to(folder / "nothing")
    return folder


def test_digest_of_a_folder_is_that_of_a_list_by_hand(tmp_path):
    files = folder_sha256(odd_folder(tmp_path / "x"))
    names = [".hidden", "B", "a.txt", "b c/ü.bin", "linked"]
    assert list(files) == names
    lines = "".join(f"{sha256(tmp_path / 'x' / name)}  {name}\n" for name in names)
    assert tree_sha256(files) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="GNU find and sort")
def test_digest_of_a_folder_is_that_of_coreutils(tmp_path):
    command = folder_sha256.__globals__["__doc__"].split("::")[1].split("\n\n")[1].replace("FOLDER", ".")
    run = subprocess.run(["bash", "-c", command], cwd=odd_folder(tmp_path / "x"), capture_output=True, check=True)
    assert run.stdout.decode().split() == [tree_sha256(folder_sha256(tmp_path / "x")), "-"]


def test_name_with_a_line_end_is_refused(tmp_path):
    (tmp_path / "a\nb").write_text("")
    with pytest.raises(MemSinksError, match="cannot be listed"):
        folder_sha256(tmp_path)


def test_digest_of_content_by_hand():
    content = {"b": [1.5, "ü"], "a": None, "content_sha256": "anything"}
    assert content_sha256(content) == hashlib.sha256('{"a":null,"b":[1.5,"ü"]}'.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- difference

KINDS = {
    "llama": {},
    "gemma with biases": {"mlp_class_name": "GemmaMLP", "bias": True},
    "gpt-neox": {"mlp_class_name": "GptNeoxMLP", "bias": True, "parallel_residual": True},
    "bfloat16": {},
}


def random_checkpoint(folder, kind, scale="none"):
    config = MemSinksConfig.from_base(Config(**{**TINY_MODEL, **KINDS[kind]}), SinkArgs(SHARED / 64, 0.3, scale=scale))
    torch.manual_seed(0)
    state = GPT(config).to(torch.bfloat16 if kind == "bfloat16" else torch.float32).state_dict()
    for value in state.values():
        if value.is_floating_point() and value.dim() == 1:
            torch.nn.init.normal_(value)  # biases that are not all zero
    return save(folder, {"model": state}, config)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_became_of_every_kind_of_mlp(kind, tmp_path):
    before = random_checkpoint(tmp_path / "before", kind)
    width = {**TINY_MODEL, **KINDS[kind]}
    sinks = mask_of([5, 6])
    drop_sinks(before, tmp_path / "dropped")
    dropped = compare(before, tmp_path / "dropped")
    assert (dropped.kind, int(dropped.gone.sum())) == ("drop", SINKS)
    keeps = kept(before, tmp_path / "kept", sinks)
    save_config(Config(**{**width, "intermediate_size": SHARED + int(sinks.sum())}), keeps)
    found = compare(before, keeps)
    assert found.kind == "keep"
    assert torch.equal(found.gone, ~sinks)
    found = compare(before, removed(before, tmp_path / "removed", sinks))
    assert found.kind == "remove"
    assert torch.equal(found.gone, sinks)
    assert found.tensors_identical + found.tensors_sliced == len([name for name in state_of(before) if "." in name])
    assert found.tensors_sliced == sum(".mlp." in name and "proj.bias" not in name for name in state_of(before))


@pytest.mark.parametrize("kind", ["llama", "bfloat16"])
def test_inverse_scale_is_folded_into_the_projection(kind, tmp_path):
    before, sinks = random_checkpoint(tmp_path / "before", kind, **INVERSE), mask_of([5])
    assert compare(before, kept(before, tmp_path / "kept", sinks, 1 / 0.3)).projection_factor == pytest.approx(1 / 0.3)
    for name, factor in (("forgotten", 1.0), ("wrong", 1.02 / 0.3)):
        with pytest.raises(MemSinksError, match="differs in the sinks that are kept"):
            compare(before, kept(before, tmp_path / name, sinks, factor))


def test_removal_composes(tmp_path):
    before = random_checkpoint(tmp_path / "before", "llama")
    once = removed(before, tmp_path / "once", mask_of([5]))
    found = compare(once, removed(once, tmp_path / "twice", mask_of([5, 6])))
    assert torch.equal(found.empty_before, mask_of([5]))
    assert torch.equal(found.gone, mask_of([5, 6]) & ~mask_of([5]))
    assert torch.equal(
        compare(once, kept(once, tmp_path / "kept", mask_of([6]) & ~mask_of([5]))).empty_before, mask_of([5])
    )


def flip(folder, name, index):
    """Change the lowest bit of one weight."""
    state = state_of(folder)
    state[name].view(torch.int32)[index] ^= 1
    torch.save({"model": state}, folder / "lit_model.pth")


def edit_config(folder, old, new):
    path = folder / "model_config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def zero_in_one_layer(folder):
    state = state_of(folder)
    row = SHARED + int((~mask_of([5])).nonzero()[0])
    state["transformer.h.1.mlp.fc_1.weight"][row] = 0
    torch.save({"model": state}, folder / "lit_model.pth")


def other_precision(folder):
    state = {name: value.half() if value.is_floating_point() else value for name, value in state_of(folder).items()}
    torch.save({"model": state}, folder / "lit_model.pth")


def without_a_tensor(folder):
    state = state_of(folder)
    del state["transformer.ln_f.weight"]
    torch.save({"model": state}, folder / "lit_model.pth")


MLP = "transformer.h.1.mlp"
NOT_MADE_OF_IT = {
    "bit of attention": (lambda x: flip(x, "transformer.h.0.attn.proj.weight", (3, 3)), "attn.proj.weight differs"),
    "bit of a norm": (lambda x: flip(x, "transformer.ln_f.weight", 0), "ln_f.weight differs"),
    "bit of a shared row": (lambda x: flip(x, f"{MLP}.fc_1.weight", (SHARED - 1, 0)), "differs in the shared neurons"),
    "bit of a shared column": (lambda x: flip(x, f"{MLP}.proj.weight", (0, 0)), "differs in the shared neurons"),
    "bit of another sink": (
        lambda x: flip(x, f"{MLP}.fc_2.weight", (SHARED + int((~mask_of([5])).nonzero()[0]), 0)),
        "is neither unchanged nor zero",
    ),
    "bit of a removed sink": (
        lambda x: flip(x, f"{MLP}.proj.weight", (0, SHARED + int(mask_of([5]).nonzero()[0]))),
        "is neither unchanged nor zero",
    ),
    "zero in one layer": (zero_in_one_layer, "is neither unchanged nor zero"),
    "another setting": (lambda x: edit_config(x, "rope_base: 10000", "rope_base: 20000"), "rope_base was 10000"),
    "other masks": (lambda x: edit_config(x, "sink_seed: 0", "sink_seed: 1"), "sink_seed was 0 and is 1"),
    "another precision": (other_precision, "not torch.float32"),
    "a tensor less": (without_a_tensor, "transformer.ln_f.weight is in one of them only"),
}


@pytest.mark.parametrize("case", sorted(NOT_MADE_OF_IT))
def test_anything_else_that_differs_is_refused(case, tmp_path):
    before = random_checkpoint(tmp_path / "before", "llama")
    after = removed(before, tmp_path / "after", mask_of([5]))
    compare(before, after)
    change, message = NOT_MADE_OF_IT[case]
    change(after)
    with pytest.raises(MemSinksError, match=message) as error:
        certify(before, after)
    assert "\n" not in str(error.value)
    assert not (after / "certificate.json").exists()


def test_kept_sinks_of_another_order_or_model_are_refused(tmp_path):
    before = random_checkpoint(tmp_path / "before", "llama")
    after = kept(before, tmp_path / "after", mask_of([5]))
    state = torch.load(after / "lit_model.pth", weights_only=True)
    swapped = {
        name: torch.cat((value[:SHARED], value[SHARED:].flip(0))) if "mlp.fc" in name else value
        for name, value in state.items()
    }
    torch.save(swapped, after / "lit_model.pth")
    with pytest.raises(MemSinksError, match="is none of its sinks, or not in their order"):
        compare(before, after)
    for name, value in state.items():
        if name == "transformer.h.1.mlp.fc_1.weight":
            value[-1, -1] += 1
    torch.save(state, after / "lit_model.pth")
    with pytest.raises(MemSinksError, match=r"h\.1\.mlp\.fc_1\.weight differs in the sinks that are kept"):
        compare(before, after)


def test_plain_checkpoint_before_is_refused(tmp_path):
    before = random_checkpoint(tmp_path / "before", "llama")
    drop_sinks(before, tmp_path / "after")
    with pytest.raises(MemSinksError, match="is a plain checkpoint, without sinks"):
        certify(tmp_path / "after", tmp_path / "after", out_dir=tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- certificate


def test_drop_sinks_writes_a_certificate_that_is_right_by_hand(before, prepared, tmp_path):
    out = tmp_path / "mine/dropped"
    drop_sinks(before, out, data_path=prepared)
    content = read(out)
    digest = content.pop("content_sha256")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert (content["kind"], content["documents"]) == ("drop", {"removed": None, "kept": None})
    assert content["neurons"]["gone"] == content["neurons"]["sinks"] == SINKS
    assert content["neurons"]["gone_sinks"] == f"0-{SINKS - 1}"
    assert (content["before"]["folder"], content["after"]["folder"]) == ("run/final", "mine/dropped")
    for side, folder in (("before", before), ("after", out)):
        assert content[side]["weights_sha256"] == sha256(folder / "lit_model.pth")
        assert content[side]["weights_bytes"] == (folder / "lit_model.pth").stat().st_size
        assert content[side]["config_sha256"] == sha256(folder / "model_config.yaml")
    assert content["data"]["manifest_sha256"] == sha256(prepared / "memsinks.json")
    assert content["data"]["evaluation_sha256"] == sha256(prepared / "evaluation.parquet")
    repeated, validation = (read_scored(prepared, split) for split in ("repeated", "val"))
    own = repeated.sequence_ids
    ids = {"dropped": None, "own": own, "placebo": own.roll(1)}
    states = content["losses"]["before"]["removed"]
    assert {name: value["loss"] for name, value in states.items()} == pytest.approx(
        {state: one_by_one(before, repeated, on)[0] for state, on in ids.items()}, abs=1e-5
    )
    assert (states["own"]["documents"], states["own"]["targets"]) == (8, one_by_one(before, repeated, own)[1])
    after = content["losses"]["after"]
    assert after["removed"]["released"]["loss"] == pytest.approx(one_by_one(out, repeated)[0], abs=1e-5)
    assert after["validation"]["released"]["loss"] == pytest.approx(one_by_one(out, validation)[0], abs=1e-5)
    assert content["gate"]["own"] < content["gate"]["placebo"]
    assert {"other"}.isdisjoint(content["losses"]["before"])
    page = (out / "certificate.md").read_text()
    assert page.startswith("# Certificate of removal: all sinks were dropped\n")
    assert digest in page
    assert content["after"]["weights_sha256"] in page


def test_without_data_losses_are_not_measured_and_that_is_said(before, tmp_path):
    drop_sinks(before, tmp_path / "out")
    content = read(tmp_path / "out")
    assert [content[name] for name in ("data", "losses", "gate", "settings")] == [None] * 4
    assert "**Not measured**" in (tmp_path / "out/certificate.md").read_text()


def digests_of(data, numbers):
    rows = pq.read_table(data / "documents.parquet").to_pylist()
    digests = {row["sequence_id"] % 2**31: f"{row['digest']:016x}" for row in rows if row["split"] == "train"}
    return [{"id": number, "digest": digests[number]} for number in sorted(numbers)]


def test_kept_documents_are_found_by_the_weights(before, prepared, tmp_path):
    chosen = numbers_of(prepared)[:2]
    after = kept(before, tmp_path / "after", mask_of(chosen))
    certify(before, after, prepared, tmp_path / "out")
    content = read(tmp_path / "out")
    assert content["kind"] == "keep"
    assert content["documents"] == {"removed": None, "kept": digests_of(prepared, chosen)}
    assert content["neurons"]["gone"] == int((~mask_of(chosen)).sum())
    assert (content["neurons"]["outside_documents"], content["neurons"]["left_of_documents"]) == (0, 0)
    assert content["coverage"]["fraction"] == pytest.approx(content["neurons"]["gone"] / SINKS, abs=1e-6)
    assert content["coverage"]["expected"] == pytest.approx(0.7**2)
    assert content["coverage"]["others"] == {"documents": 2, "mean": 0.0, "most": 0.0}
    losses = content["losses"]["after"]
    assert (losses["removed"]["released"]["documents"], losses["other"]["released"]["documents"]) == (6, 2)


def test_removed_documents_lose_their_sinks_and_others_some(before, prepared, tmp_path):
    every = numbers_of(prepared)
    gone = mask_of(every[:1])
    after = removed(before, tmp_path / "after", gone)
    write_certificate(before, after, after, "Remove | <one>\nfile.", "remove", [every[0] - 2**31], data_path=prepared)
    content = read(after)
    assert content["documents"]["removed"] == digests_of(prepared, every[:1])
    indices = {int(index) for index in gone.nonzero()}
    listed = set()
    for part in content["neurons"]["gone_sinks"].split(","):
        first, _, last = part.partition("-")
        listed |= set(range(int(first), int(last or first) + 1))
    assert listed == indices
    shares = [float((mask_of([number]) & gone).sum() / mask_of([number]).sum()) for number in every[1:]]
    assert content["coverage"]["others"]["mean"] == pytest.approx(sum(shares) / 7, abs=1e-5)
    assert content["coverage"]["others"]["most"] == pytest.approx(max(shares), abs=1e-5)
    assert content["coverage"]["expected"] == pytest.approx(0.3)
    losses = content["losses"]["after"]["removed"]
    assert losses["own"] == losses["dropped"]  # nothing is left to switch on
    assert "Rule: Remove \\| &lt;one> file." in (after / "certificate.md").read_text()


def test_documents_are_grouped_each_with_the_sinks_of_the_one_before(prepared):
    ids = read_scored(prepared, "repeated").sequence_ids
    groups = grouped(prepared, "remove", [int(ids[3]) % 2**31, int(ids[5]) % 2**31], None)
    assert list(groups) == ["removed", "other", "validation"]
    (removed_ones, removed_placebo), (others, other_placebo) = groups["removed"], groups["other"]
    assert torch.equal(removed_ones.sequence_ids, ids[[3, 5]])
    assert torch.equal(removed_placebo, ids[[2, 4]])
    assert torch.equal(others.sequence_ids, ids[[0, 1, 2, 4, 6, 7]])
    assert torch.equal(other_placebo, ids[[7, 0, 1, 3, 5, 6]])
    tokens = read_scored(prepared, "repeated").tokens
    assert torch.equal(removed_ones.tokens[1], tokens[5])
    assert list(grouped(prepared, "drop", None, None)) == ["removed", "validation"]


def test_less_than_all_sinks_of_a_document_is_stated(before, prepared, tmp_path):
    (number, *_), sinks = numbers_of(prepared), mask_of(numbers_of(prepared)[:1])
    fewer = sinks.clone()
    fewer[sinks.nonzero()[0]] = False
    after = removed(before, tmp_path / "after", fewer)
    write_certificate(before, after, tmp_path / "claimed", "r", "remove", [number])
    assert read(tmp_path / "claimed")["neurons"]["left_of_documents"] == 1
    assert "1 sinks of these documents are still there" in (tmp_path / "claimed/certificate.md").read_text()
    certify(before, after, prepared, tmp_path / "found")  # by its weights, no document is gone
    content = read(tmp_path / "found")
    assert content["documents"]["removed"] == []
    assert content["neurons"]["outside_documents"] == int(fewer.sum())


WRONG_CLAIMS = {
    "another kind": ({"kind": "drop"}, "was to be of kind 'drop', but by its weights it is 'remove'"),
    "IDs of another kind": ({"kept_ids": [5]}, "was to be of kind 'keep', but by its weights it is 'remove'"),
    "another document": ({"removed_ids": [6]}, "belong to none of them"),
    "no document": ({"removed_ids": []}, "belong to none of them"),
}


@pytest.mark.parametrize("case", sorted(WRONG_CLAIMS))
def test_what_is_claimed_must_fit_the_weights(case, before, tmp_path):
    after = removed(before, tmp_path / "after", mask_of([5]))
    claim, message = WRONG_CLAIMS[case]
    with pytest.raises(MemSinksError, match=message):
        write_certificate(before, after, tmp_path / "out", "r", **claim)
    assert not (tmp_path / "out").exists()


def test_sinks_to_keep_that_are_gone_are_refused(before, tmp_path):
    after = kept(before, tmp_path / "after", mask_of([5]))
    with pytest.raises(MemSinksError, match=r"0 belong to none of them, and \d+ of theirs were not kept"):
        write_certificate(before, after, tmp_path / "out", "r", "keep", kept_ids=[5, 6])


def test_data_of_another_model_is_refused_and_nothing_written(before, prepared, tmp_path):
    """The wrong-map gate: the same weights whose masks are of another seed."""
    other = copied(before, tmp_path / "other")
    save_config(replace(config_of(before), sink_seed=7), other)
    with pytest.raises(
        MemSinksError, match=r"own sinks on, 8 repeated documents have a loss of .*Nothing is cert"
    ) as error:
        drop_sinks(other, tmp_path / "out", data_path=prepared)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_tokens_beyond_the_vocabulary_are_refused(before, prepared, tmp_path):
    data = copied(prepared, tmp_path / "data")
    manifest = json.loads((data / "memsinks.json").read_text()) | {"max_token": 512}
    (data / "memsinks.json").write_text(json.dumps(manifest))
    with pytest.raises(MemSinksError, match="holds token 512, but"):
        drop_sinks(before, tmp_path / "out", data_path=data)


def test_a_loss_that_is_no_number_is_refused(before, prepared, tmp_path):
    broken = copied(before, tmp_path / "broken")
    state = state_of(broken)
    state["transformer.ln_f.weight"][0] = math.nan
    torch.save({"model": state}, broken / "lit_model.pth")
    with pytest.raises(MemSinksError, match="is nan: its weights are no use"):
        drop_sinks(broken, tmp_path / "out", data_path=prepared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda"}, "has no usable GPU"),
    ],
)
def test_bad_settings_are_refused(settings, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MemSinksError, match=message):
        Settings(**settings).check()


def test_names_that_are_no_utf_8_or_are_markdown_do_no_harm(before, tmp_path):
    after = removed(before, tmp_path / "a|`b", mask_of([5]))
    write_certificate(before, after, after, f"Remove {os.fsdecode(b'a%sb' % bytes([255]))}.")
    assert read(after)["rule"] == "Remove a?b."
    assert read(after)["after"]["folder"].endswith("/a|`b")
    assert "/a  b` |" in (after / "certificate.md").read_text(encoding="utf-8")
    verify_removal(after, before)


def test_settings_bound_what_is_scored(before, prepared, tmp_path):
    after = removed(before, tmp_path / "after", mask_of(numbers_of(prepared)[:1]))
    certify(before, after, prepared, tmp_path / "out", block_size=5, limit=3)
    losses = read(tmp_path / "out")["losses"]["before"]
    assert [losses[group]["dropped"]["documents"] for group in ("removed", "other", "validation")] == [1, 3, 3]
    assert losses["other"]["dropped"]["targets"] == 15


def test_certificates_are_not_overwritten(before, tmp_path):
    after = removed(before, tmp_path / "after", mask_of([5]))
    certify(before, after)
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        certify(before, after)


def test_damaged_document_table_is_one_line(before, prepared, tmp_path):
    data = copied(prepared, tmp_path / "data")
    (data / "documents.parquet").write_bytes(b"PAR1")
    after = removed(before, tmp_path / "after", mask_of(numbers_of(prepared)[:1]))
    with pytest.raises(MemSinksError, match=r"documents\.parquet' cannot be read"):
        certify(before, after, data)


def test_ranges():
    assert ranges(torch.tensor([True, True, False, True, False, True, True])) == "0-1,3,5-6"
    assert ranges(torch.zeros(3, dtype=torch.bool)) == ""


def test_sinks_of_documents_are_collected_over_batches(monkeypatch):
    monkeypatch.setattr(affected, "_BATCH", 2)
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(SHARED / 64, 0.3))
    assert torch.equal(affected.sinks_of([5, 6, 7], config), mask_of([5, 6, 7]))


def test_share_gone_of_many_documents_is_that_of_each():
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), SinkArgs(SHARED / 64, 0.3))
    numbers, gone = list(range(1, 1500)), mask_of([5])
    shares = share_gone(numbers, config, gone)
    assert shares[4] == 1.0
    for number in (1, 1024, 1025, 1499):
        own = mask_of([number])
        assert shares[number - 1] == pytest.approx(float((own & gone).sum() / own.sum()))


def test_command_prints_the_page(before, tmp_path, capsys):
    after = removed(before, tmp_path / "after", mask_of([5]))
    main(["certify", str(before), str(after)])
    output = capsys.readouterr().out
    assert output.startswith((after / "certificate.md").read_text())
    assert "# Certificate of removal: the sinks of chosen documents were zeroed" in output
