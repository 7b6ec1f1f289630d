import base64
import collections
import contextlib
import hashlib
import importlib
import importlib.metadata
import sys

import pytest

from expandr_jax.data import pydoc as pydoc_module
from expandr_jax.data.beir import read_beir, write_beir
from expandr_jax.data.duplicates import words
from expandr_jax.data.pydoc import MAX_DOCUMENT_CHARACTERS, Shares, harvest
from expandr_jax.errors import UserError
from expandr_jax.runtime.progress import Reporter

REST = "The first argument is used in the way that the second one says, unless the third is set."


def rest(number):
    """A document that is unlike that of any other number."""
    return " ".join(f"word{number}_{i}" for i in range(25))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution of the given files, without importing it."""
    environment = tmp_path / "environment"
    environment.mkdir()
    monkeypatch.syspath_prepend(environment)

    def make(name, version, files, root=environment):
        info = root / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        record = []
        for path, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            record.append(f"{path},sha256={digest.rstrip('=')},{len(content)}\n")
        (info / "RECORD").write_text("".join(record))
        return f"{name}=={version}"

    return make


def test_what_becomes_a_pair(install):
    source = f'''
raise SystemExit("this module must not be imported")

def plain():
    """Pad an array.

    Longer text: {rest(1)}

        indented
    """

def signed():
    """signed(first, second=(1, 2),
              third=None) -> result

    Skip the signature lines.
    =========================
    {rest(2)}
    """

class Thing:
    r"""Hold a \\thing in place.
    {rest(3)}"""

    def method(self):
        "Do what methods do.\\n{rest(4)}"

    if True:
        async def method(self):
            """Do it again, differently.
            {rest(5)}"""

def long():
    """Say a very great deal.
    {"word " * 100_000}"""

def _private():
    """Nobody calls this function.
    {rest(6)}"""

def repeated():
    """pad an ARRAY
    {rest(7)}"""

def leaking():
    """Find the leak here.
    {REST} find  the LEAK here."""

def brief():
    """Too short a text.
    Only these words."""

def terse():
    """Two words.
    {rest(8)}"""

def listed():
    """size (int, the size of it):
    {rest(9)}"""

def directive():
    """.. deprecated:: since version one
    {rest(10)}"""
'''
    spec = install("fake", "1.0", {"fake/__init__.py": source})
    pydoc = harvest([spec])
    queries = {key: pydoc.collection.queries[f"q:{key}"] for key in pydoc.collection.corpus}
    assert queries == {
        "fake/__init__.py:Thing": "Hold a \\thing in place.",
        "fake/__init__.py:Thing.method": "Do what methods do.",
        "fake/__init__.py:Thing.method#2": "Do it again, differently.",
        "fake/__init__.py:long": "Say a very great deal.",
        "fake/__init__.py:plain": "Pad an array.",
        "fake/__init__.py:signed": "Skip the signature lines.",
    }
    documents = pydoc.collection.corpus
    assert documents["fake/__init__.py:plain"] == f"Longer text: {rest(1)}\n\n    indented"
    assert documents["fake/__init__.py:signed"] == rest(2)
    assert len(documents["fake/__init__.py:long"]) <= MAX_DOCUMENT_CHARACTERS
    assert documents["fake/__init__.py:long"].endswith(" word")
    assert "fake" not in sys.modules


def test_equal_documents_are_one(install):
    source = "\n".join(
        f'def {name}():\n    """{query}\n    {rest(number)}"""'
        for name, query, number in [
            ("b", "Write it to disk.", 1), ("a", "Store it for later.", 1), ("c", "Read it.", 2),
            ("d", "Fetch it once more.", 2), ("e", "Do something else.", 3),
        ]
    )  # fmt: skip
    collection = harvest([install("fake", "1.0", {"fake.py": source})]).collection
    assert list(collection.corpus) == ["fake.py:a", "fake.py:d", "fake.py:e"]
    right = {
        query: judged for split in collection.qrels.values() for query, judged in split.items()
    }
    assert right == {
        "q:fake.py:a": {"fake.py:a": 1},
        "q:fake.py:b": {"fake.py:a": 1},
        "q:fake.py:d": {"fake.py:d": 1},  # "Read it." is too short for a query.
        "q:fake.py:e": {"fake.py:e": 1},
    }


def test_which_files_are_read(install):
    def module(number):
        return f'"""Text of module number {number}.\n{rest(number)}"""'

    broken = {"fake/bad.py": "def :", "fake/null.py": b'"""\0', "fake/new.py": "type X = int"}
    read = {"fake/a.py": module(1), "fake/latin.py": b"# coding: latin-1\n" + module(2).encode()}
    skipped = {
        "fake/tests/b.py": module(3),
        "fake/test_c.py": module(4),
        "fake/conftest.py": module(5),
        "fake/data.txt": module(6),
        "fake/__config__.py": module(7),
    }
    pydoc = harvest([install("fake", "1.0", read | broken | skipped)])
    assert list(pydoc.collection.corpus) == ["fake/a.py", "fake/latin.py"]
    (package,) = pydoc.source["packages"]
    contents = [content for _, content in sorted((read | broken).items())]
    digest = hashlib.sha256(b"".join(c if isinstance(c, bytes) else c.encode() for c in contents))
    assert package == {
        "name": "fake",
        "version": "1.0",
        "files": 5,
        "unparsed_files": ["fake/bad.py", "fake/new.py", "fake/null.py"],
        "sha256": digest.hexdigest(),
        "pairs": 2,
    }


