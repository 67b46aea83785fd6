"""Writes GGUF files of GLM-4.7-Flash's architecture: of given weights, or of random ones.

A stand-in, of random weights, has a published file's tensors and nearly its size, so the engine
takes the same memory and time over it. Most of its vocabulary is short words, so nearly every token
shows as text.
"""

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from hashlib import shake_128
from itertools import count, islice, product
from math import prod
from pathlib import Path
from string import ascii_lowercase

from stack.errors import Code, StackError
from stack.gguf_header import TYPES
from stack.host import sync_folder

ALIGNMENT_BYTES = 32  # GGUF's default
MARGIN_BYTES = 1 << 30

TEMPLATE = """\
[gMASK]<sop>
{%- set turns = {"system": "<|system|>", "assistant": "<|assistant|>", "tool": "<|observation|>"} %}
{%- if tools %}
    {{- "<|system|>Tools:" }}
    {%- for tool in tools %}
        {{- " " ~ tool.function.name ~ "(" }}
        {%- for parameter in tool.function.parameters.properties %}
            {{- ", " if not loop.first }}{{ parameter }}
        {%- endfor %}
        {{- ")" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- turns.get(message.role, "<|user|>") }}
    {%- if message.role == "tool" %}
        {{- "<tool_response>" ~ message.content ~ "</tool_response>" }}
    {%- else %}
        {%- if message.role == "assistant" %}
            {{- "<think>" ~ (message.reasoning_content or "") ~ "</think>" }}
        {%- endif %}
        {{- message.content or "" }}
        {%- for call in message.tool_calls or [] %}
            {{- "<tool_call>" ~ call.function.name }}
            {%- for key, value in call.function.arguments.items() %}
                {{- "<arg_key>" ~ key ~ "</arg_key><arg_value>" }}
                {{- value if value is string else value | tojson }}
                {{- "</arg_value>" }}
            {%- endfor %}
            {{- "</tool_call>" }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|><think>" }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- "</think>" }}
    {%- endif %}
{%- endif %}"""

CONTROL_TOKENS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
]
MARKUP = ("think", "tool_call", "tool_response", "arg_key", "arg_value")
MARKUP_TOKENS = [f"<{slash}{tag}>" for tag in MARKUP for slash in ("", "/")]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The hyper-parameters of a model, all of them counts."""

    layers: int
    dense_layers: int
    embd: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    v_head: int
    ff: int
    expert_ff: int
    experts: int
    experts_used: int
    vocab: int
    context: int


@dataclass(frozen=True)
class Recipe:
    """A shape, and each tensor's type: that of the first pattern its name matches.

    ``file_type`` is llama.cpp's LLAMA_FTYPE, which only labels a file.
    """

    shape: Shape
    file_type: int
    mix: Mapping[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in GPT-2's byte alphabet, their GGUF types, and BPE's merges, first ones first."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: ``dims`` in ggml's order, the contiguous one (the fan-in) first."""

    name: str
    dims: tuple[int, ...]
    quant: str

    @property
    def size_bytes(self) -> int:
        """What it takes in a file, without padding."""
        kind = TYPES[self.quant]
        return prod(self.dims) // kind.block_elements * kind.block_bytes


@dataclass(frozen=True)
class Plan:
    """What `write` writes: ``header``, then each of ``tensors``, padded."""

    recipe: str
    size_bytes: int
    tensor_count: int
    header: bytes = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)


SHAPES = {
    "full": Shape(
        layers=47, dense_layers=1, embd=2048, heads=20, q_lora=768, kv_lora=512, nope=192, rope=64,
        v_head=256, ff=10240, expert_ff=1536, experts=64, experts_used=4, vocab=154880,
        context=202752,
    ),
    # CUDA's flash attention needs kv_lora 512 with rope 64; 26 or 27 layers are another model.
    "tiny": Shape(
        layers=4, dense_layers=1, embd=256, heads=4, q_lora=192, kv_lora=512, nope=64, rope=64,
        v_head=64, ff=512, expert_ff=192, experts=8, experts_used=2, vocab=512, context=8192,
    ),
}  # fmt: skip
SHAPES["trained"] = replace(SHAPES["tiny"], layers=5, vocab=1088)

