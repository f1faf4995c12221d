"""Open a model in the browser: `python -m minillada app RUN_OR_ID`. It completes, fills, chats, and shows how.

Gradio (extra `app`) draws and queues. One request computes at a time. Stopping one, or closing its page, ends its
generator, and with it the evaluations.
"""

import html
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

from ..errors import BadInput, BadLuck, check_whole
from ..sampler import answer_of, stream
from ..show.terminal import Frame, frames, pieces
from ..show.trace import Trace
from ..strategies import SCORES
from ..text.chat import Message
from ..text.tokenizer import display
from ..weights.checkpoint import check, load
from ..weights.device import pick_device
from ..weights.hub import fetch
from .ask import Question, Talker, defaults_of, make_talker, question, to_write
from .cli import SAMPLING, SWITCHES, TYPES, Parser, newest_run

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
except ImportError:
    gr = None

LONGEST = 20_000  # characters of a prompt
MOST = {"gen_len": 1024, "steps": 4096}  # of one request
WAITING, PACE = 16, 0.05  # requests in the queue; seconds between two pictures
LABELS = {"hole": "hole", "back": "taken back", "poor": "unsure", "fair": "fairly sure"}
COLOURS = {"hole": "#9aa0a8", "new": "#22a565", "taken back": "#d03030", "unsure": "#f08c1a", "fairly sure": "#f3c98b"}
CSS = """.canvas, .ask textarea {font-family: var(--font-mono)}
.canvas .textspan, .canvas .textspan * {margin: 0 !important; padding: 0 !important; transition: none !important}"""
View = list[tuple[str, str | None]]  # what HighlightedText shows: (text, label)


def view(frame: Frame, talker: Talker) -> View:
    parts = pieces(*frame, talker.tokenizer)
    return [(text, "new" if is_new else LABELS.get(kind)) for (kind, is_new), text in parts]


def options(texts: Sequence[str], switches: Sequence[bool]) -> Namespace:
    """Return the settings as the scripts' parser gives them; what is empty is None. Raises BadInput."""
    args = Namespace(**{name: on or None for name, on in zip(SWITCHES, switches, strict=True)}, seed=0)
    for name, text in zip(TYPES, texts, strict=True):
        kind, text = TYPES[name], text.strip()
        try:
            value = kind(text) if text else getattr(args, name, None)
        except ValueError:
            raise BadInput(f"{name}: expected {kind.__name__}, got {text!r:.50}; change or clear it") from None
        setattr(args, name, value)
        if name in MOST and value is not None:
            check_whole(name, value, 1, MOST[name])
    return args


def start(talker: Talker, task: str, text: str, values: tuple) -> tuple[Question, int]:
    """Return the canvas and how to decode it, and the seed. Raises BadInput."""
    if len(text) > LONGEST:
        raise BadInput(f"text: expected at most {LONGEST} characters, got {len(text)}; shorten it")
    args = options(values[: len(TYPES)], values[len(TYPES) :])
    fill = task == "fill" or (task == "either" and "[MASK]" in text)
    asked = Namespace(**vars(args), prompt=text, fill=text if fill else None, edit=None)
    return question(asked, talker), args.seed


def denoise(talker: Talker, asked: Question, seed: int) -> Iterator[tuple[View, Trace | None]]:
    """Yield what to show while the canvas is filled; at the end the whole trace. Raises BadInput."""
    kept, shown = [], 0.0
    steps = stream(talker.model, asked.canvas, asked.config, seed, rivals=5)
    for step, frame in frames(steps, start=asked.start):
        kept.append(step)
        if time.monotonic() - shown > PACE:
            yield view(frame, talker), None
            shown = time.monotonic()
    trace = Trace.record(kept, talker.tokenizer, start=asked.start)
    yield view(trace.frame(trace.n_steps), talker), trace


