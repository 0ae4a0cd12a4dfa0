"""Random tokenised examples for the pipeline's tests: every token names its example, so nothing can be mixed up."""

from hypothesis import strategies as st

from laif_jax.data.chat import Encoded, EncodedPair

MAX_LENGTH = 24


def encoded(index: int, length: int, prompt: int, **flags) -> Encoded:
    """Tokens `1000 * index + place`; the first `prompt` are not learned."""
    tokens = [1000 * index + place for place in range(length)]
    mask = [int(place >= max(prompt, 1)) for place in range(length)]
    return Encoded(tokens, mask, prompt, **flags)


def learnable(one: Encoded) -> bool:
    return one.supervised > 0 and not one.special_text


sizes = st.tuples(st.integers(1, MAX_LENGTH), st.integers(0, MAX_LENGTH))


@st.composite
def dialogues(draw, max_size=40):
    drawn = draw(st.lists(sizes, min_size=1, max_size=max_size))
    special = draw(st.lists(st.integers(0, 2 * max_size), max_size=2))
    made = [encoded(i, length, prompt, special_text=i in special) for i, (length, prompt) in enumerate(drawn)]
    return made if any(map(learnable, made)) else [*made, encoded(len(made), 3, 1)]


@st.composite
def pairs(draw, max_size=30):
    drawn = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=max_size))
    made = [
        EncodedPair(
            encoded(2 * i, *chosen), encoded(2 * i + 1, *rejected), p_chosen=0.5 + i / 100, weight=1.0 + i % 3
        )
        for i, (chosen, rejected) in enumerate(drawn)
    ]
    n = len(made)
    if any(learnable(pair.chosen) and learnable(pair.rejected) for pair in made):
        return made
    return [*made, EncodedPair(encoded(2 * n, 3, 1), encoded(2 * n + 1, 4, 2))]