# The published mixes are unknown: these meet the published sizes, with the bits where they pay.
FLOATS = {"*norm.weight": "F32", "*.ffn_gate_inp.weight": "F32", "*.bias": "F32"}
RECIPES = {
    "tiny-q8_0": Recipe(SHAPES["tiny"], 7, FLOATS | {"*": "Q8_0"}),
    "full-q4_k": Recipe(SHAPES["full"], 15, FLOATS | {
        "*.attn_k[v_]*": "Q8_0", "*.attn_v_b.*": "Q8_0",  # no K-quant divides attn_k_b's rows
        "*.attn_*": "Q5_K", "*_shexp.*": "Q6_K", "blk.0.*": "Q6_K",
        "blk.[1-4].ffn_down_exps.*": "Q5_K", "blk.4[3-6].ffn_down_exps.*": "Q5_K",
        "token_embd.*": "Q5_K", "output.*": "Q6_K", "*": "Q4_K",
    }),
    "full-q8_0": Recipe(SHAPES["full"], 7, FLOATS | {
        "blk.[1-4].ffn_down_exps.*": "F16", "blk.4[4-6].ffn_down_exps.*": "F16",
        "*_exps.*": "Q8_0", "*": "F16",
    }),
    "trained-q8_0": Recipe(SHAPES["trained"], 7, FLOATS | {"*": "Q8_0"}),
    "trained-f16": Recipe(SHAPES["trained"], 1, FLOATS | {"*": "F16"}),
}  # fmt: skip

# Where a block has its f16 scales, and the standard deviation that a scale of 1 gives its weights
# when all other bits are uniform. The second scale of Q4_K and of Q5_K brings the mean to zero.
SCALES = {
    "Q4_K": {0: 258.3, 2: 258.3 / 7.5},
    "Q5_K": {0: 526.9, 2: 526.9 / 15.5},
    "Q6_K": {208: 1365.7},
    "Q8_0": {0: 73.9},
}


