"""Batches: everything once per epoch, whatever the hosts; right masks and tables; exact resumption."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.data.chat import EncodedPair
from laif_jax.data.pipeline import preference_batches, sft_batches
from tests.data.examples import MAX_LENGTH, dialogues, encoded, learnable, pairs

PAD = 7  # also a real token, of example 0
quick = settings(max_examples=25, deadline=None)
few = settings(max_examples=8, deadline=None)  # iterators start threads
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(
    lambda s: {"batch_size": s[0] * s[1] * 2, "micro_batch": s[1] * 2}
)


def take(batches):
    return [batches.at(step) for step in range(batches.total_steps)]


def segments(batch):
    """(micro-batch, row, segment, tokens, mask) of every segment; checks the arrays' form on the way."""
    micro, rows, length = batch["tokens"].shape
    assert all(
        batch[name].shape == (micro, rows, length) for name in ("segment_ids", "positions", "loss_mask")
    )
    assert {batch[name].dtype for name in ("tokens", "segment_ids", "positions")} == {np.dtype(np.int32)}
    assert batch["loss_mask"].dtype == np.float32
    for a in range(micro):
        for r in range(rows):
            ids = batch["segment_ids"][a, r]
            used = int((ids > 0).sum())
            assert (ids[:used] > 0).all()  # right-padded
            assert (np.diff(ids[:used]) >= 0).all()
            assert not batch["loss_mask"][a, r, used:].any()
            assert not batch["positions"][a, r, used:].any()
            assert (batch["tokens"][a, r, used:] == PAD).all()
            for segment in range(1, int(ids.max()) + 1):
                places = np.flatnonzero(ids == segment)
                assert batch["positions"][a, r, places].tolist() == list(range(len(places)))
                mask = batch["loss_mask"][a, r, places]
                assert mask[0] == 0
                yield a, r, segment, batch["tokens"][a, r, places].tolist(), mask.astype(int).tolist()


# ---- dialogues -------------------------------------------------------------------------------------------------


@quick
@given(dialogues(), shapes, st.booleans(), st.integers(0, 5))
def test_every_usable_dialogue_once_per_epoch_unchanged(examples, shape, packing, seed):
    batches = sft_batches(
        examples, max_length=MAX_LENGTH + 3, pad_id=PAD, packing=packing, seed=seed, epochs=2, **shape
    )
    layout = batches.layout
    expected = [i for i, one in enumerate(examples) if learnable(one)]
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step, batch in enumerate(take(batches)):
        assert batch["tokens"].shape == (layout.micro_batches, layout.rows, 32)
        assert batch["loss_mask"].sum() > 0
        index = batch["example_index"]
        assert index.shape == (*batch["tokens"].shape[:2], layout.max_segments)
        for a, r, segment, tokens, mask in segments(batch):
            i = int(index[a, r, segment - 1])
            assert (tokens, mask) == (examples[i].tokens, examples[i].loss_mask)
            seen[batches.epoch_of(step)].append(i)
        assert (index >= 0).sum() == sum(1 for _ in segments(batch))
    assert sorted(seen[0]) == sorted(seen[1]) == expected
    assert batches.report.used == len(expected)
    assert (
        batches.report.given
        == len(examples)
        == len(expected) + batches.report.no_target + batches.report.special_text
    )
    assert batches.report.supervised_tokens == sum(examples[i].supervised for i in expected)


@quick
@given(dialogues(), shapes, st.booleans(), st.integers(1, 5), st.integers(1, 3))
def test_hosts_side_by_side_are_the_one_host_batch(examples, shape, packing, hosts, multiple):
    settings_ = {"max_length": MAX_LENGTH, "pad_id": PAD, "packing": packing, "epochs": 1, **shape}
    alone = take(sft_batches(examples, **settings_))
    parts = [
        take(sft_batches(examples, row_multiple=multiple, process_index=i, process_count=hosts, **settings_))
        for i in range(hosts)
    ]
    assert {len(part) for part in parts} == {len(alone)}
    for step, batch in enumerate(alone):
        for name, array in batch.items():
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            rows = array.shape[1]
            assert joined.shape[1] % (hosts * multiple) == 0 or joined.shape[1] % multiple == 0
            np.testing.assert_array_equal(joined[:, :rows], array)
            padding = {"tokens": PAD, "example_index": -1}.get(name, 0)
            assert (joined[:, rows:] == padding).all()


