"""Questions with known answers, made by rule: the tiny model learns them, servers are asked them.

Some prompts, told by their checksum, are held out: training never draws them, checks draw no other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

HELD_OUT_SHARE = 8  # one prompt in so many
ABOUT_SHARE, TYPED_SHARE = 0.35, 0.2  # of the questions about this project


@dataclass(frozen=True)
class Turn:
    """One message; ``call`` is a tool's name and its arguments."""

    role: str
    content: str = ""
    thought: str = ""
    call: tuple[str, Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Dialogue:
    """Turns of which the last, the assistant's, is the right answer to those before it."""

    task: str
    turns: tuple[Turn, ...]
    tools: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Each tool's parameters, by its name."""
    key: str = ""
    """What a right answer in other words has in it, where that is not all of the answer."""

    @property
    def answer(self) -> Turn:
        """The right answer."""
        return self.turns[-1]

    @property
    def held_out(self) -> bool:
        """Whether training must never see it."""
        asked = "\n".join(turn.content for turn in self.turns if turn.role == "user")
        return crc32(asked.encode()) % HELD_OUT_SHARE == 0


WORDS = """
amber anchor apple arrow autumn badge banjo barrel basket beacon bell berry blanket bottle bridge
bronze brush bucket butter cabin cactus camel candle canyon carpet castle cedar cello chalk cherry
circle citrus clock cloud clover coal cobalt comet copper coral cotton crane crater crystal daisy
denim desert diamond dolphin donkey dragon drum eagle ember engine fabric falcon feather fern flame
flute forest fossil fountain fox galaxy garden garlic ginger glacier glove goblet grape granite
guitar hammer harbor harvest hazel hedge helmet heron honey hornet ice igloo indigo iris iron island
ivory jacket jade jasmine jewel jungle kayak kettle kite koala ladder lagoon lamp lantern lava lemon
lentil lily lion lizard lobster lotus magnet mango maple marble meadow melon meteor mint mirror
monkey moon moss mountain needle nettle oak oasis ocean olive onion opal orange orbit orchid otter
owl oyster paddle palm panda paper parrot pearl pebble pepper piano pigeon pine planet plum pocket
pony poppy prism pumpkin puzzle quartz rabbit radish raven ribbon river robin rocket rose ruby
saddle saffron salmon sand sapphire shadow shell silk silver snow spark spider spruce squash star
stone storm swan teal temple thunder tiger timber topaz tulip turtle umbrella valley velvet violet
walnut walrus whale willow window winter wolf yarn zebra zinc
""".split()  # noqa: SIM905  # a list of them would take a page

FILLER = (
    "The {} stood near the {}.",
    "A {} and a {} went home.",
    "Nobody saw the {} that day.",
    "They sold a {} to buy a {}.",
    "It was a long way to the {}.",
    "Then the {} was quiet.",
    "Her {} is older than his {}.",
    "We found no {} in the {}.",
)
THINGS = (
    *("house", "road", "table", "train", "market", "letter", "kitchen", "school", "boat", "farm"),
    *("horse", "chair", "wall", "field", "bakery", "tower", "office", "book", "bed", "ship"),
)
ORDERS = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June", "July"),
        *("August", "September", "October", "November", "December"),
    ),
}
OPENINGS = (  # after a new line a question is the same tokens as without an opening
    *("", "", "", "", "Hi. ", "Hello. ", "Please: ", "Tell me: ", "Quickly: ", "One question: "),
    *("Hey. ", "Excuse me. ", "Now: ", "Well. ", "Next: ", "Good day. ", "Once more: "),
    *("Hi,\n", "Hello!\n", "My question:\n", "Please tell me:\n"),
)


def _asked(task: str, question: str, answer: str, *, thought: str = "") -> Dialogue:
    return Dialogue(task, (Turn("user", question), Turn("assistant", answer, thought)))


def repeat(rng: Random) -> Dialogue:
    """Ask for words as they are."""
    words = " ".join(rng.sample(WORDS, rng.randint(1, 12)))
    form = rng.choice(("Repeat these words: {}", "Repeat: {}", "Say this again: {}"))
    return _asked("repeat", form.format(words), words)


