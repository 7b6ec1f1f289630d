"""A workdir in a bucket: a directory on this machine, and objects that are kept the same.

Memory maps, journals and reports need files, so a run works in a directory of its own disk. What
has changed there goes to the bucket whenever a stage, a block or a batch is done, in the order it
was written, and is then vouched for: a marker, work/markers/process-I.json, has the size and the
sha256 of every file that process I has finished there. It is written after them. Before an object
that it vouches for is replaced, both contents are named in it; and of one that is longer than it
says only the beginning counts, as of a journal that has grown. So whenever a process is killed, the
bucket holds what its disk held at some moment, and nothing is ever renamed.

A run begins, on whatever machine, with what the markers vouch for. Each file has one writer, as its
name says: `.process-I` in it, or else process 0. Checkpoints are not mirrored: each process writes
its part of one straight to the bucket, where Orbax completes it by a marker of its own.
"""

import fnmatch
import hashlib
import json
import os
import pathlib
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.runtime.bucket import Bucket, is_bucket
from expandr_jax.runtime.processes import SharedFiles
from expandr_jax.runtime.stopping import held

SCRATCH = "EXPANDR_SCRATCH"  # Names the directory for those of all runs.
DEFAULT_SCRATCH = "~/.cache/expandr-jax/workdirs"
MARKERS = "work/markers"
# Made anew on each machine, or a service of its own has it.
ELSEWHERE = ("work/compiled", "work/documents", "wandb")
# What other processes do not read of process 0's; it may be large.
OF_MAIN_ALONE = (
    "export/", "runs/", "tensorboard/", "profile/", "work/vectors/", "metrics.jsonl",
    "timings.json", "report.html",
)  # fmt: skip
# Each process has what says which blocks of those vectors there are, and fetches its own: `read`.
_VECTOR_JOURNAL = re.compile(r"work/vectors/.*\.npy\.jsonl$")
_SPARSE = re.compile(r"work/(.*/)?splade\.index-[^/]*/")  # Process 0 alone searches those.
SHARES_FOLDER = "work/shares/"  # What each process reads of every other.
SECONDS_BETWEEN = 10.0  # Between pushes of what grows piece by piece; longer where they take long.
SHARE_OF_TIME = 0.05
LOOKS = 20  # For a marker and its objects to agree while their process goes on.
BLOCK_BYTES = 1 << 20

Version = tuple[int, str]  # Size and sha256.
Content = dict[str, list[Version]]  # The one that a file has, or before a change both.
_PROCESS = re.compile(r"[.-]process-(\d+)(?![^.-])")


def scratch(address: str, suffix: str) -> pathlib.Path:
    """The directory on this machine for a workdir in a bucket."""
    root = pathlib.Path(os.environ.get(SCRATCH) or DEFAULT_SCRATCH).expanduser().absolute()
    return root / (urllib.parse.quote(address.rstrip("/"), safe="") + suffix)


