"""Several runs trained at once, by one compiled step over a leading axis of members.

A run takes part by calling `train` inside of a `Meeting`. There, calls that compile to the same step (equal task,
optimiser and shapes; their numbers, data and seeds differ) are trained in one group: each member keeps its own data
iterator, schedule, log and checkpoints, exactly as a run alone would, and only the step is shared. Its state is
[K, ...], its batch [K, A, ...], its numbers [K].

The members' axis is laid over all devices; each device takes its members by `vmap` on accelerators, and on CPU one
after the other inside of the program: the CPU's compiler makes slower code of batched products than of plain ones.

Code that takes part runs in threads, of which one runs at a time, and none while the meeting trains: what the code
does needs no locks. One that waits for somebody else, by `pause`, lets the others run.
"""

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laif_jax.models import attention
from laif_jax.records.errors import LaifError
from laif_jax.training.feed import HOST_ONLY
from laif_jax.training.progress import open_progress
from laif_jax.training.reference import ReferenceLogps
from laif_jax.training.state import TrainState, state_shardings
from laif_jax.training.step import apply_step

log = logging.getLogger(__name__)
AXIS = "member"
_JOINED: ContextVar["_Fiber | None"] = ContextVar("together", default=None)


class TogetherError(LaifError, RuntimeError):
    """Runs cannot be trained together here; the message says why and what to do."""


class Run(Protocol):
    """What a member brings: the run of `laif_jax.training.loop`."""

    task: Any
    optimizer: Any
    mesh: Mesh
    batches: Any
    hyper: dict[str, np.ndarray]
    reference: ReferenceLogps | None
    title: str
    total: int
    fetch: Callable[[list[Any]], list[dict[str, Any]]]

    def closing(self) -> Any: ...
    def resume(self, state: TrainState) -> tuple[TrainState, int]: ...
    def showing(self, total: int, done: int, *, enabled: bool) -> Any: ...
    def course(
        self, state: Callable[[], TrainState], first: int, callback: Any, every: int
    ) -> Generator[dict[str, np.ndarray], Any, None]: ...


@dataclass(eq=False)
class Member:
    """One call of `train`. `own_reference`: the number of pairs whose reference is `state`; None: as the run says.

    After training: `state` is the last one and `first` the step that this process began at; or `error`.
    """

    run: Any
    state: TrainState
    callback: Any
    every: int
    own_reference: int | None
    progress: bool
    first: int = 0
    error: BaseException | None = None


def joined() -> "_Fiber | None":
    """The meeting that the calling code takes part in, or None."""
    return _JOINED.get()


def pause(seconds: float) -> None:
    """`time.sleep`; in a meeting the other calls run meanwhile, and it may take longer."""
    fiber = _JOINED.get()
    if fiber is None:
        time.sleep(seconds)
    else:
        fiber.pause(time.monotonic() + seconds)


def advance(course: Generator[Any, Any, Any], sent: Any = None) -> Any:
    """What a generator yields next, given the answer to what it yielded last (None at first); None at its end."""
    try:
        return course.send(sent)
    except StopIteration:
        return None


# ---- the meeting -------------------------------------------------------------------------------------------------


class _Fiber:
    """A call in a thread of its own, which runs only while `resume` waits for it."""

    def __init__(self, call: Callable[[], Any], name: str):
        self._call = call
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Member | float | None] = queue.SimpleQueue()
        self.result: Any = None
        self.error: BaseException | None = None
        self.stands = False  # it has begun, and waits for `resume`
        # A daemon: a person who interrupts does not wait for what a stage does.
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    def _main(self) -> None:
        self._answers.get()
        _JOINED.set(self)
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - handed to the caller of `Meeting.run`
            self.error = error
        self._asked.put(None)

    def resume(self, error: BaseException | None = None) -> Member | float | None:
        """Runs the call up to its next training, which is returned, or its next pause: the time (of the monotonic
        clock) at which it wants to go on; None: it has ended.

        Args:
          error: is raised where the call stands.
        """
        if self.thread.ident is None:
            self.thread.start()
        self.stands = False
        self._answers.put(error)
        asked = self._asked.get()
        self.stands = asked is not None
        return asked

    def _yield(self, asked: "Member | float") -> None:
        self._asked.put(asked)
        if (error := self._answers.get()) is not None:
            raise error

    def train(self, member: Member) -> tuple[TrainState, int]:
        """Called in the thread: waits until the meeting has trained `member`."""
        self._yield(member)
        if member.error is not None:
            raise member.error
        return member.state, member.first

    def pause(self, until: float) -> None:
        """Called in the thread: waits until that time, at least."""
        self._yield(until)


