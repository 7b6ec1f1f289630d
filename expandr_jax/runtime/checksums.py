"""Finished files of a run, with their hashes: what is damaged is found before it is used."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from expandr_jax.files.hashes import hash_once
from expandr_jax.files.records import hash_json, write_json
from expandr_jax.runtime import processes


class Checksums:
    """The sha256 of each file that a stage of a run has finished, in work/seals.json.

    The first of several processes alone reads, writes and removes; all learn what it found.

    Args:
        workdir: The run; paths are relative to it.
        say: Tells the user what is damaged.

    Attributes:
        workdir: The same.
        processes: Those that share it.
    """

    def __init__(self, workdir: pathlib.Path, say: Callable[[str], None]):
        self.workdir, self._say = workdir, say
        self.processes = processes.current()
        self._path = workdir / "work" / "seals.json"
        self._files: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                record = json.loads(self._path.read_bytes().decode())
                if hash_json(record["files"]) != record["sha256"]:
                    raise ValueError
                self._files = record["files"]
            except (ValueError, KeyError, TypeError):
                say(f"{self._path}: is damaged; finished files are made again")

    def record(self, *names: str) -> None:
        """Records files, or all files of directories, as finished; names are from the workdir."""
        self.processes.once(lambda: self._record(names))

    def _record(self, names: Sequence[str]) -> None:
        for name in names:
            self._forget(name)
            self._files |= self._found(name)
        self._write()

    def forget(self, *names: str) -> None:
        """Drops the checksums of files that are about to be made again from other inputs."""

        def forget() -> None:
            for name in names:
                self._forget(name)
            self._write()

        self.processes.once(forget)

    def _write(self) -> None:
        files = dict(sorted(self._files.items()))
        write_json(self._path, {"files": files, "sha256": hash_json(files)})

    def array(self, name: str, make: Callable[[], np.ndarray | None]) -> pathlib.Path:
        """The file of an array that is kept under this name, and made where it is not whole.

        All processes call `make` together; what it returns in process 0 is written.
        """
        path = self.workdir / name
        if self.intact(name):
            return path
        array = make()

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)  # Until it is recorded, half a file is taken for none.

        self.processes.once(write)
        self.record(name)
        return path

    def intact(self, *names: str) -> bool:
        """Whether all of these are recorded and unchanged; if not, all of them are removed."""
        return self.processes.once(lambda: self._intact(names))

    def unchanged(self, *names: str) -> bool:
        """Whether all of these are recorded and unchanged; if not, they stay as they are."""
        return self.processes.once(lambda: not self._bad(names))

    def changed(self, *names: str) -> list[str]:
        """Files, recorded under these names, that are not as they were; others may lie beside."""
        known = [file for name in names for file in self._known(name)]
        return [file for file in known if self._found(file) != {file: self._files[file]}]

    def _bad(self, names: Sequence[str]) -> list[str]:
        """The names whose files are not recorded, or have changed since."""
        return [n for n in names if not self._known(n) or self._known(n) != self._found(n)]

    def _intact(self, names: Sequence[str]) -> bool:
        bad = self._bad(names)
        if not bad:
            return True
        for name in bad:
            if self._known(name):
                self._say(f"{self.workdir / name}: is damaged or was removed; it is made again")
        for name in names:
            self._forget(name)
            path = self.workdir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return False

    def _known(self, name: str) -> dict[str, str]:
        """Recorded checksums by file: of a file, or of all files in a directory."""
        return {
            file: checksum
            for file, checksum in self._files.items()
            if file == name or file.startswith(f"{name}/")
        }

    def _found(self, name: str) -> dict[str, str]:
        """Checksums of the files that are there now, as `_known` has the recorded ones."""
        path = self.workdir / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return {
            file.relative_to(self.workdir).as_posix(): hash_once(file)
            for file in files
            if file.is_file()
        }

    def _forget(self, name: str) -> None:
        for file in self._known(name):
            del self._files[file]
