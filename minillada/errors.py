"""The two ways a request can fail, each with a one-line message, `WHAT: expected E, got G; FIX`, and checks for them.

Scripts turn both into `error: ...` on stderr and exit code 2. Anything else that is raised is a bug of ours.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

# Replacements for characters that a terminal obeys: pictures of the C0 controls (except \n and \t), and U+FFFD for the
# C1 controls, for line and direction marks, and for lone surrogates, which cannot be printed.
HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
for first, last in [(0x80, 0x9F), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF)]:
    HARMLESS |= dict.fromkeys(range(first, last + 1), 0xFFFD)


def display(text: str) -> str:
    """Return the text with every character that a terminal obeys made visible; newlines and tabs stay."""
    return text.translate(HARMLESS)


def in_a_line(text: str) -> str:
    """Return the text as a line that a terminal can show: the rule for every message. "a\\n b" -> "a b"."""
    return re.sub(r"\s*[\n\t]\s*", " ", display(text))


class BadInput(ValueError):
    """What the user gave cannot be used: an option, a text, a file's content."""

    def __init__(self, message: str) -> None:
        super().__init__(in_a_line(message))


class BadLuck(OSError):
    """The environment failed: a missing file, a full disk, no network, too little memory."""

    def __init__(self, message: str) -> None:
        super().__init__(in_a_line(message))


def check_whole(what: str, value: object, low: int, high: float = math.inf, fix: str = "choose one of these") -> None:
    """Raise BadInput unless value is an int (a bool is none) from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        span = f">= {low}" if high == math.inf else f"from {low} to {high}"
        raise BadInput(f"{what}: expected a whole number {span}, got {value!r}; {fix}")


TINY = 1e-300  # as a lower limit it means: more than zero


def check_number(what: str, value: object, low: float = 0.0, high: float = 1e300) -> None:
    """Raise BadInput unless value is a finite int or float from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        above = "> 0" if low == TINY else f">= {low:g}"
        span = above if high == 1e300 else f"{above} and <= {high:g}"
        raise BadInput(f"{what}: expected a finite number {span}, got {value!r}; choose one of these")


def meant(value: object, known: Iterable[str], fix: str = "choose one") -> str:
    """Return the fix for a name that is not known: the known one that is spelled most like it, or else `fix`."""
    close = get_close_matches(str(value), known, 1)
    return f"did you mean {close[0]}?" if close else fix


