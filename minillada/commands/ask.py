"""What `sample.py` and `load_8b.py` do with a model: continue a prompt, fill holes, chat, answer a file."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..canvas import Canvas
from ..errors import BadInput, BadLuck, check_number, check_whole
from ..model import LLaDA
from ..sampler import SampleConfig, Step, answer_of, generate, stream
from ..show.page import FORMS, check_file, save
from ..show.terminal import watch
from ..show.trace import Trace, overhear
from ..text.chat import ChatTemplate, check_size
from ..text.corpora import json_lines, plain_text
from ..text.tokenizer import Tokenizer, display
from ..weights.checkpoint import expect_tokenizer
from .cli import add_sampling, complain, sample_config


def defaults_of(name: str, directory: Path) -> dict:
    """How to draw from a model unless told otherwise: a run of train_tiny.py is too small to go by its confidence, but
    for one that was taught to answer, whose checkpoints have a template."""
    wild = (Path(name) / "run.json").exists() and not (directory / "chat_template.jinja").exists()
    return {"temperature": 0.7, "remasking": "random"} if wild else {}


class Talker(NamedTuple):
    """A model with all that is needed to talk with it."""

    model: LLaDA
    tokenizer: Tokenizer
    template: ChatTemplate
    instruct: bool  # a prompt is a message, put into the template; else a text to go on with
    defaults: dict  # fields of SampleConfig

    def config(self, args: argparse.Namespace, prompt_len: int, **more: object) -> SampleConfig:
        ends = dict.fromkeys([self.model.config.eos_id, *self.template.stop_ids])
        stop_ids = tuple(id for id in ends if id is not None)
        return sample_config(args, self.model.config, prompt_len, stop_ids=stop_ids, **{**self.defaults, **more})

    def encode(self, text: str, what: str = "prompt") -> list[int]:
        """The ids to go on from, of at most 1 MB of text."""
        check_size(what, text)
        if not self.instruct:
            return self.tokenizer.encode(text)
        if not text.strip():
            raise BadInput(f"{what}: expected some text, got none; write something")
        return self.template.encode_chat([{"role": "user", "content": text}])


def add_questions(parser: argparse.ArgumentParser, required: bool) -> argparse._ActionsContainer:
    """What both scripts can be asked for, and how; the group of which one is chosen."""
    what = parser.add_mutually_exclusive_group(required=required)
    what.add_argument("--prompt", metavar="TEXT", help="a text to go on from, or a message to an instruct model")
    what.add_argument(
        "--fill", metavar="TEXT", help="text with [MASK] wherever a token is wanted; a token brings its own space"
    )
    what.add_argument("--edit", metavar="TEXT", help="text with [[a span]] to write anew, in as many tokens")
    what.add_argument("--chat", action="store_true", help="talk over several turns; /reset forgets them, /quit ends")
    what.add_argument("--prompts", type=Path, metavar="FILE", help='many: a text file with one in each line, or .jsonl '
                      'with a "prompt" in each; answers are JSONL')  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time, of --prompts (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file for the answers to --prompts")
    parser.add_argument("--raw", action="store_true", help="a prompt is plain text, even to an instruct model")
    parser.add_argument("--quiet", action="store_true", help="print the result alone, without the masks resolving")
    parser.add_argument("--watch", type=float, nargs="?", const=0.1, default=0.0, metavar="SECONDS",
                        help="in a terminal, hold every step for so long (0.1), so that one can follow")  # fmt: skip
    for form, (_, text) in FORMS.items():
        parser.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"a new file: {text}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add_sampling(parser)
    return what


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with whatever can be refused before a model is loaded. Raises BadInput, BadLuck."""
    args = parser.parse_args()
    check_whole("batch_size", args.batch_size, 1)
    if args.prompts is not None:
        read_prompts(args.prompts)
    if args.out is not None and (args.prompts is None or args.out.exists()):
        got = "one that exists" if args.prompts else "no --prompts"
        raise BadInput(f"out: expected a new file for the answers to --prompts, got {got}; give another, or none")
    check_number("watch", args.watch, 0, 60)
    if args.watch and args.quiet:
        raise BadInput("watch: expected no --quiet beside it, got both; choose one")
    for form in wanted(args):
        if args.chat or args.prompts is not None or getattr(args, "check", False):
            raise BadInput(f"{form}: expected one answer to show, got none or many; use --prompt, --fill or --edit")
        check_file(form, getattr(args, form))
    what = "fill" if args.fill is not None else "edit" if args.edit is not None else None
    if what and (args.gen_len or args.block_len):
        raise BadInput(f"{what}: expected neither --gen-len nor --block-len, since the holes decide; leave them out")
    return args


