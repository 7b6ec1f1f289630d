"""What may be unpacked, and what is refused."""

import gzip
import zipfile

import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.archive import MOST_GROWTH, list_files


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def read(path, name):
    return list(list_files(path).lines(name))


def test_lines_are_the_same_however_they_are_packed(tmp_path):
    data = b"\xef\xbb\xbfone\ntwo \n\nlast"
    expected = [(1, b"one\n"), (2, b"two \n"), (3, b"\n"), (4, b"last")]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_bytes(data)
    (tmp_path / "plain" / "a.txt.gz").write_bytes(gzip.compress(data))
    members = [("a.txt", data), ("a.txt.gz", gzip.compress(data))]
    path = write_zip(tmp_path / "packed.zip", members)
    for place in (tmp_path / "plain", path):
        assert list_files(place).names == ("a.txt", "a.txt.gz")
        assert read(place, "a.txt") == read(place, "a.txt.gz") == expected


def test_names_below_a_folder(tmp_path):
    members = [("set/a", b"1"), ("set/deep/b", b"2"), ("other/c", b"3"), ("__MACOSX/._a", b"")]
    files = list_files(write_zip(tmp_path / "x.zip", members))
    assert files.names == ("other/c", "set/a", "set/deep/b")
    below = files.below("set/")
    assert below.names == ("a", "deep/b")
    assert list(below.lines("deep/b")) == [(1, b"2")]
    assert str(below.path("a")).endswith("x.zip/set/a")


@pytest.mark.parametrize("name", ["../a", "/etc/a", "b/../../a", "C:/a", "b\\..\\a"])
def test_a_path_outside_the_archive_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "x.zip", [("corpus.jsonl", b"{}"), (name, b"")])
    with pytest.raises(UserError, match="lies outside the archive; refused"):
        list_files(path)


def test_a_member_that_stands_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = write_zip(tmp_path / "x.zip", [("a", b"1"), ("a", b"2")])
    with pytest.raises(UserError, match="'a' stands in it twice"):
        list_files(path)


def test_what_grows_as_no_text_does_is_refused(tmp_path):
    bomb = bytes(4 << 20)
    assert len(bomb) > MOST_GROWTH * len(gzip.compress(bomb))
    (tmp_path / "a.gz").write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match=r"a\.gz: unpacks to over 100 times its size"):
        read(tmp_path, "a.gz")
    members = [("a", bomb), ("b.gz", gzip.compress(bomb)), ("lines", b"q1\td1\t1\n" * 9000)]
    path = write_zip(tmp_path / "x.zip", members)
    for name in ("a", "b.gz"):
        with pytest.raises(UserError, match=f"{name}: unpacks to over 100 times its size"):
            read(path, name)
    assert len(read(path, "lines")) == 9000  # lines much alike, as in judgements


def test_a_stated_size_that_is_a_lie_does_not_help(tmp_path):
    path = write_zip(tmp_path / "x.zip", [("a", bytes(4 << 20))])
    data = path.read_bytes()
    path.write_bytes(data.replace((4 << 20).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    with pytest.raises(UserError, match="a: cannot read it: Bad CRC"):
        read(path, "a")


def test_damage_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no\.zip: cannot read it as a zip archive: No such file"):
        list_files(tmp_path / "no.zip")
    with pytest.raises(UserError, match="no such directory"):
        list_files(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="File is not a zip file"):
        list_files(tmp_path / "x.zip")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text" * 99)[:-20])
    with pytest.raises(UserError, match=r"a\.gz: cannot read it: "):
        read(tmp_path, "a.gz")
    with pytest.raises(UserError, match="b: cannot read it: No such file"):
        read(tmp_path, "b")