class Meeting:
    """Runs calls side by side, each while the others wait, and trains together what they train.

    Args:
      most: members of a group at most. on_group: told of each group before it is trained.
    """

    def __init__(self, most: int = 16, on_group: Callable[[Sequence[Member]], Any] | None = None):
        self.most = most
        self.on_group = on_group

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any | BaseException]:
        """The result of each call, or what it raised, in their order.

        Raises:
          KeyboardInterrupt, and whatever else ends this process: after all members were told, so that each leaves its
          stage in order.
        """
        fibers = [_Fiber(call, f"member-{index}") for index, call in enumerate(calls)]
        ready, paused, training = list(fibers), dict[_Fiber, float](), dict[_Fiber, Member]()
        try:
            while ready or paused or training:
                for fiber in ready:
                    asked = fiber.resume()
                    if isinstance(asked, Member):
                        training[fiber] = asked
                    elif asked is not None:
                        paused[fiber] = asked
                if paused:
                    time.sleep(max(0.0, min(paused.values()) - time.monotonic()))
                    ready = [fiber for fiber, until in paused.items() if until <= time.monotonic()]
                    paused = {fiber: until for fiber, until in paused.items() if fiber not in ready}
                else:
                    self._serve(list(training.values()))
                    ready, training = list(training), {}
        except BaseException as error:
            for fiber in fibers:
                if fiber.stands:  # one that has failed by itself is told of that
                    fiber.resume((training[fiber].error if fiber in training else None) or error)
            raise
        return [fiber.error if fiber.error is not None else fiber.result for fiber in fibers]

    def _serve(self, members: Sequence[Member]) -> None:
        groups: dict[Any, list[Member]] = {}
        for member in members:
            try:
                groups.setdefault(group_key(member), []).append(member)
            except Exception as error:  # noqa: BLE001 - of this member alone; raised again in its thread
                member.error = error
        for alike in groups.values():
            for start in range(0, len(alike), self.most):
                group = alike[start : start + self.most]
                if self.on_group:
                    self.on_group(group)
                Group(group).train()


