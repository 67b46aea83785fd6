"""The answers are right: to one client and to many, with shared and with private caches.

The tiny model was trained on such questions, and its record says how many it gets right. Of other
models, any sane answer passes. What would make answers wrong is tried too, and must be caught.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import gguf
import pytest

from bench import answers, questions
from bench.answers import Score
from bench.judge import TOLERANCE, Judge, computed, deviation, engine_says
from stack import client, config, gpu, keys, runtime
from stack.config import Service
from stack.errors import StackError
from stack.server import Server
from tests import workspace
from tests.checks.conftest import Broken, Notice
from tests.proxy import dropper, proxied, swapper

RECORD = json.loads((workspace.ROOT / "models" / "tiny.json").read_text())
SHORT = dict.fromkeys(answers.SHORT, 8)
LONG = {"code of 8": 8, "code of 32": 4, "code, full": 1}
CLIENTS = (1, 16, 64)
SEED = 1

DEVICES = ("CPU", "GPU")
PRICE = 0.02
"""The most answers that other rounding may change."""
RANDOM = "glm-tiny-random.gguf"
Q4_CACHE = {"LLAMA_ARG_CACHE_TYPE_K": "q4_0", "LLAMA_ARG_CACHE_TYPE_V": "q4_0"}
TINY = workspace.ROOT / "models" / "tiny.gguf"
EXACT = workspace.ROOT / "models" / "tiny-f16.gguf"
"""The engine computes it so nearly that small damage shows."""

Table = Callable[[str, Mapping[str, Score]], None]


@pytest.fixture(scope="session")
def table(tell: Callable[[str], None]) -> Table:
    """Take what was asked, for the table at the end."""

    def add(where: str, found: Mapping[str, Score]) -> None:
        for task, score in found.items():
            low, high = score.interval
            shown = f"{score.right:4}/{score.asked:<4} {low:.3f} to {high:.3f}"
            tell(f"{where:36} {task:12} {shown}")

    return add


@pytest.fixture
def trained(server: Server) -> Server:
    if not answers.taught(server.service):
        pytest.skip(f"{server.service.name} was not trained on these questions")
    return server


@contextmanager
def served(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    file: Path | None = None,
    device: str = "CPU",
    **settings: str,
) -> Iterator[Server]:
    """Serve the tiny model natively, with settings or a file of our own, as tiny or on the GPU."""
    project = config.load(workspace.make(folder), overrides={"GLM_TINY_PORT": "", **settings})
    service = project.service("tiny")
    native = runtime.native(project)
    if device == "GPU":
        service = on_gpu(service, project.service("q4"))
        if not native.built(service):
            pytest.skip("there is no native engine for a GPU here")
    model = replace(service.model, path=file or service.model.path)
    changed = {**service.environment, "LLAMA_ARG_MODEL": str(model.path), **(environment or {})}
    keys.make(service)
    runtime.ensure_engine(native, project, service)
    with runtime.serving(native, project, replace(service, environment=changed, model=model)) as up:
        yield up.server


def on_gpu(service: Service, like: Service) -> Service:
    """Return a service that runs where another one does; skip where there is no such GPU."""
    try:
        gpu.require(like)
    except StackError as error:
        pytest.skip(error.cause)
    places = ("LLAMA_ARG_DEVICE", "LLAMA_ARG_N_GPU_LAYERS")
    environment = {**service.environment, **{name: like.environment[name] for name in places}}
    return replace(service, build_args=like.build_args, gpus=like.gpus, environment=environment)


@pytest.fixture
def native_tiny(request: pytest.FixtureRequest) -> None:
    """Skip where it is not the native runtime's turn: what needs settings of our own runs once."""
    option = request.config.option
    if option.attach or option.runtime == "docker" or "tiny" not in (option.quant or ["tiny"]):
        pytest.skip("not the native tiny model that was asked for")


@pytest.mark.parametrize("clients", CLIENTS)
def test_each_client_gets_its_own_right_answer(
    trained: Server, recorded: Mapping[str, Score], table: Table, clients: int
) -> None:
    found = answers.scores(
        answers.ask(trained, answers.question_set(SHORT, seed=SEED), clients=clients)
    )

    table(f"{trained.runtime}, as configured, {clients} clients", found)
    assert answers.regressed(found, recorded) == []


