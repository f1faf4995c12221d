"""Ask a model, and show its answer: continue a prompt or many, fill holes, write a span anew."""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..decoding.graphs import graphed
from ..decoding.llama_cpp import LlamaCpp
from ..errors import BadInput, BadLuck, check_number, check_one_of, check_whole
from ..files import CONFIG_CAP, read_json
from ..sampler import Canvas, Model, SampleConfig, Step, answer_of, predictor_of, stream
from ..show.page import FORMS, check_apart, check_file, save
from ..show.terminal import watch
from ..show.trace import Trace
from ..text.chat import MARKERS, ChatTemplate, Message, check_size
from ..text.corpora import json_lines, plain_text
from ..text.tokenizer import Tokenizer, display
from ..weights.checkpoint import Report, expect_tokenizer, fitted, load_tokenizer
from ..weights.convert import home_of
from ..weights.device import bfloat16_instructions
from ..weights.pictures import data_url, open_picture
from ..weights.shipped import HOME
from ..weights.vision import see, sees
from .cli import SAMPLING, SWITCHES, add_sampling, sample_config, tell


def guide_of(directory: Path) -> dict:
    """Return what a model directory's generation_config.json says for us: "sampling", fields of SampleConfig;
    "filling", those for holes inside a text; "examples", {"prompt": texts, "fill": texts}; "after_eos", whether a text
    follows an end of text. {} if nothing. Raises BadInput for another form."""
    with home_of(directory) as home:
        path = home / "generation_config.json"
        guide = read_json(path, CONFIG_CAP).get("minillada", {}) if path.is_file() else {}
    for name in ("sampling", "filling"):
        fields = guide.get(name, {}) if isinstance(guide, dict) else None
        if not isinstance(fields, dict) or fields.keys() - {*SAMPLING, *SWITCHES}:
            what = f"{path}: expected fields of SampleConfig in minillada.{name}, got {str(fields)[:80]}"
            raise BadInput(f"{what}; correct the file, or delete it")
    return guide


def begin_of(guide: dict, eos_id: int | None) -> list[int]:
    """Return the ids in front of every text: an end of text, if the model learned documents that follow one."""
    return [eos_id] if guide.get("after_eos") else []


def defaults_of(directory: Path) -> dict:
    """Return how to decode a model unless told otherwise, as fields of SampleConfig."""
    return guide_of(directory).get("sampling", {})


def quick_dtype(directory: Path, device: str) -> torch.dtype | None:
    """Return bfloat16 for a checkpoint of a run of ours, or a shipped model, on a CPU that has instructions for it, and
    None otherwise, for the files' dtype: without such instructions bfloat16 is emulated, slower than float32."""
    own = directory.parent == HOME or (directory.parents[1] / "run.json").is_file()
    return torch.bfloat16 if own and torch.device(device).type == "cpu" and bfloat16_instructions("cpu") else None


# What LLaDA-V was taught to be told first.
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def usual_of(scheme: str, name: str) -> dict:
    """Return how the authors of a published model decode it, as fields of SampleConfig, from the scheme of its tensors
    and what the user called it: LLaDA2.0 and LLaDA2.1 have rules of their own."""
    return {"commit": "llada2.1" if "2.1" in name else "llada2"} if scheme == "LLaDA2" else {}


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
USUAL = ("quota", "none")  # rules that a summary does not name


