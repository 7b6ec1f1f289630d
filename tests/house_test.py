"""The house keeps its order: who imports whom, what a signature may ask for, how long files are.

Everything here is read from the sources, none of which is run.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRODUCT = ("expandr_jax", "train", "eval", "configs")
MOST_LINES = 400  # A file.
# Whoever raises it says in the commit what for.
MOST_SOURCE_LINES = 56825

# Every room of the library, the lowest first: a room imports from those before it alone. A module
# that lies in no package is a room of its own.
ROOMS = (
    "errors", "settings", "sharding", "mining", "files", "runtime", "data", "metrics", "models",
    "weights", "losses", "training", "search", "generation", "vectors", "pair", "expansion",
    "ranking", "rewards", "objectives", "pruning", "config", "loading", "report", "serving",
    "planning",
)  # fmt: skip

FLAGS = ("absl", "ml_collections")
# Libraries that take long to import, which is done where they are used, so that no mistyped option
# waits for them.
SLOW = {
    "grain", "huggingface_hub", "matplotlib", "orbax", "scann", "tensorflow",
    "tensorflow_datasets", "torch", "transformers",
}  # fmt: skip
MAKERS = ("eval/models.py", "train/rehearse.py")  # They make models, whatever they are asked.
LAUNCHER = "train.launch"  # It starts every program.
RUN = "expandr_jax.runtime.run"  # The workdir: the library takes what it needs of it.
MOST_RUNS = 39


def sources(*directories: str) -> Iterator[tuple[str, str]]:
    """Every Python file of the directories: its path from the root, its text."""
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


parsed = functools.cache(ast.parse)


@functools.cache
def imports() -> tuple[tuple[str, str], ...]:
    """Every import of the product, those inside functions too: the file, the module imported."""
    found = []
    for path, text in sources(*PRODUCT):
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.Import):
                found += [(path, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: imports are written in full"
                found += [(path, module(f"{node.module}.{alias.name}")) for alias in node.names]
    return tuple(found)


def module(name: str) -> str:
    """The module that a dotted name lies in, where it is one of the product's."""
    path = ROOT / name.replace(".", "/")
    if name.split(".")[0] in PRODUCT and not path.is_dir() and not path.with_suffix(".py").exists():
        return name.rpartition(".")[0]
    return name


def top(name: str) -> str:
    """The package that a path or a module belongs to."""
    return name.replace("/", ".").split(".")[0]


def room(name: str) -> str:
    """The room that a path or a module of the library lies in."""
    return name.removesuffix(".py").replace("/", ".").split(".")[1]


def test_the_library_imports_neither_programs_nor_settings():
    wrong = [i for i in imports() if top(i[0]) == "expandr_jax" and top(i[1]) in PRODUCT[1:]]
    assert not wrong


def test_programs_share_the_launcher_alone():
    between = [i for i in imports() if {*map(top, i)} == {"train", "eval"} and i[1] != LAUNCHER]
    assert not between


def test_no_product_imports_tests():
    assert not [path for path, name in imports() if top(name) == "tests"]


def test_the_library_reads_no_flags():
    assert not [i for i in imports() if top(i[0]) == PRODUCT[0] and top(i[1]) in FLAGS]


def imports_at_once(path: str) -> Iterator[str]:
    """What a file imports when it is imported: not in its functions, nor for types alone."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (module(f"{node.module}.{alias.name}") for alias in node.names)


def test_programs_start_without_slow_libraries():
    programs = {path for path, text in sources("train", "eval") if "__main__" in text}
    assert programs > {*MAKERS, "train/joint.py", "eval/beir.py"}
    left, seen = programs - {*MAKERS}, set()
    slow = set()
    while left:
        seen.add(path := left.pop())
        for name in imports_at_once(path):
            if top(name) in SLOW:
                slow.add((path, name))
            if top(name) in PRODUCT:
                file = name.replace(".", "/")
                files = {f"{file}.py", f"{file}/__init__.py"}
                left |= {file for file in files - seen if (ROOT / file).is_file()}
    assert not slow


def test_every_room_has_its_floor():
    rooms = {room(path) for path, _ in sources("expandr_jax")} - {"__init__"}
    assert rooms == set(ROOMS)


def test_rooms_import_from_those_below_them():
    floors = {name: floor for floor, name in enumerate(ROOMS)}
    pairs = {
        (room(path), room(name))
        for path, name in imports()
        if top(path) == top(name) == PRODUCT[0] and name != PRODUCT[0]
    }
    assert not {(low, high) for low, high in pairs if floors[low] < floors[high]}


def test_the_library_knows_no_run():
    found = {path for path, name in imports() if top(path) == PRODUCT[0] and name == RUN}
    assert {room(path) for path in found} <= {"runtime"}


def test_few_functions_take_a_whole_run():
    """Those that order its stages; the others are told what they need, and need no workdir."""
    takers = (re.findall(r"run: Run\b", text) for _, text in sources(*PRODUCT[:3]))
    assert sum(map(len, takers)) <= MOST_RUNS


def test_comments_are_whole_phrases():
    """None begins with an "Of" whose noun the reader has to guess."""
    dangling = re.compile(r'(# |"|: |^\s+)Of ')
    assert not [
        f"{path}:{number}"
        for path, text in sources(*PRODUCT)
        for number, line in enumerate(text.splitlines(), 1)
        if dangling.search(line)
    ]


def test_no_program_asks_for_the_name_of_step_b():
    """What it has to know of it the record says, `objectives.registry.StepB`."""
    asked = re.compile(r"step_b (==|!=|in|not in) ")
    assert not [path for path, text in sources(*PRODUCT) if asked.search(text)]


# Files that hold a family's name and mean another thing by it, or are about one model by intent.
NAMED_ELSEWHERE = {
    "expandr_jax/planning/narrow.py": "a rehearsal's two models are of two families",
    "expandr_jax/weights/byte_level.py": "a tokenizer's cut, by its name in GGUF files",
    "expandr_jax/weights/gguf_tokenizer.py": "a kind of tokenizers, by its name in GGUF files",
    "expandr_jax/weights/gguf_vocabulary.py": "the same, written",
    "expandr_jax/weights/sentence_transformers.py": "names that a file of settings has had",
    "eval/models.py": "a table with a row a family",
    "eval/tiny_anchordr.py": "a model of one family, for tests",
    "eval/tiny_models.py": "the same of each",
}


def family_names() -> set[str]:
    """What records of families call their models: types in config.json, classes, GGUF's names."""
    names = set()
    for _, text in sources("expandr_jax/weights/families"):
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.keyword) and node.arg == "classes":
                names |= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "GgufForm":
                names |= {leaf.value for leaf in node.args if isinstance(leaf, ast.Constant)}
    return names - {""}