def functions(numbers):
    return "".join(
        f'def f{n}():\n    """Function that has number {n}.\n    {rest(n)}"""\n' for n in numbers
    )


def test_splits(install, tmp_path):
    first = install("one", "1", {"one.py": functions(range(300))})
    # Near-duplicates of the first package's texts, and a hundred texts of its own.
    copies = functions(range(300)).replace("_24", "_x").replace("Function", "A function")
    second = install("two", "2", {"two.py": copies + functions(range(300, 400))})
    done = collections.Counter()

    class Counting(Reporter):
        @contextlib.contextmanager
        def progress(self, *task):
            yield lambda count: done.update({task: count})

    pydoc = harvest([first, second], reporter=Counting(None), min_pairs=700)
    collection, splits = pydoc.collection, pydoc.source["splits"]

    home = {
        document: split
        for split, qrels in collection.qrels.items()
        for judged in qrels.values()
        for document in judged
    }
    assert home.keys() == collection.corpus.keys()
    assert all(home[f"one.py:f{n}"] == home[f"two.py:f{n}"] for n in range(300))
    assert not set(pydoc.retriever_train) & set(pydoc.generator_train)
    assert sorted(pydoc.retriever_train + pydoc.generator_train) == sorted(
        collection.qrels["train"]
    )
    assert pydoc.source["pairs"] == sum(splits.values()) == 700
    assert pydoc.source["clusters"] == 400
    assert [package["pairs"] for package in pydoc.source["packages"]] == [300, 400]
    expected = {"retriever_train": 514.5, "generator_train": 73.5, "dev": 35, "test": 77}
    assert splits == {name: pytest.approx(size, abs=40) for name, size in expected.items()}
    stages = [("files read for their docstrings", 2), ("documents compared", 700)]
    assert list(done.items()) == [(stage, stage[1]) for stage in stages]

    other = harvest([second, first], shares=Shares(0.6, 0.24, 0.05, 0.11))
    assert other.collection.corpus == collection.corpus
    assert other.collection.qrels["test"] == collection.qrels["test"]
    assert len(other.generator_train) > len(pydoc.generator_train)
    write_beir(tmp_path / "pydoc", collection)
    assert read_beir(tmp_path / "pydoc") == collection


