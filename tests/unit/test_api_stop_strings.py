"""A stop string must be found wherever tokens cut it, and nothing of it may have been sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.api.stop_strings import StopStrings

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


def by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first place where a stop string is complete; the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(1, 6), min_size=30, max_size=30))
def test_pieces_find_what_a_search_of_the_whole_text_finds(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    search = StopStrings(stops, include)
    given_out, hit, position = "", None, 0
    for size in cuts:
        if hit is not None or position >= len(text):
            break
        new, hit = search.push(text[position : position + size])
        position += size
        given_out += new
    if hit is None:
        given_out += search.flush()
    assert (given_out, hit) == by_definition(text, stops, include)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    search = StopStrings(["###"])
    assert search.push("a##") == ("a", None)
    assert search.push("b#") == ("##b", None)
    assert search.flush() == "#"


def test_the_longest_of_many_that_begin_alike_is_found() -> None:
    stops = ["a" * length for length in range(2, 66)]
    assert StopStrings([*stops[:0:-1]]).push("b" + "a" * 99) == ("b", "aaa")
    text = "ab" * 200
    search = StopStrings([text[:255] + "x", "bx"])
    assert [search.push(part) for part in (text[:100], text[100:])] == [
        ("", None),
        ("ab" * 73, None),
    ]
    assert search.push("x")[1] == "bx"


def test_another_search_for_the_same_begins_anew() -> None:
    search = StopStrings(["###"])
    search.push("##")
    assert search.anew().push("#") == ("", None)
    assert search.push("#") == ("", "###")
