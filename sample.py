"""Let a trained model write: after a prompt, or into the holes of a text."""

from minillada.checkpoint import load
from minillada.cli import Parser, add_sampling, newest_run, pick_device, run, sample_config
from minillada.errors import BadInput
from minillada.sampler import Canvas, answer_of, stream
from minillada.tokenizer import display
from minillada.trace import watch

EXAMPLES = """examples:
  python sample.py                                            the newest run writes freely
  python sample.py runs/docs-tiny-1 --prompt "The return "    it goes on from there
  python sample.py runs/docs-tiny-1 --fill "if [MASK][MASK] in the list"
  python sample.py runs/docs-tiny-1 --temperature 1 --remasking random --seed 7
"""


def parse():
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("run", nargs="?", help="a run directory, or any model directory (default: the newest run)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue (default: none)")
    what.add_argument("--fill", metavar="TEXT", help="text with [MASK] wherever a token is wanted")
    p.add_argument("--quiet", action="store_true", help="print the result alone, without the masks resolving")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    add_sampling(p)
    return p.parse_args()


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    model, tokenizer = load(args.run or newest_run(), device)
    if tokenizer is None:
        raise BadInput(f"{args.run}: expected a tokenizer.json, got none; save the model with its tokenizer")
    if args.fill is None:
        prompt = tokenizer.encode(args.prompt)
        config = sample_config(args, model.config, len(prompt), temperature=0.7)
        canvas = Canvas.continuation([prompt], config.gen_len, model.config, device)
    else:
        row = tokenizer.encode_with_masks(args.fill)
        holes = row.count(model.config.mask_id)
        if not holes:
            raise BadInput("fill: expected at least one [MASK] in the text, got none; write it where a token is wanted")
        # One window over all the holes, and nothing after an end of text is thrown away: it is the middle of a text.
        defaults = {"gen_len": holes, "block_len": holes, "ban_eos": True, "stop_at_eos": False}
        config = sample_config(args, model.config, 0, **defaults)
        canvas = Canvas.infill([row], model.config, device)
    steps = stream(model, canvas, config, args.seed)
    if not args.quiet:
        watch(steps, tokenizer)
        return
    for step in steps:
        last = step
    tokens = last.x[0].tolist()
    if args.fill is None:
        tokens = prompt + answer_of(tokens[len(prompt) :], config, model.config)
    print(display(tokenizer.decode(tokens)))


if __name__ == "__main__":
    run(main)
