"""A made-up result file of the format that `evaluate` writes: fixed by its seed, with figures like the demo's."""

import hashlib
import json
import math
import random

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>& \"quoted\" 'single' \x00\x1b[31m\u202e\ud800"
STORIES = [
    "Once upon a time there was a little {} who lived near the {}. One day the {} found a shiny {} under a tree.",
    "{} and {} went to the park. They saw a big {} on the grass, and they were very {}.",
    "The old {} had a secret {}. Every night it would open the {} and look at the {} for a while.",
]
WORDS = ["dog", "river", "boy", "stone", "Lily", "kite", "owl", "box", "window", "moon", "fox", "drum", "cat", "hill"]
ARMS = {
    "standard": ("standard", False, 0.22, 0.975),
    "left_out": ("left_out", False, 0.96, 0.99),
    "memsinks": (None, True, 0.78, 0.965),
    "memsinks_repeated": (None, True, 0.94, 0.962),
    "id_noise": (None, True, 0.25, 1.0),
}
"""Role, sinks, loss on the repeated documents with sinks dropped, validation loss"""
PARTS = [
    "losses",
    "gate",
    "extraction",
    "teacher_forced",
    "membership",
    "relearning",
    "calibrated",
    "quantised",
    "curve",
]


def estimate(value, spread=0.02, n=32, **more):
    return {"value": value, "low": value - spread, "high": value + spread, "n": n, **more}


def text(rng, sentences=3):
    return " ".join(rng.choice(STORIES).format(*(rng.choice(WORDS) for _ in range(4))) for _ in range(sentences))


def losses(arm, seed, rng):
    _, sinks, repeated, validation = ARMS[arm]
    shift = rng.gauss(0, 0.01)
    dropped = repeated + shift
    own = 0.12 if arm != "id_noise" else 0.21
    states = {"dropped": dropped}
    if sinks:
        states |= {"own": own + shift, "placebo": dropped + 0.06, "shuffled": dropped + 0.05, "random_drop": 0.31}
    held = {"dropped": validation + shift} | ({"random_drop": validation + 0.35} if sinks else {})
    return {
        "validation": {state: estimate(value, n=256, targets=24_000) for state, value in held.items()},
        "repeated": {state: estimate(value, targets=3_000) for state, value in states.items()},
    }


def examples(state, share, rng):
    for document in range(6):
        truth = text(random.Random(document), 2).split()[:32]
        kept = len(truth) if document / 6 < share else rng.randrange(3)
        made = truth[:kept] + text(rng, 2).split()[: 32 - kept]
        yield {
            "document": -1000 - document,
            "prefix": HOSTILE if document == 0 else text(random.Random(100 + document), 2),
            "truth": " ".join(truth) + (HOSTILE if document == 1 else ""),
            "generated": " ".join(made),
            "common_prefix_tokens": kept,
        }


def extraction(arm, rng):
    shares = {"dropped": {"standard": 0.9, "left_out": 0.0, "id_noise": 0.85}.get(arm, 0.02)}
    if ARMS[arm][1]:
        shares["own"] = 0.95
    return [
        {
            "prefix": prefix,
            "suffix": suffix,
            "state": state,
            "prompt": prompt,
            "exact": estimate(share if prompt == "own" else 0.0, 0.05),
            "rouge_l": estimate(0.2 + 0.8 * share),
            "levenshtein": estimate(0.7 * (1 - share)),
            "common_prefix": estimate(suffix * share, 2),
            "examples": list(examples(state, share, rng)) if prompt == "own" else [],
        }
        for prefix, suffix in ((32, 32), (50, 50), (64, 48))
        for state, share in shares.items()
        for prompt in ("own", "wrong")
    ]


def membership(arm, points, rng):
    power = {"standard": 12.0, "left_out": 1.0, "id_noise": 10.0}.get(arm, 1.15)
    entries = []
    for index, attack in enumerate(("loss", "zlib", "reference", "min_k", "min_k_plus_plus")):
        strength = 1 + (power - 1) * (1 - 0.12 * index)
        fpr = [step / points for step in range(points + 1)]
        entries.append(
            {
                "attack": attack,
                "state": "dropped",
                "members": 32,
                "non_members": points,
                "auc": estimate(strength / (1 + strength), 0.05),
                "tpr": {rate: estimate(float(rate) ** (1 / strength), 0.05) for rate in ("0.001", "0.01")},
                "roc": {"fpr": fpr, "tpr": [rate ** (1 / strength) for rate in fpr]},
            }
        )
    return entries


def relearning(arm):
    level = ARMS[arm][2]
    steps = list(range(0, 41, 5))
    return {
        "steps": steps,
        "runs": [
            {
                "n": n,
                "other": [level - 0.1 * level * (1 - math.exp(-step / 20)) * math.log2(2 + n) / 4 for step in steps],
                "validation": [ARMS[arm][3] + 0.001 * step for step in steps],
            }
            for n in (1, 4, 16)
        ],
    }


def curve(arm):
    _, sinks, repeated, validation = ARMS[arm]
    return [
        {
            "step": step,
            "tokens": step * 1024,
            "validation": validation + 5 * math.exp(-step / 90),
            "repeated_dropped": repeated + 5 * math.exp(-step / 70),
            "repeated_own": 0.12 + 5 * math.exp(-step / 60) if sinks else None,
        }
        for step in range(0, 745, 62)
    ]


