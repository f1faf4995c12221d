"""Make endless little stories whose entropy is known exactly, so that a model's loss can be compared with it.

A tale takes one row of every entry of `GRAMMAR`, all equally likely and independent. A column of a row is a word, or a
phrase with further {words}: the hero's row has every "she". A text tells which rows were taken, because each shows and
none begins like another. So its entropy is the sum of ln(rows), and its expected length is a sum of means. And a parser
can tell whether a text is such a tale: a model that tells one remembered its hero, pronouns and things to the end.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from math import log
from string import Formatter

NAMES = {
    "she|her|her|She": "Ada Bea Cleo Dora Edith Flora Greta Hazel Ida June Kitty Lotte Mina Nora Olive Pia",
    "he|his|him|He": "Abel Ben Caspar Dan Emil Felix Gus Henry Ivo Jack Karl Leo Max Ned Otto Paul",
}

TALE = "{opening} {treasure} {loss} {meeting} {finding} {ending}"

# Names of columns -> rows, of which one is chosen. Columns are separated by "|".
GRAMMAR: dict[str, list[str]] = {
    "name|she|her|him|She": [f"{name}|{words}" for words, names in NAMES.items() for name in names.split()],
    "trait": ["kind", "brave", "curious", "shy", "clever", "cheerful", "patient", "stubborn", "dreamy", "gentle"],
    "place": ["by the river", "on the green hill", "behind the mill", "near the old harbour", "under the great oak",
              "beside the lighthouse", "in the quiet forest", "at the edge of the village", "above the bakery",
              "where the road ends"],
    "colour": ["red", "blue", "green", "yellow", "white", "silver", "purple", "golden", "striped", "spotted"],
    "thing|lost|found": [
        "kite|the string snapped and it sailed out of sight|caught in a pear tree",
        "kite|a gust of wind carried it over the roofs|hanging from the weathercock",
        "boat|the stream swept it under the bridge|resting against the mill wheel",
        "boat|a wave pulled it out past the stones|stranded among the reeds",
        "ball|it bounced over the garden wall|asleep in a bed of pumpkins",
        "ball|a dog ran off with it|hidden in a kennel, hardly chewed",
        "lantern|it slipped into the well|shining at the bottom of the bucket",
        "drum|it rolled down the slope and did not stop|lying in a ditch full of clover",
        "flute|a magpie took it for a twig|woven into the side of a nest",
        "hat|the river borrowed it|on the head of a scarecrow downstream",
        "scarf|the goat ate one end and dragged away the rest|drying on a fence, a little shorter",
        "music box|a thief with muddy paws crept in|playing softly in a fox's den"],
    "weather": ["windy", "grey", "warm", "frosty", "misty", "rainy", "still", "bright"],
    "time": ["morning", "afternoon", "evening", "day"],
    "mood": ["sleepy", "grumpy", "tiny", "wise", "merry", "solemn", "plump", "muddy"],
    "friend": ["hedgehog", "badger", "robin", "toad", "goose", "tortoise", "mole", "squirrel", "rabbit", "heron"],
    "food": ["honey cake", "slice of pear", "walnut", "bowl of milk", "piece of cheese", "bun", "jam tart", "plum"],
    "opening": [
        "Once upon a time a {trait} child named {name} lived {place}.",
        "Long ago, in a house {place}, there lived a {trait} child called {name}.",
        "There was once a {trait} child whose name was {name} and whose home was {place}.",
        "Everyone {place} knew {name}, the {trait} child who whistled all day."],
    "treasure": [
        "For a whole winter {she} saved {her} pennies to buy a {colour} {thing}.",
        "On {her} birthday {she} was given a {colour} {thing}.",
        "Nothing was dearer to {him} than {her} {colour} {thing}.",
        "Grandmother had made {him} a {colour} {thing}, and {she} took it everywhere."],
    "loss": [
        "One {weather} {time}, {lost}.",
        "But on a {weather} {time}, {lost}, and {name} could only stare.",
        "Then came a {weather} {time}: {lost}. {She} searched until the stars came out.",
        "It was a {weather} {time} when it happened: {lost}. {She} cried a little, and then {she} dried {her} eyes."],
    "meeting": [
        "A {mood} {friend} came by and offered to help for a {food}.",
        "Behind a hedge sat a {mood} {friend} who had seen it all and would tell it for a {food}.",
        '"I know where it is," said a {mood} {friend}, "but thinking of a {food} makes me forget."'],
    "finding": [
        "Together they found the {thing}, {found}.",
        "By sunset they saw it at last: the {colour} {thing}, {found}.",
        "At the end of a long path was the {colour} {thing}, {found}."],
    "ending": [
        "So {name} shared the {food} with the {friend} and walked home singing.",
        "And {name} kept {her} promise: the {friend} ate the {food} in one bite.",
        "Since then there is always a {food} {place} for a {mood} {friend}.",
        "That night {name} slept with the {thing} beside {him}, and the {friend} dreamed of another {food}."],
}  # fmt: skip


def words_of(rolls: Mapping[str, str]) -> dict[str, str]:
    """Return the word of every column. {"thing|lost": "hat|it fell"} -> {"thing": "hat", "lost": "it fell"}."""
    words = {}
    for columns, row in rolls.items():
        words |= zip(columns.split("|"), row.split("|"), strict=True)
    return words


def tell(rolls: Mapping[str, str]) -> str:
    """Return the tale of these rows, one for each entry of `GRAMMAR`, without a line end."""
    tale, words = TALE, words_of(rolls)
    while "{" in tale:  # phrases hold further words
        tale = tale.format(**words)
    return tale


def tale(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Return a random tale and its words."""
    rolls = {columns: rng.choice(rows) for columns, rows in GRAMMAR.items()}
    return tell(rolls), words_of(rolls)