def wanted(args: argparse.Namespace) -> list[str]:
    """The forms in which the run is to be written to a file."""
    return [form for form in FORMS if getattr(args, form) is not None]


def make_talker(
    directory: Path, name: str, model: LLaDA, tokenizer: Tokenizer | None, args: argparse.Namespace, **defaults: object
) -> Talker:
    """name: what the user called the model, which may tell whether it was taught to answer."""
    expect_tokenizer(directory, name)
    template = ChatTemplate.load(directory, tokenizer)
    instruct = not args.raw and (args.chat or is_instruct(name, template))
    return Talker(model, tokenizer, template, instruct, defaults)


def is_instruct(name: str, template: ChatTemplate) -> bool:
    """By its name, or by a template of its own: base models may bring one too, without having learned it."""
    last = name.replace("\\", "/").rstrip("/").split("/")[-1].lower()
    return "instruct" in last or (template.own and "base" not in last)


def answer(args: argparse.Namespace, talker: Talker) -> None:
    """Do what the options say."""
    if args.chat:
        chat(args, talker)
    elif args.prompts is not None:
        answer_file(args, talker)
    elif args.fill is not None or args.edit is not None:
        fill(args, talker)
    else:
        prompt = talker.encode(args.prompt or "")
        write(args, talker, prompt, 0 if not talker.instruct else len(prompt))


def write(args: argparse.Namespace, talker: Talker, prompt: list[int], start: int) -> list[int]:
    """Go on from the prompt, showing the text from column start on; the new tokens."""
    canvas, config = to_write(args, talker, prompt)
    x = show(args, talker, canvas, config, start)
    new = answer_of(x[len(prompt) :], config, talker.model.config)
    if args.quiet:
        print(display(talker.tokenizer.decode((prompt + new)[start:])))
    return new


def to_write(args: argparse.Namespace, talker: Talker, prompt: list[int]) -> tuple[Canvas, SampleConfig]:
    """The canvas of a prompt with holes after it, and how to decode it. Raises BadInput."""
    config = talker.config(args, len(prompt))
    device = next(talker.model.parameters()).device
    return Canvas.continuation([prompt], config.gen_len, talker.model.config, device), config


def fill(args: argparse.Namespace, talker: Talker) -> None:
    """Write what is missing in the middle of a text: its [MASK]s, or the tokens of its [[spans]]."""
    what, text = ("fill", args.fill) if args.fill is not None else ("edit", args.edit)
    canvas, config = to_fill(args, talker, what, text)
    x = show(args, talker, canvas, config, 0)
    if args.quiet:
        print(display(talker.tokenizer.decode(x)))


def to_fill(args: argparse.Namespace, talker: Talker, what: str, text: str) -> tuple[Canvas, SampleConfig]:
    """The canvas of a text to "fill" or "edit", and how to decode it. Raises BadInput."""
    check_size(what, text)
    encode, sign = {
        "fill": (talker.tokenizer.encode_with_masks, "[MASK]"),
        "edit": (talker.tokenizer.encode_to_edit, "[[span]]"),
    }[what]
    row = encode(text)
    holes = [i for i, token in enumerate(row) if token == talker.model.config.mask_id]
    if not holes:
        raise BadInput(f"{what}: expected at least one {sign} in the text, got none; write it where text is wanted")
    # One window over all the holes, and nothing after an end of text is thrown away: it is the middle of a text.
    width = holes[-1] + 1 - holes[0]
    defaults = {"gen_len": width, "block_len": width, "ban_eos": True, "stop_at_eos": False}
    config = talker.config(args, len(row) - width, **defaults)
    return Canvas.infill([row], talker.model.config, next(talker.model.parameters()).device), config


