from pathlib import Path
from struct import pack

import gguf
import pytest

from stack.errors import Code, StackError
from stack.gguf_header import MAX_HEADER_BYTES, TYPES, Header, parts, read, require

HUGE = 1 << 63


def header(body: bytes = b"", *, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return pack("<4sIQQ", b"GGUF", version, tensors, keys) + body


def key(value: bytes) -> bytes:
    return header(pack("<Q1s", 1, b"k") + value, keys=1)


def tensor(*dims: int, kind: int = 0) -> bytes:
    return header(pack(f"<Q1sI{len(dims)}QIQ", 1, b"t", len(dims), *dims, kind, 0), tensors=1)


REFUSED = {
    "empty": (b"", "an empty file"),
    "html": (b"\n<!DOCTYPE html><title>404</title>", "an HTML page"),
    "lfs-pointer": (b"version https://git-lfs.example/spec/v1\noid 0", "a git-lfs pointer"),
    "zip": (b"PK\x03\x04" + bytes(64), r"begins with b'PK\x03\x04'"),
    "only-magic": (b"GGUF", "truncated: 4 bytes, where its header asks for 8 or more"),
    "version-1": (header(version=1), "GGUF version 1"),
    "big-endian": (header(version=3 << 24), "GGUF version 50331648"),
    "no-architecture": (header(), "no architecture"),
    "tensor-count": (header(tensors=HUGE), "a count of 9,223,372,036,854,775,808"),
    "key-count": (header(keys=HUGE), "a count of 9,223,372,036,854,775,808"),
    "key-length": (header(pack("<Q", HUGE), keys=1), "truncated: 32 bytes"),
    "string-length": (key(pack("<IQ", 8, HUGE)), "truncated"),
    "array-length": (key(pack("<IIQ", 9, 10, HUGE)), "truncated"),
    "string-array-length": (key(pack("<IIQ", 9, 8, HUGE) + bytes(64)), "truncated"),
    "string-in-array-length": (key(pack("<IIQQ", 9, 8, 2, HUGE)), "truncated"),
    "nested-array": (key(pack("<IIQ", 9, 9, 1) + bytes(64)), "a value of type 9"),
    "value-type": (key(pack("<I", 13) + bytes(64)), "a value of type 13"),
    "five-dimensions": (tensor(1, 1, 1, 1, 1), "a count of 5 where 4 is the most"),
    "no-dimension": (tensor(), "tensor 't'"),
    "elements": (tensor(HUGE, HUGE), "tensor 't'"),
    "tensor-type": (tensor(32, kind=4), "tensor 't'"),
    "half-a-block": (tensor(48, kind=8), "tensor 't'"),
}


@pytest.mark.parametrize(("data", "cause"), REFUSED.values(), ids=REFUSED)
def test_what_no_engine_could_load_is_refused(path: Path, data: bytes, cause: str) -> None:
    path.write_bytes(data)
    with pytest.raises(StackError) as caught:
        read(path)
    assert caught.value.code == Code.INTEGRITY
    assert cause in caught.value.cause


def test_a_header_over_the_bound_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.write(key(pack("<IIQ", 9, 0, MAX_HEADER_BYTES)))
        file.truncate(4 * MAX_HEADER_BYTES)
    with pytest.raises(StackError, match="67,108,864 is the most"):
        read(path)


def test_a_file_one_byte_short_is_truncated(tiny: Path, path: Path) -> None:
    path.write_bytes(tiny.read_bytes()[:-1])
    size = tiny.stat().st_size
    with pytest.raises(StackError, match=f"{size - 1:,} bytes, where its header asks for {size:,}"):
        read(path)


@pytest.mark.parametrize(("name", "cause"), [("none", "no such file"), ("", "not a regular file")])
def test_what_is_no_file_cannot_be_loaded(tmp_path: Path, name: str, cause: str) -> None:
    with pytest.raises(StackError, match=cause) as caught:
        read(tmp_path / name)
    assert caught.value.code == Code.LOAD


def test_an_unreadable_file_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StackError, match="Permission denied") as caught:
        read(tiny)
    assert caught.value.code == Code.INTEGRITY


def test_version_2_reads_as_version_3(tiny: Path, path: Path) -> None:
    path.write_bytes(tiny.read_bytes().replace(pack("<I", 3), pack("<I", 2), 1))
    assert read(path) == read(tiny)


def test_keys_and_tensors_are_those_gguf_reads(tiny: Path) -> None:
    theirs, ours = gguf.GGUFReader(tiny), read(tiny)
    assert ours.tensor_count == len(theirs.tensors)
    assert ours.tensors == {tensor.name: tensor.n_bytes for tensor in theirs.tensors}
    assert ours.keys == {
        name: len(field.data) if gguf.GGUFValueType.ARRAY in field.types else field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }


def test_types_take_the_bytes_gguf_gives_them() -> None:
    assert {kind.name: (kind, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == TYPES


@pytest.fixture
def split(tmp_path: Path, tiny: Path) -> Path:
    """The same model in parts, written by gguf; the first of them."""
    whole = gguf.GGUFReader(tiny)
    writer = gguf.GGUFWriter(None, "deepseek2", split_max_tensors=20)
    writer.add_context_length(8192)
    for each in whole.tensors:
        writer.add_tensor(each.name, each.data, raw_dtype=each.tensor_type)
    writer.write_header_to_file(tmp_path / "model.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(tmp_path.glob("model-*.gguf"))


def test_parts_are_named_by_the_first(split: Path) -> None:
    assert parts(split) == tuple(sorted(split.parent.glob("model-*.gguf")))
    assert parts(split.with_name("model.gguf")) == (split.with_name("model.gguf"),)
    assert len(parts(split)) > 1


def test_split_model_reads_as_one(split: Path, tiny: Path) -> None:
    header = read(split)

    assert header.architecture == "deepseek2"
    assert header.tensors == read(tiny).tensors
    assert header.size_bytes == sum(part.stat().st_size for part in parts(split))


def test_part_that_is_short_is_named(split: Path) -> None:
    last = parts(split)[-1]
    last.write_bytes(last.read_bytes()[:-1])

    with pytest.raises(StackError, match=f"{last.name}: truncated"):
        read(split)


def test_part_under_the_name_of_another_is_refused(split: Path) -> None:
    first, second, *_ = parts(split)
    second.write_bytes(first.read_bytes())

    with pytest.raises(StackError, match=r"split 0 of .*, its name 1 of") as caught:
        read(split)
    assert caught.value.code == Code.INTEGRITY


WANTED: dict[str, int | str] = {
    "general.architecture": "deepseek2",
    "deepseek2.expert_gating_func": 2,
}


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({**WANTED, "deepseek2.expert_gating_func": 1}, "expert_gating_func is 1, where 2 is"),
        ({"general.architecture": "deepseek2"}, "expert_gating_func is not set"),
        ({**WANTED, "general.architecture": "llama"}, "architecture is llama, where deepseek2"),
    ],
)
def test_header_that_says_otherwise_is_refused(keys: dict[str, int | str], cause: str) -> None:
    header = Header("deepseek2", "", keys, 0, 0, {})

    with pytest.raises(StackError, match=cause) as caught:
        require(Path("model.gguf"), header, WANTED)
    assert caught.value.code == Code.INTEGRITY


def test_header_that_says_the_same_passes(tiny: Path) -> None:
    require(tiny, read(tiny), WANTED)
