"""A response read while it is written: thinking, content, nothing of tags, however it is cut."""

import pytest

from collab_jax.serve.reader import Decoder, Reader, Stops, first_of, held_back

MARKER = "<unknown> I need help </unknown>"


class Bytes:
    """A Text whose tokens are bytes of UTF-8."""

    marker = MARKER

    def spelt(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def read(text: str, size: int) -> tuple[str, str, Reader]:
    """(thinking, content, the reader) of a text that comes `size` bytes at a time."""
    reader, pieces = Reader(Bytes()), []  # pyright: ignore[reportArgumentType]
    raw = list(text.encode())
    for start in range(0, len(raw), size):
        pieces += reader.feed(raw[start : start + size])
    pieces += reader.finish()
    join = lambda kind: "".join(p.text for p in pieces if p.kind == kind)  # noqa: E731
    return join("reasoning"), join("content"), reader


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("<think> a  b </think><answer>\n 1 + 2 \n</answer>", "a  b", "1 + 2"),
        ("<think>é 日本 <3 </think>\n<answer>π < 4</answer>", "é 日本 <3", "π < 4"),
        ("no tags at all", "no tags at all", ""),
        ("<think>x</think><answer>cut of", "x", "cut of"),
        ("<think>x</think><answer>a</answer> and more", "x", "a"),
        (f"so {MARKER} was quoted<answer>{MARKER}a</answer>", "so  was quoted", "a"),
        ("<answer>a<answer>b</answer>", "", "ab"),
        ("<think>1 <answ", "1 <answ", ""),
    ],
)
def test_a_response_is_split_wherever_it_is_cut(text, thinking, content, size):
    assert read(text, size)[:2] == (thinking, content)


def test_whether_an_answer_was_opened_and_closed():
    states = [
        (read(text, 1)[2].opened, read(text, 1)[2].closed)
        for text in ("<think>", "</answer>", "<answer>a", "<answer>a</answer>")
    ]
    assert states == [(False, False), (False, False), (True, False), (True, True)]


def test_content_is_out_as_soon_as_it_is_certain():
    reader = Reader(Bytes())  # pyright: ignore[reportArgumentType]
    assert [p.text for p in reader.feed(list(b"<think>ab <"))] == ["ab"]
    assert [p.text for p in reader.feed(list(b"3 c"))] == [" <3 c"]


def test_a_token_that_is_no_character_does_not_hold_the_rest_back_for_ever():
    decoder = Decoder(Bytes())  # pyright: ignore[reportArgumentType]
    assert decoder.feed([0xE6]) == "" and decoder.feed([0x97, 0xA5]) == "日"
    assert "".join(decoder.feed([0xFF]) for _ in range(20)).count("\ufffd") >= 8


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 40])
def test_characters_are_whole_however_many_tokens_come_at_a_time(size):
    text = "日本語🙂 é, plain\n" * 6
    raw, decoder, out = list(text.encode()), Decoder(Bytes()), ""  # pyright: ignore[reportArgumentType]
    for start in range(0, len(raw), size):
        out += decoder.feed(raw[start : start + size])
        assert "\ufffd" not in out and len(decoder.held) < 4
    assert out == text and decoder.finish() == ""
    assert decoder.feed(list("日".encode())[:2]) == "" and decoder.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_content_ends_before_the_first_stop(size):
    text, stops = "one STOP two", Stops(["two", " STO"])
    out = "".join(stops.feed(text[i : i + size]) for i in range(0, len(text), size))
    assert out + stops.finish() == "one" and stops.hit
    free = Stops(["xyz"])
    assert free.feed("a xy") + free.feed(" b x") + free.finish() == "a xy b x" and not free.hit


def test_the_first_and_longest_string_is_found():
    assert first_of("a<b<bc", ["<bc", "<b"]) == (1, "<b")
    assert first_of("a<bc", ["<b", "<bc"]) == (1, "<bc") and first_of("a", ["b"]) is None
    assert [held_back(t, ["<ab", "<ac>"]) for t in ("", "x", "<", "x<a", "<ac", "<ab ")] == [
        0, 0, 1, 2, 3, 0,
    ]  # fmt: skip


def test_each_piece_knows_the_tokens_that_it_is_of():
    """Tokens are bytes here: a character of three bytes is of three tokens, white space inside is
    of its own, and what surrounds the content is of nobody.
    """
    raw = list("<answer> π <4</answer>".encode())
    reader, pieces = Reader(Bytes()), []  # pyright: ignore[reportArgumentType]
    for token in raw:
        pieces += reader.feed([token])
    tokens = [place for piece in pieces for places in piece.tokens for place in places]
    assert bytes(raw[place] for place in tokens).decode() == "π <4"
    assert all(len(piece.text) == len(piece.tokens) for piece in pieces)
