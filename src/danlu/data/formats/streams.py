"""Files, gzip and archives as text streams: which members there are, and how their characters are encoded."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Final, cast

from danlu.data.files import SUFFIXES, is_data_file, suffix
from danlu.data.problems import RowError

DAMAGE: Final = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError)
"""What reading a damaged file raises; `NotImplementedError` is `zipfile`'s word for a rare compression."""

HEAD: Final = 1 << 20
"""So many bytes at a file's beginning decide what it is."""

_BLOCK: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
_ENCRYPTED: Final = 1
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_ESCAPED: Final = re.compile("[\udc80-\udcff]")
_FOREIGN: Final = re.compile(r"[^\x00-\x7f]")
# A tenth of any Chinese text, old or new, simplified or traditional, is one of these. Other languages' old encodings,
# misread, hit them by chance only.
_COMMON: Final = frozenset(
    "，。、：；！？《》“”（）的一是不了在人有我他这這个個中大来來上为為和国國地到以说說时時要就出会會可也你对對生能而子"
    "那得于於着下自之年过過发發后後作里用道行所然家种種事成方多经經么去法学學如都同现現当當没沒动動面起看定天分还還"
)


@dataclass(frozen=True, slots=True)
class Member:
    """A file, or a file in an archive; each call of `open` gives its uncompressed bytes from the beginning."""

    name: str
    open: Callable[[], IO[bytes]]
    path: Path | None = None
    """The file itself, if it is one that is not compressed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one pass over a member finds out.

    Attributes:
        encoding: a codec's name.
        bad: whether some bytes are not of this encoding; they are read as lone surrogates.
        head: the first characters.
        blank: whether there is nothing but white space.
    """

    encoding: str
    bad: bool
    head: str
    blank: bool


def members(path: Path) -> Iterator[Member | RowError]:
    """The files in a file: itself, or an archive's data files; hidden ones, folders and `__MACOSX` are left out.

    An archive's members can be opened until the next one is asked for.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield RowError(f"the file cannot be read: {reason}", code="unreadable", file=str(path))
        return
    if magic not in _ZIP:
        yield _member(str(path), lambda: path.open("rb"), path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [info for info in archive.infolist() if _is_wanted(info)]
            for info in wanted:
                name = f"{path}/{info.filename}"
                if info.flag_bits & _ENCRYPTED:
                    hint = "Unpack the archive with its password, and give the files."
                    yield RowError("the file is encrypted", code="damaged-file", hint=hint, file=name)
                else:
                    yield _member(name, partial(archive.open, info))
    except DAMAGE as error:
        yield damaged(str(path), error)
        return
    if not wanted:
        yield RowError(
            "the archive holds no data file",
            code="empty-file",
            hint=f"Data files end in {', '.join(SUFFIXES)}, or those and .gz.",
            file=str(path),
        )


def _is_wanted(info: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(info.filename).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not info.is_dir() and not hidden and is_data_file(info.filename) and suffix(info.filename) != ".zip"


def _member(name: str, opened: Callable[[], IO[bytes]], path: Path | None = None) -> Member:
    """The member, uncompressed if its content is gzip."""

    try:
        with opened() as stream:
            compressed = stream.read(2) == _GZIP
    except DAMAGE:
        compressed = False  # reading it will tell
    return Member(name, lambda: cast(IO[bytes], _Gzip(opened()))) if compressed else Member(name, opened, path)


class _Gzip(gzip.GzipFile):
    """Closes what it reads from, too, which `GzipFile` leaves open."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(fileobj=source)
        self._source = source

    def close(self) -> None:
        super().close()
        self._source.close()


def damaged(name: str, error: BaseException) -> RowError:
    """The error for a file that cannot be uncompressed or read to its end."""
    if isinstance(error, OSError) and error.errno is not None:
        return RowError(f"the file cannot be read: {error.strerror}", code="unreadable", file=name)
    what = "zip" if isinstance(error, (zipfile.BadZipFile, NotImplementedError)) else "gzip"
    return RowError(
        f"the {what} file is damaged: {error}",
        code="damaged-file",
        hint="Download or compress it again.",
        file=name,
    )


def probe(member: Member) -> Probe:
    """How a member's characters are encoded, decided over the whole of it.

    Valid UTF-8 is UTF-8; what is not, but is GB18030 throughout and looks like Chinese, is GB18030; else it is UTF-8
    with bad bytes in it. A damaged file is judged by its readable beginning.
    """
    head = b""
    for block in _blocks(member):
        head += block
        if len(head) >= HEAD:
            break
    encoding = next((name for bom, name in _BOMS if head.startswith(bom)), "utf-8")
    bad = not _decodes(member, encoding)
    if bad and encoding == "utf-8" and _is_chinese(member):
        encoding, bad = "gb18030", False
    text = head.decode(encoding, "ignore")
    return Probe(encoding, bad, text, blank=len(head) < HEAD and not text.strip() and not bad)


def _blocks(member: Member) -> Iterator[bytes]:
    with suppress(*DAMAGE), member.open() as stream:
        # Not `read`, which gives nothing at all of a block that ends in damage.
        while block := cast(io.BufferedReader, stream).read1(_BLOCK):
            yield block


def _decodes(member: Member, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in _blocks(member):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _is_chinese(member: Member) -> bool:
    decoder = codecs.getincrementaldecoder("gb18030")()
    found: Counter[str] = Counter()
    try:
        for block in _blocks(member):
            text = decoder.decode(block)
            if found.total() < 10_000:
                found.update(_FOREIGN.findall(text))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    total = found.total()
    if total >= 50:
        return sum(count for char, count in found.items() if char in _COMMON) >= 0.1 * total
    # Too little for frequencies: every character must be one that old Chinese standards have among the usual ones.
    return total > 0 and sum(count for char, count in found.items() if _is_usual(char)) >= 0.9 * total


def _is_usual(char: str) -> bool:
    code = char.encode("gb2312", "ignore")
    return len(code) == 2 and (code[0] <= 0xA3 or 0xB0 <= code[0] <= 0xD7)


@contextmanager
def text_of(member: Member, probed: Probe) -> Iterator[io.TextIOWrapper]:
    """A member's text; only "\\n" ends a line (U+2028 and others may stand in JSON strings)."""
    errors = "surrogateescape" if probed.encoding.startswith("utf-8") else "replace"
    with member.open() as stream, io.TextIOWrapper(stream, probed.encoding, errors, newline="\n") as text:
        yield text


def bad_bytes(text: str, name: str, line: int) -> RowError | None:
    """The error for text with bytes that are not UTF-8, at its line (`text` begins at `line`); None if it is good."""
    found = _ESCAPED.search(text)
    if found is None:
        return None
    return RowError(
        f"found byte 0x{ord(found.group()) - 0xDC00:02x}, which is not UTF-8",
        code="bad-encoding",
        hint="Save the file as UTF-8, for example with: iconv -f GB18030 -t UTF-8 IN > OUT",
        file=name,
        line=line + text.count("\n", 0, found.start()),
    )
