"""Open models in the browser: `python -m minillada app`. One writes, fills, solves, answers, and shows how.

Gradio (extra `app`) draws and queues. One request computes at a time, model loading included. Stopping one, or closing
its page, ends its generator, and with it the evaluations. The page of a model is made anew when it is chosen.
"""

import html
import math
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from ..errors import BadInput, BadLuck, check_whole
from ..sampler import SampleConfig, answer_of, stream
from ..show.terminal import Frame, frames, kind_of, pieces
from ..show.trace import Trace
from ..text.chat import Message
from ..text.tasks import make_task
from ..text.tokenizer import Tokenizer, display
from ..weights.checkpoint import check, load, reading
from ..weights.convert import is_gguf
from ..weights.device import pick_device
from ..weights.shipped import SHIPPED, shipped
from ..weights.vision import sees
from .ask import Question, Talker, guide_of, make_talker, on_llama_cpp, question, to_write
from .cli import SWITCHES, TYPES, Parser, runs, say

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
except ImportError:
    gr = None

LONGEST = 20_000  # characters of a prompt
LENGTHS = ("gen_len", "steps", "block_len")  # 0: chosen for you
MOST = {"gen_len": 1024, "steps": 4096}  # of one request
WAITING, PACE = 16, 0.05  # requests in the queue; seconds between two pictures
LOADED = 2  # models in memory

# option -> label, what it means, and the (least, most, step) of a slider or the choices of a menu
FIELDS: dict[str, tuple] = {
    "temperature": ("Temperature", "0: always the likeliest token; 1: as the model has learned", (0, 2, 0.05)),
    "gen_len": ("How many tokens", "to write; 0: as many as fit, up to 128", (0, 1024, 1)),
    "steps": ("Steps", "0: one for each token; fewer are faster and rougher", (0, 1024, 1)),
    "remasking": ("Which hole first", "of those in the window", {
        "the surest": "low_confidence", "any, by chance": "random", "the one far ahead of its rival": "margin",
        "the one with few rivals": "entropy"}),
    "commit": ("How many per step", "holes to fill together", {
        "equally many in each": "quota", "all that are 90 % sure": "threshold:0.9", "as many as are sure": "factor:1",
        "until little is certain": "entropy-bound:0.1", "the sure and steady": "klass:0.9,0.01",
        "by chance": "ancestral", "one, exactly as learned": "first-hitting"}),
    "block_len": ("Window", "tokens to finish before those to their right; 0: chosen for you", (0, 1024, 1)),
    "revise": ("Take tokens back", "and write them again", {
        "never": "none", "the unsure": "remdm-conf", "a few, by chance": "remdm-cap:0.008",
        "some, by chance": "remdm-rescale:0.015", "many, by chance": "random-remask",
        "what the rest contradicts": "wino:0.6,0.9"}),
    "cfg_scale": ("Guidance", "how much more to heed the prompt; 0: off", (0, 4, 0.1)),
    "top_k": ("Keep the likeliest", "draw among so many tokens; 0: among all", (0, 100, 1)),
    "top_p": ("Keep a share", "draw among the likeliest that share this probability", (0.05, 1, 0.05)),
    "cache": ("Compute less", "roughly the same, and faster for long texts", {
        "no": "none", "nothing before the window": "prefix", "nothing around the window": "dual",
        "what has changed": "refresh:50,7,0.25", "finished blocks": "block"}),
    "block": ("Block", "tokens that see what stands before them and each other; 0: all see all", (0, 64, 1)),
    "seed": ("Seed", "the same seed gives the same text", (0, 999, 1)),
    "ban_eos": ("Never end the text", "", None), "defer_eos": ("End the text last", "", None),
}  # fmt: skip
LABELS = {"hole": "hole", "back": "taken back", "poor": "unsure", "fair": "fairly sure"}
COLOURS = {"hole": "#9aa0a8", "new": "#22a565", "taken back": "#d03030", "unsure": "#f08c1a", "fairly sure": "#f3c98b"}
CSS = """.canvas, .ask textarea {font-family: var(--font-mono)}
.canvas .textspan, .canvas .textspan * {margin: 0 !important; padding: 0 !important; transition: none !important}
.how code {white-space: nowrap; background: none; padding: 0}
.how input[type=number] {width: 3.2em !important; padding: 2px !important}
.board {display: grid; width: max-content; margin: 1rem auto; border: 2px solid; font-size: 1.6rem}
.board span {width: 3.2rem; line-height: 3.2rem; text-align: center; border: 1px solid #8884}
.board .given {font-weight: bold} .board .right {border-right: 2px solid var(--body-text-color)}
.board .below {border-bottom: 2px solid var(--body-text-color)}
.board .hole {color: #9aa0a8} .board .back {background: #d0303060} .board .new {background: #22a56599 !important}
.board .poor {background: #f08c1a99} .board .fair {background: #f08c1a40}"""
View = list[tuple[str, str | None]] | str  # what HighlightedText shows: (text, label); or HTML


