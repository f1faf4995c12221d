"""Talk with a model over several turns, in the terminal."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from ..errors import BadInput, BadLuck, check_whole
from ..sampler import stream
from ..text.chat import check_size
from .ask import Talker, show, to_write
from .cli import complain, tell


def chat(args: argparse.Namespace, talker: Talker) -> None:
    """Answer turn after turn until the input ends. A message that cannot be used costs one line, and the chat goes on.
    /reset forgets the turns so far; the oldest ones are forgotten when they no longer fit the model's length. /image
    FILE shows a picture, which the next message is about."""
    args.quiet = args.quiet or not sys.stdout.isatty()
    c, messages, first = talker.model.config, talker.system, talker
    length = talker.answer_length(args)
    check_whole("gen_len", length, 1, c.max_len - 1)
    talker.template.render(["user"], ["Hi"])  # a template that fails does so at once
    if not talker.taught:
        how = f"teach it with train_tiny.py --sft DATA --from {talker.name}, or chat with the shipped model `questions`"
        tell(f"{talker.name} was not taught to answer, so it only goes on writing; {how}")
    for text in lines_of_user():
        if text.strip() in ("", "/reset"):
            messages, talker = (messages, talker) if not text.strip() else (first.system, first)
            continue
        try:
            if text.startswith("/image "):
                talker = talker.shown(text.removeprefix("/image ").strip())
                print(f"(a picture of {len(talker.image):,} tokens, which your next message is about)")
                continue
            check_size("message", text)
            kept, prompt = talker.template.fit([*messages, talker.message(text)], c.max_len - length)
            if len(kept) <= len(messages):
                print(f"(the oldest {len(messages) + 1 - len(kept)} messages no longer fit and are forgotten)")
            asked = to_write(args, talker, prompt, len(prompt))
            new = show(args, talker, asked, stream(talker.writer, asked.canvas, asked.config, args.seed))
            messages = [*kept, {"role": "assistant", "content": talker.tokenizer.decode(new)}]
            talker = talker._replace(image=(), picture="")
        except (BadInput, BadLuck) as error:
            complain(str(error))


def lines_of_user() -> Iterator[str]:
    """Yield what a person types, up to /quit or the end of the input."""
    with suppress(ImportError):  # none on Windows, whose console does it
        import readline  # noqa: F401 input() then knows arrow keys and earlier lines
    here = sys.stdin.isatty()
    try:
        while (text := input("you> " if here else "")).strip() != "/quit":
            yield text
    except EOFError:
        print(end="\n" if here else "")