@few
@given(dialogues(), shapes, st.booleans(), st.integers(1, 9))
def test_resuming_anywhere_goes_on_exactly(examples, shape, packing, steps):
    def make(**kwargs):
        return sft_batches(
            examples,
            max_length=MAX_LENGTH,
            pad_id=PAD,
            packing=packing,
            steps=steps,
            seed=3,
            **shape,
            **kwargs,
        )

    whole = list(make())
    assert len(whole) == steps == make().total_steps
    for stop in {0, steps // 2, steps - 1}:
        first = make()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = make()
        next(second)  # wherever it was
        second.set_state(state)
        rest = list(second)
        assert len(rest) == steps - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_an_exhausted_iterator_can_go_back():
    batches = sft_batches([encoded(0, 5, 1)], batch_size=1, max_length=8, pad_id=PAD, epochs=3)
    start = batches.get_state()
    assert len(list(batches)) == 3
    batches.set_state(start)
    assert len(list(batches)) == 3


def test_a_state_of_other_data_or_settings_is_refused_but_not_of_other_hosts():
    def make(n=5, **kwargs):
        examples = [encoded(i, 6, 2) for i in range(n)]
        return sft_batches(
            examples, **{"batch_size": 2, "max_length": 8, "pad_id": PAD, "epochs": 1, **kwargs}
        )

    state = make().get_state()
    for other in (make(4), make(batch_size=4), make(seed=1), make(packing=True), make(max_length=9)):
        with pytest.raises(ValueError, match="belongs to other data or batch settings"):
            other.set_state(state)
    make(process_count=2, process_index=1).set_state(state)
    make(micro_batch=1).set_state(state)


def test_epochs_are_shuffled_differently_and_the_seed_decides():
    examples = [encoded(i, 3, 1) for i in range(50)]

    def order(seed, epochs=2):
        batches = sft_batches(examples, batch_size=10, max_length=8, pad_id=PAD, seed=seed, epochs=epochs)
        return np.concatenate([batch["example_index"].ravel() for batch in batches]).reshape(epochs, 50)

    first, second = order(0)
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first)
    assert order(0).tolist() == [first.tolist(), second.tolist()]
    assert order(1)[0].tolist() != first.tolist()


def test_the_last_batch_is_padded_never_dropped():
    examples = [encoded(i, 3, 1) for i in range(5)]
    batches = sft_batches(
        examples, batch_size=4, micro_batch=2, max_length=8, pad_id=PAD, epochs=1, shuffle=False
    )
    assert (batches.total_steps, batches.steps_per_epoch) == (2, 2)
    last = batches.at(1)
    assert last["tokens"].shape == (2, 2, 8)
    assert last["example_index"].ravel().tolist() == [4, -1, -1, -1]
    assert last["loss_mask"].sum() == 2


def test_packing_needs_fewer_rows():
    examples = [encoded(i, 4, 1) for i in range(32)]
    kwargs = {"batch_size": 2, "max_length": 16, "pad_id": PAD, "epochs": 1}
    loose, packed = (
        sft_batches(examples, **kwargs),
        sft_batches(examples, packing=True, max_segments=4, **kwargs),
    )
    assert (loose.total_steps, packed.total_steps) == (16, 4)
    assert packed.report.pad_fraction == 0.0
    assert loose.report.pad_fraction == 0.75


def test_static_sizes_depend_on_settings_alone():
    kwargs = {"batch_size": 4, "max_length": 100, "pad_id": PAD, "epochs": 1}
    for packing in (False, True):
        small = sft_batches([encoded(0, 3, 1)], packing=packing, **kwargs)
        large = sft_batches([encoded(i, 90, 1) for i in range(9)], packing=packing, **kwargs)
        assert small.layout == large.layout
        assert small.layout.row_length == 104


@pytest.mark.parametrize(
    ("examples", "kwargs", "message"),
    [
        ([encoded(0, 3, 3)], {}, "no example can be trained on: of 1, 1 have no supervised token and 0"),
        ([encoded(0, 3, 1, special_text=True)], {}, "1 hold the text of a special token"),
        ([], {}, "no example can be trained on: of 0"),
        ([encoded(0, 3, 3), encoded(1, 17, 1)], {}, "example 1 has 17 tokens, more than the row length 16"),
        ([encoded(0, 3, 1)], {"batch_size": 3, "micro_batch": 2}, "3 is not a multiple of `micro_batch` 2"),
        ([encoded(0, 3, 1)], {"steps": 3}, "give one of `epochs`"),
        ([encoded(0, 3, 1)], {"epochs": None}, "give one of `epochs`"),
        ([encoded(0, 3, 1)], {"epochs": None, "steps": 0}, "at least 1"),
        ([encoded(0, 3, 1)], {"process_index": 2, "process_count": 2}, "`process_index` 2 of"),
    ],
)
def test_what_cannot_work_is_an_error(examples, kwargs, message):
    settings_ = {"batch_size": 2, "max_length": 16, "pad_id": PAD, "epochs": 1} | kwargs
    with pytest.raises(ValueError, match=message):
        sft_batches(examples, **settings_)