def tales(seed: int, n: int) -> Iterator[str]:
    """Yield the first `n` tales of `seed`, independent, of six or seven sentences, without a line end."""
    rng = random.Random(seed)
    return (tale(rng)[0] for _ in range(n))


def readings(template: str, text: str, rolls: dict[str, str]) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yield how a text can begin as the template says: (rest of the text, rows taken), or (rest, None) where it fails
    to go on. "{colour} hat" and "red hut" -> ("ut", None)."""
    letters, _, template = template.partition("{")
    if not text.startswith(letters):
        same = next((i for i, (a, b) in enumerate(zip(letters, text, strict=False)) if a != b), len(text))
        yield text[same:], None
    elif not template:
        yield text[len(letters) :], rolls
    else:
        word, _, rest = template.partition("}")
        columns = next(columns for columns in GRAMMAR if word in columns.split("|"))
        for row in [rolls[columns]] if columns in rolls else GRAMMAR[columns]:
            phrase = row.split("|")[columns.split("|").index(word)]
            yield from readings(phrase + rest, text[len(letters) :], {**rolls, columns: row})


def mistake(text: str) -> int | None:
    """Return where a text stops being any tale of the grammar: how many letters of it begin a tale; None for a tale.

    "There was once a brave ship" -> 23, since a child must follow.
    """
    rests = [(len(rest), rolls is not None) for rest, rolls in readings(TALE, text, {})]
    return None if (0, True) in rests else len(text) - min(left for left, _ in rests)


def is_tale(text: str) -> bool:
    """Tell whether the grammar can make exactly this text."""
    return mistake(text) is None


def flawless(texts: Iterable[str]) -> float:
    """Return the share of texts that are tales from their first to their last letter, 0 to 1."""
    told = [is_tale(text.strip()) for text in texts]
    return sum(told) / max(1, len(told))


def expected_length(template: str) -> float:
    """Return the mean length of a filled template: its own letters plus, for each {word}, the mean of its rows."""
    total = 0.0
    for letters, word, _, _ in Formatter().parse(template):
        total += len(letters)
        for columns, rows in GRAMMAR.items():
            if word in columns.split("|"):
                column = columns.split("|").index(word)
                total += sum(expected_length(row.split("|")[column]) for row in rows) / len(rows)
    return total


def entropy_per_character() -> float:
    """Return the nats per character of a text with a tale in each line: H(tale) / E[length + 1]."""
    return sum(log(len(rows)) for rows in GRAMMAR.values()) / (expected_length(TALE) + 1)
