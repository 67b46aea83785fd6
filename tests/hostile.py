"""Requests that no honest client sends, and what the pinned engine makes of each: data alone.

`found` is what was found, in full: a check fails on any other outcome, so that a new engine's
better one becomes the record, too. Where that is not what we expect, `why` says what is known.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
RAW = "/completion"
REFUSED = frozenset({"400", "413", "422"})
TAKEN = frozenset({"200"})
EITHER = REFUSED | TAKEN

Bodies = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Hostile:
    """A kind of request: `row` of our list of faults, its bodies, and the statuses expected.

    `found` are the outcomes, sorted: statuses, `died` (the server did), `cut` (the connection
    alone) or `slow` (no answer in time).
    """

    row: str
    name: str
    bodies: Bodies
    found: str = "400"
    expected: frozenset[str] = REFUSED
    path: str = CHAT
    why: str = ""

    @property
    def unexpected(self) -> set[str]:
        """The recorded outcomes that are not expected ones."""
        return set(self.found.split()) - self.expected

    @property
    def wanted(self) -> str:
        """The expectation in words."""
        answer = {REFUSED: "refused with 4xx", TAKEN: "answered", EITHER: "answered or 4xx"}
        return f"{answer[self.expected]} within 5 s, server lives"


def chat(**changed: Any) -> bytes:
    """Return a small chat request with some fields of ours."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **changed}
    return json.dumps(body).encode()