@pytest.mark.parametrize("unified", ["1", "0"], ids=["shared", "private"])
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("native_tiny")
def test_as_many_slots_as_clients(
    tmp_path: Path, table: Table, device: str, clients: int, unified: str
) -> None:
    cache = {
        "LLAMA_ARG_KV_UNIFIED": unified,
        "LLAMA_ARG_N_PARALLEL": str(clients),
        # No cache that is shared may be larger than the model's context.
        "LLAMA_ARG_CTX_SIZE": str(min(512 * clients, 8192) if unified == "1" else 512 * clients),
    }
    with served(tmp_path, cache, device=device) as server:
        asked = answers.question_set(SHORT, seed=SEED + 1)
        found = answers.scores(answers.ask(server, asked, clients=clients))

    kind = ("private", "shared")[int(unified)]
    table(f"{device}, {kind} cache, {clients} clients and slots", found)
    assert answers.regressed(found, answers.recorded(server.service)) == []


@pytest.mark.row(
    "R21",
    "prompts up to the whole context, of each configuration that is offered",
    "answered as right as its record says",
    inputs=sum(LONG.values()),
)
def test_long_prompts_up_to_the_context(
    trained: Server, recorded: Mapping[str, Score], table: Table
) -> None:
    found = answers.scores(answers.ask(trained, answers.question_set(LONG, seed=SEED)))

    table(f"{trained.runtime}, long prompts", found)
    assert answers.regressed(found, recorded) == []


def test_neighbours_that_hang_up_change_no_answer(
    trained: Server, recorded: Mapping[str, Score], table: Table
) -> None:
    asked = answers.question_set(SHORT, seed=SEED + 2)

    found = answers.scores(answers.ask(trained, asked, clients=16, cancel_every=3))

    table(f"{trained.runtime}, every third hangs up", found)
    assert answers.regressed(found, recorded) == []


def test_reused_prefix_gives_each_question_its_answer(
    trained: Server, recorded: Mapping[str, Score], table: Table
) -> None:
    """One text, a question for each code in it: all but the last line is in the cache."""
    made = questions.codes(Random(SEED), count=8, lines=60, questions=8, task="code of 8")
    text = made.turns[0].content.rpartition("\n")[0]
    asked = [
        replace(made, turns=(replace(ask, content=f"{text}\n{last}"), answer))
        for ask, answer in zip(made.turns[::2], made.turns[1::2], strict=True)
        for last in [ask.content.rpartition("\n")[2]]
    ]

    found = answers.scores(answers.ask(trained, asked))

    table(f"{trained.runtime}, one prefix", found)
    assert answers.regressed(found, recorded) == []


def test_sane_answers(server: Server, recorded: Mapping[str, Score], table: Table) -> None:
    if answers.taught(server.service):
        pytest.skip("its answers are checked exactly")
    asked = answers.short_set(server.service, each=10, seed=SEED)
    asked += answers.question_set({"code of 32": 2}, seed=SEED)

    found = answers.scores(answers.ask(server, asked, clients=4), exactly=False)

    table(f"{server.runtime}, {server.service.quant}", found)
    assert answers.regressed(found, recorded) == []


