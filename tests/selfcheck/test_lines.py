"""How a line looks to people and to programs, and that nothing ends a check."""

import json

import pytest

from dinoforge.selfcheck.lines import Line, all_guarded, fail, guarded, judged, line_text, not_here, ok


def test_columns():
    lines = [
        ok("train", "24 steps").after(6.5),
        fail("embed", "the command ended with exit code 1", ("Traceback", "error: what went wrong")).after(123.0),
        not_here("ranks", "not asked for").after(1.0),
    ]
    assert "\n".join(map(line_text, lines)).splitlines() == [
        "ok          6.5 s train                       24 steps",
        "FAIL      123.0 s embed                       the command ended with exit code 1",
        "                                              Traceback",
        "                                              error: what went wrong",
        "not here          ranks                       not asked for",
    ]


def test_a_long_text_goes_on_in_its_column():
    first, *rest = line_text(ok("train", "word " * 60)).splitlines()
    assert first.startswith("ok")
    assert rest
    assert all(len(row) <= 120 and row.startswith(46 * " " + "word") for row in rest)
    assert sum(row.count("word") for row in [first, *rest]) == 60


def test_json_holds_everything():
    line = Line("a", "FAIL", "text", {"loss": float("nan"), "where": [("x", 1.5)]}, ("detail",), 1.0)
    text = json.dumps(line.as_json(), allow_nan=False)
    assert Line.from_json(json.loads(text)).as_json() == line.as_json()
    assert json.loads(text)["values"] == {"loss": "nan", "where": [["x", 1.5]]}


def test_an_exception_is_a_failure_that_says_where():
    def look() -> Line:
        from dinoforge.recipe.load import load_recipe

        load_recipe("no such recipe")
        raise AssertionError

    line = guarded("recipe", look)
    assert line.status == "FAIL"
    assert line.text.startswith("RecipeError: no recipe 'no such recipe'")
    assert any("dinoforge/recipe/load.py" in row for row in line.details)


def test_an_exception_ends_a_part_with_a_failure():
    def lines():
        yield ok("first", "")
        raise ValueError("made up")

    found = list(all_guarded("part", lines))
    assert [line.status for line in found] == ["ok", "FAIL"]
    assert found[1].name == "part"
    assert found[1].text == "ValueError: made up"


@pytest.mark.parametrize(("passed", "status"), [(True, "ok"), (False, "FAIL")])
def test_judged(passed, status):
    assert judged(passed, "name", "text", number=1) == Line("name", status, "text", {"number": 1})
