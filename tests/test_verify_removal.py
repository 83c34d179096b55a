"""A certificate holds, and each single thing that is changed is found: in it, in the checkpoints, in the data."""

import copy
import functools
import json
import os

import pytest
import torch
import yaml

import litgpt_memsinks.certificate.verify_removal as module
from litgpt_memsinks.__main__ import main
from litgpt_memsinks.certificate import before_after
from litgpt_memsinks.certificate.certificate import certify, write_certificate
from litgpt_memsinks.certificate.verify_removal import verify_removal
from litgpt_memsinks.digests import content_sha256, folder_sha256, tree_sha256
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.remove.remove import remove
from tests.console import memsinks
from tests.removals import copied, kept, mask_of, numbers_of, removed, state_of, trained


@pytest.fixture(scope="module")
def before(prepared, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("before") / "run/final", prepared)


@pytest.fixture(scope="module")
def after(before, prepared, tmp_path_factory):
    """Two of eight documents removed, with the certificate beside the weights; little is scored."""
    chosen = numbers_of(prepared)[:2]
    folder = removed(before, tmp_path_factory.mktemp("after") / "removed", mask_of(chosen))
    certify(before, folder, prepared, block_size=4, limit=2)
    return folder


def read(folder):
    return json.loads((folder / "certificate.json").read_text(encoding="utf-8"))


def forge(folder, content):
    """Write a certificate whose own digest is right."""
    content["content_sha256"] = content_sha256(content)
    (folder / "certificate.json").write_text(json.dumps(content), encoding="utf-8")


def refused(*arguments):
    """The one line that the command ends with, with status 1."""
    with pytest.raises(SystemExit) as stop:
        main(["verify_removal", *map(str, arguments)])
    error = str(stop.value.code)  # a text as the code: printed, and status 1
    assert error.startswith("Error: ")
    assert error.isprintable()
    return error


# ---------------------------------------------------------------------------------------------------------- what holds


def test_it_holds_with_everything_given(before, after, prepared, capsys):
    main(["verify_removal", str(after), "--before", str(before), "--data_path", str(prepared)])
    output = capsys.readouterr().out
    assert "statements of" in output
    assert "NO" not in output.replace("NOT", "")
    assert "not checked" not in output
    for statement in (
        "before, weights SHA-256",
        "after, tree SHA-256",
        "neurons, gone sinks",
        "loss after, other, own",
    ):
        assert statement in output


def test_what_is_not_given_is_said_not_to_be_checked(before, after, prepared, tmp_path, capsys):
    certificate = tmp_path / "certificate.json"
    certificate.write_bytes((after / "certificate.json").read_bytes())
    verify_removal(certificate)
    output = capsys.readouterr().out
    assert "OK: 1 statements" in output
    for reason in ("--before DIR", "--after DIR", "--data_path DIR", "needs both checkpoints"):
        assert reason in output
    verify_removal(certificate, after=after, data_path=prepared)
    output = capsys.readouterr().out
    assert "loss after, removed, own" in output
    assert "loss before, removed" not in output
    verify_removal(certificate, before, after)
    assert "coverage, others" in capsys.readouterr().out


def test_dropped_and_kept_hold(before, prepared, tmp_path, capsys):
    drop_sinks(before, tmp_path / "dropped", data_path=prepared)
    after = kept(before, tmp_path / "kept", mask_of(numbers_of(prepared)[:1]))
    write_certificate(before, after, after, "Keep one.", "keep", kept_ids=numbers_of(prepared)[:1], data_path=prepared)
    unmeasured = removed(before, tmp_path / "unmeasured", mask_of([5]))
    write_certificate(before, unmeasured, unmeasured, "Remove one.", removed_ids=[5])
    for folder in (tmp_path / "dropped", after, unmeasured):
        verify_removal(folder, before, data_path=prepared)
    assert capsys.readouterr().out.count("OK: ") == 3