def test_a_step_that_does_not_exist():
    batches = sft_batches([encoded(0, 3, 1)], batch_size=1, max_length=8, pad_id=PAD, epochs=2)
    with pytest.raises(IndexError, match="step 2 of a run of 2"):
        batches.at(2)


# ---- pairs -----------------------------------------------------------------------------------------------------


@quick
@given(pairs(), shapes, st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_every_usable_pair_once_with_its_values_on_one_host(examples, shape, packing, hosts, multiple):
    n = len(examples)
    reference = {"ref_chosen": -np.arange(n, dtype=float), "ref_rejected": -2 * np.arange(n, dtype=float)}
    made = [
        preference_batches(
            examples,
            max_length=MAX_LENGTH,
            pad_id=PAD,
            packing=packing,
            seed=1,
            epochs=1,
            row_multiple=multiple,
            process_index=i,
            process_count=hosts,
            **shape,
            **reference,
        )
        for i in range(hosts)
    ]
    seen = []
    per_row = made[0].layout.max_segments
    for host, batches in enumerate(made):
        first_row = host * batches.layout.rows // hosts
        for batch in take(batches):
            found = {(a, r, s): (tokens, mask) for a, r, s, tokens, mask in segments(batch)}
            real = batch["pair_index"] >= 0
            assert len(found) == 2 * real.sum()  # both sides are here, and nothing else
            for name in ("chosen", "rejected", "p_chosen", "weight", "ref_chosen", "ref_rejected"):
                assert (
                    batch[name].shape
                    == real.shape
                    == (batches.layout.micro_batches, batches.layout.pairs // hosts)
                )
                assert (batch[name][~real] == 0).all()
            for a, slot in np.argwhere(real):
                i = int(batch["pair_index"][a, slot])
                seen.append(i)
                for side in ("chosen", "rejected"):
                    row, segment = divmod(int(batch[side][a, slot]), per_row)
                    one = getattr(examples[i], side)
                    assert found[a, row - first_row, segment + 1] == (one.tokens, one.loss_mask)
                    assert batch[f"ref_{side}"][a, slot] == reference[f"ref_{side}"][i]
                assert batch["p_chosen"][a, slot] == np.float32(examples[i].p_chosen)
                assert batch["weight"][a, slot] == examples[i].weight
    assert sorted(seen) == [
        i for i, p in enumerate(examples) if learnable(p.chosen) and learnable(p.rejected)
    ]


@quick
@given(pairs(), shapes, st.booleans(), st.integers(2, 4))
def test_hosts_side_by_side_hold_the_one_host_pairs(examples, shape, packing, hosts):
    settings_ = {"max_length": MAX_LENGTH, "pad_id": PAD, "packing": packing, "epochs": 2, **shape}
    alone = take(preference_batches(examples, **settings_))
    parts = [
        take(preference_batches(examples, process_index=i, process_count=hosts, **settings_))
        for i in range(hosts)
    ]
    for step, batch in enumerate(alone):
        # The step joins the hosts' rows before it looks a pair up, so `chosen` and `rejected` count the rows of all.
        columns = ("pair_index", "chosen", "rejected", "p_chosen", "weight")
        for name in ("tokens", "segment_ids", "loss_mask", *columns):
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined[:, : batch[name].shape[1]], batch[name])
    assert {len(part) for part in parts} == {len(alone)}


@few
@given(pairs(), shapes, st.booleans(), st.integers(1, 6))
def test_pairs_resume_exactly(examples, shape, packing, steps):
    def make():
        return preference_batches(
            examples, max_length=MAX_LENGTH, pad_id=PAD, packing=packing, steps=steps, seed=3, **shape
        )

    first, whole = make(), list(make())
    for _ in range(steps // 2):
        next(first)
    second = make()
    second.set_state(json.loads(json.dumps(first.get_state())))
    for a, b in zip(second, whole[steps // 2 :], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_an_unpacked_pair_is_two_rows():
    examples = [EncodedPair(encoded(2 * i, 4, 2), encoded(2 * i + 1, 5, 2)) for i in range(3)]
    batches = preference_batches(
        examples, batch_size=4, micro_batch=2, max_length=8, pad_id=PAD, epochs=1, shuffle=False
    )
    batch = batches.at(0)
    assert batches.layout == (2, 4, 4, 8, 1, 2, 2)
    assert batch["pair_index"].tolist() == [[0, 1], [2, -1]]
    assert batch["chosen"].tolist() == [[0, 2], [0, 0]]
    assert batch["rejected"].tolist() == [[1, 3], [1, 0]]
    assert batch["weight"].tolist() == [[1, 1], [1, 0]]
    assert batch["p_chosen"].tolist() == [[1, 1], [1, 0]]


def test_a_change_of_labels_is_a_change_of_data():
    def make(p):
        pair = EncodedPair(encoded(0, 4, 2), encoded(1, 4, 2), p_chosen=p)
        return preference_batches([pair], batch_size=1, max_length=8, pad_id=PAD, epochs=1)

    with pytest.raises(ValueError, match="other data"):
        make(0.7).set_state(make(0.8).get_state())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"packing": True, "batch_size": 3}, "3: packed pairs lie in two rows; give an even number"),
        ({"ref_chosen": np.zeros(3)}, r"shape \(3,\), expected \(1,\)"),
    ],
)
def test_what_cannot_work_with_pairs_is_an_error(kwargs, message):
    settings_ = {"batch_size": 2, "max_length": 8, "pad_id": PAD, "epochs": 1} | kwargs
    with pytest.raises(ValueError, match=message):
        preference_batches([EncodedPair(encoded(0, 4, 2), encoded(1, 4, 2))], **settings_)