def settings(talker: Talker) -> list:
    """Make a field for every option of the sampler; what is left empty is as in the scripts."""
    texts = SAMPLING | {"seed": "same seed, same machine, same tokens"}
    made = []
    for name in TYPES:
        look = {"value": str(talker.defaults.get(name, "")), "label": name, "info": texts[name]}
        choice = name == "remasking"
        made.append(gr.Dropdown(["", *SCORES], **look) if choice else gr.Textbox(**look, max_length=100, max_lines=1))
    return made + [gr.Checkbox(label=name, info=text) for name, text in SWITCHES.items()]


def screen(label: str):
    """Make the place where the text appears."""
    look = {"show_legend": True, "show_inline_category": False, "elem_classes": "canvas"}
    return gr.HighlightedText(label=label, color_map=COLOURS, **look)


def replay(talker: Talker):
    """Make a screen, a slider through its steps, and the trace that they show."""
    shown, steps = screen("text"), gr.Slider(0, 1, 0, step=1, label="replay: step", interactive=True)
    trace = gr.State(time_to_live=3600)
    move = lambda trace, n: view(trace.frame(n), talker) if trace else gr.skip()
    steps.input(move, [trace, steps], shown, queue=False, show_progress="hidden")
    return [shown, steps, trace]


def bubbles(messages: list[Message]) -> list[Message]:
    """Return the messages for the chatbot, which takes text for HTML."""
    return [{**message, "content": html.escape(display(message["content"]))} for message in messages]


def at_end(trace: Trace | None):
    """Return what the replay's slider shows when a trace is there."""
    return gr.update(maximum=trace.n_steps, value=trace.n_steps) if trace else gr.skip()


def write(talker: Talker, task: str, text: str, *values):
    for shown, trace in denoise(talker, *start(talker, task, text, values)):
        yield shown, at_end(trace), trace


def compare(talker: Talker, text: str, *values):
    """Decode the same text with two settings, step by step in turns."""
    half = len(values) // 2
    runs = [denoise(talker, *start(talker, "either", text, v)) for v in (values[:half], values[half:])]
    last = [(gr.skip(), None)] * 2
    for both in zip_longest(*runs):
        last = [new or old for new, old in zip(both, last, strict=True)]
        yield *(shown for shown, _ in last), *(f"{t.n_steps} evaluations" if t else "…" for _, t in last)


