"""The certificate as a page for people: the same facts, and what they do and do not prove."""

from typing import Any

from litgpt_memsinks.digests import CERTIFICATE, CONTENT, PAGE

_TITLES = {
    "drop": "all sinks were dropped",
    "keep": "all sinks but those of chosen documents were dropped",
    "remove": "the sinks of chosen documents were zeroed",
}
_GROUPS = {"removed": "removed documents", "other": "other repeated documents", "validation": "validation"}
_STATES = {
    "own": "own sinks",
    "placebo": "another document's sinks",
    "dropped": "sinks dropped",
    "released": "as it is",
}
_NAMED = 20  # documents on the page; the JSON has all


def page(content: dict[str, Any]) -> str:
    """Markdown of a certificate.

    Args:
        content: The certificate, see `certificate.write_certificate`.
    """
    parts = [
        f"# Certificate of removal: {_TITLES[content['kind']]}\n\n{content['date']}. Rule: {_plain(content['rule'])}",
        _what(content),
        _losses(content),
        _checkpoints(content),
        _PROVES.format(certificate=CERTIFICATE, page=PAGE, digest=content[CONTENT], versions=_versions(content)),
    ]
    return "\n\n".join(parts) + "\n"


def _what(content: dict[str, Any]) -> str:
    neurons, coverage = content["neurons"], content["coverage"]
    gone = f"{neurons['gone']:,} of {neurons['sinks']:,} sinks"
    share = "" if coverage["fraction"] is None else f" ({coverage['fraction']:.1%})"
    how = "zero" if content["kind"] == "remove" else "gone"
    other = "and " if content["kind"] == "drop" else "the other sinks, and "
    lines = [
        f"- In each of {neurons['layers']} layers, {gone}{share} are {how}: the same ones in every layer.",
        f"- All {neurons['shared']:,} shared neurons of each layer, {other}all {neurons['tensors_identical']:,} "
        "tensors without neurons are bit for bit those of the checkpoint before.",
    ]
    if (factor := neurons["projection_factor"]) != 1:
        lines.append(
            f"- But outgoing weights of the sinks that were kept are multiplied by {factor:.6g}, as in training."
        )
    if neurons["empty_before"]:
        lines.append(f"- {neurons['empty_before']:,} sinks were zero before.")
    lines += _documents(content)
    if others := coverage["others"]:
        verb = "kept" if content["kind"] == "keep" else "not removed"
        lines.append(
            f"- {others['documents']:,} repeated documents that were {verb} lost {others['mean']:.1%} of their own "
            f"sinks in the mean, {others['most']:.1%} at most."
        )
    return "## What is gone\n\n" + "\n".join(lines)


def _documents(content: dict[str, Any]) -> list[str]:
    kind, neurons, expected = content["kind"], content["neurons"], content["coverage"]["expected"]
    listed = content["documents"]["kept" if kind == "keep" else "removed"]
    if kind == "drop":
        return ["- That concerns every document."]
    if listed is None:
        return ["- Which documents that concerns is not stated."]
    names = [f"{entry['id']}" + (f" ({entry['digest']})" if entry["digest"] else "") for entry in listed[:_NAMED]]
    more = f" and {len(listed) - _NAMED:,} more, see {CERTIFICATE}" if len(listed) > _NAMED else ""
    verb = "kept" if kind == "keep" else "removed"
    lines = [f"- Documents {verb}, {len(listed):,}, by ID (and digest): {', '.join(names) or 'none'}{more}."]
    if listed:
        lines.append(
            f"- With independent masks, {expected:.1%} of the sinks would be {'zero' if verb != 'kept' else 'gone'}."
        )
    if neurons["left_of_documents"]:
        lines.append(f"- **{neurons['left_of_documents']:,} sinks of these documents are still there.**")
    if neurons["outside_documents"]:
        lines.append(f"- {neurons['outside_documents']:,} sinks were {verb} that none of these documents uses.")
    return lines


def _losses(content: dict[str, Any]) -> str:
    if content["losses"] is None:
        return "## Losses\n\n**Not measured**: no data was named."
    gate, settings = content["gate"], content["settings"]
    rows = ["| documents | state | before | after | documents | tokens |", "|---|---|---:|---:|---:|---:|"]
    for group, title in _GROUPS.items():
        sides = [content["losses"][side].get(group, {}) for side in ("before", "after")]
        for state, words in _STATES.items():
            if found := [side[state] for side in sides if state in side]:
                old, new = (f"{side[state]['loss']:.4f}" if state in side else "–" for side in sides)
                counts = f"{found[0]['documents']:,} | {found[0]['targets']:,}"
                rows.append(f"| {title} | {words} | {old} | {new} | {counts} |")
    limit = "" if settings["limit"] is None else f"; at most {settings['limit']:,} documents of a group"
    return (
        "## Losses\n\nNats per token; higher is more forgotten. Each document alone, from its first token, "
        f"{settings['block_size']:,} tokens at most, {settings['dtype']} on {settings['device']}{limit}. "
        f"*Another document's sinks*: {settings['placebo']}.\n\n" + "\n".join(rows) + "\n\n"
        f"Wrong-map gate: before removal, {gate['documents']:,} repeated documents had a loss of {gate['own']:.4f} "
        f"with their own sinks on, below {gate['placebo']:.4f} with another document's. The IDs are the training's."
    )


def _checkpoints(content: dict[str, Any]) -> str:
    rows = ["| | before | after |", "|---|---|---|"]
    sides = [content[side] for side in ("before", "after")]
    for title, key in (
        ("folder", "folder"),
        ("weights, SHA-256", "weights_sha256"),
        ("weights, bytes", "weights_bytes"),
        ("configuration, SHA-256", "config_sha256"),
        ("all files, SHA-256 of their list", "tree_sha256"),
    ):
        rows.append(f"| {title} | " + " | ".join(_code(side[key]) for side in sides) + " |")
    data = content["data"]
    text = "Data: none was named."
    if data is not None:
        text = (
            f"Data {_code(data['folder'])}: manifest {_code(data['manifest_sha256'])}, scored documents "
            f"{_code(data['evaluation_sha256'])}."
        )
    return "## Which files\n\n" + "\n".join(rows) + f"\n\n{text}"


_PROVES = """## What this proves, and what not

- Everything above but the rule, the date, the versions and the names of folders can be computed again, from the two
  checkpoints and the data:
  `litgpt-memsinks verify_removal {certificate} --before BEFORE --after AFTER --data_path DATA`.
- The digest of `{certificate}`'s content is `{digest}`. It shows that the file was edited after it was written. It does
  not show who wrote it: whoever edits it can compute a new digest. Sign the file with your organisation's own key, such
  as `ssh-keygen -Y sign -f KEY -n file {certificate}` or `gpg --detach-sign {certificate}`. `{page}` is for reading;
  only `{certificate}` counts.
- It says which weights are gone and what the losses are. A higher loss is no proof that a text cannot be extracted, and
  facts that other documents also state may still be known.
- It says nothing about other copies: the checkpoint before removal still holds everything. Delete it, or guard it.

Made with {versions}."""


def _versions(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _plain(text: str) -> str:
    """One line of text that Markdown does not read as anything else."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(value: Any) -> str:
    return f"`{str(value).replace('`', ' ').replace('|', ' ')}`"