class Model(NamedTuple):
    """What the page of a model needs to know."""

    talker: Talker
    examples: dict[str, list[str]]  # what to try, by the name of the tab
    side: int  # of the boards that it solves, or 0

    def initial(self) -> dict:
        """Return what the settings show at first; 0 for a length: chosen for you."""
        shown = {"gen_len": 0, "steps": 0, "block_len": 0, "seed": 0}
        shown |= {"block": self.talker.model.config.block} | self.talker.defaults
        return {name: shown.get(name, getattr(SampleConfig, name, None)) for name in FIELDS}


def models(device: str, raw: bool) -> Callable[[str], Model]:
    """Return what loads a model by its name; the last few stay in memory."""

    @lru_cache(LOADED)
    def get(name: str) -> Model:
        return reading(name, partial(meet, name), progress=sys.stderr.isatty())

    def meet(name: str, directory: Path) -> Model:
        guide, how = guide_of(directory), Namespace(raw=raw, chat=False)
        run = on_llama_cpp(check(directory), directory, device) if is_gguf(directory) else load(directory, device)
        talker = make_talker(directory, name, *run, how, **guide.get("sampling", {}))
        return Model(talker, *examples_of(name, talker, guide.get("examples", {})))

    return get


def examples_of(name: str, talker: Talker, told: dict[str, list[str]]) -> tuple[dict[str, list[str]], int]:
    """Return what to try, as the model's files say, else what suits its name; and the side of its boards, or 0."""
    prompts = told.get("prompt", [])
    boards = [prompt.rstrip("=") for prompt in prompts if re.fullmatch(r"[\d.]{16}=|[\d.]{81}=", prompt)]
    side = math.isqrt(len(boards[0])) if boards else 9 if "sudoku9" in name else 4 if "sudoku" in name else 0
    if side in (4, 9) and len(boards) < 4:
        more = [example.prompt.rstrip("=") for example in make_task(f"sudoku{side}", 0, n_test=4).test]
        boards = list(dict.fromkeys(boards + more))
    chat = told.get("chat") or prompts * talker.instruct or ["Hello!"]
    holes = [f"{board}={board.replace('.', '[MASK]')}" for board in boards]
    fill = told.get("fill") or holes or ["Once upon a time[MASK][MASK][MASK][MASK]. The end."]
    return {"Write": prompts or ["", "The", "Once upon a time"], "Fill": fill, "Board": boards, "Chat": chat}, side


def names(first: str | None) -> list[str]:
    """Return the models to choose from: the one asked for, the latest runs, and the shipped ones."""
    ours = [name for name in SHIPPED if shipped(name) and not name.endswith("-ar")]  # the twin fills no holes
    found = list(dict.fromkeys([*([first] if first else []), *runs()[:20], *ours]))
    if not found:
        raise BadLuck("app: expected a model, got none; train one with train_tiny.py")
    return found


# ---- What it computes -----------------------------------------------------------------------------------------------


def view(frame: Frame, tokenizer: Tokenizer) -> View:
    return [(text, "new" if new else LABELS.get(kind)) for (kind, new), text in pieces(*frame, tokenizer)]


