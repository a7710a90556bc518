"""Names of beginnings: equal exactly where all tokens up to there are, however the rows came to be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalnet.client.prefix import Prefix, SentNames, first_name
from petalnet.p2p.session_messages import NAME_BYTES, UNIT_TOKENS

ORIGIN = first_name("model", "float32", 0)
TOKEN_BYTES = 8


def embed(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in tokens)


def prefix_of(tokens: list[int]) -> Prefix:
    return Prefix(ORIGIN).extended(embed(tokens), len(tokens))


def lengths(most: int = 3 * UNIT_TOKENS) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, most), st.sampled_from([0, 1, UNIT_TOKENS - 1, UNIT_TOKENS, UNIT_TOKENS + 1, 2 * UNIT_TOKENS]))


@given(st.lists(lengths(), max_size=6))
def test_pieces_name_what_the_whole_names(pieces: list[int]) -> None:
    tokens = [index * 7 % 1000 for index in range(sum(pieces))]
    grown, position = Prefix(ORIGIN), 0
    for count in pieces:
        grown = grown.extended(memoryview(embed(tokens[position : position + count])), count)
        position += count
        assert grown.length == position
        assert len(grown.names) == position // UNIT_TOKENS
    assert grown == prefix_of(tokens)
    assert all(len(name) == NAME_BYTES for name in grown.names)


@given(lengths(), lengths(), lengths())
def test_set_back_and_on(length: int, back: int, more: int) -> None:
    tokens = list(range(length))
    again = [5000 + index for index in range(more)]
    cut = prefix_of(tokens).cut(back)
    assert cut == prefix_of(tokens[:back])
    assert cut.extended(embed(again), more) == prefix_of(tokens[:back] + again)


@given(lengths(), st.data())
def test_another_token_changes_all_names_from_its_unit_on(length: int, data: st.DataObject) -> None:
    tokens = list(range(length))
    if not tokens:
        return
    changed = data.draw(st.integers(0, length - 1))
    other = [*tokens]
    other[changed] += 100_000
    ours, theirs = prefix_of(tokens).names, prefix_of(other).names
    same = changed // UNIT_TOKENS
    assert ours[:same] == theirs[:same]
    assert not set(ours[same:]) & set(theirs[same:])


def test_a_name_belongs_to_its_model_dtype_and_block() -> None:
    origins = [first_name(*facts) for facts in (("a", "float32", 0), ("b", "float32", 0), ("a", "bfloat16", 0), ("a", "float32", 1))]
    tokens = embed(list(range(UNIT_TOKENS)))
    assert len({Prefix(origin).extended(tokens, UNIT_TOKENS).names for origin in origins}) == 4


def test_sent_names_are_few_and_the_latest() -> None:
    sent = SentNames(most=4)
    names = [bytes([number]) * NAME_BYTES for number in range(5)]
    sent.note("a", names[:3])
    assert (sent.known("a", names), sent.known("b", names)) == (3, 0)
    sent.note("b", names[:1])
    sent.note("a", names[3:])  # two too many: of the first row the end goes
    assert len(sent) == 4
    assert (sent.known("a", names), sent.known("a", names[3:]), sent.known("b", names)) == (1, 2, 1)
    sent.forget("a", names)
    assert (sent.known("a", names), len(sent)) == (0, 1)
