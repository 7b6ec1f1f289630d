"""AnchorDR's tokenizer: a text cleaner, a SentencePiece model and a fairseq dictionary."""

import hashlib
import re
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from expandr_jax.errors import UserError
from expandr_jax.files.records import decode_line, write_json
from expandr_jax.weights.fields import Fields, model_max_length

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_BOS, _PAD, _EOS, _UNK = range(4)
_LONGEST = 1024  # What AnchorDR has positions for.

_ASCII_FORMS = str.maketrans(
    {
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("–—", "-"),
    }
)
# What cutting at punctuation parts and these put together again.
_REJOIN = (
    (re.compile(r"' ([smdtSMDT])\b"), r"'\1"),
    (re.compile(r"' (ll|re|ve)\b"), r"'\1"),
    (re.compile(r"' (LL|RE|VE) "), r"'\1 "),
)


class FairseqTokenizer:
    """Text to ids, called as a tokenizer of transformers is.

    Attributes:
        pad_token_id: Fills rows.
        model_max_length: Longest input in tokens.
        lower_case: Whether texts are lower-cased.
        vocab_size: How many ids there are.
    """

    pad_token, pad_token_id = _SPECIAL[_PAD], _PAD

    def __init__(self, directory: Path):
        """Reads sp.model, dict.txt and, for its flag and its length, tokenizer_config.json.

        Raises:
            UserError: If a file is missing or cannot be read.
        """
        settings = Fields.read(directory / "tokenizer_config.json", optional=True)
        self.lower_case = settings.flag("do_lower_case", False)
        self.model_max_length = min(_LONGEST, model_max_length(settings) or _LONGEST)
        try:
            self._files = {n: (directory / n).read_bytes() for n in ("sp.model", "dict.txt")}
        except OSError as error:
            reason = f"AnchorDR's tokenizer needs it: {error.strerror}"
            raise UserError(f"{error.filename}: {reason}") from None
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self._files["sp.model"])
        except RuntimeError:
            raise UserError(f"{directory / 'sp.model'}: not a SentencePiece model") from None
        self._ids = _read_dictionary(directory / "dict.txt", self._files["dict.txt"])
        self.vocab_size = len(self._ids)

    def __call__(
        self, texts: Sequence[str], *, truncation: bool = False, max_length: int | None = None, **_
    ) -> dict[str, list[list[int]]]:
        """Ids of texts: <s>, pieces, </s>; a longer text loses its last pieces, and how many."""
        most = max_length if truncation and max_length else 10**9
        rows, lost = [], []
        for text in texts:
            pieces = self._pieces.EncodeAsPieces(clean(text, self.lower_case))
            ids = [self._ids.get(piece, _UNK) for piece in pieces[: most - 2]]
            rows.append([_BOS, *ids, _EOS])
            lost.append(len(pieces) - len(ids))
        return {"input_ids": rows, "num_truncated_tokens": lost}

    @property
    def identity(self) -> list[str | bool]:
        """What its ids depend on: the sha256 of its files' contents, and whether it lowers case."""
        contents = (self._files[name] for name in sorted(self._files))
        return [*(hashlib.sha256(content).hexdigest() for content in contents), self.lower_case]

    def save_pretrained(self, directory: Path) -> None:
        """Writes the three files."""
        for name, content in self._files.items():
            (directory / name).write_bytes(content)
        settings = {"do_lower_case": self.lower_case, "model_max_length": self.model_max_length}
        write_json(directory / "tokenizer_config.json", settings)


def clean(text: str, lower_case: bool) -> str:
    """Makes quotes and dashes ASCII, cuts words at punctuation, rejoins English contractions."""
    text = text.strip().replace("``", '"').replace("''", '"').translate(_ASCII_FORMS)
    text = " ".join(part for token in text.split() for part in _cut(token))
    for pattern, replacement in _REJOIN:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    return text.lower() if lower_case else text


def _cut(token: str) -> list[str]:
    """Leading punctuation, core and trailing punctuation of a word, those that are there."""
    marks = "".join(
        c for c in token if c in string.punctuation or unicodedata.category(c).startswith("P")
    )
    core = token.strip(marks)
    return [part for part in token.partition(core) if part] if core else [token]


def _read_dictionary(path: Path, content: bytes) -> dict[str, int]:
    """Ids by piece: the special tokens, then the dictionary in its order."""
    ids = {piece: index for index, piece in enumerate(_SPECIAL)}
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        piece, _, count = decode_line(f"{path}:{number}", line).rpartition(" ")
        if not piece or not count.isdigit():
            raise UserError(f"{path}:{number}: expected a piece, a space and its count")
        if piece in ids:
            raise UserError(f"{path}:{number}: piece {piece!r} stands there twice")
        ids[piece] = len(ids)
    return ids