def chat(talker: Talker, text: str, messages: list[Message], *values):
    args, c = options(values[: len(TYPES)], values[len(TYPES) :]), talker.model.config
    length = args.gen_len or min(128, c.max_len // 2)
    if not text.strip() or len(text) > LONGEST:
        raise BadInput(f"message: expected 1 to {LONGEST} characters, got {len(text)}; write another")
    kept, prompt = talker.template.fit([*messages, {"role": "user", "content": text}], c.max_len - length)
    asked = to_write(args, talker, prompt, len(prompt))
    yield kept, bubbles(kept), "", *[gr.skip()] * 3
    for shown, trace in denoise(talker, asked, args.seed):
        yield *[gr.skip()] * 3, shown, at_end(trace), trace
    new = talker.tokenizer.decode(answer_of(trace.final.tolist(), asked.config, c))
    messages = [*kept, {"role": "assistant", "content": new}]
    yield messages, bubbles(messages), *[gr.skip()] * 4


def asking(label: str, hint: str, text: str = ""):
    """Make a box to type in, and the buttons to begin and to stop."""
    box = gr.Textbox(text, label=label, info=hint, lines=3, max_length=LONGEST, elem_classes="ask")
    with gr.Row():
        return box, gr.Button("Write", variant="primary"), gr.Button("Stop")


def connect(asked: tuple, work: Callable, inputs: list, outputs: list) -> None:
    """Begin the work at the button or the end of a line, one request at a time, and end it at the other button."""

    def guarded(*values):
        try:
            yield from work(*values)
        except (BadInput, BadLuck) as error:  # becomes a red box
            raise gr.Error(html.escape(display(str(error))), print_exception=False) from None

    box, button, stop = asked
    how = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
    events = [listen(guarded, [box, *inputs], outputs, **how) for listen in (button.click, box.submit)]
    stop.click(None, cancels=events)


def build(talker: Talker, name: str):
    """Make the whole page as Gradio Blocks."""
    with gr.Blocks(title=f"minillada: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"## minillada: `{name.replace('`', '')}`")
        with gr.Sidebar(label="how to decode", open=False):
            first = settings(talker)
        with gr.Tab("Complete"):
            asked = asking("prompt", "a text to go on from, or a message to an instruct model")
            connect(asked, partial(write, talker, "write"), first, replay(talker))
        with gr.Tab("Fill"):
            asked = asking("text", "type [MASK] wherever a token is wanted", "If the[MASK] is not a[MASK]")
            connect(asked, partial(write, talker, "fill"), first, replay(talker))
        with gr.Tab("Chat"):
            messages = gr.State([], time_to_live=3600)
            talk = gr.Chatbot(render_markdown=False, label="chat", buttons=[])
            asked = asking("message", "a message; what no longer fits is forgotten, the oldest first")
            connect(asked, partial(chat, talker), [messages, *first], [messages, talk, asked[0], *replay(talker)])
            gr.Button("Forget").click(lambda: ([], []), None, [messages, talk])
        with gr.Tab("Compare"):
            asked = asking("text", "a prompt, or a text with [MASK]; the sidebar has the settings of A")
            with gr.Row():
                left, right = screen("A"), screen("B")
            told = [gr.Textbox(label=f"{which}: done", interactive=False) for which in "AB"]
            with gr.Accordion("settings of B"):
                second = settings(talker)
            connect(asked, partial(compare, talker), [*first, *second], [left, right, *told])
    return page


def main() -> None:
    p = Parser(__doc__, "example: python -m minillada app GSAI-ML/LLaDA-8B-Instruct --host 0.0.0.0 --auth me:secret")
    p.add_argument("model", nargs="?", help="a run, a model directory, or an id of the hub (default: the newest run)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    p.add_argument("--host", default="127.0.0.1", help="where to listen; any other address needs --auth")
    p.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    p.add_argument("--auth", metavar="NAME:PASSWORD", help="ask for these; others on this machine can read them")
    p.add_argument("--raw", action="store_true", help="a prompt is plain text, even to an instruct model")
    args = p.parse_args()
    check_whole("port", args.port, 1, 65535)
    user, _, password = (args.auth or "").partition(":")
    if bool(args.auth) != bool(user and password):
        raise BadInput("auth: expected NAME:PASSWORD, got something else; give both")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.auth:
        raise BadInput(f"host: expected 127.0.0.1 or --auth NAME:PASSWORD, got {args.host} without; add it")
    if gr is None:
        raise BadLuck("app: expected Gradio, got none; pip install 'minillada[app]'")
    name = args.model or str(newest_run())
    found = check(name if os.path.lexists(name) else fetch(name, None, progress=True))
    loaded, defaults = load(found.directory, pick_device(args.device)), defaults_of(name, found.directory)
    talker = make_talker(found.directory, name, *loaded, Namespace(raw=args.raw, chat=False), **defaults)
    launch(build(talker, name), args.host, args.port, (user, password) if args.auth else None)


def launch(page, host: str, port: int, auth: tuple[str, str] | None = None, **more) -> None:
    """Serve until Ctrl-C: no link to the outside, no files, no API page, no fonts from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(api_open=False, max_size=WAITING)
    print(f"http://{host}:{port}", flush=True)
    page.launch(
        server_name=host, server_port=port, auth=auth, share=False, quiet=True, max_file_size="1kb", allowed_paths=[],
        footer_links=[], ssr_mode=False, enable_monitoring=False, state_session_capacity=64,
        theme=gr.themes.Base(**fonts), css=CSS, **more,
    )  # fmt: skip