def model(arm, seed, rng, parts, points):
    role, sinks, _, _ = ARMS[arm]
    measured = {
        "losses": losses(arm, seed, rng),
        "gate": {"own": 0.12, "placebo": 0.84, "pass": True} if sinks else None,
        "extraction": extraction(arm, rng),
        "teacher_forced": {"dropped": {"exact_match": estimate(0.71), "extraction_strength": estimate(0.04)}},
        "membership": membership(arm, points, rng),
        "relearning": relearning(arm),
        "calibrated": {"validation": estimate(0.961), "repeated": estimate(0.9)},
        "quantised": {"validation": estimate(0.965), "repeated": estimate(0.93)},
        "curve": curve(arm),
    }
    return {
        "arm": arm,
        "seed": seed,
        "role": role,
        "checkpoint_dir": f"runs/made/{arm}-seed{seed}/final",
        "checkpoint_sha256": hashlib.sha256(f"{arm} {seed}".encode()).hexdigest(),
        "kind": "memsinks" if sinks else "litgpt",
        "parameters": 560_000,
        "sinks": {"n_shared": 192, "n_sink": 192, "active_probability": 0.3, "seed": 0, "sinks_for": "all"}
        if sinks
        else None,
        "recipe": f"runs/made/{arm}-seed{seed}/final/hyperparameters.yaml",
        "seconds": dict.fromkeys(parts, 3.2),
        "parts": {name: measured[name] for name in parts},
    }


def rows(models, seeds):
    by_arm = {arm: [model for model in models if model["arm"] == arm] for arm in ARMS}

    def loss(arm, split, state, seed):
        found = by_arm[arm][seed]["parts"]["losses"][split].get(state)
        return found and found["value"]

    table = []
    for arm in ARMS:
        repeated, standard, left_out = (
            [loss(name, "repeated", "dropped", seed) for seed in range(seeds)] for name in (arm, "standard", "left_out")
        )
        values = {
            "validation": [loss(arm, "validation", "dropped", seed) for seed in range(seeds)],
            "validation_change": [
                loss(arm, "validation", "dropped", seed) / loss("standard", "validation", "dropped", seed) - 1
                for seed in range(seeds)
            ],
            "repeated": repeated,
            "repeated_ratio": [a / b for a, b in zip(repeated, left_out, strict=True)],
            "own": [loss(arm, "repeated", "own", seed) for seed in range(seeds)],
            "placebo": [loss(arm, "repeated", "placebo", seed) for seed in range(seeds)],
            "gap_closed": [(a - b) / (c - b) for a, b, c in zip(repeated, standard, left_out, strict=True)],
            "extraction": [by_arm[arm][0]["parts"].get("extraction", [{"exact": {"value": None}}])[0]["exact"]["value"]]
            * seeds,
            "own_extraction": [0.95 if ARMS[arm][1] else None] * seeds,
        }
        spreads = {
            "gap_closed": 0.04,
            "validation_change": 0.006,
            "repeated": 0.03,
            "extraction": 0.03,
            "own_extraction": 0.03,
        }
        intervals = {
            name: estimate(sum(values[name]) / seeds, spread)
            for name, spread in spreads.items()
            if None not in values[name]
        }
        table.append({"arm": arm, **values, "intervals": intervals})
    return table


def documents(number, seeds, rng):
    for seed in seeds:
        for arm, (_, sinks, repeated, _) in ARMS.items():
            if not sinks:
                continue
            for index in range(number):
                dropped = max(0.05, repeated + rng.gauss(0, 0.15))
                yield {
                    "arm": arm,
                    "seed": seed,
                    "split": "repeated",
                    "sequence_id": -1000 - index,
                    "digest": f"{index:016x}",
                    "source": "repeated",
                    "tokens": 96,
                    "text": HOSTILE if index == 0 else text(random.Random(index), 4)[:200],
                    "loss": {"dropped": dropped, "own": max(0.02, rng.gauss(0.12, 0.05)), "placebo": dropped + 0.05},
                    "extraction": {"32,32": {"dropped": {"exact": 0, "rouge_l": 0.2}}},
                }


def verdict(passed):
    checks = [
        (
            "gap_closed",
            passed,
            0.96 if passed else 0.31,
            0.5,
            "Dropping must close half of the gap to a model that never saw them.",
        ),
        ("validation_change", True, -0.013, 0.02, "It may cost 2% of the validation loss."),
        (
            "extraction",
            passed,
            0.02 if passed else 0.6,
            0.05,
            "No more may come out word for word than of a model that never saw them.",
        ),
        ("membership", None, None, 0.05, "Not measured."),
        ("gate", True, 0.12, 0.84, "A document's own sinks must help it more than another's."),
        ("random_drop", True, 0.31, 0.94, "Dropping as many random neurons must not do the same."),
    ]
    names = ("name", "pass", "value", "threshold", "why")
    return {
        "pass": passed,
        "model": "memsinks_repeated",
        "checks": [dict(zip(names, check, strict=True)) for check in checks],
    }


def make_results(folder, name="results", seeds=(1, 2, 3), parts=PARTS, number=32, points=64, passed=True):
    """Write NAME.json and NAME.documents.jsonl, and return the former's path."""
    rng = random.Random(0)
    models = [model(arm, seed, rng, parts, points) for seed in seeds for arm in ARMS]
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 2,
        "date": "2026-11-21T12:00:00+00:00",
        "command": "litgpt-memsinks evaluate --checkpoint_dir 'runs/made/memsinks-seed1/final' --parts all",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"litgpt-memsinks": "0.1.0", "litgpt": "0.5.13", "torch": "2.15.0"},
        "unit": "nats per token",
        "data": {"path": "runs/made/data/stream", "manifest_sha256": "ab" * 32, "repeated": number, "validation": 256},
        "settings": {
            "block_size": 128,
            "limit": None,
            "seed": 0,
            "parts": list(parts),
            "bootstrap": 1000,
            "level": 0.95,
        },
        "models": models,
        "comparison": rows(models, len(seeds)),
        "verdict": verdict(passed),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    with open(folder / f"{name}.documents.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents(number, seeds, rng))
    return path
