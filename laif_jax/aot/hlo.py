"""What an optimised HLO module moves: collectives between chips, and traffic to memory, with the trips of its loops.

XLA's own cost analysis counts the body of a loop once, which in a model whose layers are a loop is most of the work. So
the text of the module is read: how often each computation runs, and what each of its instructions touches.
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP = re.compile(r"\s*([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier"}
    | {"after-all", "partition-id", "replica-id", "iota"}
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line. `text`: all after the opening bracket of its operands."""

    name: str
    type: str
    op: str
    text: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.text[: _closing(self.text, 0)])

    @functools.cached_property
    def called(self) -> list[str]:
        return [name for group in _CALLED.findall(self.text) for name in re.findall(r"[\w.\-]+", group)]


@dataclass
class Module:
    """Computations by name, in the order of the text; `entry` is the one that runs."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""


@dataclass(frozen=True)
class Collective:
    """A communication. `bytes`: what one run of it sends and receives per chip at least; `runs`: per step."""

    op: str
    bytes: float
    group: int
    runs: int


def parse(text: str) -> Module:
    """Reads `Compiled.as_text()`."""
    module = Module()
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if line.rstrip() == "}":
            current = None
        elif header := _HEADER.match(line):
            current = module.computations.setdefault(header[2], {})
            module.entry = header[2] if header[1] else module.entry
        elif current is not None and (instruction := _instruction(re.sub(r"/\*.*?\*/", "", line))):
            current[instruction.name] = instruction  # other lines go on with a kernel's attributes
    return module


def _instruction(line: str) -> Instruction | None:
    """`[ROOT] %name = type op(operands), attributes`; a type may be a tuple, with brackets in it."""
    named = _NAME.match(line)
    if not named:
        return None
    rest = line[named.end() :]
    end = _closing(rest, 1) + 1 if rest.startswith("(") else rest.find(" ")
    found = _OP.match(rest[end:])
    if not found:
        return None
    return Instruction(named[1], rest[:end], found[1], found[2], line.lstrip().startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """Where the bracket that was opened before `start` is closed."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def size_of(kind: str, *, memory_only: bool = False) -> float:
    """Bytes of a type, tuples summed. `memory_only`: not what lies in on-chip memory (spaces S(1) and above)."""
    total = 0.0
    for name, dims, layout in _ARRAY.findall(kind):
        if name in _BYTES and not (memory_only and "S(" in layout):
            total += _BYTES[name] * math.prod(int(d) for d in dims.split(",") if d)
    return total


# ---- how often each computation runs -----------------------------------------------------------------------------


