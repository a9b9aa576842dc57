"""Stop strings against a definition that scans the whole text, and no early showing of their beginnings."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tercet.errors import ValidationError
from tercet.frontend.byte_tables import BYTE_TO_CHAR
from tercet.frontend.detokenizer import DetokenizerFactory
from tercet.frontend.stop_strings import OutputText, StopStrings
from tercet.frontend.validation import MAX_STOP_STRING_CHARS
from tests.conftest import FULL
from tests.frontend.tokenizer_zoo import TRAINED, specimen

EXAMPLES = 5_000 if FULL else 300


class Expected(NamedTuple):
    text: str
    stop_reason: str | None
    num_tokens: int


def pieces(name: str, token_ids: Sequence[int]) -> list[str]:
    """Text that each token decides; what the end decides belongs to the last token."""
    detokenizer = DetokenizerFactory(specimen(name)).create()
    texts = [detokenizer.append([token]) for token in token_ids]
    if texts:
        texts[-1] += detokenizer.finish()
    return texts


def expected(texts: Sequence[str], stop: Sequence[str], include: bool, min_tokens: int) -> Expected:
    """By definition: the first character that completes a stop string, and there the longest of them."""
    whole = "".join(texts)
    token_of_char = [number for number, text in enumerate(texts, start=1) for _ in text]
    for end in range(1, len(whole) + 1):
        if token_of_char[end - 1] <= min_tokens:
            continue
        matches = [string for string in stop if whole[:end].endswith(string)]
        if matches:
            longest = max(matches, key=len)
            text = whole[: end if include else end - len(longest)]
            return Expected(text, longest, token_of_char[end - 1])
    return Expected(whole, None, len(texts))


def run(output: OutputText, token_ids: Sequence[int], cuts: Sequence[int]) -> Expected:
    edges = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    text, used = "", 0
    for start, end in itertools.pairwise(edges):
        delta, reason, num_tokens = output.push(token_ids[start:end], finished=end == len(token_ids))
        text, used = text + delta, used + num_tokens
        if reason is not None or end == len(token_ids):
            return Expected(text, reason, used)
    raise AssertionError("unreachable: the last edge is the end")


def undecided(known: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `known` that begins a stop string without completing it."""
    ends = [len(known) - start for start in range(len(known))]
    return max((n for n in ends if any(s.startswith(known[-n:]) and len(s) > n for s in stop)), default=0)


SMALL = st.text("ab ", min_size=1, max_size=4)
STOPS = st.lists(SMALL, min_size=1, max_size=3)


def _ids(text: str) -> list[int]:
    """One token for each byte, so that every edge is a token edge."""
    tokenizer = specimen("byte_level")
    return [tokenizer.id_of(BYTE_TO_CHAR[byte]) for byte in text.encode()]


@settings(max_examples=EXAMPLES)
@given(
    st.text("ab é🙂", max_size=20),
    STOPS,
    st.lists(st.integers(0, 99), max_size=5),
    st.booleans(),
    st.integers(0, 6),
)
@example("ababab", ["abab"], [], False, 4)
@example("aab", ["aa", "aab", "b"], [2], True, 2)
def test_outcome_is_that_of_a_scan_of_the_whole_text(
    text: str, stop: list[str], cuts: list[int], include: bool, min_tokens: int
) -> None:
    token_ids = _ids(text)
    detokenizer = DetokenizerFactory(specimen("byte_level")).create()
    output = OutputText(detokenizer, stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    found = run(output, token_ids, cuts)
    assert found == expected(pieces("byte_level", token_ids), stop, include, min_tokens)


@pytest.mark.parametrize("name", TRAINED)
def test_outcome_does_not_depend_on_the_tokenizer_or_the_chunks(name: str) -> None:
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)
    stops = st.sampled_from(["o", "the", " a ", "你", "🙂🙃", "\ufffd", "e q", "<tool>", "ไท", "n't"])

    @settings(max_examples=EXAMPLES // 10)
    @given(
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=10),
        st.lists(stops, min_size=1, max_size=3),
        st.lists(st.integers(0, 99), max_size=4),
        st.integers(0, 5),
    )
    def check(random_ids: list[int], stop: list[str], cuts: list[int], min_tokens: int) -> None:
        token_ids = [*tokenizer.backend.encode("The 你好 🙂🙃 doesn't ไทย").ids, *random_ids]
        output = OutputText(factory.create(), stop, min_tokens=min_tokens)
        assert run(output, token_ids, cuts) == expected(pieces(name, token_ids), stop, False, min_tokens)

    check()