def _dims(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention = {
        "attn_norm": (s.embd,), "ffn_norm": (s.embd,),
        "attn_q_a": (s.embd, s.q_lora), "attn_q_a_norm": (s.q_lora,),
        "attn_q_b": (s.q_lora, s.heads * (s.nope + s.rope)),
        "attn_kv_a_mqa": (s.embd, s.kv_lora + s.rope), "attn_kv_a_norm": (s.kv_lora,),
        "attn_k_b": (s.nope, s.kv_lora, s.heads), "attn_v_b": (s.kv_lora, s.v_head, s.heads),
        "attn_output": (s.heads * s.v_head, s.embd),
    }  # fmt: skip
    dense = {"ffn_gate": (s.embd, s.ff), "ffn_up": (s.embd, s.ff), "ffn_down": (s.ff, s.embd)}
    up, down = (s.embd, s.expert_ff), (s.expert_ff, s.embd)
    experts = {
        "ffn_gate_inp": (s.embd, s.experts), "exp_probs_b": (s.experts,),
        "ffn_gate_exps": (*up, s.experts), "ffn_gate_shexp": up,
        "ffn_up_exps": (*up, s.experts), "ffn_up_shexp": up,
        "ffn_down_exps": (*down, s.experts), "ffn_down_shexp": down,
    }  # fmt: skip
    yield "token_embd.weight", (s.embd, s.vocab)
    for layer in range(s.layers):
        for name, dims in (attention | (dense if layer < s.dense_layers else experts)).items():
            yield f"blk.{layer}.{name}.{'bias' if name == 'exp_probs_b' else 'weight'}", dims
    yield from (("output_norm.weight", (s.embd,)), ("output.weight", (s.embd, s.vocab)))


def byte_alphabet() -> list[str]:
    """Return the character by which GPT-2's tokens write each byte."""
    shifted, printable = count(256), {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def vocabulary(words: Iterable[str], size: int, *, merges: list[str] | None = None) -> Vocabulary:
    """Make a vocabulary: GPT-2's byte alphabet, GLM's specials, then as many words as there fit."""
    tokens = [*byte_alphabet(), *CONTROL_TOKENS, *MARKUP_TOKENS]
    kinds = [1] * 256 + [3] * len(CONTROL_TOKENS) + [4] * len(MARKUP_TOKENS)
    missing = size - len(tokens)
    return Vocabulary(tokens + list(islice(words, missing)), kinds + [1] * missing, merges or [])


def _words() -> Iterator[str]:
    """Yield words of letters, short ones first, as tokens with a blank before them."""
    lengths = (product(ascii_lowercase, repeat=length) for length in count(1))
    return (byte_alphabet()[ord(" ")] + "".join(word) for length in lengths for word in length)


def _metadata(recipe: Recipe, name: str, template: str, known: Vocabulary) -> dict[str, object]:
    s, tokens = recipe.shape, known.tokens
    architecture = {
        "block_count": s.layers, "context_length": s.context, "embedding_length": s.embd,
        "feed_forward_length": s.ff, "vocab_size": s.vocab,
        "attention.head_count": s.heads, "attention.head_count_kv": 1,
        "attention.q_lora_rank": s.q_lora, "attention.kv_lora_rank": s.kv_lora,
        "attention.key_length": s.kv_lora + s.rope, "attention.value_length": s.kv_lora,
        "attention.key_length_mla": s.nope + s.rope, "attention.value_length_mla": s.v_head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": s.rope, "rope.freq_base": 1e6,
        "leading_dense_block_count": s.dense_layers, "expert_count": s.experts,
        "expert_used_count": s.experts_used, "expert_shared_count": 1, "expert_group_count": 1,
        "expert_group_used_count": 1, "expert_feed_forward_length": s.expert_ff,
        "expert_weights_scale": 1.8, "expert_weights_norm": True,
        "expert_gating_func": 2,  # sigmoid; absent, the engine guesses from the layers
    }  # fmt: skip
    special = {
        "bos": "[gMASK]", "eos": "<|endoftext|>", "eot": "<|user|>", "eom": "<|observation|>",
        "unknown": "<|endoftext|>", "padding": "[MASK]",
    }  # fmt: skip
    return {
        "general.architecture": "deepseek2", "general.type": "model", "general.name": name,
        "general.file_type": recipe.file_type, "general.quantization_version": 2,
        **{f"deepseek2.{key}": value for key, value in architecture.items()},
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": known.kinds,
        "tokenizer.ggml.merges": known.merges, "tokenizer.chat_template": template,
        **{f"tokenizer.ggml.{key}_token_id": tokens.index(token) for key, token in special.items()},
    }  # fmt: skip


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: object) -> bytes:
    """Serialise ``value`` behind its GGUF type; a list holds numbers, or else strings."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        case list():
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case _:
            return struct.pack("<I", 8) + _string(str(value))


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % ALIGNMENT_BYTES)


def plan(
    recipe: str, *, name: str = "", template: str = TEMPLATE, known: Vocabulary | None = None
) -> Plan:
    """Lay out what `write` would write; the size is exact for that name, template and vocabulary.

    Without one, most of the vocabulary is words of letters.

    Raises:
        StackError: USAGE where the recipe is unknown.

    """
    if recipe not in RECIPES:
        cause = f"unknown recipe {recipe!r} for random weights"
        raise StackError(cause, f"use one of: {', '.join(RECIPES)}", Code.USAGE)
    made = RECIPES[recipe]
    known = known or vocabulary(_words(), made.shape.vocab)
    keys, tensors, infos, weights_bytes = _metadata(made, name, template, known), [], b"", 0
    for part, dims in _dims(made.shape):
        quant = next(quant for pattern, quant in made.mix.items() if fnmatchcase(part, pattern))
        tensors.append(tensor := Tensor(part, dims, quant))
        rank, code = len(dims), TYPES[quant].code
        infos += _string(part) + struct.pack(f"<I{rank}QIQ", rank, *dims, code, weights_bytes)
        weights_bytes += tensor.size_bytes + len(_padding(tensor.size_bytes))
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + _value(value) for key, value in keys.items()) + infos
    header += _padding(len(header))
    return Plan(recipe, len(header) + weights_bytes, len(tensors), header, tuple(tensors))


Pools = Callable[[str, int], memoryview]  # of a type's name and a fan-in


def _pool(seed: int, quant: str, fan_in: int) -> memoryview:
    """Return blocks of random weights of mean 0 and standard deviation 1/sqrt(fan_in)."""
    block_bytes, std = TYPES[quant].block_bytes, fan_in**-0.5
    blocks = 1 << (16 if quant in SCALES else 18)
    bits = shake_128(f"{seed} {quant} {fan_in}".encode()).digest(blocks * block_bytes)
    if quant not in SCALES:
        step = std * 12**0.5 / 65536  # of a uniform distribution
        numbers = struct.unpack(f"<{blocks}H", bits[: 2 * blocks])
        code = {"F16": "e", "F32": "f"}[quant]
        return memoryview(struct.pack(f"<{blocks}{code}", *[(n - 32767.5) * step for n in numbers]))
    pool = bytearray(bits)
    for offset, deviation in SCALES[quant].items():
        for i, byte in enumerate(struct.pack("<e", std / deviation)):
            pool[offset + i :: block_bytes] = bytes([byte]) * blocks
    return memoryview(pool)


def _weights(tensor: Tensor, seed: int, pool_of: Pools) -> Iterator[bytes | memoryview]:
    """Yield a tensor's bytes: windows on a pool, at places that depend on its name and the seed.

    So no two experts or layers are alike, and no time goes into random numbers for each weight.
    """
    if len(tensor.dims) == 1:  # a norm, or the routing bias: 0 loads all experts alike
        yield struct.pack("<f", float("norm" in tensor.name)) * tensor.dims[0]
        return
    pool, block_bytes = pool_of(tensor.quant, tensor.dims[0]), TYPES[tensor.quant].block_bytes
    blocks, left = len(pool) // block_bytes, tensor.size_bytes // block_bytes
    while left:
        window = min(left, blocks // 2)
        place = shake_128(f"{seed} {tensor.name} {left}".encode()).digest(8)
        start = int.from_bytes(place, "little") % (blocks - window) * block_bytes
        yield pool[start : start + window * block_bytes]
        left -= window


Weights = Callable[[Tensor], Iterable[bytes | memoryview]]


def _contents(planned: Plan, weights: Weights) -> Iterator[bytes | memoryview]:
    yield planned.header
    for tensor in planned.tensors:
        yield from weights(tensor)
        yield _padding(tensor.size_bytes)


def write_random(
    path: Path,
    *,
    recipe: str,
    name: str,
    seed: int = 0,
    template: str = TEMPLATE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file of random weights; equal arguments give equal bytes.

    Raises:
        StackError: USAGE where the recipe is unknown; else as `write`.

    """
    weights = partial(_weights, seed=seed, pool_of=cache(partial(_pool, seed)))
    write(path, plan(recipe, name=name, template=template), weights, progress=progress)


def write(
    path: Path,
    planned: Plan,
    weights: Weights,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file, whole or not at all; ``weights`` gives each tensor's bytes in pieces.

    ``progress`` is called with the bytes written and the bytes in all.

    Raises:
        StackError: DISK where the file cannot be written, or would leave less than 1 GiB free.

    """
    part, folder = path.with_name(f".{path.name}.part"), path.parent
    needed_bytes = planned.size_bytes + MARGIN_BYTES
    needed = f"{needed_bytes / 1e9:.2f} GB"
    try:
        part.unlink(missing_ok=True)  # of a run that was killed
        if (free_bytes := shutil.disk_usage(folder).free) < needed_bytes:
            raise OSError(errno.ENOSPC, f"it needs {needed}, {free_bytes / 1e9:.2f} GB are free")
        with part.open("wb") as file:
            for piece in _contents(planned, weights):
                file.write(piece)
                if progress:
                    progress(file.tell(), planned.size_bytes)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(folder)
    except OSError as error:
        remedy = f"give this user a writable folder with {needed} free"
        raise StackError(
            f"cannot write {path}: {error.strerror or error}", remedy, Code.DISK
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
