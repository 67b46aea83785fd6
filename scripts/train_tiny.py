# /// script
# requires-python = ">=3.11"
# dependencies = ["gguf>=0.17", "numpy>=2", "regex>=2024.11", "torch>=2.5"]
# ///
"""Train the tiny model from nothing, on one GPU in minutes, and write models/tiny*.gguf and .json.

uv run scripts/train_tiny.py --seconds 600           # trains; shows the held-out scores as a curve
uv run scripts/train_tiny.py --resume FILE           # goes on from a checkpoint or a GGUF file
uv run scripts/train_tiny.py --resume weights.npz --seconds 0    # writes the files alone

Questions and answers are bench.questions'; the loss is on the answers alone. Each step has the same
number of tokens, as rows of one length; tasks and lengths come as often as they still fail.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random

import gguf
import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import questions  # noqa: E402
from stack import models  # noqa: E402

NAME = "GLM-4.7-Flash tiny (trained by scripts/train_tiny.py)"
SHAPE = models.SHAPES["trained"]
SCALE, NORM_EPS, ROPE_BASE = 1.8, 1e-5, 1e6
TARGETS = dict.fromkeys(questions.TASKS, 0.99) | {
    "code of 8": 0.98, "code of 32": 0.90, "code, full": 0.90,
}  # fmt: skip
WHOLE_WORDS = 784  # tokens that are a word of the corpus; the rest are BPE's


# --- The vocabulary: GLM's pre-tokenizer (engine name glm4), whole words, then byte pairs.

PIECES = regex.compile(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (*models.CONTROL_TOKENS, *models.MARKUP_TOKENS)
SPLIT = regex.compile("(" + "|".join(map(regex.escape, SPECIAL)) + ")")
ALPHABET = models.byte_alphabet()


def visible(piece: str) -> str:
    """Write a piece of text in GPT-2's byte alphabet."""
    return "".join(ALPHABET[byte] for byte in piece.encode())


def merged(symbols: list[str], first: str, second: str) -> list[str]:
    """Join each neighbouring pair of those symbols."""
    out: list[str] = []
    for symbol in symbols:
        if out and out[-1] == first and symbol == second:
            out[-1] = first + second
        else:
            out.append(symbol)
    return out


def learn_vocabulary(seed: int) -> models.Vocabulary:
    """Learn one from a sample of the corpus; digits stay single, so that sums can be learned."""
    rng, seen, ours = Random(seed), Counter[str](), Counter[str]()
    for make in questions.TASKS.values():
        for _ in range(10 if make.__name__.startswith("codes") else 600):
            made = questions.draw(make, rng, held_out=False)
            for text, _ in rendered(made):
                for part in SPLIT.sub("\0", text).split("\0"):
                    pieces = [piece for piece in PIECES.findall(part) if not piece.isdecimal()]
                    seen.update(pieces)
                    if make is questions.project:  # its rarer words must not go to pieces
                        ours.update(pieces)
    taken = {*ALPHABET, *SPECIAL}
    frequent = [
        visible(piece)
        for piece, _ in (*ours.most_common(), *seen.most_common())
        if len(piece.encode()) > 1
    ]
    asked = [visible(blank + word) for word in questions.WORDS for blank in ("", " ")]
    words = [*dict.fromkeys((*asked, *frequent))][:WHOLE_WORDS]
    taken |= {*words}
    rest = {tuple(visible(piece)): count for piece, count in seen.items()}
    merges: list[str] = []
    while len(taken) < SHAPE.vocab:
        pairs = Counter[tuple[str, str]]()
        for symbols, count in rest.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{first} {second}")
        if first + second not in taken:
            words.append(first + second)
            taken.add(first + second)
        rest = {tuple(merged([*s], first, second)): count for s, count in rest.items()}
    return models.vocabulary(words, SHAPE.vocab, merges=merges)


