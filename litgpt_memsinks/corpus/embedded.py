"""The corpus of the demo: short made-up stories from a seeded grammar, and a small tokenizer trained on them.

A story follows one of several plots. A plot is a list of beats, a beat is a sentence or two in one of several wordings,
and all beats share the story's own characters, objects and places. So the stories have a common language to learn, and
each has details of its own to memorise.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litgpt_memsinks.corpus.corpus_files import read_texts
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, write_json, write_text

END_OF_TEXT = "<|endoftext|>"
MIN_WORDS, MAX_WORDS = 55, 82
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end of text

Split = Literal["train", "validation"]

_FIRST_TRAIN_BYTE = 64  # texts whose digest starts with a byte below this can only be validation stories, others train


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


# No name ends in s, so that adding 's is always right.
GIRLS = _list(
    "Ada, Amy, Anna, Bella, Clara, Daisy, Ella, Emma, Greta, Hazel, Ida, Ivy, Jane, June, Kate, Kira, Lena, Lily, "
    "Lola, Lucy, Maya, Mia, Molly, Nina, Nora, Olive, Rosa, Ruby, Sara, Tilly, Willa, Zoe"
)
BOYS = _list(
    "Adam, Arlo, Ben, Bruno, Carl, Dan, David, Eli, Emil, Felix, Finn, Fred, Hugo, Ivan, Jack, Leo, Liam, Luca, Mark, "
    "Max, Milo, Ned, Noah, Oscar, Otto, Paul, Peter, Sam, Theo, Tim, Tom, Will"
)
PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "him", "his")}
ANIMALS = _list(
    "badger, bear, beaver, cat, dog, fox, kitten, mole, monkey, mouse, otter, panda, puppy, rabbit, tiger, wolf"
)
ADJECTIVES = _list(
    "brave, busy, calm, careful, cheerful, clever, curious, eager, friendly, funny, gentle, kind, lonely, merry, "
    "noisy, patient, polite, proud, quick, quiet, shy, silly, sleepy, strong"
)
HELPERS = _list(  # and whether female or male
    "Grandma/f, Grandpa/m, Mum/f, Dad/m, Aunt Nell/f, Uncle Bob/m, the baker/f, the baker/m, the teacher/f, "
    "the teacher/m, the farmer/f, the farmer/m, the old sailor/m, the doctor/f"
)
# What a story draws for itself. {key}, {key2}, {key3} and {key4} are different items of the list.
SLOTS: dict[str, tuple[str, ...]] = {
    "thing": _list(
        "ball, basket, bell, blanket, book, boot, box, button, coat, cup, doll, drum, flag, flute, hat, horn, jar, "
        "kite, lamp, map, mirror, pillow, ring, rope, scarf, shell, spoon, stone, toy boat, toy train, umbrella, "
        "whistle"
    ),
    "machine": _list(
        "bench, bike, boat, cart, chair, clock, door, gate, kettle, ladder, pump, sled, swing, table, wagon, wheel"
    ),
    "colour": _list("black, blue, brown, green, grey, orange, pink, purple, red, silver, white, yellow"),
    "place": _list(
        "barn, beach, bridge, castle, church, fair, farm, garden, lake, library, market, meadow, mill, park, pond, "
        "river, school, shop, station, theatre, tower, well, zoo, harbour"
    ),
    "home": _list(
        "by the sea, in a tall tower, near the woods, in a yellow house, on a hill, on a boat, at the end of a lane, "
        "in a busy town, on an island, under an old tree, in a green valley, across the river"
    ),
    "spot": _list(
        "under a bench, behind the gate, in the tall grass, in an old boot, under the stairs, between two rocks, on "
        "the wall, in a nest, behind a tree, in the mud, among the roses, on the roof, in the hay, under a box, at "
        "the bottom of a sack, near the fire, behind a curtain, under a bridge, inside a barrel, in the snow, beside "
        "the path, on top of a hill"
    ),
    "food": _list(
        "apple pie, jam, bread, honey cake, soup, cheese, pancakes, nuts, lemon cake, milk, pears, rice, cherries, "
        "corn, toast, plums, biscuits, pudding"
    ),
    "skill": _list(
        "swim, skate, dive, whistle, row a boat, ride a bike, climb a rope, play the horn, ski, fly a kite, sing, "
        "dance, read, bake, catch a ball, stand on one leg, paint, beat the drum"
    ),
    "contest": _list(
        "boat race, snail race, kite race, sled race, bike race, cake contest, book contest, dancing contest"
    ),
    "pet": _list("bat, bird, crab, duck, frog, goat, goose, hen, lamb, moth, owl, pony, snail, toad"),
    "fix": _list("glue, string, a nail, wire, tape, a drop of oil, wax, a piece of cloth, a ribbon, a stick"),
    "number": _list("two, three, four, five, six, seven, eight, nine, ten, twelve"),
    "weather": _list("bright, cold, dark, hot, rainy, snowy, sunny, warm, windy"),
    "day": _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
}

# Wordings that many plots share, for <key>. Like the beats below, they choose between the parts of [one|another].
SHARED: dict[str, str] = {
    "open": "[Once there was <who> named {A} who <trait>.|{A} was <who> who <trait>.|{A}, <who>, <trait>.|"
    "{home} lived <who> named {A}.|There was once <who> named {A}, and {A.he} <trait>.]",
    "who": "a [|very |{A.adj2} and ]{A.adj} [|little |young ]{A.kind}",
    "trait": "[lived {home}|lived {home}|loved {food4}|could {skill4}|had {number4} brothers|"
    "always wore a {colour4} hat]",
    "b": "{B}, a {B.adj} {B.kind}",
    "when": "[one {weather} [morning|day|evening]|on {day}|on a {weather} {day}|early on {day}]",
    "glad": "[happy|glad|proud|so happy|very proud|not sad any more]",
    "sad": "[sad|very sad|worried|upset]",
    "asks": "[asked {A}|{A} asked]",
    "says_a": "[said {A}|{A} said|cried {A}]",
    "says_b": "[said {B}|{B} said|cried {B}]",
    "says_g": "[said {G}|{G} said|called {G}]",
    "goes": "[went|ran|walked|hurried]",
    "big": "[|little |new |big ]",
    "the": "the [|old |little |new |big ]",
    "eat": "They [shared|ate] some {food}[| by the fire| under a tree| and told jokes]",
    "home": "[{A} [walked|ran|danced|skipped] home with [some {food3}|a {colour3} {pet3}]|That night {A} dreamed of "
    "[{food3}|a {colour3} {pet3}]|{A} sang all the way home|{A} was <glad> [all day|for {number4} days]|<eat>]",
    "friends": "[From then on|From that day], {A} and {B} [were good friends|met every {day}|always helped each other|"
    "played at the {place3}]",
}

# Marks: "-" a beat, "?" a beat that is left out more often than not, "*" a beat that may be left out or change places
# with the "*" next to it, "|" another wording of the beat above it.
PLOTS: dict[str, str] = {
    "lost and found": """
        - <open>
        - {G} had given {A.him} a <big>{colour} {thing}. But <when>, it was gone.
        | <when>, {A} lost {A.his} {colour} {thing} near the {place}.
        * {A.he} looked {spot} and {spot2}, but [it was not there|saw only a {pet}].
        * "Where can it be?" <asks>, and {A.he} felt <sad>.
        - "I will help you look," said <b>. [After {number} minutes|At last], {B.he} found it {spot3}.
        | Then <b>, came to help. [They looked and looked|At last] until {B} saw something {colour} {spot3}!
        - <friends>.
        | <home>.
        | "Thank you!" <says_a>, and gave {B.him} some {food}.
        | Now {A} keeps the {thing} {spot4}, where nobody can lose it.
        """,
    "a quarrel": """
        - <open>
        - <when>, {A.he} and {A.his} friend {B} found a <big>{colour} {thing}, and both of them wanted it.
        | <when>, <b>, [broke|lost] the {colour} {thing} that {A} loved.
        - "[Give it to me|That is not fair]!" cried {A}, and {B} ran off to <the>{place}.
        | {A} cried until {A.his} face was red, and {B} ran to hide {spot}.
        * {A} sat {spot2} and felt <sad>.
        * {G} said, "A {thing} is only a thing. A friend is not."
        - After {number} [hours|days], {A} came with some {food}. "I am sorry," {A.he} said.
        | Then {B} came back [in the rain|with some {food}]. "I was wrong," <says_b>.
        - They [hugged|laughed] and never fought about it again.
        | <eat>, and the {thing} lay {spot3}.
        """,
    "helping a stranger": """
        - <open>
        - <when>, {A.he} <goes> to <the>{place} to buy some {food}, and there sat <b>, who had lost the way.
        | <when>, a stranger with a <big>{colour} {thing} stood {spot}. It was <b>, and {B.he} was lost.
        * "[Can I help you|What is wrong]?" <asks>.
        * {A} was [late|a little afraid], but {A.he} stopped.
        - {A.he} took a heavy {machine} and walked with {B} all the way to the {place2}.
        | {A} gave {B.him} some {food2} and told {B.him} the way to the {place2}.
        ? "Nobody else stopped," <says_b>.
        - {number} days later, there was a gift at the door. It was a <big>{colour2} {thing2} from {B}!
        | Later, when {A} was lost [{spot2}|in the rain], it was {B} who came to help.
        - <home>.
        | <friends>.
        """,
    "a broken thing mended": """
        - <open>
        - <when>, the {colour} {machine} at <the>{place} [broke|fell apart] with a loud bang.
        | <when>, {A} [fell over|sat on] the {colour} {machine} of {G}, and it broke.
        - "Nobody can mend that," <says_g>, and {G.he} felt <sad>.
        | {G} was <sad>, for it was {number} years old.
        * But {A} [had an idea|did not give up].
        * {A} asked <b>, who knew old things well.
        - All they had was {fix} and a {thing}, and they worked for {number2} hours.
        | {A.he} tried {fix}, but it did not hold. Then {A.he} tried {fix2}, and it held.
        - At last the {machine} worked again, and {A} was <glad>.
        | {G} laughed and gave {A.him} some {food}.
        ? Now {A} can mend it all, even a {thing2} or a {thing3}.
        """,
    "a brave first try": """
        - <open>
        - All {A.his} friends could {skill}, but {A} was afraid to try.
        | {A} wanted to learn to {skill}, but {A.he} was [shy|afraid].
        * "What if [I fail|they all laugh]?" <asks>.
        * {A.he} sat {spot} and thought about it for {number3} days.
        - "I was afraid when I learned to {skill2}," said <b>. "Count to {number}."
        | {G} said, "Try it once. If it goes wrong, we will have some {food}."
        - So <when>, {A} <goes> to <the>{place}. {A.he} tried again and again, and at last {A.he} could do it!
        | <when>, {A} took a <big>{colour} {thing} along and counted to {number2}, and it worked!
        - <home>.
        | Now {A} can {skill} very well, and {A.he} wants to learn to {skill3}.
        """,
    "a secret": """
        - <open>
        - {A} had a secret. Every {day}, {A.he} <goes> to <the>{place} with [some {food}|a <big>{colour} {thing}].
        | <when>, {A} found a <big>{colour} {thing} {spot}, and behind it sat a little {pet}.
        * It was hard to say nothing for {number} days.
        * {A.he} only told <b>.
        - "Where do you go?" asked {G}. {A} [only laughed|said nothing].
        | One day {G} wanted to see it too.
        - At last {A} went with {G.him} to see a {pet2} with {number2} little ones {spot2}.
        | Then it came out: {A} had made a {machine} from {fix} and {fix2}.
        - "[I will not tell|You can trust me]," <says_g>, and it was true.
        | {G} laughed and gave {A.him} some {food2}.
        """,
    "a storm": """
        - <open>
        - On {day}, the sky was black, and the rain fell on the {place}.
        | <when>, a great storm came over the {place} and broke the {machine}.
        - {A} had only a <big>{colour} {thing} to keep {A.him} warm.
        | {A} ran to hide {spot} and counted to {number}.
        * "[Help|Look here]!" cried <b>, who sat {spot2}.
        * A little {pet} sat {spot3}, and {A} took it along.
        - {A} ran until {A.he} came to the house of {G}, who had some {food} for everyone.
        | {G} found {A.him} with a lamp. "Were you afraid?" {G.he} asked. "[A little|Very]," <says_a>.
        - <home>.
        | On {day}, the sun was out, and everyone helped to mend the {machine}.
        """,
    "a gift": """
        - <open>
        - {A} wanted to give {G} the best gift, but {A.he} had only {number} coins.
        | {A} wanted to give <b>, the best gift of all.
        - {A.he} saw a <big>{colour} {thing} at <the>{place}, but it cost {number2} coins more.
        | {A.he} thought of a <big>{colour} {thing}, but somebody had just lost it {spot}.
        * So {A} worked for {number3} days at the {place2}.
        * "A gift does not have to be [big|new]," said a voice {spot3}.
        - Then {A.he} made a {thing2} from {fix} and {fix2}, and it was {colour2}.
        | In the end {A.he} made some {food} and hid it {spot2} with a {colour2} {thing3}.
        - "You made this for me? It is the best gift I ever had!" {A} was <glad>.
        | There was a long hug, and {A} was <glad>.
        """,
    "a contest": """
        - <open>
        - <when>, there was a {contest} at <the>{place}, and {A} wanted to win the {colour} {thing}.
        | Every year there was a {contest} at <the>{place}, and everyone wanted to win some {food}.
        * <b>, had won it {number} times. "You will never win," {B.he} said.
        * {number2} others came too, even a {pet2} with a {colour2} hat.
        - {A} worked hard with {G} for {number3} days.
        | {G} gave {A.him} {fix} and a {thing2} to help {A.him}.
        - Then {A.he} saw a {pet} that was lost {spot}, and {A.he} stopped to help it.
        | At last {A} was first, but then a {pet} fell {spot}, and {A.he} stopped to help it.
        - So somebody else won, but {A} was <glad>.
        | "Winning is fun," <says_a>, "but I like [a friend|{food2}] better."
        | <home>.
        """,
    "a promise kept": """
        - <open>
        - "Look after my {pet} until {day}," <says_g>, and {A} said yes.
        | {A} had told {G} to come to <the>{place} with a <big>{colour} {thing} on {day}.
        - But there was a {contest} at the {place2}, and {A} wanted to go.
        | But it was a {weather} day, and <b>, wanted to {skill} with {A.him}.
        * "[Nobody will know|Let it wait]," said a little voice.
        * {A} sat {spot} and thought about it for {number} minutes.
        - "I gave my word," <says_a>, and {A.he} <goes> to keep it.
        | Then {A.he} thought of {G}, and {A.he} <goes> to keep {A.his} word.
        - "Now I know that I can trust you," <says_g>, and gave {A.him} a <big>{colour2} {thing2}.
        | <home>.
        """,
    "the truth": """
        - <open>
        - <when>, {A.he} fell over the {colour} {machine} of {G}, and it broke.
        | {G} had a <big>{colour} {thing}. <when>, {A} took it to <the>{place}, and it broke.
        - {A.he} hid it {spot} and <goes> to the {place2}.
        | "Nobody saw me," thought {A}, and {A.he} hid it {spot}.
        * All day {A} was <sad> and could not eat {A.his} {food}.
        * {G} thought that <b>, had done it.
        - {number} times {A} went to tell {G}, and {number} times {A.he} ran off. Then {A.he} said, "I am sorry."
        | After {number} days, {A} said, "It was me. I am [so|very] sorry."
        - "I broke one too, once," <says_g>, and they worked at it with {fix}.
        | {G} said, "It was brave to tell me." {A} was <glad>.
        """,
    "a noise at night": """
        - <open>
        - One {weather} night, {A} heard a [loud|strange] noise. Something fell {spot}.
        | One night, {A} heard a loud noise {spot}.
        - "A [storm|bear]!" cried {A}, and {A.he} hid {spot3}.
        | {A.he} took a <big>{colour} {thing} and called <b>.
        * {number} times it came, and then it stopped.
        * "I am not afraid," <says_b>, but it was not true.
        - In the end it was only a {pet} with {number2} little ones that wanted some {food}.
        | And who was there? It was {G} in a {colour2} [coat|hat|scarf], looking for some {food}!
        - "Next time," <says_a>, "I will look first and be afraid later."
        | <home>.
        | They all laughed until it was {day}.
        """,
}


@dataclass(frozen=True)
class Character:
    """Somebody in a story: the name, what it stands for, and the pronouns."""

    name: str
    kind: str
    adj: str
    adj2: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:  # for the {A} of the wordings
        return self.name


def stories(number: int, seed: int = 0, split: Split = "train") -> Iterator[str]:
    """Yield ``number`` distinct stories of 55 to 82 words.

    Story i depends on ``seed``, ``split`` and i only, and is in neither split a second time.

    Args:
        number: How many stories.
        seed: Another seed gives other stories (a few might be the same by chance).
        split: The two splits of a seed share no story.

    Raises:
        MemSinksError: If ``number`` is below 1 or ``split`` is unknown.
    """
    if number < 1:
        raise MemSinksError(f"The number of stories is {number}, but must be at least 1. Ask for 1 or more.")
    if split not in get_args(Split):
        raise MemSinksError(f"The split is {split!r}, but must be 'train' or 'validation'. Name one of these.")
    return _distinct_stories(number, seed, split)


def _distinct_stories(number: int, seed: int, split: Split) -> Iterator[str]:
    seen: set[bytes] = set()
    for index in range(number):
        rng = Random(f"{seed}-{split}-{index}")
        while True:
            text = _story(rng)
            digest = hashlib.sha256(text.encode()).digest()
            # The text itself says to which split it can belong, so the splits cannot meet.
            if (digest[0] >= _FIRST_TRAIN_BYTE) != (split == "train") or digest in seen:
                continue
            if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
                break
        seen.add(digest)
        yield text


def write_corpus(out_dir: Path, documents: int = 2112, validation_documents: int = 256, seed: int = 0) -> None:
    """Write ``train.jsonl`` and ``validation.jsonl``, one ``{"text": ...}`` per line, to the new folder ``out_dir``.

    Args:
        out_dir: The folder, which appears whole or not at all.
        documents: Number of training stories.
        validation_documents: Number of validation stories, none of which is a training story.
        seed: Of the generator, see :func:`stories`.

    Raises:
        MemSinksError: If ``out_dir`` already holds something or a number is below 1.
    """
    splits: tuple[tuple[Split, int], ...] = (("train", documents), ("validation", validation_documents))
    with atomic_directory(out_dir) as scratch:
        for split, number in splits:
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in stories(number, seed, split)]
            write_text(scratch / f"{split}.jsonl", "".join(lines))


def train_tokenizer(texts: Iterable[str], out_dir: Path, vocab_size: int = 1024) -> None:
    """Train a byte-level BPE on ``texts`` and write it to the new folder ``out_dir``.

    ``litgpt.Tokenizer`` and ``AutoTokenizer`` of transformers load the folder. Token 0 is ``<|endoftext|>``, the end of
    a text and the (not automatic) beginning of one. Any text can be encoded, for all bytes are in the vocabulary.

    Args:
        texts: What to train on; read once.
        out_dir: The folder, which appears whole or not at all.
        vocab_size: Number of tokens at most (few texts give fewer), with the 256 bytes and ``<|endoftext|>``.

    Raises:
        MemSinksError: If ``vocab_size`` is below 257, all texts are empty, or ``out_dir`` already holds something.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise MemSinksError(
            f"The vocabulary size is {vocab_size}, but must be at least {MIN_VOCAB_SIZE}. Ask for more."
        )
    texts = [text for text in texts if text]
    if not texts:
        raise MemSinksError("There are 0 texts to train a tokenizer on, but at least 1 is needed. Name some documents.")
    with atomic_directory(out_dir) as scratch:
        _byte_level_bpe(texts, vocab_size).save(str(scratch / "tokenizer.json"))
        write_json(scratch / "tokenizer_config.json", _tokenizer_config())


