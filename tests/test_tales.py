"""The stories of tales.py: readable, consistent, and of exactly the entropy that is claimed."""

import itertools
import re
from math import log

import pytest

from minillada.text import tales as module
from minillada.text.tales import (
    GRAMMAR,
    TALE,
    entropy_per_character,
    expected_length,
    flawless,
    is_tale,
    mistake,
    tales,
    tell,
)

COLUMNS = {word: key for key in GRAMMAR for word in key.split("|")}


def test_the_same_seed_tells_the_same_tales():
    assert list(tales(3, 20)) == list(tales(3, 20)) != list(tales(4, 20))
    assert list(tales(3, 20))[:5] == list(tales(3, 5))


def test_a_tale_is_one_line_of_six_or_seven_sentences_without_open_slots():
    for tale in tales(0, 300):
        assert "\n" not in tale and not set(tale) & set("{}|")
        assert len(re.findall(r'[.!?]"?(?= |$)', tale)) in (6, 7)


def test_what_was_lost_is_what_is_found_by_the_hero_of_the_first_sentence():
    thing_row = next(row for row in GRAMMAR["thing|lost|found"] if row.startswith("lantern|"))
    rolls = {columns: rows[0] for columns, rows in GRAMMAR.items()} | {"thing|lost|found": thing_row}
    tale = tell(rolls | {"name|she|her|him|She": "Otto|he|his|him|He"})
    assert tale.index("named Otto") < tale.index("slipped into the well") < tale.index("bottom of the bucket")
    assert re.search(r"\bhe\b", tale) and not re.search(r"\b(she|her)\b", tale)


def test_every_roll_shows_in_every_tale():
    def words(template):
        """The words that must appear whichever rows are rolled."""
        found = set(re.findall(r"{(\w+)}", template))
        for word in list(found):
            column = COLUMNS[word].split("|").index(word)
            rows = [words(row.split("|")[column]) for row in GRAMMAR[COLUMNS[word]]]
            found |= set.intersection(*rows)
        return found

    shown = {COLUMNS[word] for word in words(TALE)}
    assert shown == set(GRAMMAR)


def test_no_row_begins_like_another_so_a_text_tells_its_rolls():
    # Read from the left, the letters after what two rows share already differ: one of them alone fits the text.
    for rows in GRAMMAR.values():
        for a, b in itertools.combinations(rows, 2):
            same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
            assert a[:same].count("{") == a[:same].count("}"), (a, b)
            assert not {a[same : same + 1], b[same : same + 1]} & {"", "{", "|"}, (a, b)


@pytest.mark.parametrize("many", [range(5, 99), range(5), range(0, 99, 2)])
def test_all_tales_of_a_smaller_grammar_are_different_and_have_the_entropy_claimed(monkeypatch, many):
    few = {columns: rows[-2:] if len(rows) in many else rows[:1] for columns, rows in GRAMMAR.items()}
    every = [tell(dict(zip(few, rolls, strict=True))) for rolls in itertools.product(*few.values())]
    assert len(every) == len(set(every)) >= 32
    monkeypatch.setattr(module, "GRAMMAR", few)
    assert log(len(every)) / (sum(len(tale) + 1 for tale in every) / len(every)) == pytest.approx(
        entropy_per_character()
    )


def test_the_measured_surprise_per_character_is_the_claimed_entropy():
    n = 4000
    surprise = sum(log(len(rows)) for rows in GRAMMAR.values())  # -ln p, the same for every tale
    lengths = [len(tale) + 1 for tale in tales(11, n)]
    mean = sum(lengths) / n
    error = (sum((x - mean) ** 2 for x in lengths) / n) ** 0.5 / n**0.5
    assert abs(mean - expected_length(TALE) - 1) < 4 * error < 3
    assert surprise * n / sum(lengths) == pytest.approx(entropy_per_character(), rel=0.01)


def test_rolls_are_uniform():
    n, names = 4000, [row.split("|")[0] for row in GRAMMAR["name|she|her|him|She"]]
    counts = dict.fromkeys(names, 0)
    for tale in tales(5, n):
        counts[next(name for name in names if re.search(rf"\b{name}\b", tale))] += 1
    chi2 = sum((count - n / len(names)) ** 2 / (n / len(names)) for count in counts.values())
    assert chi2 < 62  # 31 degrees of freedom: exceeded once in a thousand


# ---- The parser ----


def test_every_tale_is_flawless_and_one_changed_letter_is_not():
    told = list(tales(7, 60))
    assert flawless(told) == 1.0
    for i, tale in enumerate(told):
        at = (37 * i) % len(tale)
        assert not is_tale(tale[:at] + "#" + tale[at + 1 :])


@pytest.mark.parametrize(
    ("old", "new"),
    [(" his ", " her "), (" red drum", " red flute"), ("the badger", "the robin"), ("Abel kept", "Ada kept")],
)
def test_a_pronoun_a_thing_a_friend_or_a_hero_that_changes_is_a_mistake_found_where_it_stands(old, new):
    rows = {"name|she|her|him|She": "Abel|he|his|him|He", "friend": "badger", "colour": "red"}
    rows["thing|lost|found"] = next(row for row in GRAMMAR["thing|lost|found"] if row.startswith("drum"))
    rows["opening"], rows["treasure"] = GRAMMAR["opening"][0], GRAMMAR["treasure"][1]
    rows["finding"], rows["ending"] = GRAMMAR["finding"][1], GRAMMAR["ending"][1]
    tale = tell({columns: choices[0] for columns, choices in GRAMMAR.items()} | rows)
    assert is_tale(tale) and old in tale
    head, _, tail = tale.rpartition(old)
    changed = head + new + tail
    assert not is_tale(changed)
    assert len(head) <= mistake(changed) <= len(head) + len(new)


def test_a_mistake_is_where_no_tale_goes_on():
    assert mistake("There was once a brave ship") == len("There was once a brave ")
    tale = next(tales(0, 1))
    assert mistake(tale) is None
    assert mistake(tale[:100]) == 100  # a beginning: right to its last letter, but not at its end
    assert mistake(f"{tale} ") == len(tale)
    assert mistake("") == 0


def test_the_share_of_flawless_tales_counts_texts_and_not_the_blanks_round_them():
    one = next(tales(0, 1))
    assert flawless([f" {one}\n", "Once upon a time.", one, one]) == 0.75
    assert flawless([]) == 0.0