def group_key(member: Member) -> Any:
    """Equal for members that one compiled step can train."""
    run = member.run
    start = run.batches.get_state()
    batch = next(run.batches)
    run.batches.set_state(start)
    shapes = tuple(
        (jax.tree_util.keystr(path), x.shape, str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path((member.state, _device_part(batch)))
    )
    has_reference = member.own_reference is not None, run.reference is not None
    return run.task, run.optimizer, run.mesh, shapes, tuple(sorted(run.hyper)), has_reference


def _device_part(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in batch.items() if name not in HOST_ONLY}


# ---- one group ---------------------------------------------------------------------------------------------------


class Group:
    """Members that one step trains, to the end of the longest; one that has ended, or failed, stands still."""

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        run = members[0].run
        devices = run.mesh.devices.reshape(-1)
        self.mesh = Mesh(devices, (AXIS,))
        self.split = NamedSharding(self.mesh, PartitionSpec(AXIS))
        # A multiple of the devices; the places beyond the members repeat the first one and stand still.
        self.places = -(-len(members) // len(devices)) * len(devices)
        # A ragged product, of experts, is not vectorised over weights.
        experts = getattr(getattr(run.task, "cfg", None), "num_experts", 0)
        rolled = devices[0].platform == "cpu" or bool(experts)
        self.step = members_step(run.task, run.optimizer, self.mesh, rolled)
        self.shardings = state_shardings(members[0].state)
        self.states: Any = None
        self.last: list[dict[str, np.ndarray]] = []

    def train(self) -> None:
        """Trains all members; sets their `state` and `first`, or their `error`."""
        self._references()
        lives: dict[int, Generator[Any, Any, None]] = {}
        for index, member in enumerate(self.members):
            if member.error is None:
                lives[index] = _life(member, functools.partial(self._state, index))
                self._ask(index, lives, None)
        if not lives:
            return
        self.states = self._stack([member.state for member in self.members])
        for member in self.members:
            member.state = None  # ty: ignore[invalid-assignment] - two copies are not kept
        try:
            self._steps(lives)
        finally:
            for life in lives.values():
                life.close()
            self.states = None

    def _steps(self, lives: dict[int, Generator[Any, Any, None]]) -> None:
        first = self.members[0].run
        total = max(self.members[index].run.total for index in lives)
        done = min(self.members[index].first for index in lives)
        shown = any(member.progress for member in self.members)
        title = f"{first.title} x {len(self.members)}"
        batches = {index: batch for index in list(lives) if (batch := self._ask(index, lives, None))}
        with open_progress(title, total, done, enabled=shown) as progress:
            for step in itertools.count(done + 1):
                if not batches:
                    return
                metrics = self._dispatch(batches)
                shared = _Shared({k: v for k, v in metrics.items() if k != "outputs"})
                batches = {
                    index: batch
                    for index in list(batches)
                    if (batch := self._ask(index, lives, _Row(shared, index)))
                }
                if shared.known is not None:
                    progress.update(step, {"loss": float(np.mean(shared.known["loss"]))})

    def _ask(self, index: int, lives: dict[int, Generator[Any, Any, None]], sent: Any) -> Any:
        """What a member yields next; None once it has ended: its state is then taken out, or its error kept."""
        member = self.members[index]
        try:
            found = advance(lives[index], sent)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - its own failure, or its order to stop
            member.error = error
            del lives[index]
            return None
        if found is None:
            member.state = self._state(index)
            del lives[index]
        return found

    def _dispatch(
        self, batches: Mapping[int, dict[str, np.ndarray]], *, update: bool = True
    ) -> dict[str, Any]:
        """One step of the members that have a batch. The others are given one that was used, and stand still; without
        `update` all do."""
        self.last = self.last or [next(iter(batches.values()))] * self.places
        for index, batch in batches.items():
            self.last[index] = batch
        arrays = [_device_part(batch) for batch in self.last]
        stacked = {name: np.stack([batch[name] for batch in arrays]) for name in arrays[0]}
        active = np.array([update and index in batches for index in range(self.places)])
        members = [self.members[i if i < len(self.members) else 0] for i in range(self.places)]
        numbers = [{"learning_rate": np.zeros((), np.float32)} | member.run.hyper for member in members]
        hyper = {name: np.stack([each[name] for each in numbers]) for name in numbers[0]}
        self.states, metrics = self.step(self.states, active, stacked, hyper)
        return metrics

    # ---- states ----

    def _stack(self, states: Sequence[TrainState]) -> TrainState:
        """[places, ...] over the members' axis, whichever way the runs' own mesh splits a state."""
        filled = [*states, *[states[0]] * (self.places - len(states))]
        mesh = self.members[0].run.mesh
        if (
            mesh.size > 1 or AxisType.Explicit in mesh.axis_types
        ):  # each device's members go there, and nowhere else
            filled = jax.device_get(filled)
            return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *filled), self.split)
        return jax.device_put(_stack(filled), self.split)

    def _state(self, index: int) -> TrainState:
        """A copy of a member's state, where its run expects it."""
        return jax.device_put(_take(self.states, index), self.shardings)

    # ---- references ----

    def _references(self) -> None:
        """The reference log-probs of members that start at their reference: by the step itself, without updates, so
        that the first margins are exactly 0."""
        wanting = {
            i: member for i, member in enumerate(self.members) if member.own_reference and not member.error
        }
        if not wanting:
            return
        self.states = self._stack([member.state for member in self.members])
        found = {
            i: np.full((2, member.own_reference or 0), np.nan, np.float32) for i, member in wanting.items()
        }
        sources = {i: _first_epoch(member) for i, member in wanting.items()}
        while batches := {i: batch for i, source in sources.items() if (batch := self._next(i, source))}:
            outputs = jax.device_get(self._dispatch(batches, update=False)["outputs"])
            for i, batch in batches.items():
                index = np.asarray(batch["pair_index"])
                real = index >= 0
                for row, name in zip(found[i], ("policy_chosen", "policy_rejected"), strict=True):
                    values = outputs[name][i][:, : index.shape[1]][real]
                    old = row[index[real]]
                    row[index[real]] = np.where(np.isnan(old), values, old)
        self.states = None
        self.last = []
        for i, member in wanting.items():
            member.run.reference = ReferenceLogps(*found[i])

    def _next(self, index: int, source: Iterator[Any]) -> Any:
        try:
            return next(source, None)
        except Exception as error:  # noqa: BLE001 - of this member alone; raised again in its thread
            self.members[index].error = error
            return None