def train_tokenizer_on(corpus: Path, out_dir: Path, vocab_size: int = 1024, text_field: str = "text") -> None:
    """Train a small tokenizer on a corpus, as a folder that LitGPT and transformers load.

    Args:
        corpus: JSON lines, a JSON array, parquet or plain text; or a folder of them.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        vocab_size: Number of tokens at most.
        text_field: Field of the text; dots lead into nested objects.

    Raises:
        MemSinksError: As ``read_texts`` and ``train_tokenizer``.
    """
    train_tokenizer(read_texts(corpus, text_field), out_dir, vocab_size)
    print(f"Tokenizer: {out_dir}")


def _byte_level_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,  # else LitGPT puts one before every document
        "clean_up_tokenization_spaces": False,  # else decoding would change "a ." into "a."
    }


def _story(rng: Random) -> str:
    """One story, of any length and perhaps not the first of its text."""
    beats = _plots()[rng.randrange(len(PLOTS))]
    cast = _Cast(rng)
    sentences = [_expand(rng.choice(wordings), rng).format_map(cast) for wordings in _order(beats, rng)]
    return _polish(" ".join(sentences))


def _order(beats: tuple[tuple[str, tuple[str, ...]], ...], rng: Random) -> Iterator[tuple[str, ...]]:
    """The wordings of the beats to tell, in the order to tell them."""
    for mark, group in groupby(beats, key=lambda beat: beat[0]):
        wordings = [beat[1] for beat in group]
        if mark == "*":
            wordings = rng.sample(wordings, rng.choice((0, 1, 1, 2)))
        elif mark == "?" and rng.random() < 0.7:
            continue
        yield from wordings