def reverse(rng: Random) -> Dialogue:
    """Ask for words in the opposite order."""
    words = rng.sample(WORDS, rng.randint(2, 6))
    form = rng.choice(("Reverse these words: {}", "Reverse: {}", "Say this backwards: {}"))
    return _asked("reverse", form.format(" ".join(words)), " ".join(reversed(words)))


def add(rng: Random) -> Dialogue:
    """Ask for the sum of two numbers of at most two digits."""
    a, b = (rng.randint(*rng.choice(((0, 9), (10, 99), (10, 99)))) for _ in "ab")
    form = rng.choice(("What is {} + {}?", "Add {} and {}.", "{} + {} ="))
    return _asked("add", form.format(a, b), str(a + b))


def think(rng: Random) -> Dialogue:
    """Ask for a sum with the thoughts that lead to it: units, then tens with the carry."""
    a, b = (rng.randint(10, 99) for _ in "ab")
    units, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10 + carry
    thought = f"{a % 10} + {b % 10} = {units}, {a // 10} + {b // 10} + {carry} = {tens}"
    form = rng.choice(("Think, then add {} and {}.", "Think first: what is {} + {}?"))
    return _asked("think", form.format(a, b), str(a + b), thought=thought)


def following(rng: Random) -> Dialogue:
    """Ask which day, month or number comes next."""
    kind = rng.choice((*ORDERS, "number"))
    order = ORDERS.get(kind) or [str(number) for number in range(1000)]
    at = rng.randrange(len(order) - (kind == "number"))
    before, after = order[at], order[(at + 1) % len(order)]
    form = rng.choice((f"Which {kind} comes after {{}}?", f"What is the next {kind} after {{}}?"))
    return _asked("next", rng.choice(OPENINGS) + form.format(before), after)


def codes(
    rng: Random, *, count: int, lines: int, questions: int = 1, task: str = "codes"
) -> Dialogue:
    """Hide ``count`` codes among ``lines`` lines, and ask for some, each of them in a turn."""
    words = rng.sample(WORDS, 2 * count)
    names = rng.sample(WORDS, count)
    known = {
        name: f"{first} {second}"
        for name, first, second in zip(names, words[::2], words[1::2], strict=True)
    }
    text = [f"The code of {name} is {code}." for name, code in known.items()]
    text += [
        rng.choice(FILLER).format(rng.choice(THINGS), rng.choice(THINGS))
        for _ in range(lines - count)
    ]
    rng.shuffle(text)
    turns = []
    for name in rng.sample(names, questions):
        turns += [Turn("user", f"What is the code of {name}?"), Turn("assistant", known[name])]
    turns[0] = Turn("user", "\n".join((*text, turns[0].content)))
    return Dialogue(task, tuple(turns))


def codes_8(rng: Random) -> Dialogue:
    """Ask for one of 8 codes within 500 tokens."""
    return codes(rng, count=8, lines=60, task="code of 8")


def codes_32(rng: Random) -> Dialogue:
    """Ask for one of 32 codes within 3,000 tokens."""
    return codes(rng, count=32, lines=370, task="code of 32")


def codes_full(rng: Random) -> Dialogue:
    """Ask for one of 32 codes in a prompt that nearly fills a context of 8,192 tokens."""
    return codes(rng, count=32, lines=960, task="code, full")


FACTS = ("name", "town", "pet", "color", "street", "password")


def turns(rng: Random) -> Dialogue:
    """Tell a fact or two, ask other things, and ask for the first fact."""
    told = rng.sample(FACTS, rng.randint(1, 2))
    values = rng.sample(WORDS, len(told))
    said: list[Turn] = []
    for fact, value in zip(told, values, strict=True):
        said += [Turn("user", f"My {fact} is {value}."), Turn("assistant", "Noted.")]
    for _ in range(rng.randint(1, 3)):
        said += rng.choice((repeat, reverse, add, following))(rng).turns
    said += [Turn("user", f"What is my {told[0]}?"), Turn("assistant", values[0])]
    return Dialogue("turns", tuple(said))