# ---- pairs that share their prompt -----------------------------------------------------------------------------


@st.composite
def answered(draw):
    """Pairs whose sides begin alike: with one prompt, and sometimes with more, or nothing at all."""
    made = []
    for i in range(draw(st.integers(1, 12))):
        prompt, a, b = (draw(st.integers(low, 8)) for low in (1, 1, 1))
        same = draw(st.integers(0, prompt + 3))  # tokens that the rejected side has of the chosen one
        chosen, other = encoded(2 * i, prompt + a, prompt), encoded(2 * i + 1, prompt + b, prompt)
        same = min(same, len(chosen.tokens))
        tokens = (chosen.tokens[:same] + other.tokens[same:])[: prompt + b]
        made.append(EncodedPair(chosen, replace(other, tokens=tokens)))
    return made


@quick
@given(answered(), st.integers(1, 3), st.integers(1, 3))
def test_a_shared_prompt_is_there_once_and_both_dialogues_are_whole(examples, hosts, multiple):
    made = [
        preference_batches(
            examples,
            batch_size=4,
            max_length=16,
            pad_id=PAD,
            packing=True,
            share_prompts=True,
            epochs=1,
            row_multiple=multiple,
            process_index=i,
            process_count=hosts,
        )
        for i in range(hosts)
    ]
    layout = made[0].layout
    assert layout.row_length == 32
    seen = []
    for host, batches in enumerate(made):
        first_row = host * layout.rows // hosts
        for batch in take(batches):
            arrays = {name: batch[name][0] for name in ("tokens", "segment_ids", "positions", "prefix")}
            assert not batch["prefix"][batch["segment_ids"] == 0].any()
            for a, slot in np.argwhere(batch["pair_index"] >= 0):
                pair = examples[int(batch["pair_index"][a, slot])]
                seen.append(int(batch["pair_index"][a, slot]))
                row, segment = divmod(int(batch["chosen"][a, slot]), layout.max_segments)
                assert batch["rejected"][a, slot] == batch["chosen"][a, slot] + 1
                row -= first_row
                own = [
                    {name: array[row, arrays["segment_ids"][row] == s] for name, array in arrays.items()}
                    for s in (segment + 1, segment + 2)
                ]
                mask = [batch["loss_mask"][0, row, arrays["segment_ids"][row] == segment + s] for s in (1, 2)]
                (start,) = set(own[1]["prefix"].tolist())
                same = next(
                    (t for t, (x, y) in enumerate(zip(pair.chosen.tokens, pair.rejected.tokens)) if x != y),
                    min(len(pair.chosen.tokens), len(pair.rejected.tokens)),
                )
                assert start == max(min(same, pair.rejected.loss_mask.index(1)) - 1, 0)
                assert not own[0]["prefix"].any()
                assert own[0]["tokens"].tolist() == pair.chosen.tokens
                whole = own[0]["tokens"][:start].tolist() + own[1]["tokens"].tolist()
                assert whole == pair.rejected.tokens
                assert mask[0].tolist() == pair.chosen.loss_mask
                assert [0.0] * start + mask[1].tolist() == pair.rejected.loss_mask
                assert mask[1][0] == 0
                assert own[1]["positions"].tolist() == list(range(start, len(whole)))
    assert sorted(seen) == list(range(len(examples)))


def test_shared_prompts_need_packing_and_sides_that_fit_a_row():
    pair = EncodedPair(encoded(0, 9, 2), encoded(1, 4, 2))
    settings_ = {"batch_size": 2, "pad_id": PAD, "epochs": 1, "share_prompts": True}
    with pytest.raises(ValueError, match="needs `packing`"):
        preference_batches([pair], max_length=16, **settings_)
    with pytest.raises(ValueError, match="example 0 has 9 tokens, more than the row length 8"):
        preference_batches([pair], max_length=8, packing=True, **settings_)
