"""Random records and JSON values, lone surrogates and odd characters included."""

from hypothesis import strategies as st

from laif_jax.records import (
    Comparison,
    Completion,
    Judgement,
    Message,
    Preference,
    Prompt,
    Rating,
    Status,
    Usage,
)

# Unicode of every kind; surrogates too, since `json.loads('"\\ud800"')` lets them in.
texts = st.text(st.characters(codec=None), max_size=20)
# Not in keys: pydantic's `model_dump(mode="json")` replaces lone surrogates there. No data source makes such keys.
keys = st.text(st.characters(codec="utf-8"), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(keys, json_values, max_size=4)

messages = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=texts)
user = st.builds(Message, role=st.just("user"), content=texts)
prompts = st.builds(
    lambda before, last, source, meta: Prompt(messages=(*before, last), source=source, meta=meta),
    st.lists(messages, max_size=3),
    user,
    texts,
    objects,
)
completions = st.builds(
    Completion,
    prompt_id=texts,
    generator=texts,
    text=texts,
    finish_reason=st.sampled_from(["stop", "length"]),
    sample_index=st.integers(0, 9),
    usage=st.none() | st.builds(Usage),
    meta=objects,
)
comparisons = st.builds(Comparison, prompt=prompts, a=completions, b=completions)
probabilities = st.floats(0, 1)
judgements = st.one_of(
    st.builds(
        Judgement,
        comparison_id=texts,
        critic=texts,
        order=st.sampled_from(["ab", "ba", "both"]),
        status=st.sampled_from([Status.OK, Status.TIE]),
        p_b=probabilities,
        raw=texts,
        meta=objects,
    ),
    st.builds(
        Judgement,
        comparison_id=texts,
        critic=texts,
        order=st.just("ab"),
        status=st.sampled_from([Status.UNPARSABLE, Status.REFUSED, Status.FAILED]),
        reason=texts,
    ),
)
preferences = st.builds(
    Preference,
    prompt=prompts,
    chosen=completions,
    rejected=completions,
    p_chosen=probabilities,
    judgement_ids=st.lists(texts, max_size=2).map(tuple),
)
scores = st.floats(1, 10)
ratings = st.one_of(
    st.builds(
        Rating,
        completion_id=texts,
        prompt_id=texts,
        critic=texts,
        status=st.just(Status.OK),
        score=scores,
        p=st.none() | st.tuples(*[probabilities] * 10),
        mass=st.none() | probabilities,
        raw=texts,
    ),
    st.builds(
        Rating,
        completion_id=texts,
        prompt_id=texts,
        critic=texts,
        status=st.sampled_from([Status.UNPARSABLE, Status.REFUSED, Status.FAILED]),
        reason=texts,
    ),
)
records = st.one_of(prompts, completions, comparisons, judgements, ratings, preferences)
