"""What a GGUF file says about itself, read without trusting it and without its weights."""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from stack.errors import Code, StackError

MAX_HEADER_BYTES = 64 << 20
MAX_ENTRIES = 1 << 16  # keys, or tensors; real files have about 50 and 1,000
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 63
VERSIONS = (2, 3)
MAGIC = b"GGUF"
SCALARS = dict([*enumerate("BbHhIif?"), *enumerate("Qqd", 10)])  # to the codes of struct
STRING, ARRAY = 8, 9


class TensorType(NamedTuple):
    """A type of ggml: each ``block_elements`` weights of a row take ``block_bytes``."""

    code: int
    block_elements: int
    block_bytes: int


# A copy, since importing gguf takes half a second; a test compares it with gguf's own.
TYPES = {
    name: TensorType(*numbers)
    for name, *numbers in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40),
        ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
        ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2),
        ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
    )
}  # fmt: skip
_BY_CODE = {kind.code: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class Header:
    """A header; ``keys`` holds every scalar, and of an array its length.

    ``size_bytes`` is where the last tensor ends: the least size of an undamaged file. ``tensors``
    gives the bytes of each, without padding. Of a split model it is the first part's, with the
    tensors and the size of all; the other parts have no keys but those of the split.
    """

    architecture: str
    name: str
    keys: Mapping[str, int | float | bool | str]
    tensor_count: int
    size_bytes: int
    tensors: Mapping[str, int] = field(repr=False)


class _Cursor:
    """Walks the first bytes of a file; raises EOFError(bytes needed) where they run out."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise EOFError(self.at)
        return start

    def take(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def count(self, code: str, limit: int) -> int:
        if (count := self.take(code)) > limit:
            raise ValueError(f"a count of {count:,} where {limit:,} is the most")
        return int(count)

    def string(self) -> str:
        start = self.skip(self.take("Q"))
        return self.data[start : self.at].decode(errors="replace")

    def value(self) -> Any:
        if (kind := self.take("I")) == ARRAY:
            return self.array(self.take("I"), self.take("Q"))
        return self.string() if kind == STRING else self.take(_scalar(kind))

    def array(self, kind: int, count: int) -> int:
        if kind != STRING:
            self.skip(count * struct.calcsize(_scalar(kind)))
            return count
        # Not through skip and take: a real file has half a million strings.
        at, last, length_at = self.at, len(self.data) - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise EOFError(at + 8)
            at += 8 + length_at(self.data, at)[0]
        self.skip(at - self.at)
        return count


def _scalar(kind: int) -> str:
    if kind not in SCALARS:  # the engine knows no arrays of arrays either
        raise ValueError(f"a value of type {kind}")
    return SCALARS[kind]


def parse(data: bytes) -> Header:
    """Parse a file's first bytes; raises EOFError(bytes needed) or ValueError."""
    if not data.startswith(MAGIC):
        raise ValueError(foreign(data))
    cursor = _Cursor(data)
    if (version := cursor.take("4xI")) not in VERSIONS:
        raise ValueError(f"GGUF version {version}, where {VERSIONS} are supported")
    tensor_count, key_count = cursor.count("Q", MAX_ENTRIES), cursor.count("Q", MAX_ENTRIES)
    keys = {cursor.string(): cursor.value() for _ in range(key_count)}
    end, tensors = 0, {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = [cursor.take("Q") for _ in range(cursor.count("I", MAX_DIMENSIONS))]
        kind, offset, elements = _BY_CODE.get(cursor.take("I")), cursor.take("Q"), math.prod(shape)
        if not kind or not shape or shape[0] % kind.block_elements or elements > MAX_ELEMENTS:
            raise ValueError(f"tensor {name[:64]!r} of shape {shape} and type {kind}")
        tensors[name] = elements // kind.block_elements * kind.block_bytes
        end = max(end, offset + tensors[name])
    without = "" if keys.get("split.no") else None
    architecture = keys.get("general.architecture", without)
    alignment = keys.get("general.alignment", 32)
    if not isinstance(architecture, str) or not isinstance(alignment, int) or alignment < 1:
        raise ValueError("no architecture, or an alignment that is none")
    size_bytes = cursor.at + (end and -cursor.at % alignment + end)
    name = str(keys.get("general.name", ""))
    return Header(architecture, name, keys, tensor_count, size_bytes, tensors)


def foreign(data: bytes) -> str:
    """Name what a file is, by its first bytes, that does not begin as GGUF does."""
    start = data[:512].lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it points to"
    if start.startswith(b"<"):
        return "an HTML page, not a GGUF file"
    return f"not a GGUF file: begins with {start[:4]!r}" if start else "an empty file"


def parts(path: Path) -> tuple[Path, ...]:
    """Return the files of a model: itself, or all parts of a split one named by its first."""
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", path.name)
    if not match:
        return (path,)
    return tuple(
        path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf")
        for number in range(1, max(1, int(match[2])) + 1)
    )


def read(path: Path) -> Header:
    """Read the header of a model, and hold each of its files' size against it.

    Raises:
        StackError: as `read_file`; INTEGRITY where the parts of a split one do not belong together.

    """
    files = parts(path)
    first, *others = map(read_file, files)
    for number, header in enumerate((first, *others)):
        told = (header.keys.get("split.no", 0), header.keys.get("split.count", 1) or 1)
        if told != (number, len(files)):
            raise StackError(
                f"{files[number]}: its header says split {told[0]} of {told[1]}, "
                f"its name {number} of {len(files)}",
                "fetch the file again, under its own name",
                Code.INTEGRITY,
            )
    tensors = {name: size for each in (first, *others) for name, size in each.tensors.items()}
    size_bytes = sum(each.size_bytes for each in (first, *others))
    return replace(first, tensors=tensors, tensor_count=len(tensors), size_bytes=size_bytes)


def require(path: Path, header: Header, wanted: Mapping[str, int | str]) -> None:
    """Hold a header's values against those that `compose.yaml` asks for.

    Raises:
        StackError: INTEGRITY, with what differs.

    """
    differ = [
        f"{key} is {header.keys.get(key, 'not set')}, where {value} is wanted"
        for key, value in wanted.items()
        if header.keys.get(key) != value
    ]
    if differ:
        raise StackError(
            f"{path}: {'; '.join(differ)}",
            "it is another model, or an old conversion: fetch its repository's newest file "
            "(`uv run invoke download --update`)",
            Code.INTEGRITY,
        )


def read_file(path: Path) -> Header:
    """Read the header of ``path``, at most 64 MiB of it, and hold the file's size against it.

    Raises:
        StackError: LOAD where there is no regular file; INTEGRITY where it cannot be read, is not
            GGUF of version 2 or 3, is out of bounds, or is shorter than its header says.

    """
    try:
        if not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise StackError(f"{path}: {what}", "fetch or make the model first", Code.LOAD)
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            header = parse(file.read(MAX_HEADER_BYTES))
        if size_bytes < header.size_bytes:
            raise EOFError(header.size_bytes)
    except OSError as error:
        cause, remedy = error.strerror or str(error), "let this user read the file"
    except EOFError as error:
        needed, remedy = error.args[0], "fetch or make the file again"
        cause = f"truncated: {size_bytes:,} bytes, where its header asks for {needed:,} or more"
        if needed <= size_bytes:
            cause = f"a header of {needed:,} bytes or more, where {MAX_HEADER_BYTES:,} is the most"
    except ValueError as error:
        cause, remedy = str(error), "fetch or make the file again"
    else:
        return header
    raise StackError(f"{path}: {cause}", remedy, Code.INTEGRITY)