@pytest.mark.parametrize("settings", [{"keep": True}, {"choice": "all"}, {"choice": "least_shared"}], ids=str)
def test_what_the_commands_wrote_holds(before, prepared, tmp_path, capsys, settings):
    ids = ",".join(map(str, numbers_of(prepared)[:2]))
    if "keep" in settings:
        drop_sinks(before, tmp_path / "out", keep=ids, data_path=prepared)
    else:
        limit = {"max_collateral": 0.2} if settings["choice"] == "least_shared" else {}
        remove(before, tmp_path / "out", prepared, ids=ids, yes=True, **settings, **limit)
    assert {"certificate.json", "certificate.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    named = read(tmp_path / "out")["documents"]["kept" if "keep" in settings else "removed"]
    assert [one["id"] for one in named] == sorted(numbers_of(prepared)[:2])
    verify_removal(tmp_path / "out", before, data_path=prepared)
    assert "OK: " in capsys.readouterr().out


def test_a_zeroed_sink_that_is_not_recorded_is_found(before, prepared, tmp_path):
    """It could be trained again: the record is what keeps it off."""
    ids = str(numbers_of(prepared)[0])
    remove(before, tmp_path / "out", prepared, ids=ids, yes=True, certificate=False)
    config = tmp_path / "out/model_config.yaml"
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"sink_removed": "", "sink_removed_documents": 0}))
    with pytest.raises(MemSinksError, match="does not record that it was removed"):
        certify(before, tmp_path / "out")


def test_a_signature_beside_it_does_not_matter(before, after, tmp_path):
    folder = copied(after, tmp_path / "after")
    (folder / "certificate.json.sig").write_text("signed")
    verify_removal(folder, before)


# ------------------------------------------------------------------------------------------------ an edited certificate


