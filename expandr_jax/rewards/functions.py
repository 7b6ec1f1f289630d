"""Rewards of the user's own: `reward.functions`, imported where a model is trained, nowhere else.

A function is called for some queries at once, as function(queries=[text, ...], texts=[[text, ...],
...], judgements=[{document id: grade}, ...]), and gives a number for each text of each query:
[queries][texts of a query]. Whatever goes wrong in it is one line.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import UserError, shown
from expandr_jax.files.records import hash_file
from expandr_jax.runtime.stopping import Stopped
from expandr_jax.settings import Check

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FUNCTIONS = Check(
    'a tuple of functions, each once and as "my.module:function"',
    lambda value: (
        isinstance(value, tuple)
        and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)
        and len({*value}) == len(value)
    ),
)
SETTING = "reward.functions"
FUNCTION_PREFIX = "function:"  # What its names begin with among the rewards of a candidate.


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function that rewards the candidates of some queries.

    Attributes:
        name: As "my.module:function".
        call: The function.
        file: Where its module lies.
        sha256: That file's; what the module imports is not looked at.
        failed: Is called where it fails, before that is told.
    """

    name: str
    call: Callable[..., Any]
    file: str
    sha256: str
    failed: Callable[[], None] = lambda: None

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.partition(":")[0]


def load_functions(names: Sequence[str]) -> tuple[RewardFunction, ...]:
    """Imports the functions of `reward.functions`, which runs their modules.

    UserError where one is not there, or its module cannot be imported.
    """
    return tuple(map(_load, names))


def _load(name: str) -> RewardFunction:
    module, _, function = name.partition(":")
    file = sha256 = ""
    try:
        spec = importlib.util.find_spec(module)
        if spec and os.path.isfile(spec.origin or ""):
            file = spec.origin
            sha256 = hash_file(file)  # Before it runs, so that the hash is of what runs.
            found = importlib.import_module(module)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        parents = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)]
        if not isinstance(error, ModuleNotFoundError) or error.name not in parents:
            told = f"{SETTING}: importing {module} {_told(error, file)}"
            raise UserError(told) from None
    if not sha256:
        raise UserError(
            f"{SETTING}: {name}: there is no such module with a file; expected one in the "
            "directory that the command is started in, or one that is installed"
        )
    call = getattr(found, function, None)
    if not callable(call):
        is_there = f"a {type(call).__name__}, and no function," if call is not None else "nothing"
        raise UserError(f"{SETTING}: {name}: {file} has {is_there} of that name")
    return RewardFunction(name, call, file, sha256)


def function_rewards(
    function: RewardFunction,
    ids: Sequence[str],
    queries: Sequence[str],
    texts: Sequence[Sequence[str]],
    judgements: Sequence[Mapping[str, int]],
    seconds: float,
) -> np.ndarray:
    """What a function gives for the texts of some queries: [queries, texts of a query] float64.

    Args:
        function: It gets lists and dictionaries of its own, with which it may do as it likes.
        ids: The queries' ids, for messages.
        queries: Their texts.
        texts: As many texts of each.
        judgements: Document id -> grade, of each.
        seconds: How long it may take.

    Raises:
        UserError: It raises, takes longer, or gives other than so many finite numbers.
    """
    done: list[Any] = []

    def work() -> None:
        try:
            given = function.call(
                queries=[*queries],
                texts=[[*own] for own in texts],
                judgements=[dict(judged) for judged in judgements],
            )
            # Here, as what it gives may compute its numbers when they are asked for.
            done.append(_read(function, given, ids, texts))
        except UserError as error:
            done.append(error)
        except BaseException as error:  # A thread's own end, such as sys.exit(), says nothing.
            of = f"query {ids[0]}" if len(ids) == 1 else f"{len(ids)} queries from {ids[0]} on"
            told = f"{_told(error, function.file)}, for {of}"
            done.append(UserError(f"{SETTING}: {function.name} {told}"))

    thread = threading.Thread(target=work, name=function.name, daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    # One that goes on must not keep what it is told of by, nor all that led there.
    of = f"{len(ids)} queries from {ids[0]} on"
    late = f"took longer than reward.function_seconds, {seconds:g}, for {of}"
    found = done[0] if done else _refused(function, late)
    if isinstance(found, UserError):
        function.failed()
        raise found
    return found


def _read(
    function: RewardFunction, given: Any, ids: Sequence[str], texts: Sequence[Sequence[str]]
) -> np.ndarray:
    """The numbers that a function has given, checked one by one."""
    rows = _listed(given)
    if rows is None or len(rows) != len(ids):
        raise _refused(function, f"{_counted(given, rows)} for {len(ids)} queries; expected a list "
                       "of numbers for each")  # fmt: skip
    found = []
    for query, row, own in zip(ids, rows, texts, strict=True):
        values = _listed(row)
        if values is None or len(values) != len(own):
            what = f"{_counted(row, values)} for query {query}; expected {len(own)} numbers"
            raise _refused(function, what)
        found.append([_number(function, query, i, value) for i, value in enumerate(values)])
    return np.array(found)


def _listed(value: Any) -> list[Any] | None:
    """The items of what has some in an order; else None."""
    if isinstance(value, (str, bytes, Mapping, set, frozenset)):
        return None
    try:
        return [*value]
    except TypeError:
        return None


def _counted(value: Any, items: Sequence[Any] | None) -> str:
    return f"gave {len(items)} values" if items is not None else f"gave {shown(value)}"


def _number(function: RewardFunction, query: str, place: int, value: Any) -> float:
    try:
        # Not float() alone, which reads strings, too.
        number = float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        what = f"gave {shown(value)} for text {place} of query {query}; expected a finite number"
        raise _refused(function, what)
    return number


def _refused(function: RewardFunction, what: str) -> UserError:
    return UserError(f"{SETTING}: {function.name} {what}")


def _told(error: BaseException, file: str = "") -> str:
    """What was raised, in a line, and where: in the function's own file, if that is on the way."""
    places = traceback.extract_tb(error.__traceback__)
    own = [p for p in places if file and os.path.realpath(p.filename) == os.path.realpath(file)]
    at = (own or [*places])[-1]
    where = f"{at.filename}:{at.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}{text and f': {text}'} ({where})"