@settings(max_examples=EXAMPLES)
@given(st.text("ab ", max_size=16), STOPS, st.integers(0, 16))
def test_held_back_is_exactly_what_may_become_a_stop_string(
    text: str, stop: list[str], min_tokens: int
) -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create(), stop, min_tokens=min_tokens)
    shown = known = ""
    for char, token_id in zip(text, _ids(text), strict=True):
        delta, reason, _ = output.push([token_id])
        if reason is not None:
            return
        shown, known = shown + delta, known + char
        assert shown == known[: len(known) - undecided(known, stop)]


def test_stop_string_across_tokens_is_cut_off() -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create(), ["STOP"])
    shown = [output.push([token]) for token in _ids("go STOP now")]
    assert shown[:7] == [
        ("g", None, 1),
        ("o", None, 1),
        (" ", None, 1),
        *[("", None, 1)] * 3,
        ("", "STOP", 1),
    ]
    assert shown[7:] == [("", None, 0)] * 4  # tokens that were in flight when it stopped
    assert output.stop_reason == "STOP"


def test_false_start_is_shown_once_it_is_decided() -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create(), ["STOP"])
    assert [output.push([token])[0] for token in _ids("aSTa")] == ["a", "", "", "STa"]
    assert output.push(_ids("ST"), finished=True) == ("ST", None, 2)


def test_match_inside_a_chunk_counts_its_tokens() -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create(), ["."])
    assert output.push(_ids("One. Two.")) == ("One", ".", 4)


def test_stop_string_completed_by_the_end_of_the_text() -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create(), ["\ufffd"])
    assert output.push(_ids("A🙂")[:3]) == ("A", None, 3)
    assert output.push([], finished=True) == ("", "\ufffd", 0)


@pytest.mark.parametrize("stop", [[], ["never"]])
@pytest.mark.parametrize(("include", "shown"), [(False, "hi"), (True, "hi<|end|>")])
def test_stop_token_is_shown_only_if_stop_strings_are(stop: list[str], include: bool, shown: str) -> None:
    tokenizer = specimen("byte_level")
    detokenizer = DetokenizerFactory(tokenizer).create(skip_special_tokens=False)
    output = OutputText(detokenizer, stop, include_stop_str_in_output=include)
    token_ids = [*_ids("hi"), tokenizer.id_of("<|end|>")]
    assert output.push(token_ids, finished=True, ended_by_stop_token=True) == (shown, None, 3)


def test_without_stop_strings_text_passes_at_once() -> None:
    output = OutputText(DetokenizerFactory(specimen("byte_level")).create())
    assert output.push(_ids("STO")) == ("STO", None, 3)
    assert output.push(_ids("🙂")[:2], finished=True) == ("\ufffd", None, 2)


@pytest.mark.parametrize("stop", [[""], ["a", ""], ["x" * (MAX_STOP_STRING_CHARS + 1)]])
def test_bad_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(ValidationError, match="stop: holds"):
        OutputText(DetokenizerFactory(specimen("byte_level")).create(), stop)


def test_empty_set_is_refused() -> None:
    with pytest.raises(ValidationError, match="stop: is empty"):
        StopStrings([])


def test_longest_stop_string_takes_linear_time() -> None:
    # Counted, not timed: a scan that starts over at every character would compare some 10^6 here.
    stop = StopStrings(["a" * 2000 + "b"])
    comparisons = 0

    class Counting(str):
        def __getitem__(self, key: SupportsIndex | slice) -> str:
            nonlocal comparisons
            comparisons += 1
            return str.__getitem__(self, key)

    stop.strings = tuple(Counting(string) for string in stop.strings)
    state = stop.start()
    assert stop.scan(state, "a" * 4000 + "c") is None
    assert comparisons < 5 * 4001
    assert state == [0]
