"""The pieces that choose and loop over cases, and that read messages: nothing that they leave out goes unnoticed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.cases import each, pairwise
from tests.messages import assert_told

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (2, 2, 2), (16, 14, 5), (12, 5, 6, 4, 3), (1, 7, 1, 2)], ids=str)
def test_any_two_values_meet(sizes: tuple[int, ...]) -> None:
    parameters = [[[f"{i}", a] for a in range(size)] for i, size in enumerate(sizes)]  # lists: no hash is asked for
    rows = pairwise(*parameters)
    assert rows == pairwise(*parameters)
    met = {((i, row[i][1]), (j, row[j][1])) for row in rows for i, j in itertools.combinations(range(len(sizes)), 2)}
    columns = itertools.combinations(range(len(sizes)), 2)
    assert met == {((i, a), (j, b)) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}
    first, second, *_ = sorted(sizes, reverse=True)
    assert first * second <= len(rows) <= 1.3 * first * second + 2


def test_a_loop_names_the_cases_that_fail_and_goes_on(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from tests.cases import each

        seen = []

        @each("a, b", [(1, 2), (3, 3), (5, 6), (7, 7)])
        def test_it(a, b, tmp_path):
            seen.append((a, b))
            assert not list(tmp_path.iterdir())
            (tmp_path / "x").touch()
            assert a != b

        def test_all_ran():
            assert len(seen) == 4
        """
    )
    ended = pytester.runpytest("-n", "0", "-p", "no:cacheprovider")
    text = ended.stdout.str()
    assert ended.parseoutcomes()["passed"] >= 1 and ended.ret == 1
    assert "a='3', b='3'" in text and "a='7', b='7'" in text and "a='1'" not in text


def test_a_loop_without_cases_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="asserts nothing"):
        each("a", [])


@each("name", ["one", "two"])
def test_every_case_has_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    (tmp_path / name).touch()


LINE = "pruneexp: a.b=3: expected c.d=[1, 2) (2 of 3 jobs)\n"


@each("named, typed", [("a.b=3", ["c.d=[1, 2)"]), ("a.b=3", []), ("a.b=3", ["expected", "2 of 3 jobs"])])
def test_a_message_that_names_the_key_the_value_and_what_to_type(named: str, typed: list[str]) -> None:
    assert_told(LINE, named, *typed)


@each("printed, named, typed", [(LINE, "a.b", []), (LINE, "a.b=4", []), (LINE, "b=3", []), (LINE, "a.b=3", ["a.b=3"]),
                                (LINE, "a.b=3", ["d=[1, 2)"]), (LINE, "a.b=3", ["job"]), (LINE, "a.b=3", ["c.d"]),
                                (LINE * 2, "a.b=3", []), (LINE.strip(), "a.b=3", [])])  # fmt: skip
def test_a_message_that_lacks_something(printed: str, named: str, typed: list[str]) -> None:
    with pytest.raises(AssertionError):
        assert_told(printed, named, *typed)