class _Cast(dict[str, Any]):
    """Who and what one story is about; things are drawn when the story first mentions them."""

    def __init__(self, rng: Random) -> None:
        names = rng.sample(GIRLS, 2), rng.sample(BOYS, 2)
        adjectives = rng.sample(ADJECTIVES, 3)
        helper, sex = rng.choice(HELPERS).split("/")
        super().__init__(G=Character(helper, "", "", "", *PRONOUNS[sex]))
        for key, girl, boy, adjective in zip("AB", *names, adjectives[:2], strict=True):
            name, sex = rng.choice(((girl, "f"), (boy, "m")))
            kind = rng.choice(ANIMALS) if rng.random() < 0.5 else "girl" if sex == "f" else "boy"
            self[key] = Character(name, kind, adjective, adjectives[2], *PRONOUNS[sex])
        self._rng = rng

    def __missing__(self, key: str) -> str:
        slot = key.rstrip("234")
        drawn = self._rng.sample(SLOTS[slot], 4)
        self.update(zip((slot, f"{slot}2", f"{slot}3", f"{slot}4"), drawn, strict=True))
        return str(self[key])


@cache
def _plots() -> tuple[tuple[tuple[str, tuple[str, ...]], ...], ...]:
    """For every plot its beats, as (mark, wordings)."""
    return tuple(_parse(text) for text in PLOTS.values())


def _parse(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    beats: list[tuple[str, tuple[str, ...]]] = []
    for line in text.strip().splitlines():
        mark, wording = line.split(maxsplit=1)
        while "<" in wording:
            wording = re.sub(r"<(\w+)>", lambda found: SHARED[found[1]], wording)
        if mark == "|":
            mark, wordings = beats.pop()
            beats.append((mark, (*wordings, wording)))
        else:
            beats.append((mark, (wording,)))
    return tuple(beats)


def _expand(text: str, rng: Random) -> str:
    """Choose one part of every [part|part], also of nested ones."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), text)
    return text


def _polish(text: str) -> str:
    """Capitals at the beginning of sentences, "an" before vowels, no doubled spaces."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    # A quotation that ends in "!" or "?" can go on with "he asked", one that ends in "." cannot.
    return re.sub(r"(?:^|[.!?] |\.\" )\"?[a-z]", lambda found: found[0][:-1] + found[0][-1].upper(), text)
