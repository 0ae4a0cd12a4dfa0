"""Runs that train together leave what they leave alone: losses, weights, files; and one that fails is the only one."""

import functools
import json
import time

import jax
import numpy as np
import pytest

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import DpoSpec, OptimizerSpec, SftSpec, TrainSpec
from laif_jax.models.config import ModelConfig
from laif_jax.models.decoder import init_params
from laif_jax.models.reward import reward_specs
from laif_jax.parallel import param_shardings
from laif_jax.training import together
from laif_jax.training.loop import train
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.recorder import NonFiniteError
from laif_jax.training.reference import reference_logps
from laif_jax.training.reward_task import reward_task
from laif_jax.training.state import create_state
from laif_jax.training.tasks import preference_task, sft_task
from tests.training import small, toys

RATES = (1e-3, 3e-3, 2e-3)


class Cycle:
    """Three batches, over and over, other ones for every seed."""

    steps_per_epoch = 3

    def __init__(self, make, seed):
        self.batches = [make(seed, number) for number in range(3)]
        self.step = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return dict(self.batches[(self.step - 1) % 3])

    def get_state(self):
        return self.step

    def set_state(self, state):
        self.step = state


def sft_batch(seed, number):
    docs = small.documents(8, 10 * seed + number)
    return small.lay_out(docs, [[i] for i in range(8)], 16)


def pair_batch(seed, number):
    return small.pair_batch(seed=10 * seed + number, first=4 * number)


def optimizer(seed, **options):
    return OptimizerSpec(name="adamw", learning_rate=RATES[seed % 3], clip_norm=0.5 + seed, **options)


def weights(cfg: ModelConfig, seed: int):
    return init_params(cfg, jax.random.key(seed))


def sft(seed, out, *, steps=5, mesh=None, **options):
    spec = SftSpec(steps=steps + seed, log_every=2, save_every=2, optimizer=optimizer(seed))
    spec = spec.model_copy(update=options)
    mesh = mesh or small.mesh()
    task = sft_task(small.config(), spec, **small.F32)
    state = small.fresh_state(task, mesh, spec.optimizer, params=weights(task.cfg, seed))
    return train(task, Cycle(sft_batch, seed), state, spec, out, mesh=mesh, progress=False)


def dpo(seed, out, *, mesh=None, **options):
    smoothing = 0.05 * (1 + seed)
    spec = DpoSpec(
        loss="conservative",
        steps=7,
        beta=0.1 * (1 + seed),
        label_smoothing=smoothing,
        optimizer=optimizer(seed),
    )
    spec = spec.model_copy(update=options)
    mesh = mesh or small.mesh()
    task = preference_task(small.config(), spec, **small.F32)
    state = small.fresh_state(task, mesh, spec.optimizer, params=weights(task.cfg, seed))
    batches, reference = Cycle(pair_batch, seed), None
    if not together.joined():
        hyper = dict(task.numbers) | optimizer_hyper(spec.optimizer)
        reference, state = reference_logps(
            task,
            state,
            make_optimizer(spec.optimizer),
            batches,
            12,
            mesh=mesh,
            hyper=hyper,
            cache_dir=out,
        )
    own = 12 if reference is None else None
    return train(
        task,
        batches,
        state,
        spec,
        out,
        mesh=mesh,
        reference=reference,
        own_reference=own,
        progress=False,
    )


def reward(seed, out, *, mesh=None, members=1):
    spec = RewardSpec(steps=5, members=members, margin=0.1 * seed, optimizer=optimizer(seed))
    mesh = mesh or small.mesh()
    cfg = small.config()
    cfg = type(cfg)(**{**vars(cfg), "head": "score"})
    task = reward_task(cfg, spec, dtype="float32", remat="none")
    specs = reward_specs(cfg, members)
    leaves, tree = jax.tree.flatten(specs, is_leaf=lambda x: hasattr(x, "logical_axes"))
    random = np.random.default_rng(seed)
    params = tree.unflatten([random.normal(0, 0.1, leaf.shape).astype(np.float32) for leaf in leaves])
    state = create_state(
        params, make_optimizer(spec.optimizer), mesh=mesh, shardings=param_shardings(specs, mesh)
    )
    return train(task, Cycle(pair_batch, seed), state, spec, out, mesh=mesh, progress=False)


