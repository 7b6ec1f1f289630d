"""The pydoc collection: find a docstring by its first line, in the source of packages.

A query is the first line of a docstring, its one relevant document is the rest. Titles stay
empty: the name of the function would give the answer away. Source is parsed, never imported, so
that nothing is executed and the collection depends on the packages' versions alone. They lie in a
directory of their own: what this environment runs with, another Python or jax, is not what is read.
"""

import ast
import base64
import csv
import gc
import hashlib
import importlib.metadata
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from expandr_jax.data.beir import Collection
from expandr_jax.data.duplicates import near_duplicate_clusters, words
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.runtime.progress import QUIET, Reporter
from expandr_jax.settings import NotNegative

# Where `make` installs requirements-pydoc.txt: pip install --target.
WHEELS = Path(sys.prefix) / "pydoc"
MIN_QUERY_WORDS = 3
MIN_DOCUMENT_WORDS = 20
MAX_DOCUMENT_CHARACTERS = 10_000
# No text may come within 0.5 of one in another split; clustering below that keeps it so for
# readers who split words at other characters.
JACCARD = 0.35

RULE = (
    "query: first line of a public docstring, signature lines skipped; document: the rest, at "
    f"most {MAX_DOCUMENT_CHARACTERS} characters; at least {MIN_QUERY_WORDS} and "
    f"{MIN_DOCUMENT_WORDS} words; first of equal queries kept; none whose query is inside its "
    "document, ends in a colon or is markup; equal documents are one, under the first id; test "
    "files skipped; clusters of documents whose "
    f"word 5-gram Jaccard is above {JACCARD} go whole to one split by the sha256 of their "
    "smallest id"
)


@dataclass(frozen=True)
class Shares:
    """The part of the clusters that each split gets; the paper's trainings share 7 : 1."""

    retriever_train: NotNegative = 0.735
    generator_train: NotNegative = 0.105
    dev: NotNegative = 0.05
    test: NotNegative = 0.11


class _Pair(NamedTuple):
    id: str
    query: str
    document: str


class _Package(NamedTuple):
    name: str
    version: str
    distribution: importlib.metadata.Distribution
    files: dict[str, str]  # Path -> hash, as the wheel has it.


def harvest(
    packages: Sequence[str],
    *,
    min_pairs: int = 1,
    shares: Shares = Shares(),
    reporter: Reporter = QUIET,
) -> TrainingData:
    """Harvests query-document pairs from the docstrings of packages.

    Args:
        packages: "name==version"; their order does not matter to the collection. They are looked
            for in `WHEELS`, then among this environment's own.
        min_pairs: how many pairs there must be.
        shares: of the four splits; they add up to 1.
        reporter: where progress is shown.

    Returns:
        The collection, whose query ids are "q:" + document id. Its source lists the packages with
        version, number of files and pairs and the sha256 of their files' contents, sizes of the
        splits, and the rule.

    Raises:
        UserError: a package is missing or has another version, a file cannot be read or is not as
            the package's wheel has it, the shares do not add up, or there are too few pairs.
    """
    if min(asdict(shares).values()) < 0 or abs(sum(asdict(shares).values()) - 1) > 1e-9:
        raise UserError(f"pydoc: shares {asdict(shares)}; expected parts that add up to 1")
    found = [_find(spec) for spec in packages]
    candidates: list[_Pair] = []
    source = []
    files = sum(len(package.files) for package in found)
    with reporter.progress("files read for their docstrings", files) as advance:
        for package in found:
            digest, unparsed = hashlib.sha256(), []
            for file in package.files:
                content = _read(package, file)
                digest.update(content)
                if tree := _parse(content):
                    candidates += filter(None, map(_split_docstring, _docstrings(file, tree)))
                else:
                    unparsed.append(file)
                advance(1)
            source.append(
                {
                    "name": package.name,
                    "version": package.version,
                    "files": len(package.files),
                    "unparsed_files": unparsed,
                    "sha256": digest.hexdigest(),
                }
            )
    pairs = _distinct(candidates)
    if len(pairs) < max(min_pairs, 1):
        raise UserError(
            f"pydoc: {len(pairs)} pairs in {len(found)} packages; expected at least "
            f"{max(min_pairs, 1)}: list more packages"
        )
    for package, entry in zip(found, source, strict=True):
        files = set(package.files)
        entry["pairs"] = sum(pair.id.split(":")[0] in files for pair in pairs)
    with reporter.progress("documents compared", len(pairs)) as advance:
        documents = [pair.document for pair in pairs]
        clusters = near_duplicate_clusters(documents, JACCARD, advance)
    return _assemble(pairs, clusters, shares, source)


