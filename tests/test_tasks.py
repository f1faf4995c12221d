"""The toy tasks: answers that are right, checkers that notice wrong ones, and nothing of the test in the training."""

import itertools
import json
import random
import re
import sys

import pytest

from minillada.commands.tasks import main
from minillada.errors import BadInput
from minillada.text.tales import GRAMMAR, tell
from minillada.text.tales import tales as all_tales
from minillada.text.tasks import TASKS, Example, boards, is_tale, make_task, places, solutions, value_of, write_task

SMALL = {name: (40, 0, 5 if name == "sudoku9" else 30) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_examples_and_another_seed_others(name):
    n, seed, n_test = SMALL[name]
    task = make_task(name, n, seed, n_test)
    assert make_task(name, n, seed, n_test) == task
    assert len(task.train) == n and len(task.test) == n_test == len(set(task.test))
    assert make_task(name, n // 2, seed, n_test).train == task.train[: n // 2]
    assert make_task(name, n, 1, n_test).train != task.train


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_one_line_its_answer_is_right_and_others_are_not(name):
    task = make_task(name, *SMALL[name])
    for example in task.train + task.test:
        assert example.answer.strip() and "\n" not in example.text
        assert task.check(example, example.answer + "\nwhat follows") == 1
        assert task.check(example, f" {example.answer.strip()} ") == 1
        assert task.check(example, "") == 0
        assert task.check(example, example.answer + "0") < 1


def test_sums_are_right_and_no_pair_of_the_test_was_trained_on_in_either_order():
    def pairs(examples):
        found = [tuple(sorted(map(int, term.split("+")))) for e in examples for term in e.prompt[:-1].split(",")]
        totals = [int(part) for e in examples for part in e.answer.split(",")]
        assert totals == [a + b for a, b in found]
        return set(found)

    one, many = make_task("addition", 20_000, 0, 300), make_task("sums:5", 4000, 0, 60)
    train, test = pairs(one.train + many.train), pairs(one.test + many.test)
    assert not train & test
    assert len(train) > 3500  # of some 4500 for `addition` and `sums`: nine tenths are there to be seen
    assert all(10 <= a <= b <= 99 for a, b in pairs(one.train))
    assert all(len(e.prompt) == 5 * 6 and len(e.answer) == 5 * 6 - 1 for e in many.train)


def test_digits_and_terms_can_be_chosen():
    assert all(re.fullmatch(r"\d{4}\+\d{4}=", e.prompt) for e in make_task("addition:4", 20, 0, 5).train)
    assert make_task("sums:32", 1, 0, 1).train[0].answer.count(",") == 31


def test_a_row_of_sums_counts_the_right_ones_in_their_places():
    check, example = make_task("sums", 1, 0, 1).check, Example("", "046,100,007,019")
    assert check(example, "046,100,007,018\n019") == 0.75
    assert check(example, "100,046") == 0
    assert check(example, "046") == 0.25


def test_words_are_reversed_and_never_seen_either_way():
    task = make_task("reverse:5", 5000, 0, 200)
    seen = {e.prompt[:-1] for e in task.train} | {e.answer for e in task.train}
    for example in task.test:
        word = example.prompt[:-1]
        assert example.answer == word[::-1] and not {word, word[::-1]} & seen
        assert 3 <= len(word) <= 5


def test_a_fact_told_one_way_is_never_told_the_other_way_and_a_control_is_told_both_ways():
    task = make_task("facts:60", 6000)

    def names(text):
        """(who or what comes first, what comes last) of a sentence."""
        return re.fullmatch(r"(.+?) (?:is known as|is|has long been) (.+)\.", text).groups()

    told = {names(e.text) for e in task.train}
    assert len(told) == 80  # 20 people by name, 20 by role, 20 both ways
    both = {pair for pair in told if pair[::-1] in told}
    assert len(both) == 40
    kinds = {}
    for example in task.test:
        pair = names(example.text)
        kinds.setdefault(example.kind, set()).add(pair)
        assert example.kind == (
            ("reversed by filling" if example.after else "told both ways" if pair in both else "as told")
            if pair in told
            else "reversed"
        )
    assert {kind: len(found) for kind, found in kinds.items()} == {
        "as told": 40, "reversed": 40, "reversed by filling": 40, "told both ways": 40
    }  # fmt: skip


def test_what_a_fact_begins_with_goes_on_in_one_way_alone():
    task = make_task("facts:60", 6000)
    for question in (e for e in task.test if e.kind in ("as told", "told both ways")):
        assert {e.text for e in task.train if e.text.startswith(question.prompt)} == {question.text}


def test_a_gap_to_be_filled_stands_in_front_of_a_sentence_as_it_was_told():
    task = make_task("facts:30", 3000, 0, 40)
    told = {e.text for e in task.train}
    gaps = [e for e in task.test if e.after]
    assert gaps and all(e.prompt == "" and e.text in told for e in gaps)


def test_an_open_board_may_be_filled_in_any_way_that_keeps_the_rules_and_its_digits():
    task, known = make_task("open4", 3000, 0, 200), {"".join(map(str, board)) for board in boards()[0]}
    asked = {e.prompt for e in task.train}
    for example in (*task.train[:200], *task.test):
        given = example.prompt[:-1]
        ways = ["".join(map(str, way)) for way in solutions([int(d) for d in given.replace(".", "0")], 2)]
        assert 3 <= 16 - given.count(".") <= 6 and example.answer in ways
        assert all(task.check(example, f"{way}\nmore") == 1 for way in ways)
    assert {e.answer for e in task.train} <= known and not asked & {e.prompt for e in task.test}
    assert all((e.answer in known) == (e.kind == "clues") for e in task.test)
    assert {e.kind for e in task.test} == {"clues", "boards"}


@pytest.mark.parametrize("line", ["2143432112343412", "12343412214343", "1234341221434312", "", "x234341221434321"])
def test_a_board_that_breaks_a_rule_or_changes_a_digit_is_wrong(line):
    check, example = make_task("open4", 1, 0, 1).check, Example("1..............1=", "")
    assert check(example, "1234432121433412") == 0 and check(Example("1..............1=", ""), line) == 0
    assert check(Example("1...............=", ""), "1234341221434321") == 1


def brute_force(puzzle, side, width):
    """Every solution, by trying all permutations row by row."""
    rows = [[]]
    for r in range(side):
        given = puzzle[r * side : (r + 1) * side]
        fitting = [
            p
            for p in itertools.permutations(range(1, side + 1))
            if all(g in (0, d) for g, d in zip(given, p, strict=True))
        ]
        rows = [
            [*above, p]
            for above in rows
            for p in fitting
            if all(p[c] != other[c] for other in above for c in range(side))
            and all(
                p[c] not in other[c // width * width : c // width * width + width]
                for other in above[r // width * width :]
                for c in range(side)
            )
        ]
    return [[digit for row in found for digit in row] for found in rows]


def digits(text):
    return [int(c) for c in text.rstrip("=").replace(".", "0")]


def test_every_4x4_puzzle_has_the_one_solution_that_a_plain_search_finds():
    task = make_task("sudoku4", 60, 0, 40)
    for example in task.train + task.test:
        assert brute_force(digits(example.prompt), 4, 2) == [digits(example.answer)]
        assert 6 <= example.prompt.count(".") <= 10


def test_every_9x9_puzzle_has_its_answer_as_only_solution():
    task = make_task("sudoku9", 40, 0, 5)
    for example in task.train + task.test:
        puzzle, answer = digits(example.prompt), digits(example.answer)
        assert list(solutions(puzzle, 3)) == [answer]
        assert all(p in (0, a) for p, a in zip(puzzle, answer, strict=True))
        taken = {(unit, digit) for units, digit in zip(places(3), answer, strict=True) for unit in units}
        assert len(taken) == 27 * 9  # every digit stands in every row, column and box
        assert 10 < puzzle.count(0) <= 50
    assert len({e.answer for e in task.train}) == 40  # the 16 made of one board differ


def test_the_solver_finds_all_288_boards_both_solutions_of_an_ambiguous_one_and_none_of_a_contradiction():
    found = list(solutions([0] * 16, 2))
    assert sorted(found) == sorted(brute_force([0] * 16, 4, 2)) and len(found) == 288
    ambiguous = digits("12343412214343..")
    assert list(solutions(ambiguous, 2)) == brute_force(ambiguous, 4, 2)
    ambiguous = digits("1234341221.343.1")
    assert sorted(solutions(ambiguous, 2)) == sorted(brute_force(ambiguous, 4, 2))
    assert not list(solutions(digits("11.............."), 2))


def test_no_4x4_board_of_the_test_is_a_trained_one_renamed_turned_or_mirrored():
    train, test = boards()
    known = set(map(tuple, train))
    assert len(train) == 192 and len(test) == 96
    for board in random.Random(0).sample(test, 12):
        square = [board[4 * r : 4 * r + 4] for r in range(4)]
        for turned in (square, square[::-1]):
            for _ in range(4):
                turned = [list(row) for row in zip(*turned[::-1], strict=True)]
                for names in itertools.permutations(range(1, 5)):
                    assert tuple(names[d - 1] for row in turned for d in row) not in known


def test_only_what_the_grammar_tells_is_a_tale():
    for text in all_tales(5, 100):
        assert is_tale(text)
        assert not is_tale(text + " ") and not is_tale(text[:-1]) and not is_tale("")
    rolls = {columns: rows[0] for columns, rows in GRAMMAR.items()}
    text = tell(rolls)
    name = rolls["name|she|her|him|She"].split("|")[0]
    assert text.count(name) > 1
    head, _, tail = text.rpartition(name)
    assert not is_tale(head + "Otto" + tail)  # the hero does not change in the middle


def test_a_tale_may_go_on_in_any_way_the_grammar_knows():
    task = make_task("tales", 300, 0, 30)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    same = [make_task("tales", 0, seed, 400).test for seed in (1, 2)]
    rest = {e.prompt: e.answer for e in same[0]}
    others = [e for e in same[1] if rest.get(e.prompt, e.answer) != e.answer]
    assert others and all(task.check(e, rest[e.prompt]) == 1 for e in others)


def test_the_answer_to_a_question_stands_in_the_tale_and_its_heroes_met_never_before():
    task = make_task("questions", 1000, 0, 100)
    for example in task.test:
        tale, _, _ = example.prompt.rpartition(". ")
        assert example.answer.strip() in tale
    assert {e.kind for e in task.test} == {"name", "thing", "colour", "friend", "food", "place"}
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}


@pytest.mark.parametrize(
    ("expression", "value"),
    [("8/(3-1)", 4), ("9-3-2", 4), ("9-(3-2)", 8), ("8/4/2", 1), ("1/3*3", 1), ("2+3*4", 14), (" ((7)) ", 7)]
    + [(text, None) for text in ("", "1+", "(1", "1)", "1 2", "-1", "2**3", "1/(2-2)", "٣", "1+x", "(" * 99 + "1")],
)  # fmt: skip
def test_an_expression_has_its_exact_value_or_none(expression, value):
    assert value_of(expression) == value


def test_any_expression_of_all_the_numbers_that_reaches_the_target_counts():
    check, example = make_task("countdown", 0, 0, 0).check, Example("3,5,7:22=", "3*5+7")
    for right in ("3*5+7", "7+5*3", " (5 * 3) + 7 \n9"):
        assert check(example, right) == 1
    for wrong in ("22", "3*5", "3*5+7+7-7", "3*5+07", "3*5+7=22", "15+7", "3*7+5", "3*5+7+0"):
        assert check(example, wrong) == 0
    assert check(Example("3,8,3:8=", ""), "3*8/3") == 1


def test_numbers_and_target_of_the_test_were_never_trained_on_and_many_have_several_answers():
    task = make_task("countdown", 1500, 0, 60)
    key = lambda e: (*sorted(e.prompt.split(":")[0].split(",")), e.prompt.split(":")[1])
    assert not {key(e) for e in task.test} & {key(e) for e in task.train}
    answers = {}
    for example in task.train:
        answers.setdefault(example.prompt, set()).add(example.answer)
    assert max(map(len, answers.values())) > 2
    assert all(len(e.prompt.split(":")[0].split(",")) == 4 for e in make_task("countdown:4", 9, 0, 3).train)


def test_files_hold_the_examples_and_are_never_overwritten(tmp_path):
    task = make_task("facts", 50, 0, 40)
    paths = write_task(task, tmp_path / "new")
    assert sorted(paths) == ["test.jsonl", "train.jsonl", "train.txt"]
    assert paths["train.txt"].read_text().splitlines() == [e.text for e in task.train]
    for part, examples in (("train", task.train), ("test", task.test)):
        lines = paths[f"{part}.jsonl"].read_text(encoding="utf-8").splitlines()
        assert [Example(**json.loads(line)) for line in lines] == examples
    before = {path: path.read_bytes() for path in paths.values()}
    paths["train.txt"].unlink()
    with pytest.raises(BadInput, match=r"^out: expected .*train\.jsonl"):
        write_task(make_task("addition", 3, 0, 3), tmp_path / "new")
    assert not paths["train.txt"].exists()
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())


@pytest.mark.parametrize(
    "spec", ["nothing", "addition:", "addition:0", "addition:x", "addition:²", "sudoku4:2", "facts:2"]
)
def test_a_task_that_is_none_is_refused(spec):
    with pytest.raises(BadInput, match=r"^task.*expected"):
        make_task(spec, 1)


def test_where_fewer_questions_exist_than_are_wanted_all_are_asked():
    pairs = [tuple(sorted(map(int, e.prompt[:-1].split("+")))) for e in make_task("addition:1", 0).test]
    trained = {tuple(sorted(map(int, e.prompt[:-1].split("+")))) for e in make_task("addition:1", 2000).train}
    assert set(pairs) | trained == set(itertools.combinations_with_replacement(range(1, 10), 2))
    assert len(pairs) == sum(1 if a == b else 2 for a, b in set(pairs)) > 0


def test_the_command_writes_the_files_and_says_where(tmp_path, monkeypatch, capsys):
    def tasks(*args):
        monkeypatch.setattr(sys, "argv", ["tasks", *args, "--out", str(tmp_path / "a")])
        main()
        return capsys.readouterr().out.splitlines()

    assert tasks("addition", "--n", "20", "--test", "5") == [
        str(tmp_path / "a" / name) for name in ("train.txt", "train.jsonl", "test.jsonl")
    ]
    assert len((tmp_path / "a" / "train.txt").read_text().splitlines()) == 20
    assert len((tmp_path / "a" / "test.jsonl").read_text().splitlines()) == 5
    with pytest.raises(BadInput, match=r"^out: expected a place for new files"):
        tasks("addition")
    with pytest.raises(BadInput, match=r"^task: expected one of addition"):
        tasks("subtraction")