def show(args: argparse.Namespace, talker: Talker, canvas: Canvas, config: SampleConfig, start: int) -> list[int]:
    """Fill the canvas before the user's eyes, or quietly, and write what files were asked for; its only row."""
    rivals, seen = {}, []
    steps = stream(talker.model, canvas, config, args.seed)
    if wanted(args) or not args.quiet:
        steps = overhear(talker.model, steps, rivals)
    steps = keep(steps, seen) if wanted(args) else steps
    if not args.quiet:
        last = watch(steps, talker.tokenizer, start=start, pause=args.watch)
    else:
        for last in steps:  # noqa: B007 the last one is the result
            pass
    if wanted(args):
        trace = Trace.record(seen, talker.tokenizer, start=start, rivals=rivals)
        for form in wanted(args):
            save(trace, form, path := getattr(args, form))
            print(f"{form} written to {path}", file=sys.stderr)
    return last.x[0].tolist()


def keep(steps: Iterable[Step], seen: list[Step]) -> Iterator[Step]:
    """The same steps, and a list of them."""
    for step in steps:
        seen.append(step)
        yield step


def chat(args: argparse.Namespace, talker: Talker) -> None:
    """Turn after turn until the input ends. A message that cannot be used costs one line, and the chat goes on."""
    args.quiet = args.quiet or not sys.stdout.isatty()
    c, messages = talker.model.config, []
    length = args.gen_len or min(128, c.max_len // 2)
    check_whole("gen_len", length, 1, c.max_len - 1)
    talker.template.render(["user"], ["Hi"])  # a template that fails does so at once
    for text in lines_of_user():
        if text.strip() in ("", "/reset"):
            messages = messages if not text.strip() else []
            continue
        try:
            check_size("message", text)
            kept, prompt = talker.template.fit([*messages, {"role": "user", "content": text}], c.max_len - length)
            if len(kept) <= len(messages):
                print(f"(the oldest {len(messages) + 1 - len(kept)} messages no longer fit and are forgotten)")
            new = write(args, talker, prompt, len(prompt))
            messages = [*kept, {"role": "assistant", "content": talker.tokenizer.decode(new)}]
        except BadInput as error:
            complain(str(error))


def lines_of_user() -> Iterator[str]:
    """What a person types, up to /quit or the end of the input."""
    with suppress(ImportError):  # none on Windows, whose console does it
        import readline  # noqa: F401 input() then knows arrow keys and earlier lines
    here = sys.stdin.isatty()
    try:
        while (text := input("you> " if here else "")).strip() != "/quit":
            yield text
    except EOFError:
        print(end="\n" if here else "")


def answer_file(args: argparse.Namespace, talker: Talker) -> None:
    """A line of JSON for every prompt, in order: {"prompt": ..., "answer": ...}. Finished batches stay written."""
    texts = read_prompts(args.prompts)
    prompts = [talker.encode(text, f"{args.prompts}, prompt {i}") for i, text in enumerate(texts, start=1)]
    config = talker.config(args, max(map(len, prompts)))
    with open(args.out, "x", encoding="utf-8") if args.out else nullcontext(sys.stdout) as out:
        for first in tqdm(range(0, len(texts), args.batch_size), unit="batch", disable=None):
            now = slice(first, first + args.batch_size)
            answers = generate(talker.model, prompts[now], config, args.seed)
            for text, new in zip(texts[now], answers, strict=True):
                print(json.dumps({"prompt": text, "answer": talker.tokenizer.decode(new)}), file=out, flush=True)


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of every line of a .jsonl file, or every line that is not empty. Raises BadInput, BadLuck."""
    if not path.is_file():
        raise BadLuck(f"{path}: expected a file with a prompt in each line, got no such file; check the name")
    if path.suffix.lower() == ".jsonl":
        texts = list(json_lines(path, "prompt"))
    else:
        texts = [line for line in "".join(plain_text(path)).split("\n") if line.strip()]
    if not texts:
        raise BadInput(f"{path}: expected a prompt in each line, got nothing; write some")
    return texts