def test_families_are_named_in_their_own_files_alone():
    """What a family is, its record says: `weights.families.family`."""
    names, found = family_names(), set()
    assert names > {"bert", "llama", "T5EncoderModel", "qwen3"}
    for path, text in sources(*PRODUCT[:3]):
        if not path.startswith(("expandr_jax/weights/families/", "expandr_jax/models/")):
            leaves = (x for x in ast.walk(parsed(text)) if isinstance(x, ast.Constant))
            found |= {(path, x.value) for x in leaves if isinstance(x.value, str)}
    assert {path for path, name in found if name in names} == {*NAMED_ELSEWHERE}


def test_modules_of_families_are_taken_from_their_records():
    """But for the decoder, which is what generation is made of."""
    stems = [
        {pathlib.Path(path).stem for path, _ in sources(f"expandr_jax/{directory}")}
        for directory in ("weights/families", "models")
    ]
    own = {f"expandr_jax.models.{stem}" for stem in set.intersection(*stems) - {"decoder"}}
    own |= {f"expandr_jax.weights.families.{stem}" for stem in stems[0] - {"family"}}
    inside = ("expandr_jax/weights/families/", "expandr_jax/models/")
    assert not [i for i in imports() if i[1] in own and not i[0].startswith(inside)]


def test_no_type_is_asked_for_a_family():
    """A module's record is found by `family_of`, and says what it can."""
    for path, text in sources(*PRODUCT[:3]):
        tree = parsed(text)
        models = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("expandr_jax.models")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type"):
                asked = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
                assert not asked & models, f"{path}:{node.lineno}"


def types_named(text: str) -> Iterator[str]:
    """Classes and other names for types that a module defines, those it has for itself apart."""
    for node in parsed(text).body:
        named = [node.name] if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.Assign):
            named = [target.id for target in node.targets if isinstance(target, ast.Name)]
        yield from (name for name in named if re.fullmatch(r"[A-Z][a-z]\w*", name))


def test_a_type_has_a_name_of_its_own():
    """But for the parts of models, which each family calls as all do: `Block`, `Attention`."""
    names = [
        name
        for path, text in sources(*PRODUCT)
        if room(path) != "models"
        for name in types_named(text)
    ]
    assert not {name for name in names if names.count(name) > 1}


# Constants that mean the same in several modules: how much of something is in memory at once, what
# a thing is called, a limit of two places that have one reason.
SHARED_CONSTANTS = {
    "FAMILY", "HEADER", "JACCARD", "MOST_SIZES", "MOVED", "QUERIES_AT_ONCE", "ROWS_AT_ONCE",
    "SECONDS_BETWEEN_LOOKS", "TEXTS_AT_ONCE",
}  # fmt: skip
# Each row of a benchmark and each made model is a module with the same names in it.
ALIKE = ("eval/benchmarks/", "eval/tiny_")


def constants(text: str) -> set[str]:
    """Constants that a module defines, those it has for itself apart."""
    own: set[str] = set()
    for node in parsed(text).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            named = target.elts if isinstance(target, ast.Tuple) else [target]
            own |= {name.id for name in named if isinstance(name, ast.Name)}
    return {name for name in own if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)}


def test_a_constant_has_a_name_of_its_own():
    """A reader who meets `BLOCK` or `TEXTS` in an import knows which one it is."""
    names = [
        name
        for path, text in sources(*PRODUCT[:3])
        if not path.startswith(ALIKE)
        for name in constants(text)
    ]
    assert {name for name in names if names.count(name) > 1} == SHARED_CONSTANTS


# What every program has, what several programs and processes start with, and a formula of two
# families.
SHARED_FUNCTIONS = {"define_flags", "main", "measure", "relative_buckets", "start"}


def test_a_function_has_a_name_of_its_own():
    """One meaning a name, as of types and constants; those that a module has for itself apart."""
    names = [
        node.name
        for path, text in sources(*PRODUCT[:3])
        if not path.startswith(ALIKE)
        for node in parsed(text).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert {name for name in names if names.count(name) > 1} == SHARED_FUNCTIONS


def test_no_file_is_long():
    long = {path for path, text in sources(*PRODUCT, "tests") if text.count("\n") > MOST_LINES}
    assert not long


def test_the_source_does_not_grow():
    assert sum(text.count("\n") for _, text in sources(*PRODUCT[:3])) <= MOST_SOURCE_LINES


@pytest.mark.parametrize("path", ["expandr_jax/search/exact.py", "expandr_jax.search.exact"])
def test_a_room_is_found_by_path_or_module(path):
    assert (top(path), room(path)) == ("expandr_jax", "search")