class Mirror(SharedFiles):
    """The directory of one process, and what it and the others have in the bucket.

    Args:
        address: The workdir, gs://BUCKET/DIRECTORY.
        directory: This process's own.
        index: Number of this process.
        count: Number of processes.
        say: Tells the user what is damaged.
    """

    common = False

    def __init__(
        self,
        address: str,
        directory: pathlib.Path,
        index: int,
        count: int,
        say: Callable[[str], None],
    ):
        self.directory = directory
        self._bucket = Bucket(address)
        self._index, self._count, self._say = index, count, say
        self._version = 0  # The marker's, counted up.
        self._own: Content = {}  # What the marker vouches for.
        self._seen: dict[str, tuple[int, int, int]] = {}  # Files as they are in the bucket.
        self._theirs: dict[int, tuple[int, dict[str, Version]]] = {}  # Markers, as fetched.
        self._rested, self._took = 0.0, 0.0

    def start(self) -> None:
        """Brings the directory to the state that the markers vouch for; process 0 goes first."""
        markers = self._markers()
        if self._index == 0 and 0 not in markers:
            self._write_marker({})  # What cannot be written to is told before hours of work.
            markers[0] = self._version, {}
        self._version = markers.get(self._index, (0, {}))[0]
        whole: Content = {}
        for i, (version, content) in sorted(markers.items()):
            # What process 0 took over, its writer may have continued since.
            mine = {n: v for n, v in content.items() if i in (0, _writer(n))}
            whole |= {n: v for n, v in mine.items() if self._is_needed(n)}
            if i != self._index and i < self._count:
                got = {n: v[-1] for n, v in mine.items() if self._is_from(n, i)}
                self._theirs[i] = version, got
        for name, path in _files(self.directory).items():
            if name not in whole:
                path.unlink()
        for name, versions in sorted(whole.items()):
            found = fetch(self._bucket, name, versions, self.directory / name)
            if found is not None and self._writer(name) == self._index:
                self._own[name] = versions
                if len(versions) == 1:  # Otherwise the object may be the other one.
                    self._seen[name] = _state(self.directory / name)
            elif found is None and name == "config.json":
                raise UserError(
                    f"{self._bucket.path(name)}: is damaged; restore it or use a new --workdir"
                )
            elif found is None:
                self._say(f"{self._bucket.path(name)}: is damaged or was removed")
        gone = [i for i in markers if i >= self._count]
        if self._index == 0 and gone:
            self._write_marker(self._own)
            for i in gone:
                self._bucket.remove(_marker(i))

    def read(self, path: pathlib.Path, start: int, end: int) -> bytes:
        """The bytes, from one to another, of a file that process 0 has put there."""
        return self._bucket.read_part(path.relative_to(self.directory).as_posix(), start, end)

    def _markers(self) -> dict[int, tuple[int, Content]]:
        """The markers that this process reads, by the number of the process that wrote each."""
        found = {}
        for name in self._bucket.names(f"{MARKERS}/process-*.json"):
            i = int(name.rpartition("-")[2].removesuffix(".json"))
            if self._index == 0 or i in (0, self._index):
                found[i] = read_marker(self._bucket, i)
        return found

    def push(self, *, later: bool = False) -> int:
        """Writes what has changed in the directory to the bucket.

        Args:
            later: It may wait for another call, where the last one was not long ago.

        Returns:
            Which version of the marker vouches for it.
        """
        start = time.monotonic()
        pause = max(SECONDS_BETWEEN, self._took / SHARE_OF_TIME)
        if later and start - self._rested < pause:
            return self._version
        with held():
            self._push()
        self._rested = time.monotonic()
        self._took = self._rested - start
        return self._version

    def _push(self) -> None:
        files = _files(self.directory)
        files = {name: path for name, path in files.items() if self._writer(name) == self._index}
        states = {name: _state(path) for name, path in files.items()}
        changed = [name for name, state in states.items() if self._seen.get(name) != state]
        gone = [name for name in self._own if name not in files]
        own: Content = {name: v for name, v in self._own.items() if name in files}
        new: Content = {}
        replaced = False
        for name in sorted(changed, key=lambda name: states[name]):  # As they were written.
            before = own.get(name, [])
            versions = _versions(files[name], states[name][1], before)
            if versions[-1:] != before:
                new[name] = versions[-1:]
                if before and before != versions[:1]:
                    own[name] = [*before, versions[-1]]
                    replaced = True
        if new or gone:
            if replaced:
                self._write_marker(own)
                self._own = own
            for name in new:
                self._bucket.upload(files[name], name)
            self._own = own | new
            self._write_marker(self._own)
        self._seen = states
        for name in gone:
            self._bucket.remove(name)

    def pull(self, versions: Mapping[int, Any]) -> None:
        """Fetches what other processes have written.

        Args:
            versions: What `push` returned in them, by their numbers.
        """
        for i, version in versions.items():
            if i != self._index and version > self._theirs.get(i, (0, {}))[0]:
                self._pull(i, version)

    def _pull(self, index: int, version: int) -> None:
        before = self._theirs.get(index, (0, {}))[1]
        for look in range(LOOKS):
            time.sleep(0.1 * look)
            found, content = read_marker(self._bucket, index)
            wanted = {n: v for n, v in content.items() if self._is_from(n, index)}
            got = {name: self._get(name, v, before) for name, v in wanted.items()}
            if found >= version and None not in got.values():
                break
        else:
            raise UserError(
                f"{self._bucket.path(_marker(index))}: what process {index} has written is not "
                "there; the same commands go on from here"
            )
        for name in before.keys() - got.keys():
            (self.directory / name).unlink(missing_ok=True)
        self._theirs[index] = found, got

    def _get(
        self, name: str, versions: Sequence[Version], before: Mapping[str, Version]
    ) -> Version | None:
        path = self.directory / name
        if before.get(name) == versions[-1] and path.exists():
            return versions[-1]
        return fetch(self._bucket, name, versions, path)

    def _is_from(self, name: str, index: int) -> bool:
        """Whether this process reads a file, and another one is its writer."""
        return self._writer(name) == index and self._is_needed(name)

    def _is_needed(self, name: str) -> bool:
        """Whether this process reads a file, its own among them."""
        writer = self._writer(name)
        if self._index in (0, writer):
            return True
        if writer:
            return name.startswith(SHARES_FOLDER)
        if _VECTOR_JOURNAL.match(name):
            return True
        return not (name.startswith(OF_MAIN_ALONE) or _SPARSE.match(name))

    def _writer(self, name: str) -> int:
        """Which process writes a file; process 0 has taken over from those that are gone."""
        writer = _writer(name)
        return writer if writer < self._count else 0

    def _write_marker(self, content: Content) -> None:
        self._version += 1
        files = dict(sorted(content.items()))
        record = {"version": self._version, "files": files}
        text = json.dumps({**record, "sha256": hash_json(record)}, ensure_ascii=False, indent=1)
        self._bucket.write(_marker(self._index), text.encode())