def _find(spec: str) -> _Package:
    name, separator, version = spec.partition("==")
    if not (name and separator and version):
        raise UserError(f'pydoc: package {spec!r}; expected "name==version"')
    # --upgrade, as pip leaves another version that is there.
    command = f"pip install --no-deps --upgrade --target {WHEELS} {spec}"
    found = [
        *importlib.metadata.distributions(name=name, path=[str(WHEELS)]),
        *importlib.metadata.distributions(name=name),
    ]
    if not found:
        raise UserError(f"pydoc: package {name} is not installed; {command}")
    right = [distribution for distribution in found if distribution.version == version]
    if not right:
        raise UserError(
            f"pydoc: package {name} is installed as {found[0].version}; expected {version}: "
            + command
        )
    # Not distribution.files, which from Python 3.12 on hides files that are gone from the disk.
    record = csv.reader((right[0].read_text("RECORD") or "").splitlines())
    files = {row[0]: row[1] for row in record if row and _is_source(PurePosixPath(row[0]))}
    if not files:
        raise UserError(f"pydoc: package {name} has no list of its source files; {command}")
    return _Package(name, version, right[0], dict(sorted(files.items())))


def _is_source(path: PurePosixPath) -> bool:
    # White space and colons would spoil the ids.
    if path.suffix != ".py" or ".." in path.parts or re.search(r"[\s:]", str(path)):
        return False
    if path.name.startswith("test_") or path.stem.endswith("_test"):
        return False
    return not _SKIPPED & {*path.parts}


# Tests, and what differs between the wheels of one version: numpy.distutils is left out for
# Python 3.12 and later, and __config__.py describes the machine that built the wheel.
_SKIPPED = {"test", "tests", "conftest.py", "distutils", "__config__.py"}


def _read(package: _Package, file: str) -> bytes:
    trouble = ""
    try:
        content = package.distribution.locate_file(file).read_bytes()
    except OSError as error:
        trouble = f"cannot read this file of package {package.name}: {error.strerror}"
    else:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if package.files[file] not in ("", f"sha256={digest}"):
            trouble = f"differs from this file of package {package.name}=={package.version}"
    if trouble:
        root = package.distribution.locate_file("")
        raise UserError(
            f"{file}: {trouble}; pip install --no-deps --upgrade --force-reinstall --target "
            f"{root} {package.name}=={package.version}"
        )
    return content


def _parse(content: bytes) -> ast.Module | None:
    """Returns the syntax tree of a file, or None if it is no valid Python."""
    collecting = gc.isenabled()
    gc.disable()  # a tree has no cycles, and looking for them takes a fifth of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            # One grammar for all Python versions, so that each skips the same files.
            return ast.parse(content, feature_version=(3, 11))
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collecting:
            gc.enable()


def _docstrings(file: str, tree: ast.Module) -> list[tuple[str, str]]:
    """Returns (id, docstring) of a file's module and public definitions."""
    seen: defaultdict[str, int] = defaultdict(int)
    found = []
    for name, node in [("", tree), *_definitions(tree, "")]:
        if text := _docstring(node):
            seen[name] += 1
            number = f"#{seen[name]}" if seen[name] > 1 else ""  # an overload, or a setter
            found.append((f"{file}:{name}{number}" if name else file, text))
    return found


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):  # statements alone
        for child in getattr(node, field, ()):
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _definitions(child, prefix)
            elif not child.name.startswith("_"):
                yield prefix + child.name, child
                yield from _definitions(child, f"{prefix}{child.name}.")