RUNS = {"sft": sft, "dpo": dpo, "reward": reward}


def meet(calls, groups=None, most=16):
    return together.Meeting(most, None if groups is None else (lambda g: groups.append(len(g)))).run(calls)


def assert_same(a, b, rtol=2e-5):
    assert len(a.history) == len(b.history)
    for x, y in zip(a.history, b.history):
        assert x.keys() - {"perf/tokens_per_second_per_device"} == y.keys() - {
            "perf/tokens_per_second_per_device"
        }
        for name in x.keys() - {"perf/tokens_per_second_per_device"}:
            np.testing.assert_allclose(x[name], y[name], rtol=rtol, atol=1e-5, err_msg=f"{name} {x['step']}")
    for x, y in zip(jax.tree.leaves(a.state.params), jax.tree.leaves(b.state.params)):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-3, atol=2e-5)


# ---- equal to alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_members_are_trained_as_alone(kind, tmp_path):
    """Other initial weights, data, learning rates, clipping, betas, margins and lengths; one group."""
    groups: list[int] = []
    calls = [lambda seed=seed: RUNS[kind](seed, tmp_path / f"together-{seed}") for seed in range(3)]
    found = meet(calls, groups)
    assert groups == [3]
    for seed, result in enumerate(found):
        assert not isinstance(result, BaseException), result
        assert_same(RUNS[kind](seed, tmp_path / f"alone-{seed}"), result)


def test_an_ensemble_of_reward_models_may_be_a_member(tmp_path):
    groups: list[int] = []
    calls = [lambda seed=seed: reward(seed, tmp_path / f"together-{seed}", members=2) for seed in range(2)]
    found = meet(calls, groups)
    assert groups == [2]
    for seed, result in enumerate(found):
        assert_same(reward(seed, tmp_path / f"alone-{seed}", members=2), result)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_members_lie_over_all_devices_of_a_mesh_that_splits_a_model(kind, tmp_path):
    """Three members on four devices: one place is empty. Alone, the model itself is split."""
    mesh = small.mesh(data=2, fsdp=2)
    calls = [
        lambda seed=seed: RUNS[kind](seed, tmp_path / f"together-{seed}", mesh=mesh) for seed in range(3)
    ]
    for seed, result in enumerate(meet(calls)):
        assert not isinstance(result, BaseException), result
        assert_same(RUNS[kind](seed, tmp_path / f"alone-{seed}", mesh=mesh), result)


def test_by_vmap_and_one_after_the_other_are_equal():
    task = sft_task(small.config(), SftSpec(steps=1), **small.F32)
    found = []
    for rolled in (True, False):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (together.AXIS,))
        states = [small.fresh_state(task, small.mesh(), params=weights(task.cfg, k)) for k in range(2)]
        stacked = jax.device_put(
            jax.tree.map(lambda *x: np.stack(x), *jax.device_get(states)),
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(together.AXIS)),
        )
        batches = [sft_batch(k, 0) for k in range(2)]
        batch = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        hyper = {"learning_rate": np.float32([0.1, 0.2]), "clip_norm": np.float32([1.0, np.inf])}
        step = together.members_step(task, make_optimizer(small.PLAIN), mesh, rolled)
        states, metrics = step(stacked, np.array([True, True]), batch, hyper)
        found.append((states.trainable, metrics))
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1])):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


# ---- groups ------------------------------------------------------------------------------------------------------