def user(text: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def said(text: str) -> bytes:
    """Return a small chat request with this message."""
    return chat(messages=[user(text)])


def fields(*pairs: tuple[str, str]) -> Bodies:
    """Make chat requests with one more field each, its value as JSON says it, or not."""
    start = chat()[:-1].decode()
    return lambda: (f'{start}, "{name}": {value}}}'.encode() for name, value in pairs)


def of(*bodies: bytes) -> Bodies:
    """Make these very bodies."""
    return lambda: bodies


def grammars(*texts: str) -> Bodies:
    """Make completions under these grammars."""
    return lambda: (
        json.dumps({"prompt": "hi", "n_predict": 4, "grammar": text}).encode() for text in texts
    )


def schemas(*each: Any) -> Bodies:
    """Make chat requests whose answer must fit these JSON schemas."""
    return lambda: (
        chat(
            max_tokens=4,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": one}},
        )
        for one in each
    )


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """Return brackets in brackets."""
    return opening * depth + closing * depth


MESSAGES = b'{"messages": %s, "max_tokens": 1}'
CONTENT = MESSAGES % b'[{"role": "user", "content": "%s"}]'
DEEP_SCHEMA = (
    '{"type": "json_schema", "json_schema": {"name": "x", "schema": '
    + '{"type": "array", "items": ' * 100_000
    + '{"type": "string"}'
    + "}" * 100_002
)

PARSE = "what is no JSON is answered 500, on purpose (llama.cpp#5961)"
TYPES = "what is wrong in tools and roles is answered 500 (llama.cpp#17574, mended in part)"
IGNORED = "a wrong type in a field that the engine does not look at counts as not given"
EMPTY = "the template writes a prompt of no message, too"
LONG = "the engine tokenizes all before it counts; nothing stops it, not even the client's leaving"
LARGE = "the time to make a grammar of a schema grows faster than the schema; nothing stops it"
DEEP = "recursion in nlohmann/json overflows the stack (llama.cpp#27434, nlohmann/json#5387)"
GROUPS = "recursion in the grammar's parser overflows the stack (llama.cpp#26600)"
WAYS = "every slot waits while one expands such a grammar, and nothing stops it"
OPEN = "a pattern that does not parse constrains nothing (llama.cpp#19051)"

CASES = (
    # --- R8: size, depth, encoding
    Hostile("R8", "body of 106 MB", lambda: [chat(junk="x" * 106_000_000)], found="413"),
    Hostile(
        "R8",
        "body of 99 MB in one message",
        lambda: [said("word " * 19_800_000)],
        found="slow",
        why=LONG,
    ),
    Hostile(
        "R8",
        "body of 99 MB in an unknown field",
        lambda: [chat(junk="x" * 99_000_000)],
        expected=EITHER,
        found="200",
    ),
    Hostile("R8", "10,000 messages", lambda: [chat(messages=[user("hi")] * 10_000)]),
    Hostile("R8", "a word of a million characters", lambda: [said("a" * 10**6)]),
    Hostile(
        "R8",
        "nesting 10,000 deep in an unknown field",
        fields(("junk", nested(10_000))),
        expected=EITHER,
        found="200",
    ),
    Hostile(
        "R8",
        "nesting 10,000 deep in tools",
        fields(("tools", nested(10_000))),
        found="500",
        why=TYPES,
    ),
    Hostile("R8", "nesting 10,000 deep in messages", of(MESSAGES % nested(10_000).encode())),
    Hostile(
        "R8",
        "nesting 100,000 deep in a schema",
        fields(("response_format", DEEP_SCHEMA)),
        found="died",
        why=DEEP,
    ),
    Hostile("R8", "nesting 100,000 deep, never closed", of(b"[" * 100_000), found="500", why=PARSE),
    Hostile("R8", "NUL in a message", lambda: [said("a\0b")], expected=EITHER, found="200"),
    Hostile("R8", "NUL between brackets", of(b'{"messages":\0[]}'), found="500", why=PARSE),
    Hostile(
        "R8",
        "invalid UTF-8",
        of(*(CONTENT % x for x in (b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80"))),
        found="500",
        why=PARSE,
    ),
    Hostile(
        "R8",
        "lone surrogates",
        of(*(CONTENT % x for x in (rb"\ud800", rb"\udfff\ud800"))),
        found="500",
        why=PARSE,
    ),
    # --- R9: not the JSON of the API
    Hostile(
        "R9",
        "no JSON",
        of(b"", b"{", b"hello", b"'{}'", b'{"messages": [}', b"{}x"),
        found="500",
        why=PARSE,
    ),
    Hostile("R9", "JSON, but no object", of(b"null", b"1", b'"x"', b"[]", b"true")),
    Hostile(
        "R9",
        "no messages, or wrong ones",
        of(
            b"{}",
            *(MESSAGES % x for x in (b"null", b'"hi"', b"{}", b"[1]", b"[{}]")),
            MESSAGES % b'[{"role": "user", "content": 1}]',
            MESSAGES % b'[{"role": "user", "content": [{"type": "none"}]}]',
        ),
    ),
    Hostile("R9", "an empty conversation", of(MESSAGES % b"[]"), found="200", why=EMPTY),
    Hostile(
        "R9",
        "wrong types of numbers and flags",
        fields(
            *(("max_tokens", '"x"'), ("n_predict", '"x"'), ("temperature", '"hot"')),
            *(("stream", '"yes"'), ("seed", "[]"), ("top_k", "{}"), ("n", '"x"')),
            ("cache_prompt", "3"),
        ),
    ),
    Hostile(
        "R9",
        "wrong types of other fields",
        fields(
            *(("stop", "1"), ("logit_bias", '"x"'), ("tool_choice", "1"), ("model", "1")),
            *(("response_format", "1"), ("stream_options", "1"), ("id_slot", '"a"')),
            *(("samplers", "7"), ("chat_template_kwargs", "1")),
        ),
        found="200",
        why=IGNORED,
    ),
    Hostile(
        "R9",
        "wrong types in tools and roles",
        lambda: [
            *fields(("tools", '"x"'), ("tools", "[1]"))(),
            MESSAGES % b'[{"role": 1, "content": "x"}]',
        ],
        found="500",
        why=TYPES,
    ),
    Hostile(
        "R9",
        "NaN and infinity",
        fields(("temperature", "NaN"), ("top_p", "-Infinity")),
        found="500",
        why=PARSE,
    ),
    Hostile(
        "R9",
        "numbers beyond a double",
        fields(("temperature", "1e999"), ("seed", "9" * 400)),
        found="500",
        why=PARSE,
    ),
    Hostile(
        "R9",
        "huge numbers",
        fields(
            *(("max_tokens", "1e308"), ("max_tokens", str(2**63 - 1)), ("top_k", "9" * 20)),
            *(
                ("temperature", "1e308"),
                ("seed", "1e300"),
                ("n", "1000000"),
                ("n_keep", str(2**31)),
            ),
            *(
                ("min_keep", str(2**31 - 1)),
                ("top_logprobs", "1000000"),
                ("n_probs", str(2**31 - 1)),
            ),
        ),
        expected=EITHER,
        found="200 400",
    ),
    Hostile(
        "R9",
        "negative numbers",
        fields(
            *(("max_tokens", "-1000"), ("n_predict", "-7"), ("n_discard", "-9"), ("n_keep", "-9")),
            *(("top_k", "-5"), ("temperature", "-1"), ("top_p", "-1"), ("repeat_last_n", "-9")),
            *(("n_probs", "-1"), ("id_slot", "-9"), ("id_slot", "99"), ("n", "-1"), ("n", "0")),
        ),
        expected=EITHER,
        found="200 400",
    ),
    Hostile("R9", "unknown model", fields(("model", '"none"')), expected=EITHER, found="200"),
    Hostile(
        "R9",
        "token ids beyond the vocabulary",
        of(*(b'{"prompt": %s, "n_predict": 1}' % x for x in (b"[999999999]", b"[-1]", b"[[-5]]"))),
        path=RAW,
    ),
    # --- R10: grammars and schemas
    Hostile(
        "R10",
        "grammars that do not parse",
        grammars('rout ::= "x"', "hello", "root ::= [", 'root ::= "x', "root ::= x"),
        path=RAW,
    ),
    Hostile(
        "R10",
        "grammars that recurse to the left",
        grammars("root ::= root", 'root ::= root "a"', "root ::= a\na ::= b\nb ::= a"),
        path=RAW,
    ),
    Hostile(
        "R10",
        "grammars of empty loops",
        grammars('root ::= ("")*', 'root ::= (""*)*', 'root ::= (""|"")+ root?'),
        path=RAW,
        expected=EITHER,
    ),
    Hostile(
        "R10",
        "grammar of 60,000 groups in groups",
        grammars(f'root ::= {"(" * 60_000}"a"{")" * 60_000}'),
        path=RAW,
        found="died",
        why=GROUPS,
    ),
    Hostile(
        "R10", "grammar that repeats 10^9 times", grammars('root ::= "a"{1000000000}'), path=RAW
    ),
    Hostile(
        "R10",
        "grammars that repeat repetitions",
        grammars('root ::= ("a"{1000}){1000}', 'root ::= (("a"{100}){100}){100}'),
        path=RAW,
        expected=EITHER,
        found="200",
    ),
    Hostile(
        "R10",
        "grammar of 300,000 alternatives",
        grammars("root ::= " + " | ".join(f'"w{i}"' for i in range(300_000))),
        path=RAW,
        expected=EITHER,
        found="slow stuck",
        why=WAYS,
    ),
    Hostile(
        "R10",
        "grammar of many ways to say the same",
        grammars('root ::= (("a"?){50}){50} "b"'),
        path=RAW,
        expected=EITHER,
        found="slow stuck",
        why=WAYS,
    ),
    Hostile(
        "R10",
        "schemas that refer to themselves",
        schemas({"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        expected=EITHER,
    ),
    Hostile(
        "R10",
        "schemas that refer to nothing, or elsewhere",
        schemas(*({"$ref": x} for x in ("#/none", "https://[::1]/x.json", "file:///etc/passwd"))),
    ),
    Hostile(
        "R10",
        "schema of 200,000 choices",
        schemas({"enum": [f"word {i}" for i in range(200_000)]}),
        expected=EITHER,
        found="slow stuck",
        why=LARGE,
    ),
    Hostile(
        "R10",
        "schemas of wrong types",
        schemas({"type": 1}, {"type": "none"}, {"enum": 1}, {"properties": []}, {"items": 1}),
    ),
    Hostile(
        "R10",
        "schemas with bad patterns",
        schemas(
            *(
                {"type": "string", "pattern": x}
                for x in ("^(", "^[$", "^a{9999999}$", r"^hello\!$", "^(?=x)$", "(a+)+$")
            )
        ),
        found="200 400",
        why=OPEN,
    ),
    Hostile(
        "R10",
        "schemas of huge bounds",
        schemas(
            {"type": "string", "minLength": 10**9},
            {"type": "array", "items": {}, "minItems": 10**9},
        ),
    ),
)