class Talker(NamedTuple):
    """A model with all that is needed to talk with it."""

    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate
    instruct: bool  # a prompt is a message, put into the template; else a text to go on with
    defaults: dict  # fields of SampleConfig
    name: str  # what the user called it
    taught: bool  # to answer messages, as far as its files tell
    begin: list[int]  # see `begin_of`
    filling: dict  # fields of SampleConfig, for holes inside a text
    writer: Model  # what to sample with: the model, maybe recorded
    system: list[Message]  # what stands in front of every chat
    image: tuple[int, ...] = ()  # the patches of the picture that the next prompt is about
    picture: str = ""  # that picture as a `data:` URL

    def config(self, args: argparse.Namespace, prompt_len: int, **more: object) -> SampleConfig:
        """Return how to decode: what the options say, then `more`, then the model's defaults."""
        ends = dict.fromkeys([self.model.config.eos_id, *self.template.stop_ids])
        stop_ids = tuple(id for id in ends if id is not None)
        return sample_config(args, self.model.config, prompt_len, **{"stop_ids": stop_ids, **self.defaults, **more})

    def answer_length(self, args: argparse.Namespace) -> int:
        """Return how many tokens an answer in a chat may take: as asked, the default, or what a short model leaves."""
        return args.gen_len or self.defaults.get("gen_len") or min(128, self.model.config.max_len // 2)

    def shown(self, path: str | Path) -> "Talker":
        """Return one that sees the picture in a file, and what it saw before. Raises BadInput, BadLuck."""
        picture = open_picture(path)
        model, ids = see(self.model, picture)
        writer = graphed(model, "off" if self.writer is self.model else "auto")
        return self._replace(model=model, writer=writer, image=tuple(ids), picture=data_url(picture))

    def message(self, text: str) -> Message:
        """Return what a user says, with the picture that it is about."""
        return {"role": "user", "content": text} | ({"image": self.image} if self.image else {})

    def encode(self, text: str, what: str = "prompt") -> list[int]:
        """Return the ids to go on from, of at most 1 MB of text."""
        check_size(what, text)
        if not self.instruct:
            return self.before() + self.tokenizer.encode(text)
        if not text.strip():
            raise BadInput(f"{what}: expected some text, got none; write something")
        return self.template.encode_chat([*self.system, self.message(text)])

    def before(self) -> list[int]:
        """Return the ids in front of a text that is no message: its beginning, and a picture with a newline."""
        return self.begin + ([*self.image, *self.tokenizer.encode("\n")] if self.image else [])


class Question(NamedTuple):
    """A canvas of one row, and how to decode it."""

    canvas: Canvas
    config: SampleConfig
    n_prompt: int = 0  # tokens in front of an answer
    stop: int | None = None  # the column behind it; a block model writes to the end of a block
    start: int = 0  # the first column to show
    picture: str = ""  # see `Talker`


def add_questions(parser: argparse.ArgumentParser, required: bool) -> argparse._ActionsContainer:
    """Add what both scripts can be asked for, and how; return the group of which one is chosen."""
    what = parser.add_mutually_exclusive_group(required=required)
    what.add_argument("--prompt", metavar="TEXT", help="a text to go on from, or a message to an instruct model")
    what.add_argument("--fill", metavar="TEXT", help="text with [MASK] for each token wanted; it brings its own space")
    what.add_argument("--edit", metavar="TEXT", help="text with [[a span]] to write anew, in as many tokens")
    what.add_argument("--chat", action="store_true", help="talk over several turns; /reset forgets them, /quit ends")
    what.add_argument("--prompts", type=Path, metavar="FILE", help='many: a text file with one in each line, or .jsonl '
                      'with a "prompt" in each; answers are JSONL')  # fmt: skip
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture that the prompt, text or chat is about")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time, of --prompts (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file for the answers to --prompts")
    parser.add_argument("--raw", action="store_true", help="a prompt is plain text, even to an instruct model")
    parser.add_argument("--quiet", action="store_true", help="print the result alone, without the masks resolving")
    parser.add_argument("--watch", type=float, nargs="?", const=0.1, default=0.0, metavar="SECONDS",
                        help="in a terminal, hold every step for so long (0.1), so that one can follow")  # fmt: skip
    for form, (_, text) in FORMS.items():
        parser.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"a new file: {text}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor (default: as many as it has cores)")
    add_sampling(parser)
    return what


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options, and set the number of threads. Raises BadInput and BadLuck for what can be refused before a
    model is loaded."""
    args = parser.parse_args()
    check_whole("batch_size", args.batch_size, 1)
    check_one_of("graphs", args.graphs, ("auto", "off"))
    if args.dtype is not None:
        check_one_of("dtype", args.dtype, DTYPES)
    if args.threads is not None:
        check_whole("threads", args.threads, 1, 1024)
        torch.set_num_threads(args.threads)
    if args.prompts is not None:
        read_prompts(args.prompts)
    if args.out is not None and (args.prompts is None or args.out.exists()):
        got = "one that exists" if args.prompts else "no --prompts"
        raise BadInput(f"out: expected a new file for the answers to --prompts, got {got}; give another, or none")
    check_number("watch", args.watch, 0, 60)
    if args.watch and args.quiet:
        raise BadInput("watch: expected no --quiet beside it, got both; leave one of the two out")
    for form in files_of(args):
        if args.chat or args.prompts is not None or getattr(args, "check", False):
            raise BadInput(f"{form}: expected one answer to show, got none or many; use --prompt, --fill or --edit")
        check_file(form, getattr(args, form))
    check_apart({form: getattr(args, form) for form in files_of(args)})
    if args.image is not None:
        if args.prompts is not None or args.edit is not None or getattr(args, "check", False):
            raise BadInput("image: expected --prompt, --fill or --chat with it, got another; leave one of the two out")
        open_picture(args.image)  # a fault is told before gigabytes are read
    what = "fill" if args.fill is not None else "edit" if args.edit is not None else None
    if what and (args.gen_len or args.block_len):
        raise BadInput(
            f"{what}: expected neither --gen-len nor --block-len, got one; the holes decide, so leave it out"
        )
    return args


def read_prompts(path: Path) -> list[str]:
    """Return the "prompt" of every line of a .jsonl file, or every line that is not empty. Raises BadInput, BadLuck."""
    if not path.is_file():
        raise BadLuck(f"{path}: expected a file with a prompt in each line, got no such file; check the name")
    if path.suffix.lower() == ".jsonl":
        texts = list(json_lines(path, "prompt"))
    else:
        texts = [line for line in "".join(plain_text(path)).split("\n") if line.strip()]
    if not texts:
        raise BadInput(f"{path}: expected a prompt in each line, got nothing; write one prompt a line")
    return texts


def answer_file(args: argparse.Namespace, talker: Talker) -> None:
    """Write a line of JSON for every prompt in order, {"prompt": …, "answer": …}. Finished batches stay written."""
    texts = read_prompts(args.prompts)
    prompts = [talker.encode(text, f"{args.prompts}, prompt {i}") for i, text in enumerate(texts, start=1)]
    config, start, nfe, written = talker.config(args, max(map(len, prompts))), time.perf_counter(), 0, 0
    device, total = predictor_of(talker.model).device, -(-len(texts) // args.batch_size) * config.steps
    with open(args.out, "x", encoding="utf-8") if args.out else nullcontext(sys.stdout) as out, bar_of(total) as bar:
        for first in range(0, len(texts), args.batch_size):
            now = slice(first, first + args.batch_size)
            c = predictor_of(talker.model, config.block).config
            canvas = Canvas.continuation(prompts[now], config.gen_len, c, device)
            for step in stream(talker.writer, canvas, config, args.seed):  # noqa: B007 the last one has the answers
                bar.update()
            nfe += step.nfe
            for text, new in zip(texts[now], canvas.answers(step.x, config, talker.model.config), strict=True):
                written += len(new)
                bar.write(json.dumps({"prompt": text, "answer": talker.tokenizer.decode(new)}), file=out)
                out.flush()
    if not args.quiet:
        tell(summary(talker, config, args.seed, written, nfe, time.perf_counter() - start))


def bar_of(steps: int) -> tqdm:
    """Return a bar over steps that nobody sees; it appears on a terminal, after a second, and goes when it is full."""
    return tqdm(total=steps, unit="step", delay=1, leave=False, dynamic_ncols=True, disable=None)


def summary(talker: Talker, c: SampleConfig, seed: int, written: int, nfe: int, seconds: float) -> str:
    """Say in one line what has written, with which settings, and what it took."""
    block = predictor_of(talker.model, c.block).config.block
    rules = [f"{what} {rule}" for what in ("commit", "revise", "cache") if (rule := getattr(c, what)) not in USUAL]
    rules += [f"cfg_scale {c.cfg_scale:g}"] if c.cfg_scale else []
    weight = next(talker.model.parameters(), None) if isinstance(talker.model, nn.Module) else None
    rules += ["in bfloat16"] if weight is not None and weight.dtype == torch.bfloat16 else []
    windows = f"blocks of {block}" if block else f"windows of {c.block_len}"
    how = ", ".join([f"temperature {c.temperature:g}", f"order {c.remasking}", windows, *rules])
    speed = f"{seconds:.1f} s, {written / max(seconds, 1e-9):,.0f} tokens/s"
    return f"{talker.name}: {how}; {nfe} evaluations, {speed}; seed {seed}"


def files_of(args: argparse.Namespace) -> list[str]:
    """Return the forms in which the steps are to be written to a file."""
    return [form for form in FORMS if getattr(args, form) is not None]


def on_llama_cpp(found: Report, home: Path, device: str) -> tuple[LlamaCpp, Tokenizer | None]:
    """Return a GGUF file as a mask predictor that llama.cpp computes, and the tokenizer of `home`. Raises BadInput,
    BadLuck."""
    model = LlamaCpp(found.directory, gpu_layers=0 if device == "cpu" else -1, config=found.config)
    return model, fitted(load_tokenizer(home), found.config)


def make_talker(
    directory: Path, name: str, model: Model, tokenizer: Tokenizer | None, args: argparse.Namespace, **defaults: object
) -> Talker:
    """Join a model and its tokenizer with a chat template. name: what the user called the model, which may tell
    whether it was taught to answer. Raises BadInput without a tokenizer."""
    expect_tokenizer(directory, name)
    with home_of(directory) as home:
        template = ChatTemplate.load(home, tokenizer)
    last = name.replace("\\", "/").rstrip("/").split("/")[-1].lower()
    taught = "instruct" in last or (template.own and "base" not in last)  # base models too may bring a template
    guide, system = guide_of(directory), []
    begin, filling = begin_of(guide, model.config.eos_id), guide.get("filling", {})
    if sees(model) and len(markers := [id for id in map(tokenizer.inner.token_to_id, MARKERS) if id is not None]) == 3:
        *heads, turn_end = markers  # LLaDA-V: one window, no special token, and no end but that of a turn
        banned = dict.fromkeys([tokenizer.eos_id, tokenizer.bos_id, *heads])
        official = {"banned_ids": tuple(id for id in banned if id not in (None, turn_end)), "stop_ids": (turn_end,)}
        defaults = {"block_len": 128, **official, **defaults}
        system, taught = [{"role": "system", "content": SYSTEM}], True
    instruct, writer = not args.raw and (args.chat or taught), graphed(model, getattr(args, "graphs", "auto"))
    talker = Talker(model, tokenizer, template, instruct, defaults, name, taught, begin, filling, writer, system)
    return talker if getattr(args, "image", None) is None else talker.shown(args.image)


def question(args: argparse.Namespace, talker: Talker) -> Question:
    """Return the canvas and the way to decode it that the options ask for. Raises BadInput."""
    for what in ("fill", "edit"):
        if getattr(args, what) is not None:
            return to_fill(args, talker, what, getattr(args, what))
    prompt = talker.encode(args.prompt or "")
    return to_write(args, talker, prompt, len(prompt if talker.instruct else talker.before()))


def to_write(args: argparse.Namespace, talker: Talker, prompt: list[int], start: int) -> Question:
    """Put holes behind a prompt; show the columns from `start` on. Raises BadInput."""
    config, model = talker.config(args, len(prompt)), talker.model
    predict = predictor_of(model, config.block)
    canvas = Canvas.continuation([prompt], config.gen_len, predict.config, predict.device)
    return Question(canvas, config, len(prompt), len(prompt) + config.gen_len, start, talker.picture)


def to_fill(args: argparse.Namespace, talker: Talker, what: str, text: str) -> Question:
    """Make holes of the [MASK]s of a text (what = "fill") or of its [[spans]] ("edit"). Raises BadInput."""
    check_size(what, text)
    encode = talker.tokenizer.encode_with_masks if what == "fill" else talker.tokenizer.encode_to_edit
    row = talker.before() + encode(text)
    holes = [i for i, token in enumerate(row) if token == talker.model.config.mask_id]
    if not holes:
        sign = "[MASK]" if what == "fill" else "[[span]]"
        raise BadInput(f"{what}: expected at least one {sign} in the text, got none; write it where text is wanted")
    # One window over all the holes, and nothing after an end of text is thrown away: it is the middle of a text.
    width, model = holes[-1] + 1 - holes[0], talker.model
    whole = {"gen_len": width, "block_len": width, "ban_eos": True, "stop_at_eos": False, **talker.filling}
    canvas = Canvas.infill([row], model.config, predictor_of(model).device)
    how = talker.config(args, len(row) - width, **whole)
    return Question(canvas, how, start=len(talker.before()), picture=talker.picture)


def show(args: argparse.Namespace, talker: Talker, asked: Question, steps: Iterable[Step]) -> list[int]:
    """Draw the steps as they come, or with --quiet print the result alone; write the files that were asked for. Return
    the tokens behind the prompt, up to the end of the text."""
    seen, start, written = [], time.perf_counter(), 0
    if not args.quiet:
        steps = watch(steps, talker.tokenizer, start=asked.start, pause=args.watch, key=not args.chat)
    with bar_of(asked.config.steps) if args.quiet else nullcontext() as bar:
        for step in steps:
            seen = [*seen, step] if files_of(args) else [step]
            written += (step.committed.sum() - step.revised.sum()).item()
            if bar is not None:
                bar.update()
    if not (args.quiet or args.chat):
        tell(summary(talker, asked.config, args.seed, written, step.nfe, time.perf_counter() - start))
    for form in files_of(args):
        trace = Trace.record(seen, talker.tokenizer, start=asked.start, picture=asked.picture)
        save(trace, form, getattr(args, form))
        tell(f"{form} written to {getattr(args, form)}")
    row = seen[-1].x[0].tolist()
    new = answer_of(row[asked.n_prompt : asked.stop], asked.config, talker.model.config)
    if args.quiet:
        print(display(talker.tokenizer.decode((row[: asked.n_prompt] + new)[asked.start :])))
    return new