def toy(seed, out, *, rows=8, steps=5, callback=None, params=None):
    """A run of a regression, which compiles in no time; other numbers, data and weights for every seed."""
    spec = TrainSpec(steps=steps + seed, log_every=2, save_every=2, optimizer=optimizer(seed))
    start = toys.params(seed) if params is None else params
    return train(
        toys.loss_fn,
        toys.Batches(spec.steps, rows),
        create_state(start, make_optimizer(spec.optimizer), mesh=toys.mesh()),
        spec,
        out,
        mesh=toys.mesh(),
        callback=callback,
        callback_every=1,
        progress=False,
    )


def test_other_shapes_are_other_groups(tmp_path):
    groups: list[int] = []
    calls = [lambda seed=seed: toy(seed, tmp_path / f"a{seed}") for seed in range(2)]
    calls += [lambda seed=seed: toy(seed, tmp_path / f"b{seed}", rows=12) for seed in range(3)]
    found = meet(calls, groups)
    assert not any(isinstance(result, BaseException) for result in found)
    assert sorted(groups) == [2, 3]


def test_a_group_has_no_more_members_than_asked_for(tmp_path):
    groups: list[int] = []
    meet([lambda seed=seed: toy(seed, tmp_path / str(seed)) for seed in range(3)], groups, most=2)
    assert groups == [2, 1]


def test_a_call_that_trains_twice_and_one_that_does_not(tmp_path):
    groups: list[int] = []

    def twice():
        first = toy(0, tmp_path / "first")
        return toy(1, tmp_path / "second").history[-1]["step"], first.history[-1]["step"]

    found = meet([twice, lambda: "nothing", lambda: toy(2, tmp_path / "third").history[-1]["step"]], groups)
    assert found == [(6, 5), "nothing", 7]
    assert groups == [2, 1]
    assert together.joined() is None


def test_numbers_do_not_compile_again(tmp_path):
    together.members_step.cache_clear()
    for name in "ab":
        meet([lambda seed=seed, name=name: toy(seed, tmp_path / f"{name}{seed}") for seed in range(2)])
    meet([lambda seed=seed: toy(seed, tmp_path / f"c{seed}", steps=3) for seed in (1, 2)])
    assert together.members_step.cache_info().misses == 1
    mesh = jax.sharding.Mesh(toys.mesh().devices.reshape(-1), (together.AXIS,))
    step = together.members_step(toys.loss_fn, make_optimizer(optimizer(0)), mesh, True)
    assert together.members_step.cache_info().misses == 1
    assert step._cache_size() == 1


# ---- waiting -----------------------------------------------------------------------------------------------------