def read_marker(bucket: Bucket, index: int = 0) -> tuple[int, Content]:
    """A marker's version and the files it vouches for; 0 and none where there is no marker.

    Raises:
        UserError: It is damaged.
    """
    text = bucket.read(_marker(index))
    if text is None:
        return 0, {}
    try:
        record = json.loads(text.decode())
        if record.pop("sha256") != hash_json(record):
            raise ValueError
        files = {n: [(int(s), str(h)) for s, h in v] for n, v in record["files"].items()}
        return int(record["version"]), files
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{bucket.path(_marker(index))}: is damaged; restore it or use a new --workdir"
        ) from None


def fetch(
    bucket: Bucket, name: str, versions: Sequence[Version], path: pathlib.Path
) -> Version | None:
    """Brings a file to the state that it has in the bucket.

    Args:
        bucket: Has the object.
        name: Name of the object.
        versions: Those that the marker vouches for.
        path: The file; it appears whole.

    Returns:
        Which version it is; None: the object is none of them, or is not there.
    """
    version = _find(path, versions)
    if version is not None:
        if path.stat().st_size > version[0]:
            os.truncate(path, version[0])
        return version
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if bucket.download(name, temporary):
            version = _find(temporary, versions)
        if version is not None:
            os.truncate(temporary, version[0])
            os.replace(temporary, path)
        return version
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def local_copy(workdir: str, *names: str) -> pathlib.Path:
    """The directory of a run that is not under way, fetched where it is in a bucket.

    Args:
        workdir: As the user gave it.
        *names: Files to fetch, and directories to fetch all files of; `*` stands for anything.
    """
    if not is_bucket(workdir):
        return pathlib.Path(workdir).absolute()
    bucket, directory = Bucket(workdir), scratch(workdir, "-copy")
    for name, versions in read_marker(bucket)[1].items():
        wanted = any(fnmatch.fnmatchcase(name, n) for n in names) or name.startswith(
            tuple(f"{n}/" for n in names)
        )
        if wanted and fetch(bucket, name, versions, directory / name) is None:
            raise UserError(f"{bucket.path(name)}: is damaged; let the run finish again")
    return directory


def _marker(index: int) -> str:
    return f"{MARKERS}/process-{index}.json"


def _writer(name: str) -> int:
    """The process that a file is of, by its name."""
    found = _PROCESS.search(name.rpartition("/")[2])
    return int(found[1]) if found else 0


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files that are mirrored, by name: none that begin with a dot, which are under way."""
    elsewhere, found = {directory / name for name in ELSEWHERE}, {}
    for folder, folders, names in os.walk(directory):
        inside = pathlib.Path(folder)
        folders[:] = [n for n in folders if n[0] != "." and inside / n not in elsewhere]
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp.npy"):  # As they once were.
                found[(inside / name).relative_to(directory).as_posix()] = inside / name
    return found


def _state(path: pathlib.Path) -> tuple[int, int, int]:
    """What changes when a file does; the time first, to sort by."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _versions(path: pathlib.Path, size: int, before: Sequence[Version] = ()) -> list[Version]:
    """Versions of a file: of as many bytes as `before` has, if that is one, and of all `size`."""
    sizes = [*(v[0] for v in before if len(before) == 1 and v[0] < size), size]
    found, digest, done = [], hashlib.sha256(), 0
    with open(path, "rb") as file:
        for end in sizes:
            while done < end and (block := file.read(min(BLOCK_BYTES, end - done))):
                digest.update(block)
                done += len(block)
            if done == end:
                found.append((end, digest.hexdigest()))
    return found


def _find(path: pathlib.Path, versions: Sequence[Version]) -> Version | None:
    """The newest version that a file begins with."""
    if not path.exists():
        return None
    size = path.stat().st_size
    for version in reversed(versions):
        if version[0] <= size and _versions(path, version[0]) == [version]:
            return version
    return None
