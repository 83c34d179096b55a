"""The main job end to end: text, document IDs, stream, `litgpt pretrain` in five arms, dropped sinks, measured result.

Not a stage: it only calls the stages' commands, and the stock `litgpt` console script for the training runs.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from litgpt_memsinks.corpus.corpus_files import read_texts
from litgpt_memsinks.corpus.embedded import train_tokenizer, write_corpus
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import PARTS, Kept, Plan
from litgpt_memsinks.evaluate.bootstrap import Bootstrap
from litgpt_memsinks.evaluate.evaluate import measure_arms, print_results, results_content
from litgpt_memsinks.evaluate.results import Seed, compare, write_results
from litgpt_memsinks.evaluate.subject import Asked, Role, Subject, ask_prepared
from litgpt_memsinks.evaluate.verdict import Thresholds
from litgpt_memsinks.experiments.training_runs import MICRO_BATCH, TrainingRun, one_pass, pretrain_command, train_runs
from litgpt_memsinks.files import atomic_directory, write_json
from litgpt_memsinks.prepare.manifest import MANIFEST
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.pretrain.pretrain import NO_COMPILER, has_cpp_compiler
from litgpt_memsinks.report.report import report

ARMS = {
    "standard": "stream",
    "left_out": "left_out",
    "memsinks": "stream",
    "memsinks_repeated": "stream",
    "id_noise": "id_noise",
}
"""Recipe of each arm, and the prepared stream that it trains on."""

REPEATED_DOCUMENTS, REPEATS = 32, 96
JUDGED = "memsinks"
"""The arm that the verdict in results.json is about."""
RELEARNED, RELEARNING_STEPS, DRAWS = 4, 20, 500  # of the attacks, what fits into seconds
VOCAB_SIZE = 1024
EMBEDDED_DOCUMENTS, OWN_DOCUMENTS = 4500, 3000  # documents that occur once: what trains in minutes
EMBEDDED_BLOCK, OWN_BLOCK = 128, 256  # tokens in a training row
OWN_CHARACTERS = 1500  # longer texts are cut: a block holds about 1,000 characters, and the demo has minutes
VALIDATION_FRACTION = 0.08


@dataclass
class Settings:
    """What decides a run besides its seed; kept in the output folder, so that a later call continues it or refuses."""

    corpus: str | None
    corpus_sha256: str | None
    recipes_sha256: str
    package: str


def demo(
    corpus: Path | None = None,
    seeds: int = 1,
    out_dir: Path = Path("runs/demo"),
    recipes: Path = Path("recipes/demo"),
    jobs: int | None = None,
) -> None:
    """Train five arms with the stock `litgpt pretrain` and show what dropping the sinks removes.

    A demo that was interrupted goes on where it was: finished streams and runs are not redone.

    Args:
        corpus: JSON lines with a text each, to use instead of the embedded stories. At least 600 documents.
        seeds: Number of training seeds.
        out_dir: Folder for data, runs, results.json, report.html and report.png.
        recipes: Folder of the arms' recipes.
        jobs: Training runs at the same time; one per core by default.

    Raises:
        MemSinksError: For bad input, or if a training run fails.
    """
    started = time.monotonic()
    _check(corpus, seeds, jobs, recipes)
    _remember(out_dir, _settings(corpus, recipes))
    if not has_cpp_compiler():
        print(NO_COMPILER)
    block_size = EMBEDDED_BLOCK if corpus is None else OWN_BLOCK
    print("1/4 Text, document IDs and streams")
    streams = prepare_streams(corpus, out_dir)
    print(f"2/4 Training: {len(ARMS)} arms x {seeds} seed(s) with `litgpt pretrain --config {recipes}/ARM.yaml`")
    train_arms(streams, out_dir, recipes, seeds, block_size, jobs or os.cpu_count() or 1)
    print("3/4 Dropping the sinks")
    drop_all(out_dir, seeds, streams["stream"])
    print("4/4 Measuring")
    asked = ask_prepared(streams["stream"], None)
    plan = Plan(PARTS, block_size, relearn_documents=(RELEARNED,), relearn_steps=RELEARNING_STEPS)
    boot = Bootstrap(DRAWS)
    results = [evaluate_arms(out_dir, seed, asked, plan) for seed in range(1, seeds + 1)]
    results_file = out_dir / "results.json"
    content = results_content(results, asked, plan, None, boot, Thresholds(), JUDGED)
    write_results(results_file, content, results, asked)
    picture = out_dir / "report.png"
    picture.unlink(missing_ok=True)
    page = picture.with_suffix(".html")
    page.unlink(missing_ok=True)
    report(results_file, page)
    report(results_file, picture)
    print_results(compare(results))
    print(
        f"Numbers: {results_file}   Report: {page}   Time: {(time.monotonic() - started) / 60:.1f} min\n"
        f"Try the released model: litgpt generate {run_dir(out_dir, 'memsinks', 1) / 'dropped'} --prompt 'One day'"
    )


def _settings(corpus: Path | None, recipes: Path) -> Settings:
    return Settings(
        corpus=None if corpus is None else str(corpus.resolve()),
        corpus_sha256=None if corpus is None else _sha256([corpus]),
        recipes_sha256=_sha256([recipes / f"{arm}.yaml" for arm in ARMS]),
        package=version("litgpt-memsinks"),
    )


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check(corpus: Path | None, seeds: int, jobs: int | None, recipes: Path) -> None:
    if corpus is not None and not corpus.is_file():
        raise MemSinksError(f"There is no file {str(corpus)!r}. Give a corpus of JSON lines, one object per document.")
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise MemSinksError(f"{name} is {value}, but it must be at least 1.")
    if missing := [arm for arm in ARMS if not (recipes / f"{arm}.yaml").is_file()]:
        raise MemSinksError(
            f"{str(recipes)!r} lacks {missing[0]}.yaml. Run the demo in the repository, or give --recipes DIR."
        )


def _remember(out_dir: Path, settings: Settings) -> None:
    """Store the settings in a new folder, or refuse a folder of another demo."""
    path = out_dir / "demo.json"
    if path.is_file():
        if (found := json.loads(path.read_text(encoding="utf-8"))) != asdict(settings):
            different = ", ".join(name for name in asdict(settings) if found.get(name) != asdict(settings)[name])
            raise MemSinksError(
                f"{str(out_dir)!r} holds another demo: its {different} differ. Remove it, or set --out_dir (OUT=)."
            )
        print(f"{str(out_dir)!r} exists: what is finished there is not redone.")
    else:
        write_json(path, asdict(settings))


def run_dir(out_dir: Path, arm: str, seed: int) -> Path:
    """Folder of one training run."""
    return out_dir / f"{arm}-seed{seed}"


# ----------------------------------------------------------------------------------------------------------------- data


def prepare_streams(corpus: Path | None, out_dir: Path) -> dict[str, Path]:
    """Make the tokenizer and the three streams of the arms; finished ones are kept.

    Returns:
        Name of each stream to its prepared folder.
    """
    texts, data = out_dir / "corpus", out_dir / "data"
    if not texts.is_dir():
        write_corpus(texts, EMBEDDED_DOCUMENTS + REPEATED_DOCUMENTS, 256) if corpus is None else sample(corpus, texts)
    tokenizer_dir = own_tokenizer(texts / "train.jsonl", out_dir)
    variants = {"stream": {}, "left_out": {"leave_out_repeated": True}, "id_noise": {"id_noise": 1.0}}
    for name, changes in variants.items():
        if not (data / name / MANIFEST).is_file():
            prepare(
                train=texts / "train.jsonl",
                validation=texts / "validation.jsonl",
                out_dir=data / name,
                tokenizer_dir=tokenizer_dir,
                repeated_documents=REPEATED_DOCUMENTS,
                repeats=REPEATS,
                **changes,  # type: ignore[arg-type]
            )
    return {name: data / name for name in variants}


def own_tokenizer(texts: Path, out_dir: Path) -> Path:
    """The folder of a small tokenizer of a corpus; a finished one is kept."""
    tokenizer_dir = out_dir / "tokenizer"
    if not tokenizer_dir.is_dir():
        train_tokenizer(read_texts(texts), tokenizer_dir, VOCAB_SIZE)
    return tokenizer_dir


def sample(corpus: Path, out_dir: Path, seed: int = 0, documents: int = OWN_DOCUMENTS + REPEATED_DOCUMENTS) -> None:
    """Take a seeded sample of a user's corpus that trains in minutes, and write it as train and validation JSON lines.

    Texts are cut to ``OWN_CHARACTERS`` characters. Exact copies are dropped, so that only the demo's repeats repeat.

    Raises:
        MemSinksError: If the corpus is too small.
    """
    rng = random.Random(seed)
    wanted = documents + round(documents * VALIDATION_FRACTION)
    texts = _reservoir(_cut(corpus), wanted, rng)
    if len(texts) < 600:
        raise MemSinksError(f"{str(corpus)!r} has {len(texts)} distinct documents, but the demo needs 600 or more.")
    rng.shuffle(texts)
    n_validation = round(len(texts) * VALIDATION_FRACTION)
    with atomic_directory(out_dir) as scratch:
        for name, part in (("validation", texts[:n_validation]), ("train", texts[n_validation:])):
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in part)
            (scratch / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Took {len(texts):,} documents of {str(corpus)!r}, each cut to its first {OWN_CHARACTERS:,} characters.")


def _cut(corpus: Path) -> Iterator[str]:
    """Distinct texts, cut at the end of a word."""
    seen: set[int] = set()
    for whole in read_texts(corpus):
        text = whole[:OWN_CHARACTERS]
        if len(whole) > OWN_CHARACTERS:
            text = (text.rsplit(maxsplit=1) or [""])[0]
        if text and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def _reservoir(texts: Iterator[str], number: int, rng: random.Random) -> list[str]:
    """A uniform sample of a stream without holding it (Vitter's algorithm R)."""
    kept: list[str] = []
    for index, text in enumerate(texts):
        if index < number:
            kept.append(text)
        elif (place := rng.randrange(index + 1)) < number:
            kept[place] = text
    return kept


# ------------------------------------------------------------------------------------------------------------- training


def train_arms(streams: dict[str, Path], out_dir: Path, recipes: Path, seeds: int, block_size: int, jobs: int) -> None:
    """Run `litgpt pretrain` for each arm and seed in subprocesses, some at a time, with one progress bar each.

    Raises:
        MemSinksError: If a run fails; the message has the end of its log.
    """
    runs = []
    for arm, seed in [(arm, seed) for seed in range(1, seeds + 1) for arm in ARMS]:
        stream, folder = streams[ARMS[arm]], run_dir(out_dir, arm, seed)
        iterations = one_pass(stream, block_size)
        tokens = iterations * MICRO_BATCH * block_size
        command = pretrain_command(recipes / f"{arm}.yaml", stream, folder, seed, block_size, tokens)
        runs.append(TrainingRun(f"{arm} seed {seed}", tuple(command), folder, iterations))
    jobs = min(jobs, len(runs))
    train_runs(runs, jobs, max(1, (os.cpu_count() or 1) // jobs))


# ------------------------------------------------------------------------------------------------------------ measuring


def drop_all(out_dir: Path, seeds: int, data_path: Path) -> None:
    """Write the released model of each arm with sinks, with its certificate and the losses before and after."""
    for seed in range(1, seeds + 1):
        for arm in ("memsinks", "memsinks_repeated"):
            target = run_dir(out_dir, arm, seed) / "dropped"
            if not target.is_dir():
                _drop(run_dir(out_dir, arm, seed) / "final", target, data_path)


def _drop(checkpoint_dir: Path, target: Path, data_path: Path) -> None:
    """Drop the sinks. A model that has memorised nothing, of a corpus that teaches little, gets no losses certified."""
    try:
        drop_sinks(checkpoint_dir, target, data_path=data_path)
    except MemSinksError as error:
        print(f"The certificate of {target} has no losses. {error}")
        drop_sinks(checkpoint_dir, target)


def evaluate_arms(out_dir: Path, seed: int, asked: Asked, plan: Plan) -> Seed:
    """Measure every arm of one seed on the same documents. What is finished is kept in the output folder."""
    roles: dict[str, Role] = {"standard": "standard", "left_out": "left_out"}
    subjects = [Subject.at(arm, run_dir(out_dir, arm, seed) / "final", roles.get(arm)) for arm in ARMS]
    # the arm with 100% ID noise has no IDs that could fit it: that is what it is for
    return measure_arms(subjects, asked, plan, "cpu", Kept(out_dir / "measured"), allow_wrong_map=True)