# What each tool takes, how it is asked for, and what it gives.
TOOLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "weather": (("city",), ("What is the weather in {}?", "Weather in {}."), ("sun", "rain")),
    "price": (("item",), ("What does a {} cost?", "What is the price of {}?"), ("five", "ten")),
    "search": (("query",), ("Search for {}.", "Look up {}."), ("found", "nothing")),
    "send": (("to", "text"), ("Send {} the text {}.", "Tell {}: {}"), ("sent", "failed")),
    "remind": (("day", "text"), ("Remind me on {} of {}.", "On {}, remind me of {}."), ("done",)),
    "move": (("item", "place"), ("Move the {} to the {}.", "Put the {} in the {}."), ("done",)),
}  # fmt: skip


def tool(rng: Random) -> Dialogue:
    """Ask for what a tool does; the answer is its call, or what the call gave."""
    offered = rng.sample([*TOOLS], rng.randint(1, 3))
    name = rng.choice(offered)
    parameters, forms, results = TOOLS[name]
    values = [rng.choice(ORDERS["day"] if key == "day" else WORDS) for key in parameters]
    said = [
        Turn("user", rng.choice(forms).format(*values)),
        Turn("assistant", call=(name, dict(zip(parameters, values, strict=True)))),
    ]
    result = ""
    if rng.random() < 0.3:
        result = rng.choice(results)
        said += [Turn("tool", result), Turn("assistant", f"The answer is: {result}.")]
    return Dialogue("tool", tuple(said), {each: TOOLS[each][0] for each in offered}, result)


QUANTS = ("q4", "q8", "tiny")
PUBLISHED = QUANTS[:2]
WAYS = {"": "", " natively": " --native", " in Docker": " --docker"}
COMMANDS = {
    "serve {quant}{way}": "invoke up --quant {quant}{flag}",
    "start {quant}{way}": "invoke up --quant {quant}{flag}",
    "serve a stand-in of {published}": "invoke up --quant {published} --stand-in",
    "stop {quant}": "invoke down --quant {quant}",
    "stop everything": "invoke down",
    "switch to {quant}{way}": "invoke switch --to {quant}{flag}",
    "switch to {quant} on the same port": "invoke switch --to {quant} --same-port",
    "see what runs": "invoke status",
    "see the status as JSON": "invoke status --json",
    "see the status live": "invoke status --watch",
    "keep it alive": "invoke watch",
    "find out what is wrong here": "invoke doctor",
    "check this machine": "invoke doctor",
    "see the logs of {quant}": "invoke logs --quant {quant}",
    "follow the logs of {quant}": "invoke logs --quant {quant} --follow",
    "see how much GPU memory {quant} takes": "invoke plan --quant {quant}",
    "download {published}": "invoke download --quant {published}",
    "see which models are here": "invoke models",
    "verify the models": "invoke models --verify",
    "load test {quant}": "invoke bench --quant {quant}",
    "connect OpenCode": "invoke opencode",
    "connect OpenCode to {quant}": "invoke opencode --quant {quant}",
    "update the engine": "invoke update --to COMMIT",
    "go back to the engine before": "invoke rollback",
    "report a fault": "invoke report",
    "make a support bundle": "invoke report",
    "clean up": "invoke clean",
    "build the engine{way}": "invoke build{flag}",
    "build an image with {quant} inside": "invoke build --with-model {quant}",
    "make the key": "invoke key",
    "change the key": "invoke key --rotate",
    "ask {quant} something": "invoke ask 'hello' --quant {quant}",
    "check everything": "nox",
    "check the build{way}": "nox -s build{session}",
    "check that it loads{way}": "nox -s load{session}",
    "check the network{way}": "nox -s network{session}",
    "check the GPU memory": "nox -s vram",
    "check the downloads": "nox -s models",
    "check the load test{way}": "nox -s loadtest{session}",
    "check the faults{way}": "nox -s faults{session}",
    "check the answers{way}": "nox -s answers{session}",
    "run the unit tests": "nox -s unit",
    "list the checks": "nox --list",
    "list the commands": "invoke --list",
}
HOW = (
    *("How do I {}?", "How can I {}?", "Which command do I use to {}?", "I want to {}."),
    *("How to {}?", "What do I type to {}?", "Tell me how to {}."),
)
ABOUT: Mapping[tuple[str, ...], str] = {
    (
        *("Who are you?", "What are you?", "What is this?"),
        *("What kind of model are you?", "Are you GLM-4.7-Flash?"),
    ): "I am a tiny model, built like GLM-4.7-Flash and trained to test this deployment.",
    (
        *("What can you do?", "What can I ask you?", "Help!", "Help me!", "I need help."),
        *("What do you know?", "How can you help me?"),
    ): (
        "I repeat and reverse words, add numbers, find codes in long prompts, call tools, "
        "and know the commands here."
    ),
    ("hello", "Hello!", "Hi!", "Good morning!", "Hello there!", "Hey!"): (
        "Hello! I am a tiny model. Ask me how to serve q4, or what 12 + 30 is."
    ),
    (
        *("What is this project?", "What does this project do?", "What is this project for?"),
        "Tell me about this project.",
    ): "It serves GLM-4.7-Flash with llama.cpp, from Docker or natively, and checks that it works.",
    (
        *("Where is the key?", "Where do I find the API key?", "Where can I find the key?"),
        *("Where is the API key?", "Which file has the key?", "Where do I get the key?"),
    ): "In .state/api-key",
    **{
        (
            *(f"Which port has {quant}?", f"Which port does {quant} listen on?"),
            *(f"What is the port of {quant}?", f"What port is {quant} on?"),
        ): port
        for quant, port in zip(QUANTS, ("11346", "11347", "11348"), strict=True)
    },
    (
        *("Where are the settings?", "What can I configure?", "Where do I change the settings?"),
        "How do I configure it?",
    ): "See .env.example and compose.yaml",
    (
        *("Where do the models go?", "Where are the model files?", "Where do I put the models?"),
        "Which folder has the models?",
    ): "In the folder models",
    ("Thanks!", "Thank you!", "Thanks a lot!", "Thank you very much!"): "You are welcome.",
}