def board(frame: Frame, tokenizer: Tokenizer) -> View:
    """Draw the cells as an HTML grid, coloured by sureness."""
    side, cells = math.isqrt(len(frame[0])), []
    box = math.isqrt(side)
    for i, (token, p, new, back) in enumerate(zip(*frame, strict=True)):
        kinds = [kind_of(token, p, back, tokenizer.mask_id), "new" * new]
        kinds += ["right" * (i % side % box == box - 1 and i % side < side - 1)]
        kinds += ["below" * (i // side % box == box - 1 and i // side < side - 1)]
        text = "░" if token == tokenizer.mask_id else display(tokenizer.token(token))
        cells.append(f'<span class="{" ".join(filter(None, kinds))}">{html.escape(text)}</span>')
    return f'<div class="board" style="grid-template-columns: repeat({side}, auto)">{"".join(cells)}</div>'


def options(model: Model, values: tuple) -> Namespace:
    """Return the settings as the scripts' parser gives them; what was left as it was is None. Raises BadInput."""
    args = Namespace(seed=0)
    for (name, shown), value in zip(model.initial().items(), values, strict=True):
        kind = bool if name in SWITCHES else TYPES[name]
        try:
            value = None if value == shown or (value == 0 and name in LENGTHS) else kind(value)
        except (TypeError, ValueError):
            raise BadInput(f"{name}: expected {kind.__name__}, got {value!r:.50}; change it") from None
        setattr(args, name, getattr(args, name, None) if value is None else value)
        if name in MOST and value is not None:
            check_whole(name, value, 1, MOST[name])
    return args


def start(model: Model, task: str, text: str, values: tuple) -> tuple[Question, int]:
    """Return the canvas and how to decode it, and the seed. Raises BadInput."""
    if len(text) > LONGEST:
        raise BadInput(f"text: expected at most {LONGEST} characters, got {len(text)}; shorten it")
    args = options(model, values)
    if task == "board":
        return to_solve(model, text, args), args.seed
    fill = task == "fill" or (task == "either" and "[MASK]" in text)
    return ask(model, args, fill=text) if fill else ask(model, args, prompt=text), args.seed


def ask(model: Model, args: Namespace, prompt: str = "", fill: str | None = None) -> Question:
    """Return the question that the scripts would make of a prompt, or of a text whose holes say how much to write."""
    lengths = {} if fill is None else {"gen_len": None, "block_len": None}
    return question(Namespace(**vars(args) | {"prompt": prompt, "fill": fill, "edit": None} | lengths), model.talker)


def to_solve(model: Model, text: str, args: Namespace) -> Question:
    """Return the canvas of a board's question and answer, in which the given digits stand already. Raises BadInput."""
    n, clues = model.side**2, re.sub(r"\s", "", text).replace("0", ".")
    if not re.fullmatch(rf"[1-{model.side}.]{{{n}}}", clues) or "." not in clues:
        what = f"board: expected {n} cells, each 1 to {model.side} or a dot for a hole, got {text!r:.60}"
        raise BadInput(f"{what}; type {model.side} lines of {model.side}")
    asked = ask(model, args, fill=f"{clues}={clues.replace('.', '[MASK]')}")
    return asked._replace(start=asked.canvas.x.shape[1] - n)


def denoise(talker: Talker, asked: Question, seed: int) -> Iterator[tuple[Frame, Trace | None]]:
    """Yield what to show while the canvas is filled; at the end the whole trace. Raises BadInput."""
    kept, shown = [], 0.0
    steps = stream(talker.writer, asked.canvas, asked.config, seed, rivals=5)
    for step, frame in frames(steps, start=asked.start):
        kept.append(step)
        if time.monotonic() - shown > PACE:
            yield frame, None
            shown = time.monotonic()
    trace = Trace.record(kept, talker.tokenizer, start=asked.start, picture=asked.picture)
    yield trace.frame(trace.n_steps), trace


def write(task: str, model: Model, text: str, *values):
    draw = board if task == "board" else view
    for frame, trace in denoise(model.talker, *start(model, task, text, values)):
        yield draw(frame, model.talker.tokenizer), at_end(trace), trace


def compare(model: Model, text: str, *values):
    """Decode the same text with two settings, step by step in turns."""
    half, talker = len(values) // 2, model.talker
    runs = [denoise(talker, *start(model, "either", text, v)) for v in (values[:half], values[half:])]
    last = [(gr.skip(), None)] * 2
    for both in zip_longest(*runs):
        last = [(view(new[0], talker.tokenizer), new[1]) if new else old for new, old in zip(both, last, strict=True)]
        yield *(shown for shown, _ in last), *(f"{t.n_steps} evaluations" if t else "…" for _, t in last)


def chat(model: Model, text: str, messages: list[Message], *values):
    args, talker = options(model, values), model.talker
    c = talker.model.config
    if not text.strip() or len(text) > LONGEST:
        raise BadInput(f"message: expected 1 to {LONGEST} characters, got {len(text)}; write another")
    told = [*talker.system, *messages, talker.message(text)]  # the picture stands in front of the newest message
    kept, prompt = talker.template.fit(told, c.max_len - talker.answer_length(args))
    kept = [{"role": m["role"], "content": m["content"]} for m in kept if m["role"] != "system"]
    asked = to_write(args, talker, prompt, len(prompt))
    yield kept, bubbles(kept), "", *[gr.skip()] * 3
    for frame, trace in denoise(talker, asked, args.seed):
        yield *[gr.skip()] * 3, view(frame, talker.tokenizer), at_end(trace), trace
    new = talker.tokenizer.decode(answer_of(trace.final.tolist(), asked.config, c))
    messages = [*kept, {"role": "assistant", "content": new}]
    yield messages, bubbles(messages), *[gr.skip()] * 4


def bubbles(messages: list[Message]) -> list[Message]:
    """Return the messages for the chatbot, which takes text for HTML."""
    return [{**message, "content": html.escape(display(message["content"]))} for message in messages]


def at_end(trace: Trace | None):
    """Return what the replay's slider shows when a trace is there."""
    return gr.update(maximum=trace.n_steps, value=trace.n_steps) if trace else gr.skip()


# ---- The page -------------------------------------------------------------------------------------------------------


def settings(model: Model, label: str) -> list:
    """Make a field for every option of the sampler, set as the model is decoded unless told otherwise."""

    def field(name: str, value: object):
        label, info, kind = FIELDS[name]
        look = {"label": label, "info": f"{info} `--{name.replace('_', '-')}`", "value": value, "min_width": 190}
        if isinstance(kind, dict):
            return gr.Dropdown(list(kind.items()), allow_custom_value=True, **look)
        if kind is None:
            return gr.Checkbox(**look)
        least, most, step = kind
        return gr.Slider(least, max(most, value), step=step, buttons=[], **look)

    shown, made = model.initial(), []
    with gr.Accordion(label, open=True, elem_classes="how"):
        for last in (False, True):
            with gr.Row():
                made += [field(name, value) for name, value in shown.items() if (name in SWITCHES) is last]
    return made


def screen(label: str):
    """Make the place where the text appears."""
    look = {"show_legend": True, "show_inline_category": False, "elem_classes": "canvas"}
    return gr.HighlightedText(label=label, color_map=COLOURS, **look)


def replay(shown, draw: Callable = view):
    """Make a slider through the steps that a screen has shown, and the trace that they are drawn from."""
    steps, trace = gr.Slider(0, 1, 0, step=1, label="Replay: step", interactive=True), gr.State(time_to_live=3600)
    move = lambda trace, n: draw(trace.frame(n), trace.tokenizer) if trace and n is not None else gr.skip()
    steps.input(move, [trace, steps], shown, queue=False, show_progress="hidden")
    return [shown, steps, trace]


def asking(label: str, hint: str, examples: list[str], button: str = "Write", n_lines: int = 3):
    """Make a box to type in, examples to click, and the buttons to begin and to stop."""
    look = {"label": label, "info": hint, "lines": n_lines, "max_length": LONGEST, "elem_classes": "ask"}
    box = gr.Textbox(examples[0], interactive=True, **look)
    labels = [shorten(text, 60, placeholder="…") or "(nothing)" for text in examples]
    tries = gr.Dataset(components=[box], samples=[[text] for text in examples], sample_labels=labels, label="Try")
    with gr.Row():
        return box, tries, gr.Button(button, variant="primary"), gr.Button("Stop")


def connect(asked: tuple, get: Callable[[], Model], work: Callable, inputs: list, outputs: list, picture: list) -> None:
    """Begin the work at the button, the end of a line or an example, one request at a time; end it at Stop. The model
    is looked up for every request, so a page that nobody leaves holds none in memory. picture: the box of one, or []"""

    def guarded(*values):
        try:
            if not isinstance(values[0], str):  # the page sends none, but others may
                raise BadInput(f"text: expected a text, got {values[0]!r:.80}; write one")
            *values, path = values if picture else (*values, None)
            model = get()
            yield from work(model if path is None else model._replace(talker=model.talker.shown(path)), *values)
        except (BadInput, BadLuck) as error:  # becomes a red box
            raise gr.Error(html.escape(display(str(error))), print_exception=False) from None

    box, tries, button, stop = asked
    how = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
    chosen = tries.click(
        lambda sample: sample[0] if sample else gr.skip(), tries, box, queue=False, show_progress="hidden"
    )
    given = [box, *inputs, *picture]
    events = [listen(guarded, given, outputs, **how) for listen in (button.click, box.submit, chosen.then)]
    stop.click(None, cancels=events)


def page_of(model: Model, get: Callable[[], Model]) -> None:
    """Make what depends on the model: its tabs, with what it does best in front, and the settings."""
    examples, side = model.examples, model.side
    front = "Board" if side else "Chat" if model.talker.instruct else "Write"
    with gr.Row():
        main, how = gr.Column(scale=3, min_width=480), gr.Column(scale=2, min_width=300)
    picture = []  # for a model that sees
    with how:
        if sees(model.talker.model):
            look = {"sources": ["upload", "clipboard"], "buttons": [], "height": 220}
            picture = [gr.Image(label="Picture that the text is about", type="filepath", image_mode=None, **look)]
        first = settings(model, "How to decode")
    with main, gr.Tabs(selected=front):
        if side:
            with gr.Tab("Board", id="Board"):
                tries = ["\n".join(re.findall(rf".{{{side}}}", text)) for text in examples["Board"]]
                asked = asking("Board", "the given digits, and a dot for each hole", tries, "Solve", side)
                row = to_solve(model, tries[0], options(model, tuple(model.initial().values())))
                no = [False] * side**2
                frame = row.canvas.x[0, row.start :].tolist(), [math.nan] * side**2, no, no
                shown = gr.HTML(board(frame, model.talker.tokenizer))
                gr.Markdown("**bold**: given · green: new · orange: the deeper, the less sure")
                connect(asked, get, partial(write, "board"), first, replay(shown, board), picture)
        if model.talker.taught:
            with gr.Tab("Chat", id="Chat"):
                messages = gr.State([], time_to_live=3600)
                talk = gr.Chatbot(render_markdown=False, label="Chat", buttons=[], height=260)
                hint = "what no longer fits is forgotten, the oldest first"
                asked = asking("Message", hint, examples["Chat"], "Send")
                outputs = replay(screen("The answer, as it appears"))
                connect(asked, get, chat, [messages, *first], [messages, talk, asked[0], *outputs], picture)
                talk.clear(lambda: [], None, messages)
        with gr.Tab("Write", id="Write"):
            hint = "a message" if model.talker.instruct else "how the text begins; it may be empty"
            asked = asking("Beginning", hint, examples["Write"])
            connect(asked, get, partial(write, "write"), first, replay(screen("Text")), picture)
        with gr.Tab("Fill", id="Fill"):
            asked = asking("Text with holes", "type [MASK] wherever a token is wanted", examples["Fill"], "Fill")
            connect(asked, get, partial(write, "fill"), first, replay(screen("Text")), picture)
        with gr.Tab("Compare", id="Compare"):
            tries = [*examples["Write"][:2], *examples["Fill"][:2]]
            asked = asking("Text", "a beginning, or a text with [MASK]", tries)
            with gr.Row():
                left, right = screen("A: the settings at the right"), screen("B: the settings below")
            with gr.Row():
                told = [gr.Textbox(label=f"{which}: done", interactive=False) for which in "AB"]
            second = settings(model, "How to decode B")
            connect(asked, get, compare, [*first, *second], [left, right, *told], picture)


def build(get: Callable[[str], Model], known: list[str]):
    """Make the whole page as Gradio Blocks. get: loads a model by its name; known: the names to choose from."""

    class Page(gr.Blocks):
        async def preprocess_data(self, *args, **more) -> list:
            """Read the values that a request brings. What the page does not send becomes one line, no traceback."""
            try:
                return await super().preprocess_data(*args, **more)
            except Exception:
                line = "request: expected the values that this page sends, got others; load the page again"
                raise gr.Error(line, print_exception=False) from None

    with Page(title="minillada", analytics_enabled=False) as page:
        page.takes_pictures = False  # until a model is chosen that sees
        choices = [(f"{name}: {SHIPPED[name]}" if name in SHIPPED else name, name) for name in known]
        with gr.Row(equal_height=True):
            gr.Markdown("## minillada\n\nText appears out of masks, anywhere, seeing both sides.")
            chosen = gr.Dropdown(choices, value=known[0], label="Model", interactive=True)

        @gr.render(chosen, concurrency_id="model", concurrency_limit=1)
        def show(name: str) -> None:
            try:
                if name not in known:
                    raise BadInput(f"model: expected one of the list, got {name!r:.80}; choose another")
                model = get(name)
                page.takes_pictures |= sees(model.talker.model)
                page_of(model, partial(get, name))
            except (BadInput, BadLuck) as error:
                gr.Markdown(html.escape(display(str(error))))

    return page


def main() -> None:
    p = Parser(__doc__, "example: python -m minillada app GSAI-ML/LLaDA-8B-Instruct --host 0.0.0.0 --auth me:secret")
    p.add_argument("model", nargs="?", help="to begin with: a run, a model directory, a shipped model or an id of the "
                   "hub (default: the newest run)")  # fmt: skip
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
    known, get = names(args.model), models(pick_device(args.device), args.raw)
    get(known[0])  # a fault is told here, and the first page opens at once
    launch(build(get, known), args.host, args.port, (user, password) if args.auth else None)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        os._exit(130)  # at once: a computation in another thread would not let Python end in peace


class Door:
    """Let through what the page itself asks for. What it has no use for is not there: files (but for pictures, once a
    model was chosen that sees), /info and the rest of Gradio's interface for programs."""

    OPEN = re.compile(r"/gradio_api/(queue/|heartbeat/|startup-events|cancel|reset|app_id|login|logout|user|token)")
    PICTURES = re.compile(r"/gradio_api/(upload|file=)")

    def __init__(self, app: Callable, page) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        wanted = self.OPEN.match(path) or (self.page.takes_pictures and self.PICTURES.match(path))
        if "gradio_api" in path and not wanted:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"not here"})
        else:
            await self.app(scope, receive, send)


def launch(page, host: str, port: int, auth: tuple[str, str] | None = None, **more) -> None:
    """Begin to serve: no link to the outside, no files but pictures, no API page, no fonts from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(api_open=False, max_size=WAITING)
    say(f"http://{host}:{port}")
    page.launch(
        server_name=host, server_port=port, auth=auth, share=False, quiet=True, max_file_size="10mb", allowed_paths=[],
        footer_links=[], ssr_mode=False, enable_monitoring=False, state_session_capacity=64,
        theme=gr.themes.Base(**fonts), css=CSS, prevent_thread_lock=True,
        app_kwargs={"middleware": [(Door, [page], {})]}, **more,
    )  # fmt: skip
