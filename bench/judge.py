"""Judges a server by its answers, before it counts as serving or its engine as current.

A model that was trained on our questions must answer them as its record says, and compute nearly
what the training code did. Somebody else's gets its record from its first good run. Random weights
answer nothing: the same file, engine and settings must say again what they said first.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from bench import answers, questions
from bench.answers import Score
from stack import client
from stack.config import Project
from stack.errors import Code, StackError
from stack.host import write_atomic
from stack.server import Server

EACH, SEED = 4, 7
"""Questions of each task, and which."""
SANE = "sane"
"""All tasks of a model that was not trained on them, taken together: it may miss some."""
# How far likely tokens' log-probabilities may be from the training code's, in nats on average:
# it computes in float32 with the file's weights, the engine rounds what it multiplies them with.
TOLERANCE = {"tiny-f16.gguf": 0.01, "tiny.gguf": 0.25}
LIKELY = -4.6  # the logarithm of 1 %
PROMPTS = questions.WORDS[::26]
TEXT_TOKENS = 8
LEAST_SAME = 0.5
"""Of the texts of random weights, whose likeliest tokens hardly differ: rounding changes some."""


@dataclass(frozen=True)
class Judge:
    """Knows the models of a deployment by their records: the repository's, and its own."""

    project: Project

    def ask(self, server: Server) -> dict[str, Score]:
        """Ask a fixed set of questions; return the scores, none of random weights."""
        service = server.service
        if answers.random_weights(service):
            return {}
        asked = answers.short_set(service, each=EACH, seed=SEED)
        if answers.taught(service):
            return answers.scores(answers.ask(server, asked))
        replies = answers.ask(server, asked, clients=service.slots)
        return {SANE: answers.together(answers.scores(replies, exactly=False).values())}

    def worse(self, found: Mapping[str, Score], before: Mapping[str, Score]) -> list[str]:
        """Return the tasks that are worse than before, with both scores."""
        return [
            f"{task}, {found[task].right} of {found[task].asked} right, "
            f"{before[task].right} of {before[task].asked} before"
            for task in answers.regressed(found, before, strictly=SANE not in found)
        ]

    def prove(self, server: Server) -> None:
        """Hold a server against its record; a first good run makes one where there is none.

        Raises:
            StackError: VERIFY where it answers worse, or does not answer.

        """
        if answers.random_weights(server.service):
            wrong = self._changed(server)
        else:
            wrong = self._worse_than_recorded(server)
        if wrong:
            raise StackError(
                f"{server.service.name} answers wrong: {'; '.join(wrong)}.",
                "Its engine, settings or file make it so; `nox -s answers` tells more.",
                Code.VERIFY,
            )

    def _worse_than_recorded(self, server: Server) -> list[str]:
        service, found = server.service, self.ask(server)
        record = answers.recorded(service)
        if not answers.taught(service):
            record = record and {SANE: answers.together(record.values())}
            if not record:
                good = found[SANE].share >= answers.LEAST
                told = [found[SANE].right, found[SANE].asked]
                name = f"{service.model_file.name}, {service.model_file.stat().st_size} bytes"
                kept = self._kept(name, told if good else None)
                if not kept:
                    return [f"{told[0]} of {told[1]} right, too few for a record"]
                record = {SANE: Score(*kept)}
        wrong = self.worse(found, record)
        off, most = deviation(server), TOLERANCE.get(service.model_file.name, 0)
        if off > most:
            wrong.append(f"{off:.3f} nats from what the training code computed, {most} at most")
        return wrong

    def _changed(self, server: Server) -> list[str]:
        service = server.service
        texts = [client.complete(server, each, tokens=TEXT_TOKENS).text for each in PROMPTS]
        about = [
            *(service.model_file.name, service.model_file.stat().st_size, server.runtime),
            *(client.props(server)["build_info"], sorted(service.environment.items())),
        ]
        first = self._kept(sha256(json.dumps(about).encode()).hexdigest(), texts)
        same = sum(map(str.__eq__, texts, first))
        if same >= LEAST_SAME * len(texts):
            return []
        return [f"{same} of {len(texts)} texts are those of the same file, engine and settings"]

    def _kept(self, name: str, told: Any) -> Any:
        """Return what this deployment keeps under a name: what is told now, if nothing was."""
        path = self.project.state / "answers.json"
        try:
            every = dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # made again
            every = {}
        if name not in every and told:
            every[name] = told
            write_atomic(path, json.dumps(every, indent=1) + "\n")
        return every.get(name)


def computed(server: Server) -> list[dict[str, Any]]:
    """Return what the training code computed with the served file, for fixed prompts, if any."""
    record = json.loads(answers.RECORD.with_name("tiny.json").read_text())
    found: list[dict[str, Any]] = record["references"].get(server.service.model_file.name, [])
    return found


def engine_says(server: Server, known: Mapping[str, Any], *, tokens: int) -> dict[str, Any]:
    """Return the engine's greedy tokens after a prompt, and the likeliest at the first place."""
    body = {
        "prompt": known["prompt_ids"],
        "n_predict": tokens,
        "temperature": 0,
        "n_probs": 32,
        "return_tokens": True,
    }
    with client.session(server, timeout_s=60) as session:
        answer: dict[str, Any] = session.post("/completion", json=body).raise_for_status().json()
    return answer


def deviation(server: Server) -> float:
    """Return how far the engine's log-probabilities are off, in nats: a prompt's most, averaged.

    Of the prompts that nobody taught, where errors show; tokens under 1 % are left out.
    """
    off = []
    for known in computed(server):
        if known["task"] in questions.TASKS:
            continue
        top = engine_says(server, known, tokens=1)["completion_probabilities"][0]["top_logprobs"]
        found: dict[str, float] = {str(each["id"]): each["logprob"] for each in top}
        told: dict[str, float] = known["logprobs"]
        likely = {token: share for token, share in told.items() if share > LIKELY}
        off.append(max(abs(found.get(token, -99) - share) for token, share in likely.items()))
    return sum(off) / len(off) if off else 0