class Tokenizer:
    """Turns text into token ids as the engine does."""

    def __init__(self, known: models.Vocabulary) -> None:
        self.known, self.ids = known, {token: i for i, token in enumerate(known.tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(known.merges)}
        self.piece = cache(self._piece)

    def _piece(self, piece: str) -> tuple[int, ...]:
        text = visible(piece)
        if text in self.ids:
            return (self.ids[text],)
        symbols = [*text]
        while pairs := [p for p in pairwise(symbols) if p in self.ranks]:
            symbols = merged(symbols, *min(pairs, key=self.ranks.__getitem__))
        return tuple(self.ids[symbol] for symbol in symbols)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens in it."""
        ids: list[int] = []
        for part in SPLIT.split(text):
            if part in SPECIAL:
                ids.append(self.ids[part])
            else:
                for piece in PIECES.findall(part):
                    ids += self.piece(piece)
        return ids


# --- Dialogues as text: models.TEMPLATE's turns, and which parts of them the model must say.


def rendered(made: questions.Dialogue) -> Iterator[tuple[str, bool]]:
    """Yield a dialogue's text in parts, each with whether the model says it.

    What ends its turn is the next role's token.
    """
    tools = " ".join(f"{name}({', '.join(names)})" for name, names in made.tools.items())
    yield "[gMASK]<sop>" + (f"<|system|>Tools: {tools}" if tools else ""), False
    ended = False
    for turn in made.turns:
        role = {"tool": "<|observation|>"}.get(turn.role, f"<|{turn.role}|>")
        yield role, ended
        ended = turn.role == "assistant"
        if turn.role == "tool":
            yield f"<tool_response>{turn.content}</tool_response>", False
        elif turn.role == "user":
            yield turn.content, False
        else:
            yield "<think>", False
            yield f"{turn.thought}</think>{turn.content}{called(turn)}", True
    yield "<|observation|>" if made.answer.call else "<|user|>", True


def called(turn: questions.Turn) -> str:
    """Return a turn's tool call in GLM's format."""
    if not turn.call:
        return ""
    name, arguments = turn.call
    pairs = (
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
        for key, value in arguments.items()
    )
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


# --- Batches: rows of equal length, and the places whose next token is the model's to say.


@dataclass(frozen=True)
class Bucket:
    """Rows of ``length`` tokens, and the tasks that fit into one."""

    length: int
    tasks: tuple[str, ...]


SHORT = ("repeat", "reverse", "add", "next", "project", "think", "unknown")
BUCKETS = (
    Bucket(64, SHORT),
    Bucket(128, ("turns", "tool", "a few codes")),
    Bucket(512, ("code of 8",)),
    Bucket(4096, ("code of 32",)),
    Bucket(8192, ("code, full",)),
)
# Of the code tasks when training: the most codes and lines of a prompt that asks for several.
CODES = {
    "a few codes": (5, 7), "code of 8": (12, 60), "code of 32": (40, 380), "code, full": (64, 970),
}  # fmt: skip
LONGER = {"code of 32": "code of 8", "code, full": "code of 32"}  # each waits for the shorter one


def practice(task: str, rng: Random) -> questions.Dialogue:
    """Draw for training: prompts with codes of all sizes, and as many questions as there are."""
    if task not in CODES:
        return questions.draw(questions.TASKS[task], rng, held_out=False)
    most, lines_most = CODES[task]
    count = rng.randint(2, most)
    least = lines_most // 3 if task in LONGER else count
    lines = rng.randint(max(count, least), lines_most)
    asked = rng.randint(max(1, count // 2), count)
    make = partial(questions.codes, count=count, lines=lines, questions=asked, task=task)
    return questions.draw(make, rng, held_out=False)


def encoded(made: questions.Dialogue, tokens: Tokenizer) -> tuple[list[int], list[int]]:
    """Return a dialogue's ids, and the places of those that the model must say."""
    ids: list[int] = []
    says: list[int] = []
    for text, said in rendered(made):
        part = tokens.encode(text)
        if said:
            says += range(len(ids), len(ids) + len(part))
        ids += part
    return ids, says


@dataclass(frozen=True)
class Batch:
    """``ids`` of rows x length, flat places before the tokens to say, those tokens, and rows."""

    ids: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def packed(rows: list[tuple[list[int], list[int]]], length: int) -> Batch:
    """Lay out rows; what follows a row's end is never looked at."""
    ids = np.zeros((len(rows), length), np.int64)
    places, labels, owners = [], [], []
    for row, (tokens, says) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        places += [row * length + at - 1 for at in says]
        labels += [tokens[at] for at in says]
        owners += [row] * len(says)
    return Batch(ids, np.array(places), np.array(labels), np.array(owners))


_tokenizer: Tokenizer


def _worker(known: models.Vocabulary) -> None:
    global _tokenizer  # noqa: PLW0603  # a process of a pool keeps nothing else
    _tokenizer = Tokenizer(known)
    torch.set_num_threads(1)


def make_batch(seed: int, length: int, rows: int, weights: dict[str, float]) -> Batch:
    """Make one batch for training of the tasks that have weights."""
    rng, made = Random(seed), []
    while len(made) < rows:
        (task,) = rng.choices([*weights], [*weights.values()])
        ids, says = encoded(practice(task, rng), _tokenizer)
        if len(ids) <= length:
            made.append((ids, says))
    return packed(made, length)


def test_batches(
    tokens: Tokenizer, step_tokens: int, least: int, seed: int
) -> dict[str, list[Batch]]:
    """Draw held-out questions of every task: as many as make a step, and ``least`` or more."""
    out: dict[str, list[Batch]] = {}
    for bucket in BUCKETS:
        rows = max(1, step_tokens // bucket.length)
        for task in bucket.tasks:
            if task not in questions.TASKS:
                continue
            rng = Random(f"{seed} {task}")
            drawn: list[tuple[list[int], list[int]]] = []
            while len(drawn) < max(rows, least):
                ids, says = encoded(
                    questions.draw(questions.TASKS[task], rng, held_out=True), tokens
                )
                if len(ids) <= bucket.length:
                    begins = len(ids) - ids[::-1].index(tokens.ids["<think>"])
                    drawn.append((ids, [at for at in says if at >= begins]))
            out[task] = [
                packed(drawn[at : at + rows], bucket.length) for at in range(0, len(drawn), rows)
            ]
    return out


# --- The model, with its weights under the names of the GGUF file.

Weights = dict[str, Tensor]


def new_weights(seed: int) -> dict[str, nn.Parameter]:
    """Draw weights: what is added to the residual stream begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for tensor in models.plan("trained-f16").tensors:
        dims = tensor.dims[::-1]
        values = torch.randn(dims, generator=generator) * tensor.dims[0] ** -0.5
        if tensor.name.endswith("norm.weight"):
            values = torch.ones(dims)
        elif tensor.name == "token_embd.weight":
            values = torch.randn(dims, generator=generator) * 0.5
        elif "_down" in tensor.name or "output" in tensor.name or tensor.name.endswith("bias"):
            values = torch.zeros(dims)
        out[tensor.name] = nn.Parameter(values, requires_grad=not tensor.name.endswith("bias"))
    return out


def resume(weights: dict[str, nn.Parameter], path: Path, known: models.Vocabulary) -> None:
    """Take weights from a checkpoint, or a GGUF file, whose vocabulary may be another.

    Of its tokens those that there are today keep their rows; new ones keep what was drawn.
    """
    if path.suffix != ".gguf":
        with np.load(path) as kept:
            for name, weight in weights.items():
                weight.data = torch.from_numpy(kept[name].astype(np.float32))
        return
    reader = gguf.GGUFReader(path)
    before = {
        token: row for row, token in enumerate(reader.fields["tokenizer.ggml.tokens"].contents())
    }
    pairs = [(at, before[token]) for at, token in enumerate(known.tokens) if token in before]
    now, then = map(list, zip(*pairs, strict=True))
    print(f"{len(now)} of {len(known.tokens)} tokens were known")
    for tensor in reader.tensors:
        values, weight = torch.from_numpy(tensor.data.astype(np.float32)), weights[tensor.name]
        if tensor.name in ("token_embd.weight", "output.weight"):
            weight.data[now] = values[then]
        else:
            weight.data = values.view(weight.shape)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, NORM_EPS)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def before(x: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of an attention, each of tokens x heads x (nope + rope)."""
    s, n = SHAPE, len(x)
    normed = norm(x, w["attn_norm"])
    query = F.linear(norm(F.linear(normed, w["attn_q_a"]), w["attn_q_a_norm"]), w["attn_q_b"])
    query = query.view(n, s.heads, s.nope + s.rope)
    latent, rope = F.linear(normed, w["attn_kv_a_mqa"]).split((s.kv_lora, s.rope), -1)
    latent = norm(latent, w["attn_kv_a_norm"])
    key = F.linear(latent, w["attn_k_b"].transpose(1, 2).reshape(-1, s.kv_lora))
    value = F.linear(latent, w["attn_v_b"].reshape(-1, s.kv_lora)).view(n, s.heads, s.v_head)
    cos, sin = cos[:, None], sin[:, None]
    rope = rotated(rope[:, None], cos, sin).expand(n, s.heads, s.rope)
    query = torch.cat((query[..., : s.nope], rotated(query[..., s.nope :], cos, sin)), -1)
    key = torch.cat((key.view(n, s.heads, s.nope), rope), -1)
    kind = value.dtype
    return query.to(kind), key.to(kind), F.pad(value, (0, s.nope + s.rope - s.v_head))


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate x) * up x."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def after_dense(x: Tensor, attended: Tensor, w: Weights) -> Tensor:
    """Add the attention and a feed-forward network to the residual stream."""
    x = x + F.linear(attended[..., : SHAPE.v_head].flatten(1), w["attn_output"])
    h = norm(x, w["ffn_norm"])
    return x + F.linear(swiglu(h, w["ffn_gate"], w["ffn_up"]), w["ffn_down"])


def after_experts(x: Tensor, attended: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Add the attention and the experts; all are computed, since they are tiny, and most weigh 0.

    Also return how many tokens chose each expert.
    """
    s = SHAPE
    x = x + F.linear(attended[..., : s.v_head].flatten(1), w["attn_output"])
    h = norm(x, w["ffn_norm"])
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(h.float(), w["ffn_gate_inp"]).sigmoid()
    biased = scores.detach() + w["exp_probs_b"]
    better = (biased[:, None, :] > biased[:, :, None]).sum(-1)  # topk is slow over short rows
    used = (better < s.experts_used).to(scores.dtype)
    share = scores * used
    share = SCALE * share / share.sum(-1, keepdim=True)
    hidden = swiglu(h, w["ffn_gate_exps"].flatten(0, 1), w["ffn_up_exps"].flatten(0, 1))
    hidden = hidden.view(-1, s.experts, s.expert_ff) * share[..., None].to(hidden.dtype)
    down = w["ffn_down_exps"].transpose(0, 1).reshape(s.embd, -1)
    out = F.linear(hidden.flatten(1), down)
    shared = swiglu(h, w["ffn_gate_shexp"], w["ffn_up_shexp"])
    return x + out + F.linear(shared, w["ffn_down_shexp"]), used.sum(0)


class Model:
    """The forward pass over flat tokens, whose number is the same whatever the rows' length."""

    def __init__(self, weights: Weights, device: str, *, compiled: bool) -> None:
        self.weights, self.device = weights, device
        self.layers: list[tuple[Weights, Weights]] = []
        for layer in range(SHAPE.layers):
            of_layer = {
                name.split(".")[2]: weight
                for name, weight in weights.items()
                if name.startswith(f"blk.{layer}.")
            }
            first = {name: w for name, w in of_layer.items() if name.startswith("attn")}
            second = {name: w for name, w in of_layer.items() if name not in first}
            second["attn_output"] = first.pop("attn_output")
            self.layers.append((first, second))
        wrap = torch.compile if compiled else lambda function: function
        self.before, self.dense = wrap(before), wrap(after_dense)
        self.experts, self.loss = wrap(after_experts), wrap(loss)
        self.turns = cache(self._turns)

    def _turns(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, SHAPE.rope, 2, device=self.device) / SHAPE.rope
        angles = torch.arange(length, device=self.device)[:, None] * ROPE_BASE**-pairs
        angles = angles.repeat(rows, 1)
        return angles.cos(), angles.sin()

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what goes into the output matrix, and each layer's load of its experts."""
        rows, length = ids.shape
        # index_select: indexing would add gradients of equal tokens, padding too, one by one
        x, loads = self.weights["token_embd.weight"].index_select(0, ids.flatten()), []
        cos, sin = self.turns(rows, length)
        for layer, (first, second) in enumerate(self.layers):
            query, key, value = (
                part.view(rows, length, SHAPE.heads, -1).transpose(1, 2)
                for part in self.before(x, cos, sin, first)
            )
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            attended = attended.transpose(1, 2).reshape(rows * length, SHAPE.heads, -1)
            if layer < SHAPE.dense_layers:
                x = self.dense(x, attended, second)
            else:
                x, load = self.experts(x, attended, second)
                loads.append(load)
        return x, loads

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of tokens."""
        w = self.weights
        return F.linear(norm(x, w["output_norm.weight"]), w["output.weight"]).float()


def loss(x: Tensor, labels: Tensor, normed: Tensor, output: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that are none of -1."""
    logits = F.linear(norm(x, normed), output).float()
    return F.cross_entropy(logits, labels, ignore_index=-1)


# --- The optimizer: Muon for matrices, Adam for the rest.


@torch.no_grad()
def orthogonal(g: Tensor) -> Tensor:
    """Bring all singular values of a stack of matrices near 1 (five Newton-Schulz steps)."""
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


class Muon:
    """Momentum whose update is orthogonalised; matrices of one shape go through it together."""

    def __init__(self, weights: list[nn.Parameter], *, decay: float) -> None:
        self.decay = decay
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in weights:
            groups.setdefault(tuple(sorted(weight.shape[-2:])), []).append(weight)
        self.groups = [*groups.items()]
        self.moments = {id(w): torch.zeros_like(w) for w in weights}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the weights from their gradients."""
        for (rows, columns), weights in self.groups:
            gradients = [w.grad for w in weights]
            moments = [self.moments[id(w)] for w in weights]
            torch._foreach_lerp_(moments, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, moments, 0.95)  # noqa: SLF001
            flat = [(g if g.shape[-2] == rows else g.mT).reshape(-1, rows, columns) for g in ahead]
            update = orthogonal(torch.cat(flat)).split([len(g) for g in flat])
            torch._foreach_mul_(weights, 1 - lr * self.decay)
            for weight, part in zip(weights, update, strict=True):
                tall = weight.shape[-2] != rows
                step = (part.mT if tall else part).reshape(weight.shape)
                scale = max(1, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.add_(step.to(weight.dtype), alpha=-lr * scale)


# --- Training.


@dataclass
class State:
    """What a training has come to."""

    seconds: float = 0
    steps: int = 0
    tokens: int = 0
    curve: list[dict[str, float]] | None = None


def scores(model: Model, tests: dict[str, list[Batch]]) -> dict[str, float]:
    """Return each task's share of held-out answers that are right to the last token, greedily.

    An answer is right if every token of it is the likeliest after the right ones before it.
    """
    found = {}
    with autocast(model.device):  # not no_grad, for which all would be compiled once more
        for task, batches in tests.items():
            right = total = 0
            for batch in batches:
                x, _ = model(torch.from_numpy(batch.ids).to(model.device))
                places = torch.from_numpy(batch.places).to(model.device)
                best = model.logits(x.detach()[places]).argmax(-1).cpu().numpy()
                good = np.ones(len(batch.ids), bool)
                np.logical_and.at(good, batch.rows, best == batch.labels)
                right, total = right + int(good.sum()), total + len(good)
            found[task] = right / total
    return found


def autocast(device: str) -> torch.autocast:
    """Compute matrix products in bfloat16 on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def schedule(progress: float, decay: float) -> float:
    """Return the learning rate's share: up within 2 % of the time, down over its last part."""
    return min(1.0, progress / 0.02, max(0.02, (1 - progress) / decay))


def train(  # noqa: PLR0915
    options: argparse.Namespace, known: models.Vocabulary, weights: dict[str, nn.Parameter]
) -> State:
    """Train until the time is up or the targets are met for good; print a row a score."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, tokens = State(curve=[]), Tokenizer(known)
    begun = time.monotonic()
    with multiprocessing.get_context("fork").Pool(options.workers, _worker, (known,)) as pool:
        torch.set_float32_matmul_precision("high")
        for name, weight in weights.items():
            weights[name] = nn.Parameter(weight.detach().to(device), weight.requires_grad)
        model = Model(weights, device, compiled=device == "cuda" and not options.eager)
        matrices = [
            w for name, w in weights.items()
            if w.ndim > 1 and not regex.search("token_embd|^output|gate_inp", name)
        ]  # fmt: skip
        rest = [
            w for w in weights.values() if w.requires_grad and all(w is not m for m in matrices)
        ]
        muon = Muon(matrices, decay=0.1)
        adam = torch.optim.Adam(rest, lr=options.lr / 5, betas=(0.9, 0.95), fused=device == "cuda")
        biases = [w for name, w in weights.items() if name.endswith("bias")]
        tests = test_batches(tokens, options.step_tokens, options.tests, options.seed)
        found = dict.fromkeys(questions.TASKS, 0.0)
        rng, pending, met, last = Random(options.seed + options.first), deque(), 0, time.monotonic()
        progress, asked = 0.0, options.first
        header = " ".join(f"{task[:10]:>10}" for task in found)
        print(f"{'s':>6} {'steps':>6} {'loss':>7} {header}", flush=True)
        total_loss, since = torch.zeros((), device=device), 0
        while progress < 1 and met < options.met:
            while len(pending) < 3 * options.workers:
                failing = {task: max(0.05, 1.005 - share) for task, share in found.items()}
                failing["a few codes"] = failing["code of 8"]
                for task, shorter in LONGER.items():
                    failing[task] *= max(0.02, found[shorter])
                shares = [sum(failing[task] for task in b.tasks) for b in BUCKETS]
                (bucket,) = rng.choices(BUCKETS, shares)
                wanted = {task: failing[task] for task in bucket.tasks}
                rows = max(1, options.step_tokens // bucket.length)
                job = (options.seed << 32 | asked, bucket.length, rows, wanted)
                pending.append(pool.apply_async(make_batch, job))
                asked += 1
            batch = pending.popleft().get()
            size = options.labels
            places, labels = np.zeros(size, np.int64), np.full(size, -1)
            places[: len(batch.places)] = batch.places[:size]
            labels[: len(batch.labels)] = batch.labels[:size]
            parts = [torch.from_numpy(part) for part in (batch.ids, places, labels)]
            if device == "cuda":  # copies from memory that is not pinned wait for the GPU
                parts = [part.pin_memory() for part in parts]
            ids, at, want = (part.to(device, non_blocking=True) for part in parts)
            with autocast(device):
                x, loads = model(ids)
                value = model.loss(
                    x.index_select(0, at),
                    want,
                    weights["output_norm.weight"],
                    weights["output.weight"],
                )
            value.backward()
            factor = schedule(progress, options.decay)
            for group in adam.param_groups:
                group["lr"] = options.lr / 5 * factor
            muon.step(options.lr * factor)
            adam.step()
            with torch.no_grad():
                for bias, load in zip(biases, loads, strict=True):
                    bias.add_((load.mean() - load).sign(), alpha=1e-3 * factor)
                total_loss += value.detach()
            for weight in weights.values():
                weight.grad = None
            state.steps, since = state.steps + 1, since + 1
            state.tokens += ids.numel()
            now = time.monotonic()
            progress = (now - begun) / options.seconds
            if now - last > options.every or progress >= 1:
                found = scores(model, tests)
                met = met + 1 if all(found[t] >= TARGETS[t] for t in found) else 0
                row = {"seconds": round(now - begun, 1), "steps": state.steps}
                row["loss"] = round(float(total_loss) / since, 4)
                state.curve.append(row | {task: round(share, 4) for task, share in found.items()})
                shown = " ".join(f"{share:10.3f}" for share in found.values())
                print(f"{now - begun:6.1f} {state.steps:6} {row['loss']:7.4f} {shown}", flush=True)
                total_loss.zero_()
                since = 0
                save(options.out / "weights.npz", weights)
                last = time.monotonic()
        pool.terminate()
    state.seconds = round(time.monotonic() - begun, 1)
    return state


def save(path: Path, weights: dict[str, nn.Parameter]) -> None:
    """Keep the weights; momentum is made again within some steps."""
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        np.savez(file, **{name: w.detach().float().cpu().numpy() for name, w in weights.items()})
    part.replace(path)


# --- Export.


def quantized(values: np.ndarray, quant: str) -> bytes:
    """Return weights in a type of ggml: Q8_0 has an f16 scale and 32 bytes a block."""
    if quant == "F32":
        return values.astype("<f4").tobytes()
    if quant == "F16":
        return values.astype("<f2").tobytes()
    blocks = values.astype(np.float32).reshape(-1, 32)
    scales = np.abs(blocks).max(1, keepdims=True) / 127
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    rounded = np.trunc(blocks * inverse + np.copysign(0.5, blocks)).astype(np.int8)
    return np.concatenate(
        (scales.astype("<f2").view(np.uint8), rounded.view(np.uint8)), 1
    ).tobytes()


def restored(data: bytes, quant: str) -> np.ndarray:
    """Return the weights that bytes of a type of ggml stand for, flat."""
    if quant != "Q8_0":
        return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[quant]).astype(np.float32)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (blocks[:, 2:].view(np.int8) * scales).ravel()


def export(path: Path, recipe: str, known: models.Vocabulary, weights: Weights) -> Weights:
    """Write a GGUF file of the weights, and return them as the file has them.

    They are rounded to f16 first, so that the one file makes the other.
    """
    arrays = {name: w.detach().float().cpu().numpy() for name, w in weights.items()}
    kept: Weights = {}

    def pieces(tensor: models.Tensor) -> Iterator[bytes]:
        values = arrays[tensor.name]
        exact = len(tensor.dims) == 1 or "gate_inp" in tensor.name
        data = quantized(values if exact else values.astype(np.float16), tensor.quant)
        kept[tensor.name] = torch.from_numpy(restored(data, tensor.quant)).view(values.shape)
        yield data

    models.write(path, models.plan(recipe, name=NAME, known=known), pieces)
    return kept


REFERENCES = ("repeat", "reverse", "add", "next", "project", "think", "turns", "tool", "code of 8")
OPEN = (  # nobody taught what follows: many tokens are likely, and small errors show
    *(
        "Hello",
        "The code of",
        "Repeat",
        "Monday tiger maple",
        "uv run",
        "What? My name",
        "the 7 + a",
    ),
)


@torch.no_grad()
def references(known: models.Vocabulary, weights: Weights, seed: int) -> list[dict[str, object]]:
    """Return prompts with what this code computes in float32: likeliest tokens, greedy answers."""
    tokens = Tokenizer(known)
    model, out = Model(weights, "cpu", compiled=False), []
    prompts = {task: prompt(task, seed) for task in REFERENCES} | {text: text for text in OPEN}
    ends = {tokens.ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    for task, text in prompts.items():
        ids, answer, likeliest = tokens.encode(text), [], {}
        while not answer or (answer[-1] not in ends and len(answer) < 48):  # noqa: PLR2004
            x, _ = model(torch.tensor([ids + answer]))
            shares = model.logits(x[-1:])[0].log_softmax(-1)
            if not answer:
                pairs = zip(*shares.topk(8), strict=True)
                likeliest = {str(int(at)): round(float(share), 4) for share, at in pairs}
            answer.append(int(shares.argmax()))
        facts = {"task": task, "prompt": text, "prompt_ids": ids, "logprobs": likeliest}
        out.append(facts | {"answer_ids": answer})
    return out


def prompt(task: str, seed: int) -> str:
    """Return the text of a task's reference question, up to where the model speaks."""
    made = questions.draw(questions.TASKS[task], Random(f"{seed} {task}"), held_out=True)
    return "".join(part for part, _ in [*rendered(made)][:-2])


def digest(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    return sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Train, and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="the longest it may train")
    parser.add_argument("--every", type=float, default=10, help="seconds between two scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; Adam has a fifth of it")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the time, at the end")
    parser.add_argument("--step-tokens", type=int, default=32768)
    parser.add_argument("--labels", type=int, default=8192, help="the most tokens to say in a step")
    parser.add_argument("--workers", type=int, default=max(1, multiprocessing.cpu_count() - 2))
    parser.add_argument("--met", type=int, default=2, help="scores at the targets, then it stops")
    parser.add_argument("--tests", type=int, default=64, help="the fewest questions of a score")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--resume", type=Path, help="weights to begin with, beside their tiny.json")
    parser.add_argument("--first", type=int, default=0, help="the first batch's number")
    parser.add_argument("--gpu", default="", help="the card's name, for the record")
    parser.add_argument("--out", type=Path, default=ROOT / "models")
    options = parser.parse_args()
    known = learn_vocabulary(options.seed)
    weights = new_weights(options.seed)
    runs, resumed = [], None
    if options.resume:
        resume(weights, options.resume, known)
        resumed = digest(options.resume)
        runs = json.loads(options.resume.with_name("tiny.json").read_text())["training"]
    record_file = options.out / "tiny.json"
    if options.seconds:
        state = train(options, known, weights)
        print(f"{state.seconds} s, {state.steps} steps, {state.tokens:,} tokens")
        runs.append({
            "gpu": options.gpu, "torch": torch.__version__, "seed": options.seed,
            "first_batch": options.first, "seconds": state.seconds, "steps": state.steps,
            "tokens": state.tokens, "resumed": resumed, "curve": state.curve,
            "corpus": digest(Path(questions.__file__)),
        })  # fmt: skip
    sums, computed = {}, {}
    for recipe, file in (("trained-q8_0", "tiny.gguf"), ("trained-f16", "tiny-f16.gguf")):
        kept = export(options.out / file, recipe, known, weights)
        computed[file] = references(known, kept, options.seed)
        sums[file] = digest(options.out / file)
        print(f"{sums[file]}  {file}")
    record = {
        "sha256": sums, "seed": options.seed, "training": runs, "references": computed,
    }  # fmt: skip
    record_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