def _life(member: Member, state: Callable[[], TrainState]) -> Generator[Any, Any, None]:
    """A run in a group: yields once, when `member.state` and `member.first` are where it starts, then its batches."""
    run = member.run
    run.fetch = lambda rows: [row.values() for row in rows]
    with run.closing():
        member.state, member.first = run.resume(member.state)
        yield member
        with run.showing(run.total, member.first, enabled=False):
            yield from run.course(state, member.first, member.callback, member.every)


def _first_epoch(member: Member) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a member's first epoch, without reference log-probs; its iterator is then set back."""
    batches = member.run.batches
    start = batches.get_state()
    for _ in range(min(member.run.total, batches.steps_per_epoch)):
        batch = dict(next(batches))
        zeros = np.zeros(np.shape(batch["pair_index"]), np.float32)
        yield batch | {"ref_chosen": zeros, "ref_rejected": zeros}
    batches.set_state(start)


class _Shared:
    """The metrics of one step of a group, read once for all members."""

    def __init__(self, metrics: Any):
        self.metrics: Any = metrics
        self.known: dict[str, np.ndarray] | None = None

    def read(self) -> dict[str, np.ndarray]:
        if self.known is None:
            self.known, self.metrics = jax.device_get(self.metrics), None
        assert self.known is not None
        return self.known


@dataclass(frozen=True)
class _Row:
    """One member's part of them."""

    shared: _Shared
    index: int

    def values(self) -> dict[str, Any]:
        return {name: value[self.index] for name, value in self.shared.read().items()}


@jax.jit
def _take(states: TrainState, index: Any) -> TrainState:
    return jax.tree.map(lambda x: x[index], states)


@jax.jit
def _stack(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


# ---- the step ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def members_step(task: Any, optimizer: optax.GradientTransformation, mesh: Mesh, rolled: bool) -> Any:
    """The jitted `step(states, active, batch, hyper) -> (states, metrics)`; `states` is donated.

    Args:
      mesh: of one axis, `AXIS`, which divides the number of members K. rolled: a device takes its members one after the
        other instead of by `vmap`.

    Returns:
      The step: states [K, ...]; active bool [K], members that stand still keep everything; batch [K, A, ...];
      hyper [K]. Metrics as of `make_train_step`, each [K].
    """

    def one(given: tuple[TrainState, jax.Array, Any, Any]) -> tuple[TrainState, dict[str, Any]]:
        state, active, batch, hyper = given
        state = replace(state, healthy=state.healthy & active)
        return apply_step(task, optimizer, state, batch, hyper)

    def local(states: TrainState, active: jax.Array, batch: Any, hyper: Any) -> Any:
        given = (states, active, batch, hyper)
        if rolled:
            return jax.lax.map(one, given)
        with attention.not_fused():
            return jax.vmap(one)(given)

    part = PartitionSpec(AXIS)
    spread = jax.shard_map(local, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    split = NamedSharding(mesh, part)  # said, or the first call and the second would be two programs
    return jax.jit(spread, in_shardings=split, out_shardings=split, donate_argnums=0)