def until(condition, limit=60.0):
    """Pauses until it holds: for ever, if the others may not run meanwhile."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        together.pause(0.001)


def test_one_that_waits_lets_the_others_run(tmp_path):
    seen: list[str] = []

    def waiting():
        seen.append("asks")
        until(lambda: "answers" in seen)
        return toy(0, tmp_path / "0").history[-1]["step"]

    def answering():
        until(lambda: "asks" in seen)
        together.pause(0.01)
        seen.append("answers")

    groups: list[int] = []
    trains = functools.partial(toy, 1, tmp_path / "1")
    trained, waited, _ = meet([trains, waiting, answering], groups)
    assert (trained.history[-1]["step"], waited) == (6, 5)
    assert groups == [2]  # what is to be trained waits for those that wait for somebody else


def test_an_interruption_reaches_those_that_wait():
    seen = []

    def waiting():
        try:
            until(lambda: False)
        except BaseException as error:
            seen.append(type(error))
            raise

    def interrupted():
        until(lambda: time.monotonic() > start + 0.02)
        seen.append("interrupts")
        raise ValueError("of this call alone")

    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(together.time, "sleep", _interrupt_when(lambda: "interrupts" in seen))
        with pytest.raises(KeyboardInterrupt):
            meet([waiting, interrupted, waiting])
    assert seen == ["interrupts", KeyboardInterrupt, KeyboardInterrupt]


def _interrupt_when(condition):
    sleep = time.sleep

    def stand_in(seconds):
        if condition():
            raise KeyboardInterrupt
        sleep(seconds)

    return stand_in


def test_outside_of_a_meeting_a_pause_is_a_sleep():
    start = time.monotonic()
    together.pause(0.05)
    assert time.monotonic() - start >= 0.05


# ---- failing and going on ----------------------------------------------------------------------------------------


def test_one_that_fails_is_the_only_one(tmp_path):
    def bad():
        params = toys.params(1)
        params["b"]["bias"] = params["b"]["bias"].at[0].set(np.nan)
        return toy(1, tmp_path / "bad", params=params)

    def early():
        raise ValueError("before it trains")

    groups: list[int] = []
    good, failed, never, other = meet(
        [lambda: toy(0, tmp_path / "good"), bad, early, lambda: toy(2, tmp_path / "other")], groups
    )
    assert groups == [3]
    assert isinstance(failed, NonFiniteError)
    assert isinstance(never, ValueError)
    assert_same(toy(0, tmp_path / "alone"), good)
    assert_same(toy(2, tmp_path / "alone-2"), other)


def test_a_member_goes_on_where_it_was_cut_short(tmp_path):
    """One of two was trained to step 4 alone; together with a fresh one it does the rest, and no step twice."""

    def crash(step, _):
        if step == 4:
            raise RuntimeError("stopped here")

    with pytest.raises(RuntimeError):
        toy(1, tmp_path / "cut", callback=crash)
    resumed, fresh = meet([lambda: toy(1, tmp_path / "cut"), lambda: toy(0, tmp_path / "fresh")])
    assert resumed.resumed_from == 4
    assert_same(toy(1, tmp_path / "alone"), resumed)
    assert_same(toy(0, tmp_path / "alone-0"), fresh)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert steps == list(range(1, 7))


def test_callbacks_see_their_own_member(tmp_path):
    seen: dict[int, list[tuple[int, float]]] = {0: [], 1: []}

    def note(seed):
        def callback(step, state):
            seen[seed].append((int(state.step), float(state.params["b"]["bias"][0])))
            assert int(state.step) == step

        return callback

    found = meet(
        [lambda seed=seed: toy(seed, tmp_path / str(seed), callback=note(seed)) for seed in range(2)]
    )
    for seed, result in enumerate(found):
        assert [step for step, _ in seen[seed]] == list(range(1, 6 + seed))
        assert seen[seed][-1][1] == float(result.state.params["b"]["bias"][0])


def test_an_interruption_reaches_all_members(tmp_path):
    seen = []

    def interrupted(seed):
        def stop(step, _):
            if step == 3:
                raise KeyboardInterrupt

        try:
            return toy(seed, tmp_path / str(seed), callback=stop)
        except BaseException as error:
            seen.append((seed, type(error)))
            raise

    with pytest.raises(KeyboardInterrupt):
        meet([lambda seed=seed: interrupted(seed) for seed in range(2)])
    assert sorted(seen) == [(0, KeyboardInterrupt), (1, KeyboardInterrupt)]


def test_one_that_had_failed_before_an_interruption_says_why(tmp_path):
    seen = {}

    def told(name, call):
        try:
            return call()
        except BaseException as error:
            seen[name] = type(error)
            raise

    def bad():
        params = toys.params(1)
        params["b"]["bias"] = params["b"]["bias"].at[0].set(np.nan)
        return toy(1, tmp_path / "bad", params=params)

    def interrupted(step, _):
        if step == 4:
            raise KeyboardInterrupt

    other = functools.partial(toy, 0, tmp_path / "other", callback=interrupted)
    with pytest.raises(KeyboardInterrupt):
        meet([lambda: told("bad", bad), lambda: told("other", other)])
    assert seen == {"bad": NonFiniteError, "other": KeyboardInterrupt}