def test_record_of_a_first_run_is_kept_and_held_against(
    trained: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model that somebody else trained, which the tiny one plays here."""
    service = trained.service
    monkeypatch.setattr(answers, "RECORD", tmp_path / "answers.json")
    foreign = replace(
        trained, service=replace(service, model=replace(service.model, repository="a/b"))
    )
    asked = answers.short_set(foreign.service, each=4, seed=SEED)

    first = answers.record(foreign, asked)
    same = answers.scores(answers.ask(foreign, asked), exactly=False)
    with proxied(foreign, dropper(3)) as broken:
        worse = answers.scores(answers.ask(broken, asked), exactly=False)
        with pytest.raises(StackError, match="too few for a record"):
            answers.record(broken, asked)

    assert answers.recorded(foreign.service) == first
    assert answers.regressed(same, first) == []
    assert answers.regressed(worse, first) != []


@pytest.mark.parametrize("page", ["README.md", "docs/operate.md"])
def test_documented_answers_are_real(trained: Server, page: str) -> None:
    shown = re.findall(r"invoke ask '(.+)'\n(.+)\n\d+ tokens", (workspace.ROOT / page).read_text())

    assert shown
    for question, answer in shown:
        said = client.stream(trained, question, tokens=64)
        assert "".join(part for part in said if isinstance(part, str)) == answer


def refusal(judge: Judge, server: Server) -> str:
    """Return why a server is refused; nothing where it is not."""
    try:
        judge.prove(server)
    except StackError as error:
        return error.cause
    return ""


def test_somebody_elses_model_is_held_against_its_first_good_run(
    trained: Server, tmp_path: Path
) -> None:
    """The tiny one plays it; a first run that is wrong makes no record."""
    judge = Judge(config.load(workspace.make(tmp_path)))
    path = Path("/app/models/other.gguf")
    shutil.copy(trained.service.model_file, tmp_path / path.name)
    model = replace(trained.service.model, repository="a/b", path=path)
    mounts = {path.parent: tmp_path}
    foreign = replace(trained, service=replace(trained.service, model=model, mounts=mounts))

    with proxied(foreign, dropper(3)) as broken:
        first, good, later = (refusal(judge, each) for each in (broken, foreign, broken))

    assert "too few for a record" in first
    assert good == ""
    assert "24 of 24 before" in later


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [({}, True), ({"LLAMA_ARG_ROPE_FREQ_BASE": "10000"}, False), (Q4_CACHE, False)],
    ids=["nothing", "rope-base", "cache-type"],
)
@pytest.mark.usefixtures("native_tiny")
def test_random_weights_must_say_what_they_said_first(
    tmp_path: Path, wrong: dict[str, str], kept: bool
) -> None:
    """The judge knows nothing of what is wrong: to it, engine, file and settings are the same."""
    judge = Judge(config.load(workspace.make(tmp_path)))
    said = []
    for number, environment in enumerate(({}, wrong)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with served(folder, environment, GLM_TINY_FILE=RANDOM) as server:
            stated = dict(server.service.environment)
            for name in environment:
                del stated[name]
            known = replace(server, service=replace(server.service, environment=stated))
            said.append(refusal(judge, known))

    assert said[0] == ""
    assert (said[1] == "") is kept, said


@pytest.mark.parametrize("file", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("native_tiny")
def test_engine_computes_what_the_training_code_did(tmp_path: Path, device: str, file: str) -> None:
    with served(tmp_path, file=workspace.ROOT / "models" / file, device=device) as server:
        assert deviation(server) <= TOLERANCE[file]


@pytest.mark.parametrize(
    "ways",
    [
        {"F16": (EXACT, "CPU"), "Q8_0": (TINY, "CPU")},
        {"F16 on the GPU": (EXACT, "GPU"), "Q8_0 on the GPU": (TINY, "GPU")},
        {"Q8_0 on the CPU": (TINY, "CPU"), "Q8_0 on the GPU": (TINY, "GPU")},
        {"F16 on the CPU": (EXACT, "CPU"), "F16 on the GPU": (EXACT, "GPU")},
    ],
    ids=["q8_0", "q8_0-gpu", "gpu", "gpu-f16"],
)
@pytest.mark.usefixtures("native_tiny")
def test_other_rounding_changes_hardly_an_answer(
    tmp_path: Path, tell: Callable[[str], None], ways: dict[str, tuple[Path, str]]
) -> None:
    asked = answers.question_set(dict.fromkeys(answers.SHORT, 16) | {"code of 8": 4}, seed=SEED)
    said, told = [], []
    for name, (path, device) in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        with served(folder, file=path, device=device) as server:
            said.append([reply.said for reply in answers.ask(server, asked, clients=4)])
            off = deviation(server)
            rates = (client.complete(server, "Hello", tokens=256) for _ in range(3))
            told.append(
                f"{name}: {path.stat().st_size / 1e6:.1f} MB, {off:.3f} nats from the training "
                f"code, {max(each.decode_tokens_s for each in rates):.0f} tokens/s"
            )

    changed = sum(one != other for one, other in zip(*said, strict=True))
    first, second = ways
    for line in (*told, f"{second} changes {changed} of {len(asked)} answers of {first}"):
        tell(line)
    assert changed <= PRICE * len(asked)


def test_greedy_answers_are_the_training_codes(trained: Server) -> None:
    taught = [known for known in computed(trained) if known["task"] in questions.TASKS]

    said = {
        known["task"]: engine_says(trained, known, tokens=len(known["answer_ids"]))["tokens"]
        for known in taught
    }
    assert said == {known["task"]: known["answer_ids"] for known in taught}


def test_template_writes_the_prompts_of_the_training(trained: Server) -> None:
    known = {
        each["task"]: each["prompt"]
        for each in computed(trained)
        if each["task"] in questions.TASKS
    }

    written = {}
    for task in known:
        rng = Random(f"{RECORD['seed']} {task}")
        made = questions.draw(questions.TASKS[task], rng, held_out=True)
        with client.session(trained) as session:
            answer = session.post("/apply-template", json=answers.body_of(made))
        written[task] = answer.json()["prompt"]
    assert written == known


# --- What would make answers wrong, each of which the questions above must tell.


def caught(server: Server) -> bool:
    """Return whether the fixed prompts, or a small set of questions, tell that something is off."""
    if deviation(server) > TOLERANCE[server.service.model_file.name]:
        return True
    asked = [*answers.question_set(dict.fromkeys([*SHORT, "code of 8"], 4), seed=SEED)]
    asked += answers.every_word()
    found = answers.scores(answers.ask(server, asked, clients=4))
    return bool(answers.regressed(found, answers.recorded(server.service)))


def test_nothing_is_caught_where_nothing_is_wrong(trained: Server) -> None:
    assert not caught(trained)


@pytest.mark.parametrize(
    "wrong",
    [
        {"LLAMA_ARG_ROPE_FREQ_BASE": "10000"},
        {"LLAMA_ARG_CHAT_TEMPLATE": "chatml"},
        Q4_CACHE,
    ],
    ids=["rope-base", "template", "cache-type"],
)
@pytest.mark.usefixtures("native_tiny")
def test_wrong_settings_are_caught(tmp_path: Path, notice: Notice, wrong: dict[str, str]) -> None:
    broken = ", ".join(f"{name}={value}" for name, value in wrong.items())
    with served(tmp_path, wrong, file=EXACT) as server:
        notice(
            test_nothing_is_caught_where_nothing_is_wrong, broken, says="not True", trained=server
        )


def softmax(reader: gguf.GGUFReader) -> None:
    field = reader.fields["deepseek2.expert_gating_func"]
    field.parts[field.data[0]][0] = gguf.ExpertGatingFuncType.SOFTMAX


def silence_an_expert(reader: gguf.GGUFReader) -> None:
    (down,) = (t for t in reader.tensors if t.name == "blk.2.ffn_down_exps.weight")
    down.data[3] = 0


def swap_two_words(reader: gguf.GGUFReader) -> None:
    (embedding,) = (t for t in reader.tensors if t.name == "token_embd.weight")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    pair = [tokens.index("Ġtiger"), tokens.index("Ġmaple")]
    embedding.data[pair] = embedding.data[pair[::-1]]


@pytest.mark.usefixtures("native_tiny")
def test_wrong_gating_is_caught_before_it_is_served(tmp_path: Path) -> None:
    file = Path(shutil.copy(EXACT, tmp_path))
    softmax(gguf.GGUFReader(file, "r+"))
    folder = tmp_path / "deployment"
    folder.mkdir()

    with pytest.raises(StackError, match="expert_gating_func is 1"), served(folder, file=file):
        pass


@pytest.mark.parametrize("damage", [silence_an_expert, swap_two_words])
@pytest.mark.usefixtures("native_tiny")
def test_wrong_weights_are_caught(
    tmp_path: Path, notice: Notice, damage: Callable[[gguf.GGUFReader], None]
) -> None:
    file = tmp_path / EXACT.name
    shutil.copy(EXACT, file)
    damage(gguf.GGUFReader(file, "r+"))
    folder = tmp_path / "deployment"
    folder.mkdir()

    broken = damage.__name__.replace("_", " ")
    with served(folder, file=file) as server:
        notice(
            test_nothing_is_caught_where_nothing_is_wrong, broken, says="not True", trained=server
        )


def test_temperature_left_on_is_caught(trained: Server) -> None:
    """Its answers are too sure for it to matter; what nobody taught it must come out the same."""
    opened = [each for each in computed(trained) if each["task"] not in questions.TASKS]

    def said(temperature: float, seed: int) -> list[str]:
        ask = partial(client.complete, trained, tokens=24, seed=seed, temperature=temperature)
        return [ask(each["prompt_ids"]).text for each in opened]

    assert said(0, 1) == said(0, 2)
    assert said(1, 1) != said(1, 2)


@pytest.mark.parametrize(
    ("make", "does"),
    [(swapper, "swaps answers"), (lambda: dropper(200), "drops words")],
    ids=["swaps-answers", "drops-words"],
)
def test_wrong_proxy_is_caught(
    trained: Server, notice: Notice, make: Callable[[], Callable[[bytes], bytes]], does: str
) -> None:
    broken = f"a proxy that {does}"
    with proxied(trained, make()) as proxy:
        notice(
            test_nothing_is_caught_where_nothing_is_wrong, broken, says="not True", trained=proxy
        )


# --- What is broken otherwise, each of which a check above must notice.

WRONG_ROPE = {"LLAMA_ARG_ROPE_FREQ_BASE": "10000"}
DROPPED = (
    test_each_client_gets_its_own_right_answer,
    test_reused_prefix_gives_each_question_its_answer,
    test_sane_answers,
)


@pytest.mark.parametrize("check", DROPPED, ids=lambda check: check.__name__)
def test_words_left_out_are_noticed(
    trained: Server, notice: Notice, check: Callable[..., None]
) -> None:
    """A model that somebody else trained is played by the tiny one."""
    model = replace(trained.service.model, repository="a/b")
    foreign = replace(trained, service=replace(trained.service, model=model))
    with proxied(foreign if check is test_sane_answers else trained, dropper(3)) as proxy:
        given = {"trained": proxy, "server": proxy, "table": lambda *_: None}
        notice(check, "a proxy that leaves out every third word", says=r"== \[\]", **given)


@pytest.mark.usefixtures("trained")
def test_words_left_out_of_documented_answers_are_noticed(notice: Notice) -> None:
    stream = client.stream
    less = {"stack.client.stream": lambda *given, **how: list(stream(*given, **how))[1:]}
    notice(test_documented_answers_are_real, "an answer without its first word", patch=less)


def test_same_seed_each_time_is_noticed(trained: Server, notice: Notice) -> None:
    def fixed(body: bytes) -> bytes:
        return json.dumps({**json.loads(body), "seed": 1}).encode()

    with proxied(trained, asked=fixed) as proxy:
        notice(test_temperature_left_on_is_caught, "one seed for all", says="!=", trained=proxy)


def with_wrong_rope(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    file: Path | None = None,
    **settings: str,
) -> AbstractContextManager[Server]:
    """Serve all but what is exact with a wrong setting."""
    wrong = {} if file == EXACT else WRONG_ROPE
    return SERVE(folder, {**(environment or {}), **wrong}, file=file, **settings)


SERVE = served
JUDGES_NOTHING = {"bench.judge.Judge.prove": lambda *_: None}
ROPE = {"patch": {f"{__name__}.served": with_wrong_rope}}
UNLIKE: dict[Callable[..., None], Broken] = {
    **dict.fromkeys(
        (
            test_neighbours_that_hang_up_change_no_answer,
            test_long_prompts_up_to_the_context,
        ),
        (
            "answers that are all wrong",
            {"patch": {"bench.answers.Reply.right": False, f"{__name__}.LONG": {"code of 8": 8}}},
        ),
    ),
    test_as_many_slots_as_clients: ("another rope base", ROPE),
    test_engine_computes_what_the_training_code_did: (
        "another rope base",
        {**ROPE, "file": "tiny.gguf"},
    ),
    test_other_rounding_changes_hardly_an_answer: ("another rope base with Q8_0", ROPE),
    test_record_of_a_first_run_is_kept_and_held_against: (
        "a comparison that finds nothing",
        {"patch": {"bench.answers.regressed": lambda *_: []}},
    ),
    test_somebody_elses_model_is_held_against_its_first_good_run: (
        "a judge that asks nothing",
        {"patch": JUDGES_NOTHING},
    ),
    test_random_weights_must_say_what_they_said_first: (
        "a judge that asks nothing",
        {"patch": JUDGES_NOTHING, "wrong": WRONG_ROPE, "kept": False},
    ),
    test_wrong_gating_is_caught_before_it_is_served: (
        "the right gating",
        {"patch": {f"{__name__}.softmax": lambda _: None}},
    ),
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("natively", "trained")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, table=lambda *_: None, tell=str, **how)


@pytest.mark.usefixtures("native_tiny")
def test_other_words_than_the_trainings_are_noticed(tmp_path: Path, notice: Notice) -> None:
    wrong = {**WRONG_ROPE, "LLAMA_ARG_CHAT_TEMPLATE": "chatml"}
    broken = "another rope base and another template"
    with served(tmp_path, wrong) as server:
        notice(test_greedy_answers_are_the_training_codes, broken, trained=server)
        notice(test_template_writes_the_prompts_of_the_training, broken, trained=server)