def _docstring(node: ast.AST) -> str:
    """The docstring with control characters and common indentation removed.

    Not ast.get_docstring or inspect.cleandoc, whose result differs between Python versions.
    """
    match node.body[:1]:
        case [ast.Expr(ast.Constant(str(text)))]:
            pass
        case _:
            return ""
    text = text.encode("utf-8", "replace").decode().expandtabs()
    lines = [re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", " ", line) for line in text.split("\n")]
    lines = [line.rstrip() for line in lines]
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line]
    margin = min(margins, default=0)
    return "\n".join([lines[0].lstrip(), *(line[margin:] for line in lines[1:])]).strip()


# name(...), over several lines if need be, with what it returns before "=" or after "->". A space
# before the bracket makes it an entry of a list of arguments.
_SIGNATURE = re.compile(
    r"(?:[\w., ]+ = )?[\w.]+\((?:[^()]|\([^()]*\))*\)[ ]*(?:->[^\n]*)?[:.;]?[ ]*(?:\n|\Z)"
)
_MARKUP = ("..", ">>>", "```", "@", ":param", ":arg")


def _split_docstring(docstring: tuple[str, str]) -> _Pair | None:
    identifier, text = docstring
    while text and (match := _SIGNATURE.match(text) or re.match(r"[\W_]*(?:\n|\Z)", text)):
        text = text[match.end() :].lstrip()
    query, _, document = text.partition("\n")
    query = query.strip()
    document = re.sub(r"\A(?:[\W_]*\n)+", "", document).strip()  # an underline, empty lines
    if len(document) > MAX_DOCUMENT_CHARACTERS:
        document = document[: MAX_DOCUMENT_CHARACTERS + 1].rsplit(maxsplit=1)[0]
    if query.endswith(":") or query.startswith(_MARKUP):
        return None
    if len(words(query)) < MIN_QUERY_WORDS or len(document.split()) < MIN_DOCUMENT_WORDS:
        return None
    if " ".join(words(query)) in " ".join(words(document)):
        return None
    return _Pair(identifier, query, document)


def _distinct(candidates: list[_Pair]) -> list[_Pair]:
    """Keeps the first pair, by id, of those with the same query words."""
    first: dict[str, _Pair] = {}
    for pair in sorted(candidates):
        first.setdefault(" ".join(words(pair.query)), pair)
    return list(first.values())


def _assemble(
    pairs: list[_Pair], clusters: list[int], shares: Shares, packages: list[dict]
) -> TrainingData:
    splits: dict[str, list[_Pair]] = {name: [] for name in asdict(shares)}
    for pair, cluster in zip(pairs, clusters, strict=True):
        splits[_split_of(pairs[cluster].id, shares)].append(pair)
    members = {name: [f"q:{pair.id}" for pair in split] for name, split in splits.items()}
    train = sorted(splits["retriever_train"] + splits["generator_train"])
    judged = {"train": train, "dev": splits["dev"], "test": splits["test"]}
    # Equal documents are one: neither could be found before the other but by chance.
    first: dict[str, str] = {}
    for pair in pairs:
        first.setdefault(pair.document, pair.id)
    collection = Collection(
        name="pydoc",
        corpus={identifier: document for document, identifier in first.items()},
        queries={f"q:{pair.id}": pair.query for pair in pairs},
        qrels={
            name: {f"q:{pair.id}": {first[pair.document]: 1} for pair in split}
            for name, split in judged.items()
        },
    )
    source = {
        "name": "pydoc",
        "packages": packages,
        "pairs": len(pairs),
        "documents": len(first),
        "clusters": len(set(clusters)),
        "splits": {name: len(ids) for name, ids in members.items()},
        "rule": RULE,
    }
    return TrainingData(collection, members["retriever_train"], members["generator_train"], source)


def _split_of(cluster: str, shares: Shares) -> str:
    draw = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:6]) / 2**48
    # Test and dev first: they stay the same when only the trainings share differently.
    for name in ("test", "dev", "generator_train"):
        draw -= getattr(shares, name)
        if draw < 0:
            return name
    return "retriever_train"
