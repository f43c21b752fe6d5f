"""From the bytes of a file to its text: what compressed it, and in which encoding it is."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final

import zstandard

from metrics_pipeline.errors import SettingError

READ_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile)

_MAGIC: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bz2"),
    (b"PK\x03\x04", "zip"),
)
_SUFFIXES: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bz2", ".zip": "zip"}
_MARKS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_PIECE: Final = 1 << 20


class Source:
    """The bytes of a file, decompressed.

    Attributes:
        path: as it was given.
        size: in bytes, as it lies on disk.
        position: how many of them are read.
        error: why what was opened last broke off; None when it did not.
        compression: what it is compressed by; empty when by nothing.
        name: of the data: the file's without what says how it is compressed, or that of the one file in an archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise SettingError(f"{path}: {'is no regular file' if path.exists() else 'there is no such file'}")
            self.size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
        except OSError as error:
            raise SettingError(f"{path}: cannot be read: {error.strerror}") from error
        self.position = 0
        self.error: Exception | None = None
        named = _SUFFIXES.get(path.suffix.casefold(), "")
        self.compression = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
        if named and head and named != self.compression:
            raise SettingError(f"{path}: cannot be read beyond line 0: Not a {named} file, as its name says")
        self.name = path.name[: -len(path.suffix)] if named and named != "zip" else path.name
        self._member = self._member_of_zip() if self.compression == "zip" else ""
        if self._member:
            self.name = Path(self._member).name

    def _member_of_zip(self) -> str:
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [
                    one.filename
                    for one in archive.infolist()
                    if not one.is_dir() and not one.filename.startswith(("__MACOSX/", "."))
                ]
        except READ_ERRORS as error:
            raise SettingError(f"{self.path}: is not a zip archive that can be read: {error}") from error
        if "xl/workbook.xml" in names:
            raise SettingError(f"{self.path}: is an Excel workbook: save the sheet as CSV UTF-8, and replay that")
        if len(names) != 1:
            raise SettingError(
                f"{self.path}: holds {len(names)} files ({', '.join(names[:5])}): unzip it, and replay those you mean"
            )
        return names[0]

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes from the beginning; where they break off, they end, and `error` says why."""
        self.position = 0
        self.error = None
        with io.FileIO(self.path) as raw, ExitStack() as closing:
            counted = _Counted(self, raw)
            plain = io.BufferedReader(counted, 1 << 18)
            opened: IO[bytes]
            if self.compression == "gzip":
                opened = gzip.GzipFile(fileobj=plain)  # type: ignore[assignment]
            elif self.compression == "zstd":
                opened = io.BufferedReader(_Zstd(plain), 1 << 18)
            elif self.compression == "xz":
                opened = closing.enter_context(lzma.LZMAFile(plain))
            elif self.compression == "bz2":
                opened = closing.enter_context(bz2.BZ2File(plain))
            elif self.compression == "zip":
                archive = closing.enter_context(zipfile.ZipFile(self.path))
                opened = closing.enter_context(archive.open(self._member))
                self.position = self.size
            else:
                opened = plain
            try:
                yield io.BufferedReader(_Guarded(self, opened), 1 << 18)
            finally:
                opened.close()

    def head(self, size: int) -> bytes:
        """The first bytes.

        Raises:
            SettingError: there are none that can be read.
        """
        with self.open() as opened:
            found = opened.read(size)
        self.position = 0
        if self.error is not None and not found:
            raise SettingError(f"{self.path}: cannot be read beyond line 0: {self.error}") from self.error
        return found

    def encoding(self) -> str:
        """The encoding of the text: by its mark, by its zeros, and else UTF-8 when all of it is, or Windows' cp1252."""
        head = self.head(4096)
        for mark, name in _MARKS:
            if head.startswith(mark):
                return name
        even, odd = head[0:64:2], head[1:64:2]
        if len(head) >= 8 and odd.count(0) * 2 > len(odd) and 0 not in even[:8]:
            return "utf-16-le"
        if len(head) >= 8 and even.count(0) * 2 > len(even) and 0 not in odd[:8]:
            return "utf-16-be"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        valid = broken = 0
        with self.open() as opened:
            while piece := opened.read(_PIECE):
                if piece.isascii() and not decoder.getstate()[0]:
                    continue
                text = decoder.decode(piece)
                bad = text.count("\ufffd")
                broken += bad
                valid += len(text) - bad - len(text.encode("ascii", "ignore"))
        self.position = 0
        return "cp1252" if broken > valid else "utf-8"


class _Counted(io.RawIOBase):
    """A file that says how far it was read."""

    def __init__(self, source: Source, raw: io.FileIO) -> None:
        super().__init__()
        self._source, self._raw = source, raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer) or 0
        self._source.position += count
        return count


class _Guarded(io.RawIOBase):
    """Bytes that end where they cannot be read further, so that what came before is not lost; the source has the reason."""

    def __init__(self, source: Source, opened: IO[bytes]) -> None:
        super().__init__()
        self._source, self._opened = source, opened

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._opened.read(min(len(buffer), 1 << 16))
        except READ_ERRORS as error:
            self._source.error = error
            return 0
        buffer[: len(data)] = data
        return len(data)


class _Zstd(io.RawIOBase):
    """Frames of zstd; unlike the package's own reader it fails when the last one breaks off."""

    def __init__(self, plain: IO[bytes]) -> None:
        super().__init__()
        self._plain = plain
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._plain.read(1 << 16)
            if not packed:
                if self._begun and not self._frame.eof:
                    raise EOFError("the last zstd frame breaks off")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._begun = True
            self._ready = self._frame.decompress(packed)
        data, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
