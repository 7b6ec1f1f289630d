"""What a compiled program sends between devices, read from its optimised HLO.

Loops are followed: a collective in a scan over 32 layers counts 32 times. A loop whose length is
known at run time only (sampling, until texts are finished) counts as one turn.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8,
          "f64": 8}  # fmt: skip
# A computation: whether it is the first to run, its name, its lines.
_HEADER = r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\{\s*$\n"
_COMPUTATION = re.compile(
    _HEADER + r"((?:^(?!ENTRY |%?[\w.\-]+\s*\(.*\{\s*$).*\n?)*)", re.MULTILINE
)
_COLLECTIVE = re.compile(rf"=\s*(.*?)\s({'|'.join(COLLECTIVES)}|ragged-all-to-all)(-start)?\(")
_CALLED = re.compile(
    r"(body|to_apply|calls|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_LESS = re.compile(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_ELEMENT = re.compile(r" get-tuple-element\(.*index=(\d+)")
_ADDED = re.compile(r" add\(.*%([\w.\-]+)\)")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?(\d+)')
_LIMIT = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*)? ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in a program.

    Attributes:
        count: How many are run.
        bytes: That pass a device, of all of them: the larger of what goes in and what comes out.
        largest: Bytes of the largest.
    """

    count: int
    bytes: int
    largest: int


def count_collectives(hlo: str) -> dict[str, Collectives]:
    """Collectives of a program, by kind, from what `Compiled.as_text()` gives."""
    found = _COMPUTATION.findall(hlo)
    computations = {name: body.splitlines() for _, name, body in found}
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in computations.get(name, ()):
            for called, turns in _calls(line, computations):
                visit(called, factor * turns)

    visit(next((name for entry, name, _ in found if entry), ""), 1)
    # A collective that runs beside other work stands in several fusions, under one channel, and
    # where that work is a loop it is still one.
    fused = {
        called
        for lines in computations.values()
        for line in lines
        for attribute, called in _CALLED.findall(line.replace("%", ""))
        if attribute == "calls"
    }
    counted: dict[str, tuple[str, int, int]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            match = _COLLECTIVE.search(line)
            if match and times[name]:
                types, kind, started = match.groups()
                kind = "all-to-all" if kind == "ragged-all-to-all" else kind
                channel = _CHANNEL.search(line)
                shared = channel and name in fused
                key = f"{kind}:{channel.group(1)}" if shared else f"{name}:{number}"
                turns = min(times[name], counted[key][2] if key in counted else times[name])
                counted[key] = kind, _size(types, kind, bool(started), line), turns
    totals = {}
    for kind in COLLECTIVES:
        own = [(size, turns) for known, size, turns in counted.values() if known == kind]
        if own:
            totals[kind] = Collectives(
                sum(turns for _, turns in own),
                sum(size * turns for size, turns in own),
                max(size for size, _ in own),
            )
    return totals


def _calls(line: str, computations: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Computations that an instruction calls, and how often."""
    if _COLLECTIVE.search(line):
        return []  # What it calls only adds numbers up.
    calls = []
    for attribute, called in _CALLED.findall(line):
        turns = _turns(line, computations) if attribute == "body" else 1
        calls += [(name, turns) for name in re.findall(r"[\w.\-]+", called)]
    return calls


def _turns(loop: str, computations: dict[str, list[str]]) -> int:
    """Turns of a loop: as it says, or as its condition does, counting up from 0; else 1."""
    known = _TRIPS.search(loop)
    if known:
        return int(known.group(1))
    condition, body = (computations.get(name, []) for name in _LOOP.search(loop).groups())
    compared = next((_LESS.search(line) for line in condition if "ROOT" in line), None)
    if not compared:
        return 1
    counter, limit = (_definition(name, condition) for name in compared.groups())
    place, most = _ELEMENT.search(counter), _LIMIT.search(limit)
    if not (place and most):
        return 1
    return math.ceil(int(most.group(1)) / _step(body, int(place.group(1))))


def _step(body: list[str], place: int) -> int:
    """What a loop's body adds to the counter at this place of its state; 1 where it is unclear."""
    root = next((line for line in body if "ROOT" in line), "")
    state = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    if place >= len(state):
        return 1
    added = _ADDED.search(_definition(state[place], body))
    number = added and _LIMIT.search(_definition(added.group(1), body))
    return max(1, int(number.group(1))) if number else 1


def _definition(name: str, lines: list[str]) -> str:
    """The line that a name is defined on; "" where it is not."""
    return next((line for line in lines if f"%{name} = " in line), "")


def _size(types: str, kind: str, started: bool, line: str) -> int:
    """Bytes of a collective; of a started one, types are those of operands and results."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _BYTES.get(dtype, 4)
        for dtype, dims in _ARRAY.findall(types)
    ]
    if started:
        return max(sizes, default=0)
    total = sum(sizes)
    return total * _group_size(line) if kind == "reduce-scatter" else total


def _group_size(line: str) -> int:
    """Devices among which a collective runs."""
    mesh = _MESH_GROUPS.search(line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh.group(2)))
    groups = _GROUPS.search(line)
    if not groups:
        return 1
    if groups.group(2):
        return int(groups.group(2))
    return len(groups.group(3).split(","))
