"""The tests' hub is one to `huggingface_hub` itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants, hf_hub_download

from tests.hub import CDN, REPOSITORY, Fault, Hub

SIZE = 2 * constants.DOWNLOAD_CHUNK_SIZE
CONTENT = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's tries
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "other").write_bytes(CONTENT[::-1])
    with Hub(tmp_path) as hub:
        hub.publish({"model.gguf": "file"})
        yield hub
    close_session()


def download(hub: Hub, revision: str = "main") -> bytes:
    path = hf_hub_download(
        REPOSITORY,
        "model.gguf",
        revision=revision,
        endpoint=hub.url,
        token="hf_secret",
        local_dir=hub.folder / "local",
    )
    return Path(path).read_bytes()


def test_the_library_downloads_and_the_token_stays_with_the_hub(hub: Hub) -> None:
    assert download(hub) == CONTENT
    sent_to = {each.host: each.headers.get("authorization") for each in hub.requests}
    assert sent_to == {"127.0.0.1": "Bearer hf_secret", CDN: None}


def test_a_file_has_its_size_and_hash_in_the_api(hub: Hub) -> None:
    info = HfApi(endpoint=hub.url).model_info(REPOSITORY, files_metadata=True)
    (file,) = info.siblings or []

    assert (info.sha, file.size) == (hub.main, SIZE)
    assert file.lfs
    assert file.lfs.sha256 == hub.commits[hub.main]["model.gguf"]


@pytest.mark.parametrize(
    ("faults", "sent_bytes"),
    [
        ([Fault(cut=0)], SIZE),
        ([Fault(cut=0.75)], 1.25 * SIZE),
        ([Fault(cut=0.75), Fault(ignore_range=True)], 1.75 * SIZE),
        ([Fault(status=429, times=2, headers={"Retry-After": "0"})], SIZE),
    ],
    ids=["cut-at-0", "cut-at-75", "no-range", "429"],
)
def test_a_fault_strikes_as_often_as_told(hub: Hub, faults: list[Fault], sent_bytes: int) -> None:
    hub.faults = faults

    assert download(hub) == CONTENT
    assert hub.sent_bytes() == sent_bytes


def test_a_commit_keeps_its_files_when_the_branch_moves_on(hub: Hub) -> None:
    first, second = hub.main, hub.publish({"model.gguf": "other"})

    assert download(hub, second) == CONTENT[::-1]
    assert download(hub, first) == CONTENT