def check_one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise BadInput unless value is one of the known names."""
    known = list(known)
    if value not in known:
        raise BadInput(f"{what}: expected one of {', '.join(known)}, got {value!r}; {meant(value, known)}")


def named(table: dict[str, Callable], what: str, spec: str) -> object:
    """Make what a user calls "name" or "name:parameter,parameter". Raises BadInput for an unknown name or parameter."""
    name, colon, given = spec.partition(":")
    check_one_of(what, name, table)
    takes = list(inspect.signature(table[name]).parameters)
    texts = given.split(",") if colon else []
    if len(texts) > len(takes):
        few = f"at most {len(takes)} parameters ({', '.join(takes)})" if takes else "no parameter"
        raise BadInput(f"{what}: expected {name} with {few}, got {spec!r}; leave out the rest")
    values = []
    for parameter, text in zip(takes, texts, strict=False):
        try:
            values.append(int(text) if text.strip().isdecimal() else float(text))
        except ValueError:
            values.append(text)  # no number: refused in the next line
        check_number(f"{what} {name}, {parameter}", values[-1])
    return table[name](*values)


# The largest value each size may have: far above any published model, far below what would hang a machine.
LIMITS = {"vocab_size": 2**24, "embedding_size": 2**24, "n_layer": 1024, "n_head": 1024, "n_kv_head": 1024}
LIMITS |= {"d_model": 2**17, "d_head": 2**13, "d_ff": 2**20, "max_len": 2**24, "rotary_dim": 2**13}
MOST_STEPS = 10**6  # a method may look at every step, even one that evaluates nothing
MOE_LIMITS = {"n_expert": 2**13, "d_expert": 2**20, "n_expert_group": 2**13}


def check_model(c) -> None:
    """Raise BadInput, naming the field of a ModelConfig, if no model can have these sizes."""
    for name, limit in (LIMITS | (MOE_LIMITS if c.n_expert else {})).items():
        check_whole(name, getattr(c, name), 1, limit)
    for name in ("rope_theta", "norm_eps", "router_scale"):
        check_number(name, getattr(c, name), TINY)
    check_whole("block", c.block, 0)
    check_one_of("router", c.router, ("softmax", "sigmoid"))
    rules = [
        ("pad_id", c.pad_id != c.mask_id, f"an id other than mask_id {c.mask_id}"),
        ("n_kv_head", c.n_head % c.n_kv_head == 0, f"a divisor of n_head {c.n_head}"),
        ("rotary_dim", c.rotary_dim % 2 == 0 and c.rotary_dim <= c.d_head, f"an even number up to {c.d_head}"),
        ("embedding_size", c.embedding_size >= c.vocab_size, f"at least vocab_size {c.vocab_size}"),
    ]
    if c.n_expert:
        check_whole("n_expert_active", c.n_expert_active, 1, c.n_expert)
        check_whole("n_expert_group_active", c.n_expert_group_active, 1, c.n_expert_group)
        rules += [("n_expert_group", c.n_expert % c.n_expert_group == 0, f"a divisor of n_expert {c.n_expert}")]
        rules += [(name, getattr(c, name) % 8 == 0, "a multiple of 8 with experts") for name in ("d_model", "d_expert")]
    for name, holds, expected in rules:
        if not holds:
            raise BadInput(f"{name}: expected {expected}, got {getattr(c, name)!r}; change one of the two")
    for name in ("mask_id", "eos_id", "pad_id"):
        if getattr(c, name) is not None or name == "mask_id":
            check_whole(name, getattr(c, name), 0, c.embedding_size - 1)


def has_id(c, ids):
    """Tell whether ids (a number or a tensor) are of the vocabulary, or of patches of pictures that c was shown."""
    end = c.embedding_size + getattr(c, "n_patch", 0)
    return (ids >= 0) & (ids < c.vocab_size) | (ids >= c.embedding_size) & (ids < end)


def check_canvas(x, valid, c) -> None:
    """Raise BadInput unless a model of the ModelConfig c can fill the canvas x (B,T) with padding where not valid."""
    kinds = (x.dim(), str(x.dtype), str(valid.dtype), valid.shape)
    if kinds != (2, "torch.int64", "torch.bool", x.shape) or not x.numel():
        got = f"{x.dtype} {tuple(x.shape)} and {valid.dtype} {tuple(valid.shape)}"
        raise BadInput(f"canvas: expected x (B,T) long and valid (B,T) bool, got {got}; give tensors of that kind")
    if x.shape[1] > c.max_len:
        raise BadInput(f"canvas: expected at most {c.max_len} tokens, got {x.shape[1]}; shorten prompt or gen_len")
    if not valid.any(1).all():
        raise BadInput("canvas: expected a valid token in every row, got one of nothing but padding; leave it out")
    strange = x[~has_id(c, x)]
    if len(strange):
        expected = f"an id from 0 to {c.vocab_size - 1}"
        raise BadInput(f"token: expected {expected}, got {strange[0].item()}; use the model's tokenizer")


def check_blocks(config, c) -> tuple[int, str]:
    """Return the tokens of a block of the ModelConfig c, 0 for full attention, and the cache to decode with. Raises
    BadInput for a cache of a SampleConfig that would let a block model see what it must not."""
    if c.block and config.cache not in ("none", "blocks", "block"):
        raise BadInput(f"cache: expected none or block with a block model, got {config.cache}; leave it out")
    return c.block, "blocks" if c.block and config.cache == "none" else config.cache


def check_ids(name: str, ids: Iterable[int], c) -> list[int]:
    """Return the ids as a list. Raises BadInput unless each is one of the vocabulary and not the mask."""
    if any(not 0 <= i < c.vocab_size or i == c.mask_id for i in ids):
        raise BadInput(f"{name}: expected ids from 0 to {c.vocab_size - 1} without the mask, got {ids}; leave it out")
    return list(ids)


def check_sampling(config) -> None:
    """Raise BadInput unless the numbers of a SampleConfig are in range and its choices fit each other."""
    for name in ("gen_len", "steps", "block_len"):
        check_whole(name, getattr(config, name), 1, LIMITS["max_len"] if name != "steps" else MOST_STEPS)
    check_whole("top_k", config.top_k, 0)
    check_number("temperature", config.temperature)
    check_number("cfg_scale", config.cfg_scale)
    check_number("top_p", config.top_p, TINY, 1.0)
    if config.gen_len % config.block_len:
        divisors = [d for d in range(config.gen_len, 0, -1) if config.gen_len % d == 0]
        near = min(divisors, key=lambda d: abs(d - config.block_len))
        expected = f"a divisor of gen_len {config.gen_len}"
        raise BadInput(f"block_len: expected {expected}, got {config.block_len}; try {near}")
    windows = config.gen_len // config.block_len
    if config.steps % windows:
        near = max(1, config.steps // windows) * windows
        raise BadInput(f"steps: expected a multiple of the {windows} windows, got {config.steps}; try {near}")
    if config.revise != "none" and config.commit != "quota":
        what = f"commit: expected none beside revise, which brings its own rule, got {config.commit}"
        raise BadInput(f"{what}; leave one of the two out")
    if config.block:
        check_whole("block", config.block, 0)
    for what, rule in (("revise", "wino"), ("commit", "speculate")):  # they ask about more than the canvas
        if getattr(config, what).startswith(rule) and config.cache != "none":
            raise BadInput(f"cache: expected none with {what} {rule}, got {config.cache}; leave one of the two out")