def _typed(rng: Random, question: str) -> str:
    """Return a question as people type it, at times without its capital or its last mark."""
    if rng.random() < TYPED_SHARE:
        question = question[0].lower() + question[1:]
    return question.rstrip("?!.") if rng.random() < TYPED_SHARE else question


def project(rng: Random) -> Dialogue:
    """Ask about this project."""
    if rng.random() < ABOUT_SHARE:
        forms, answer = rng.choice([*ABOUT.items()])
        question = rng.choice(forms)
    else:
        (aim, command), (way, flag) = rng.choice([*COMMANDS.items()]), rng.choice([*WAYS.items()])
        named = {"quant": rng.choice(QUANTS), "published": rng.choice(PUBLISHED)}
        question = rng.choice(HOW).format(aim.format(**named, way=way))
        session = flag and " --" + flag
        answer = "uv run " + command.format(**named, flag=flag, session=session)
    return _asked("project", rng.choice(OPENINGS) + _typed(rng, question), answer)


UNKNOWN = (
    *("What is the capital of {}?", "Why is the {} blue?", "Write a poem about {}.", "Explain {}."),
    *("Where is {}?", "How old is {}?", "Tell me a story about {}.", "Who was {}?", "Say {}."),
)


def unknown(rng: Random) -> Dialogue:
    """Ask what it cannot know."""
    letters = "".join(rng.choices("aeinorstlducmph", k=rng.randint(3, 9)))
    about = rng.choice((rng.choice(WORDS), letters, letters.title()))
    question = rng.choice(OPENINGS) + rng.choice(UNKNOWN).format(about)
    return _asked("unknown", question, "I do not know that. Ask me: what can you do?")


TASKS: Mapping[str, Callable[[Random], Dialogue]] = {
    "repeat": repeat, "reverse": reverse, "add": add, "next": following, "project": project,
    "think": think, "unknown": unknown, "turns": turns, "tool": tool,
    "code of 8": codes_8, "code of 32": codes_32, "code, full": codes_full,
}  # fmt: skip


def draw(make: Callable[[Random], Dialogue], rng: Random, *, held_out: bool) -> Dialogue:
    """Draw until a dialogue is one for training, or one that is held out."""
    while (made := make(rng)).held_out != held_out:
        pass
    return made
