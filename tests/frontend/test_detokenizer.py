"""The text that streams equals the one-shot decode, whatever the tokenizer, the tokens and the chunks."""

import itertools
import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tercet.frontend.byte_tables import BYTE_TO_CHAR, decode_utf8_stream, incomplete_utf8_suffix
from tercet.frontend.detokenizer import Detokenizer, DetokenizerFactory
from tercet.frontend.detokenizer_tables import DecoderKind
from tests.conftest import FULL
from tests.frontend.tokenizer_zoo import REAL, TRAINED, Specimen, specimen

NAMES = (*REAL, *TRAINED)
SCRIPTS = [
    "plain words, 'quoted', don't; 12345 + 6.",
    "  two  spaces\n\nand lines\t",
    "你好世界",
    "日本語テキスト",
    "한국어",
    "ภาษาไทยสวัสดี",
    "a\u0301\u0327e\u0308",
    "🙂🙃👩‍👩‍👧‍👦🇫🇷",
    "naïve tok <tool><|start|> <|end|>▁▁x é",
    "\ufffd\x00\u200b\ufeff",
    "\ud7ff\ue000\U0010ffff",
]
EXAMPLES = 400 if FULL else 40  # found by hypothesis, for each tokenizer and property
RANDOM_STRINGS = 100_000 if FULL else 500  # drawn plainly, for each tokenizer


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Text of several scripts, and what a decoder shows for bytes that are not UTF-8."""
    parts = st.one_of(
        st.sampled_from(SCRIPTS),
        st.text(max_size=12),
        st.binary(max_size=8).map(lambda data: data.decode("utf-8", "replace")),
    )
    return "".join(draw(st.lists(parts, max_size=4)))


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Specimen) -> list[int]:
    """Encodings of text, or any ids of the vocabulary (and beyond it) in any order, or both mixed."""
    vocab_size = tokenizer.vocab_size
    text = tokenizer.backend.encode(draw(texts())).ids
    rare = [token for token in map(tokenizer.backend.token_to_id, _RARE_TOKENS) if token is not None]
    random_ids = draw(
        st.lists(
            st.one_of(st.integers(0, vocab_size - 1), st.sampled_from([*rare, vocab_size, vocab_size + 7])),
            max_size=12,
        )
    )
    return draw(st.sampled_from([text, random_ids, text + random_ids, random_ids + text]))


# Single bytes, of both kinds, so that characters are often begun, cut off and completed.
_RARE_TOKENS = [
    *(f"<0x{byte:02X}>" for byte in (0x41, 0x20, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xFF)),
    *(
        BYTE_TO_CHAR[byte]
        for byte in (0x41, 0x20, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xFF, 0xED)
    ),
    "<|start|>",
    "<|end|>",
    "<tool>",
    "▁",
]


def chunks_of(token_ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    return [token_ids[start:end] for start, end in itertools.pairwise(edges)]


def stream(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> str:
    """The concatenated deltas."""
    return "".join([*(detokenizer.append(chunk) for chunk in chunks), detokenizer.finish()])


def decode(tokenizer: Specimen, token_ids: Sequence[int], skip: bool = False) -> str:
    text: str = tokenizer.backend.decode(list(token_ids), skip_special_tokens=skip)
    return text


def after_prompt(tokenizer: Specimen, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """The definition in detokenizer.py: D(P+O) without its longest common prefix with D(P)."""
    before, whole = decode(tokenizer, prompt, skip), decode(tokenizer, [*prompt, *output], skip)
    length = 0
    while length < min(len(before), len(whole)) and before[length] == whole[length]:
        length += 1
    return whole[length:]


@pytest.mark.parametrize("name", NAMES)
def test_deltas_equal_the_one_shot_decode(name: str) -> None:
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)

    @settings(max_examples=EXAMPLES)
    @given(token_lists(tokenizer), st.lists(st.integers(0, 1000), max_size=6), st.booleans())
    def check(token_ids: list[int], cuts: list[int], skip: bool) -> None:
        detokenizer = factory.create(skip_special_tokens=skip)
        assert stream(detokenizer, chunks_of(token_ids, cuts)) == decode(tokenizer, token_ids, skip)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_finishing_at_every_offset_gives_the_decode_of_that_prefix(name: str) -> None:
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)

    @settings(max_examples=EXAMPLES // 4)
    @given(token_lists(tokenizer), st.booleans())
    def check(token_ids: list[int], skip: bool) -> None:
        streamed = factory.create(skip_special_tokens=skip)
        shown = ""
        for end in range(len(token_ids) + 1):
            finished = factory.create(skip_special_tokens=skip)
            by_one = [token_ids[index : index + 1] for index in range(end)]
            assert stream(finished, by_one) == decode(tokenizer, token_ids[:end], skip)
            # Nothing shown so far may have been taken back by what came later.
            assert decode(tokenizer, token_ids, skip).startswith(shown)
            shown += streamed.append(token_ids[end : end + 1])

    check()


def random_text(rng: random.Random) -> str:
    """Pieces of the scripts, cut anywhere, and random bytes as UTF-8 decoding shows them."""
    parts = []
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.5:
            script = rng.choice(SCRIPTS)
            start = rng.randrange(len(script))
            parts.append(script[start : start + rng.randrange(1, 8)])
        else:
            parts.append(rng.randbytes(rng.randrange(1, 8)).decode("utf-8", "replace"))
    return "".join(parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.timeout(600)
def test_many_random_byte_strings(name: str) -> None:
    """Encodings of random byte strings, ended anywhere (inside characters too), random tokens among them."""
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)
    rng = random.Random(name)
    for start in range(0, RANDOM_STRINGS, 500):
        texts = [random_text(rng) for _ in range(min(500, RANDOM_STRINGS - start))]
        lists = [encoding.ids for encoding in tokenizer.backend.encode_batch(texts)]
        for token_ids in lists:
            if rng.random() < 0.3:
                token_ids.insert(rng.randrange(len(token_ids) + 1), rng.randrange(tokenizer.vocab_size))
            del token_ids[rng.randrange(1, len(token_ids) + 2) :]
        skip = rng.random() < 0.5
        expected = tokenizer.backend.decode_batch(lists, skip_special_tokens=skip)
        for token_ids, text in zip(lists, expected, strict=True):
            chunks = chunks_of(token_ids, [rng.randrange(99) for _ in range(rng.randrange(5))])
            assert stream(factory.create(skip_special_tokens=skip), chunks) == text, token_ids


@pytest.mark.parametrize("name", NAMES)
def test_text_after_a_prompt(name: str) -> None:
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)

    @settings(max_examples=EXAMPLES // 2)
    @given(
        token_lists(tokenizer),
        token_lists(tokenizer),
        st.lists(st.integers(0, 99), max_size=4),
        st.booleans(),
    )
    def check(prompt: list[int], output: list[int], cuts: list[int], skip: bool) -> None:
        detokenizer = factory.create(skip_special_tokens=skip, prompt_token_ids=prompt)
        shown = stream(detokenizer, chunks_of(output, cuts))
        assert shown == after_prompt(tokenizer, prompt, output, skip)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_cut_anywhere_loses_no_character(name: str) -> None:
    tokenizer = specimen(name)
    factory = DetokenizerFactory(tokenizer)
    token_ids = tokenizer.backend.encode("Hello 你好 🙂🙃 ภาษา, it's été.", add_special_tokens=False).ids
    for cut in range(len(token_ids) + 1):
        prompt, output = token_ids[:cut], token_ids[cut:]
        shown = stream(factory.create(prompt_token_ids=prompt), [[token] for token in output])
        assert shown == after_prompt(tokenizer, prompt, output, skip=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("smollm2", DecoderKind.BYTE_LEVEL),
        ("minilm", DecoderKind.PIECES),
        ("byte_level", DecoderKind.BYTE_LEVEL),
        ("byte_fallback", DecoderKind.PIECES),
        ("byte_fallback_unstripped", DecoderKind.PIECES),
        ("word_piece", DecoderKind.PIECES),
        ("unigram", DecoderKind.PIECES),
        ("suffix_bpe", DecoderKind.SUFFIX),
        ("no_decoder", DecoderKind.PIECES),
        ("replace_after_fuse", DecoderKind.HELD),
        ("ctc", DecoderKind.HELD),
    ],
)
def test_decoder_is_recognised(name: str, kind: DecoderKind) -> None:
    assert DetokenizerFactory(specimen(name)).kind is kind


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
        decoders.Sequence([decoders.Replace("0", "1"), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("a", "b"), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace("e", "")]),
        decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteFallback()]),
        decoders.Sequence([]),
        decoders.Fuse(),
    ],
    ids=repr,
)
def test_unusual_chains_are_exact_too(decoder: decoders.Decoder) -> None:
    base = specimen("byte_fallback").backend
    backend = tokenizers.Tokenizer.from_str(base.to_str())
    backend.decoder = decoder
    tokenizer = Specimen("unusual", backend)
    factory = DetokenizerFactory(tokenizer)
    random_ids = random.Random(7)
    for _ in range(200 if FULL else 60):
        token_ids = [random_ids.randrange(1, tokenizer.vocab_size) for _ in range(random_ids.randrange(12))]
        prompt, output = token_ids[:3], token_ids[3:]
        assert stream(factory.create(), [[token] for token in token_ids]) == decode(
            tokenizer, token_ids, True
        )
        shown = stream(factory.create(prompt_token_ids=prompt), [output])
        assert shown == after_prompt(tokenizer, prompt, output, skip=True)


# What users see


def test_leading_space_is_kept_after_a_prompt() -> None:
    tokenizer = specimen("byte_fallback")
    prompt = tokenizer.backend.encode("The").ids
    output = tokenizer.backend.encode("quick").ids  # begins with "▁"
    factory = DetokenizerFactory(tokenizer)
    assert stream(factory.create(), [output]) == "quick"
    assert stream(factory.create(prompt_token_ids=prompt), [output]) == " quick"


def test_character_is_shown_once_it_is_whole() -> None:
    tokenizer = specimen("byte_level")
    detokenizer = DetokenizerFactory(tokenizer).create()
    token_ids = [tokenizer.id_of(BYTE_TO_CHAR[byte]) for byte in "🙂".encode()]
    assert [detokenizer.append([token]) for token in token_ids] == ["", "", "", "🙂"]
    assert detokenizer.finish() == ""


def test_character_cut_off_by_the_end_reads_as_the_decode_has_it() -> None:
    tokenizer = specimen("byte_level")
    detokenizer = DetokenizerFactory(tokenizer).create()
    token_ids = [tokenizer.id_of(BYTE_TO_CHAR[byte]) for byte in "A🙂".encode()[:3]]
    assert [detokenizer.append([token]) for token in token_ids] == ["A", "", ""]
    assert detokenizer.finish() == "\ufffd" == decode(tokenizer, token_ids)[1:]
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = specimen("byte_level")
    token_ids = tokenizer.backend.encode("<|start|>cat<tool><|end|>").ids
    factory = DetokenizerFactory(tokenizer)
    assert stream(factory.create(skip_special_tokens=True), [token_ids]) == "cat<tool>"
    assert stream(factory.create(skip_special_tokens=False), [token_ids]) == "<|start|>cat<tool><|end|>"


@pytest.mark.parametrize("name", ["word_piece", "no_decoder"])
def test_spaces_between_special_tokens(name: str) -> None:
    tokenizer = specimen(name)
    start, end, tool, cat = (tokenizer.id_of(token) for token in ("<|start|>", "<|end|>", "<tool>", "a"))
    token_ids = [start, end, cat, tool, tool, cat, end]
    factory = DetokenizerFactory(tokenizer)
    for chunks in ([token_ids], [[token] for token in token_ids]):
        apart = factory.create(skip_special_tokens=False, spaces_between_special_tokens=True)
        assert stream(apart, chunks) == "<|start|> <|end|> a <tool> <tool> a <|end|>"
        tight = factory.create(skip_special_tokens=False, spaces_between_special_tokens=False)
        assert stream(tight, chunks) == "<|start|><|end|> a <tool><tool> a <|end|>"
    tight = factory.create(
        skip_special_tokens=False, spaces_between_special_tokens=False, prompt_token_ids=[cat, start]
    )
    assert stream(tight, [[end], [cat]]) == "<|end|> a"


def test_negative_id_is_refused() -> None:
    with pytest.raises(OverflowError):
        DetokenizerFactory(specimen("byte_level")).create().append([-1])


def test_ids_outside_the_vocabulary_do_not_fill_the_tables() -> None:
    tokenizer = specimen("byte_level")
    detokenizer = DetokenizerFactory(tokenizer).create()
    assert detokenizer.append(range(tokenizer.vocab_size, tokenizer.vocab_size + 1000)) == ""
    assert len(detokenizer._table) == 0  # type: ignore[attr-defined]


# UTF-8 in pieces, against the library: every pair of bytes, and triples around the difficult edges


def _bytes_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({char: byte for byte, char in enumerate(BYTE_TO_CHAR)}))
    backend.decoder = decoders.ByteLevel()
    return backend


def test_every_short_byte_string_decodes_as_the_library_does() -> None:
    tokenizer = Specimen("bytes", _bytes_backend())
    factory = DetokenizerFactory(tokenizer)
    edges = [
        0x41,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
    ]
    strings = [*itertools.product(range(256), repeat=2), *itertools.product(edges, repeat=3)]
    if FULL:
        strings += itertools.product(edges, repeat=4)
    expected = tokenizer.backend.decode_batch([list(string) for string in strings], skip_special_tokens=False)
    for string, text in zip(strings, expected, strict=True):
        assert stream(factory.create(), [[byte] for byte in string]) == text


@given(st.binary(max_size=12), st.integers(0, 12))
@example("🙂".encode(), 2)
def test_utf8_stream_can_be_cut_anywhere(data: bytes, cut: int) -> None:
    head, pending = decode_utf8_stream(data[:cut])
    tail, rest = decode_utf8_stream(pending + data[cut:])
    end = "\ufffd" if rest else ""
    assert head + tail + end == data.decode("utf-8", "replace")
    assert pending == incomplete_utf8_suffix(data[:cut])