def leaves(value, path=()):
    """Paths of all values that are no containers, and of lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key], (*path, key))]
    if isinstance(value, list):
        return [path, *(leaf for index in range(len(value)) for leaf in leaves(value[index], (*path, index)))]
    return [path]


def edited(content, path):
    """The certificate with one value changed to another one of its kind."""
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    value = part[path[-1]]
    if isinstance(value, list):
        part[path[-1]] = value[:-1]
    elif isinstance(value, str):
        part[path[-1]] = {"remove": "drop", "cpu": "cuda"}.get(value, value[:-1] + ("1" if value[-1] != "1" else "0"))
    elif value is None:
        part[path[-1]] = 1 if path[-1] == "limit" else []
    else:
        part[path[-1]] = value + (1 if isinstance(value, int) else 0.01)
    return content


WORDS = {("rule",), ("date",), ("before", "folder"), ("after", "folder"), ("data", "folder"), ("content_sha256",)}
"""What cannot be computed again, and the digest, which a forger makes anew."""


def test_every_single_edit_is_found_by_the_digest(after, tmp_path):
    folder, content = copied(after, tmp_path / "after"), read(after)
    (folder / "lit_model.pth").unlink()  # nothing but the certificate is looked at
    paths = leaves(content)
    assert len(paths) > 90
    for path in paths:
        (folder / "certificate.json").write_text(json.dumps(edited(content, path)), encoding="utf-8")
        with pytest.raises(MemSinksError, match=r"the certificate's own digest|is not a (whole )?certificate"):
            verify_removal(folder / "certificate.json")


@pytest.fixture
def remembered(monkeypatch):
    """Compute each thing once: the files stay the same while the certificate changes."""
    for name in ("compare", "digests", "data_digests"):
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name)))
    known, losses = {}, module.losses

    def once(folder, groups, data_path, settings):
        key = folder, str(settings), str({name: scored.sequence_ids for name, (scored, _) in groups.items()})
        if key not in known:
            known[key] = losses(folder, groups, data_path, settings)
        return copy.deepcopy(known[key])

    monkeypatch.setattr(module, "losses", once)


def test_every_single_edit_with_a_new_digest_is_found_by_the_files(
    before, after, prepared, tmp_path, monkeypatch, remembered
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    certificate, content = tmp_path / "certificate.json", read(after)
    overlooked = set()
    for path in leaves(content):
        forge(tmp_path, edited(content, path))
        try:
            verify_removal(certificate, before, after, prepared)
        except MemSinksError:
            continue
        overlooked.add(path)
    assert overlooked == WORDS | {("versions", name) for name in content["versions"]}


def test_losses_that_are_left_out_or_made_up_are_found(before, after, prepared, tmp_path, remembered):
    content = read(after)
    del content["losses"]["after"]["removed"]["own"]
    forge(tmp_path, content)
    with pytest.raises(MemSinksError, match="loss after, removed, own: not certified"):
        verify_removal(tmp_path, before, after, prepared)
    content = read(after)
    content["losses"]["after"]["other"]["released"] = content["losses"]["after"]["other"]["own"]
    forge(tmp_path, content)
    with pytest.raises(MemSinksError, match="loss after, other, released: certified only"):
        verify_removal(tmp_path, before, after, prepared)


def test_losses_may_differ_by_the_tolerance_only(before, after, prepared, tmp_path):
    for change, holds in ((0.0009, True), (0.0011, False)):
        content = read(after)
        content["losses"]["before"]["removed"]["own"]["loss"] += change
        forge(tmp_path, content)
        if holds:
            verify_removal(tmp_path, before, after, prepared)
        else:
            with pytest.raises(MemSinksError, match="loss before, removed, own"):
                verify_removal(tmp_path, before, after, prepared)


JUNK = {
    "empty": b"",
    "no JSON": b"{]",
    "no object": b"[]",
    "no text": b"\xff\xfe{}",
    "half a character": b'{"format": 1, "kind": "\\ud800"}',
    "no number": b'{"format": NaN}',
    "too large a number": b'{"format": 1e999}',
    "a key twice": b'{"format": 1, "format": 1}',
    "nested without end": b'{"format":' + b"[" * 200_000,
    "another format": b'{"format": 2}',
    "nothing else": b'{"format": 1}',
    "escape sequences": b'{"format": 1, "\\u001b[2J": 1}',
    "a prepared folder's manifest": b'{"format_version": 2}',
}


@pytest.mark.parametrize("case", sorted(JUNK))
def test_junk_is_one_line(case, tmp_path):
    (tmp_path / "certificate.json").write_bytes(JUNK[case])
    error = refused(tmp_path)
    assert "is not a " in error
    assert len(error) < 600


def test_every_key_that_is_missing_or_of_another_kind_is_one_line(after, tmp_path, capsys):
    content = read(after)
    paths = [
        path
        for path in leaves(content)
        if not isinstance(path[-1], int) and path[0] not in ("versions", "content_sha256")
    ]
    for path in paths:
        for change in ("missing", {}, True):
            changed = copy.deepcopy(content)
            part = changed
            for key in path[:-1]:
                part = part[key]
            if change == "missing":
                del part[path[-1]]
            else:
                part[path[-1]] = change
            forge(tmp_path, changed)
            with pytest.raises(MemSinksError, match=r"is not a (whole )?certificate"):
                verify_removal(tmp_path)
    forge(tmp_path, content | {"signed_by": "somebody"})
    assert "too much" in refused(tmp_path)


def test_a_key_that_is_there_twice_is_refused(after, tmp_path):
    text = (after / "certificate.json").read_text()
    (tmp_path / "certificate.json").write_text(text.replace('"rule":', '"rule": "Drop everything.", "rule":', 1))
    assert "a key is there twice" in refused(tmp_path)


@pytest.mark.parametrize("number", [0, -1, 2**31])
def test_an_id_that_no_document_can_have_is_refused(number, after, tmp_path):
    content = read(after)
    content["documents"]["removed"][0]["id"] = number
    forge(tmp_path, content)
    assert "documents.removed is missing, of another kind or too much" in refused(tmp_path)


def test_escape_sequences_do_not_reach_the_terminal(before, after, tmp_path, capsys):
    content = read(after)
    content["before"]["weights_sha256"] = "\x1b[2J"
    forge(tmp_path, content)
    assert "before, weights SHA-256" in refused(tmp_path, "--before", before)
    assert "\x1b" not in capsys.readouterr().out


def test_no_certificate_is_one_line(tmp_path):
    assert "There is no certificate" in refused(tmp_path)
    assert "There is no certificate" in refused(tmp_path / "nothing.json")


# ------------------------------------------------------------------------------------------ other checkpoints and data


def truncate(folder):
    with open(folder / "lit_model.pth", "r+b") as file:
        file.truncate(os.path.getsize(file.name) // 2)


def flip_a_byte(folder):
    with open(folder / "lit_model.pth", "r+b") as file:
        file.seek(os.path.getsize(file.name) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def another_setting(folder):
    with open(folder / "model_config.yaml", "a") as file:
        file.write("# edited\n")


CHANGES = {
    "truncated weights": (truncate, "weights SHA-256"),
    "a flipped bit": (flip_a_byte, "weights SHA-256"),
    "another configuration": (another_setting, "config SHA-256"),
    "a file more": (lambda folder: (folder / "more.txt").write_text("x"), "tree SHA-256"),
}


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("case", sorted(CHANGES))
def test_changed_checkpoints_are_found(case, side, before, after, prepared, tmp_path):
    folders = {"before": before, "after": after}
    folders[side] = copied(folders[side], tmp_path / "changed")
    change, statement = CHANGES[case]
    change(folders[side])
    arguments = ["--before", folders["before"], "--after", folders["after"], "--data_path", prepared]
    assert f"{side}, {statement}" in refused(after / "certificate.json", *arguments)


def test_other_checkpoints_and_data_are_found(before, after, prepared, tmp_path):
    assert "before, weights SHA-256" in refused(after, "--before", after)
    other = copied(prepared, tmp_path / "data")
    path = other / "evaluation.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert "data, evaluation SHA-256" in refused(after, "--before", before, "--data_path", other)
    for option in ("--before", "--after"):
        assert "is not a LitGPT checkpoint: it has no model_config.yaml" in refused(after, option, prepared)
    assert "has no memsinks.json" in refused(after, "--data_path", before)
    assert "There is no prepared data" in refused(after, "--data_path", tmp_path / "nothing")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def vouch(folder, content, side="after"):
    """Put the digests of what is now in a folder into a certificate."""
    files = folder_sha256(folder)
    content[side] |= {
        "weights_sha256": files["lit_model.pth"],
        "weights_bytes": (folder / "lit_model.pth").stat().st_size,
        "config_sha256": files["model_config.yaml"],
        "tree_sha256": tree_sha256(files),
    }


def test_weights_of_another_training_that_a_forged_certificate_vouches_for_are_found(before, after, prepared, tmp_path):
    folder = copied(after, tmp_path / "after")
    state = state_of(folder)
    state["transformer.h.0.attn.qkv.weight"].view(torch.int32)[0, 0] ^= 1  # moves no loss
    torch.save({"model": state}, folder / "lit_model.pth")
    content = read(folder)
    vouch(folder, content)
    forge(folder, content)
    error = refused(folder, "--before", before, "--data_path", prepared)
    assert "does not hold (which sinks are gone: " in error
    assert "attn.qkv.weight differs" in error
    verify_removal(folder, data_path=prepared)  # without the checkpoint before it, nobody can tell


def test_a_forged_certificate_does_not_pass_the_wrong_map_gate(before, prepared, tmp_path, monkeypatch):
    folders = [copied(before, tmp_path / "before"), removed(before, tmp_path / "after", mask_of([5]))]
    for folder in folders:  # other masks than those of the training
        path = folder / "model_config.yaml"
        path.write_text(path.read_text().replace("sink_seed: 0", "sink_seed: 7"))
    monkeypatch.setattr(before_after, "gate_of", lambda losses: {"own": 0.0, "placebo": 1.0, "documents": 8})
    write_certificate(*folders, tmp_path, "Remove.", data_path=prepared)
    monkeypatch.undo()
    content = read(tmp_path)
    content["gate"] = before_after.gate_of(content["losses"]["before"])
    assert content["gate"]["own"] > content["gate"]["placebo"]
    forge(tmp_path, content)
    error = refused(tmp_path, "--before", folders[0], "--after", folders[1], "--data_path", prepared)
    assert "does not hold (wrong-map gate, own < placebo: " in error


@pytest.mark.parametrize("case", ["pickle", "truncated"])
def test_weights_that_a_forged_certificate_vouches_for_are_still_read_safely(case, before, after, prepared, tmp_path):
    folder = copied(after, tmp_path / "after")
    if case == "pickle":
        torch.save({"model": Malicious(tmp_path / "pwned")}, folder / "lit_model.pth")
    else:
        truncate(folder)
    content = read(folder)
    vouch(folder, content)
    forge(folder, content)
    assert "cannot be read as model weights" in refused(folder, "--before", before, "--data_path", prepared)
    assert "cannot be read as model weights" in refused(folder, "--data_path", prepared)
    with pytest.raises(SystemExit, match="cannot be read as model weights"):
        main(["certify", str(before), str(folder), "--out_dir", str(tmp_path / "out")])
    assert not (tmp_path / "pwned").exists()


def test_command_of_the_console_script(before, after, tmp_path):
    forge(tmp_path, edited(read(after), ("neurons", "gone")))
    result = memsinks("verify_removal", tmp_path, "--before", before, "--after", after, check=False)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines if " NO " in line] == [["neurons,", "gone", "NO"]]
    assert lines[-1].startswith("Error: ")
    assert "does not hold (neurons, gone: " in lines[-1]