def test_pinned_wheels_are_read_whatever_the_environment_has(install, tmp_path, monkeypatch):
    monkeypatch.setattr(pydoc_module, "WHEELS", tmp_path / "wheels")
    install("fake", "2.0", {"fake.py": functions(range(9))})
    with pytest.raises(UserError, match=r"installed as 2\.0; expected 1\.0: .* --target .*wheels"):
        harvest(["fake==1.0"])
    install("fake", "1.0", {"fake.py": functions(range(3))}, tmp_path / "wheels")
    assert len(harvest(["fake==1.0"]).collection.corpus) == 3
    assert len(harvest(["fake==2.0"]).collection.corpus) == 9


def test_mistakes_are_named(install):
    spec = install("fake", "1.0", {"fake.py": functions(range(3)), "gone.py": ""})
    install("empty", "1.0", {"empty.txt": ""})
    cases = {
        "fake>=1": 'expected "name==version"',
        "absent==1.0": "package absent is not installed; pip install .*--no-deps .* absent==1.0",
        "fake==2.0": "installed as 1.0; expected 2.0: pip install .*--no-deps .* fake==2.0",
        "empty==1.0": "package empty has no list of its source files",
    }
    for wrong, complaint in cases.items():
        with pytest.raises(UserError, match=complaint.replace(">", ".")):
            harvest([wrong])
    with pytest.raises(UserError, match="3 pairs in 1 packages; expected at least 6000"):
        harvest([spec], min_pairs=6000)
    with pytest.raises(UserError, match="parts that add up to 1"):
        harvest([spec], shares=Shares(test=0.5))
    distribution = importlib.metadata.distribution("fake")
    distribution.locate_file("gone.py").write_text("# changed")
    with pytest.raises(UserError, match=r"gone\.py: differs from this file of package fake==1\.0"):
        harvest([spec])
    distribution.locate_file("gone.py").unlink()
    with pytest.raises(UserError, match=r"gone\.py: cannot read .* package fake: No such file"):
        harvest([spec])


def test_real_package():
    """The same bytes on every machine and Python version, and splits that share no text."""
    try:
        collection = harvest(["networkx==3.6.1"], min_pairs=1000).collection
    except UserError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    text = "\n".join(f"{key}\t{value}" for key, value in collection.corpus.items())
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "1ca11a9539d6f81a07c18f63b3c9c5e87c597d24d202cbab9fc22d6ab061dd89"
    )
    for key, document in collection.corpus.items():
        query = collection.queries[f"q:{key}"]
        assert query.lower() not in document.lower()
        assert len(words(query)) >= 3
        assert len(document.split()) >= 20
    check_splits(collection)
    normal = [query.lower().strip() for query in collection.queries.values()]
    assert len(set(normal)) == len(normal)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "pydoc"])
def test_the_configs_packages(name):
    """What is tested on is neither in what is trained on nor close to it."""
    config = importlib.import_module(f"configs.{name}").get_config().data
    try:
        pydoc = harvest(config.packages, shares=Shares(**config.shares), min_pairs=config.min_pairs)
    except UserError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    judged, queries = pydoc.collection.qrels, pydoc.collection.queries
    assert len(judged["test"]) >= {"quickstart": 300, "pydoc": 1000}[name]
    assert len(pydoc.generator_train) >= {"quickstart": 500, "pydoc": 4000}[name]
    check_splits(pydoc.collection)
    trained, tested = ({queries[q].lower().strip() for q in judged[s]} for s in ("train", "test"))
    assert not trained & tested


def check_splits(collection):
    """No test document shares more than half of its word 5-grams with one that is trained on."""
    grams, holders = {}, collections.defaultdict(list)
    for key, document in collection.corpus.items():
        tokens = document.lower().split()
        grams[key] = {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}
    for judged in collection.qrels["train"].values():
        for key in judged:
            for gram in grams[key]:
                holders[gram].append(key)
    for judged in collection.qrels["test"].values():
        for test in judged:
            mine = grams[test]
            assert mine
            for key in {key for gram in mine for key in holders[gram]}:
                assert len(mine & grams[key]) <= 0.5 * len(mine | grams[key]), (test, key)
