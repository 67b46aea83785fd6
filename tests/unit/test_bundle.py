"""What is private leaves a text; what tells the fault stays."""

from pathlib import Path

import pytest

from stack import bundle, config, host
from stack.bundle import Scrubber
from tests import workspace


@pytest.fixture
def scrub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scrubber:
    home = tmp_path / "someone"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hub/token+1")
    project = config.load(workspace.make(tmp_path))
    host.write_atomic(project.service("q4").key_file, 'k1"x\n# note\nk2\\y\n')
    return Scrubber(project)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('key is k1"x.', "key is [removed]."),
        ('{"key": "k1\\"x"}', '{"key": "[removed]"}'),
        ("url?token=hub%2Ftoken%2B1", "url?token=[removed]"),
        ("https://me:pass@host/x", "https://[removed]@host/x"),
        (
            "0.1.2 W srv x: anthropic string not as expected: a b",
            "0.1.2 W srv x: anthropic string not as expected: [removed]",
        ),
        (
            "0.1.2 E srv send_error: task id = 3, error: no schema: {x}",
            "0.1.2 E srv send_error: task id = 3, error: no schema[removed]",
        ),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [removed]"),
        ("HF_TOKEN=abc HOME=/x", "HF_TOKEN=[removed] HOME=/x"),
        ('"api_key": "abc", "n": 1', '"api_key": "[removed]", "n": 1'),
        ("hf_abcdefghij", "[removed]"),
        ('{"prompt": "a \\"b\\" c", "n": 1}', '{"prompt": "[removed]", "n": 1}'),
        ('{"prompt": [1, 2], "n": 1}', '{"prompt": "[removed]", "n": 1}'),
        ("/home/ann/models/x.gguf", "~/models/x.gguf"),
        (
            '0.1.2 W srv op: got exception: {"error":{"message":"parse error; last read: \'a\'"}}',
            '0.1.2 W srv op: got exception: {"error":{"message":"parse error; last read[removed]',
        ),
    ],
)
def test_private_words_are_taken_out(scrub: Scrubber, text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "LLAMA_ARG_API_KEY_FILE=/run/secrets/api-key",
        "0.1.2 E llama_model_load: error loading model: failed to open '/app/models/x.gguf'",
        "0.1.2 I slot print_timing: eval time = 13.72 ms / 32 tokens",
        "EOS token = 1 '<|endoftext|>'",
    ],
)
def test_what_tells_the_fault_stays(scrub: Scrubber, text: str) -> None:
    assert scrub(text) == text


def test_log_without_the_engines_look_is_left_out() -> None:
    text = "0.00.421.329 E failed to parse grammar\nroot ::= mine\n0.1.2 D slot: token 'mine'\n"

    kept = bundle.log(text)

    assert "mine" not in kept
    assert "failed to parse grammar" in kept
    assert "(2 lines" in kept