def runs(module: Module, unknown: int = 1) -> dict[str, int]:
    """How often each computation runs per step. `unknown`: trips of loops whose number the text does not tell."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for instruction in module.computations.get(name, {}).values():
            inner = times
            if instruction.op == "while":
                inner *= trips(module, instruction) or unknown
            for called in instruction.called:
                visit(called, inner)

    visit(module.entry, 1)
    return counts


def trips(module: Module, loop: Instruction) -> int | None:
    """The trips of a `while`, from what XLA knows or from its condition `counter < constant`; None: not known."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = module.computations.get(condition[1], {}) if condition else {}
    for instruction in lines.values():
        if instruction.op == "compare" and "direction=LT" in instruction.text:
            limits = [
                value for name in instruction.operands if (value := _constant(lines.get(name))) is not None
            ]
            counters = [
                lines[name]
                for name in instruction.operands
                if name in lines and _constant(lines[name]) is None
            ]
            if limits and counters:
                return -(-limits[0] // _step(module, loop, counters[0]))
    return None


def _constant(instruction: Instruction | None) -> int | None:
    found = re.match(r"(\d+)\)", instruction.text) if instruction and instruction.op == "constant" else None
    return int(found[1]) if found else None


def _step(module: Module, loop: Instruction, counter: Instruction) -> int:
    """By how much the body raises its counter: 1, or more where the compiler has unrolled it."""
    index, body = re.search(r"index=(\d+)", counter.text), re.search(r"body=%?([\w.\-]+)", loop.text)
    lines = module.computations.get(body[1], {}) if body else {}
    root = next((line for line in lines.values() if line.root), None)
    if index is None or root is None or root.op != "tuple" or int(index[1]) >= len(root.operands):
        return 1
    raised = lines.get(root.operands[int(index[1])])
    if raised is None or raised.op != "add":
        return 1
    return next((value for name in raised.operands if (value := _constant(lines.get(name)))), 1)


# ---- between chips -----------------------------------------------------------------------------------------------


def collectives(module: Module, unknown: int = 1) -> list[Collective]:
    """Every communication of a step. Parts of one that was cut up to run beside others (equal channels) count once."""
    counts = runs(module, unknown)
    seen: set[str] = set()
    found = []
    for name, body in module.computations.items():
        for instruction in body.values():
            op = instruction.op.removesuffix("-start")
            if op not in COLLECTIVES or not counts.get(name):
                continue
            if channel := re.search(r"channel_id=(\d+)", instruction.text):
                shape = _ARRAY.search(instruction.type)
                same = f"{channel[1]} {op} {shape and shape[2]}"  # those of a `shard_map` all have channel 1
                if same in seen:
                    continue
                seen.add(same)
            group = group_size(instruction.text)
            if group > 1 or op == "collective-permute":
                found.append(Collective(op, _traffic(op, instruction, body, group), group, counts[name]))
    return found


def _traffic(op: str, instruction: Instruction, body: dict[str, Instruction], group: int) -> float:
    """Bytes through one chip's links: what an algorithm that uses them best must send."""
    given = sum(size_of(body[name].type) for name in instruction.operands if name in body)
    made = size_of(instruction.type)
    if instruction.op.endswith("-start"):  # a tuple of what goes in, what comes out, and flags
        made = max(made - given, given)
    share = (group - 1) / max(group, 1)
    if op == "all-reduce":
        return 2 * share * given
    if op == "all-gather":
        return share * made
    return given if op == "collective-permute" else share * given


def group_size(text: str) -> int:
    """Chips per group of a collective, from any of the forms that XLA prints."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    return 1


# ---- to memory ---------------------------------------------------------------------------------------------------


def memory_traffic(module: Module, *, with_trips: bool = True, unknown: int = 1) -> float:
    """Bytes read from and written to a chip's memory by all instructions that run, each fusion as one."""
    counts = runs(module, unknown)
    inside = _fused(module)
    total = 0.0
    for name, body in module.computations.items():
        if counts.get(name) and name not in inside:
            each = sum(_touched(module, instruction, body) for instruction in body.values())
            total += each * (counts[name] if with_trips else 1)
    return total


def _fused(module: Module) -> set[str]:
    """Computations that are the inside of one instruction, all but bodies of control flow."""
    control = ("while", "conditional", "call")
    lines: Iterable[Instruction] = (i for body in module.computations.values() for i in body.values())
    return {name for instruction in lines if instruction.op not in control for name in instruction.called}


def _touched(module: Module, instruction: Instruction, body: dict[str, Instruction]) -> float:
    if instruction.op in _FREE or instruction.op.endswith("-done"):
        return 0.0
    if instruction.op in ("dynamic-slice", "gather"):
        return 2 * size_of(instruction.type, memory_only=True)
    if instruction.op == "dynamic-update-slice":
        update = body.get(instruction.operands[1])
        return 2 * size_of(update.type, memory_only=True) if update else 0.0
    made = size_of(instruction.type, memory_only=True)
    given = [size_of(body[n].type, memory_only=True) if n in body else 0.0 for n in instruction.operands]
    if instruction.op == "fusion" and instruction.called:
        inner = module.computations.get(instruction.called[0], {})
        for index, (part, in_place) in _partial(inner).items():
            if index < len(given):
                saved = max(given[index] - part, 0.0)
                given[index] -= saved
                made -= saved if in_place else 0.0
    return max(made, 0.0) + sum(given)


def _partial(inner: dict[str, Instruction]) -> dict[int, tuple[float, bool]]:
    """Parameters of a fusion of which only a part is touched: number -> (bytes, whether it is written in place)."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    found = {}
    for instruction in inner.values():
        number = re.match(r"(\d+)\)", instruction.text) if instruction.op == "parameter" else None
        uses = users.get(instruction.name, [])
        while len(uses) == 1 and uses[0].op == "bitcast":
            uses = users.get(uses[0].name, [])
        if number is None or not uses:
            continue
        if all(use.op in ("dynamic-slice", "gather") for use in uses):
            found[int(number[1])] = (sum(size_of(use.type) for use in uses), False)
        elif len(uses) == 1 and uses[0].op == "dynamic-update-slice":
            update = inner.get(uses[0].operands[1])
            found[int(number[1])] = (size_of(update.type) if update else 0.0, True)
    return found
