"""Recorded evaluations answer as evaluations do. A tape of tensor operations stands in for a CUDA graph: it knows
addresses and no Python, and refuses what a host would have to wait for."""

import gc

import pytest
import torch
from oracles import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from minillada import SampleConfig, generate, stream
from minillada.commands.cli import Parser, add_sampling
from minillada.decoding import graphs
from minillada.decoding.graphs import Graphed, graphed
from minillada.errors import BadInput
from minillada.sampler import Canvas
from minillada.strategies import Whole

WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique",
    "_unique2",
    "repeat_interleave",
    "equal",
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
MOE = {"n_expert": 4, "n_expert_active": 2, "d_expert": 8}


class Tape(TorchDispatchMode):
    """Keep every operation with its tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in WAITS:
            raise RuntimeError(f"{func} makes the host wait")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Recorder:
    """Record on tapes, and count."""

    def __init__(self):
        self.recorded = self.played = 0

    def __call__(self, run):
        self.recorded += 1
        with Tape() as tape:
            result = run()
        result.fill_(torch.nan)  # a GPU only takes notes while it records

        def play():
            self.played += 1
            for func, args, kwargs, out in tape.operations:
                tree_map(
                    lambda old, new: old.copy_(new) if isinstance(old, Tensor) else old, out, func(*args, **kwargs)
                )

        return play, result


@pytest.fixture
def pair():
    """A model, the same recorded, and its recorder."""

    def make(**fields):
        record = Recorder()
        model = tiny_model(**fields)
        return model, Graphed(model, record), record

    return make


def config(**options):
    return SampleConfig(**{"gen_len": 12, "steps": 12, "block_len": 6, "stop_at_eos": False} | options)


@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_head": 1, "qk_norm": True}, MOE], ids=["dense", "grouped heads", "experts"]
)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"cache": "prefix"}, {"cache": "dual"}, {"cache": "dual", "cfg_scale": 0.5}, {"commit": "threshold:0.5"},
        {"temperature": 1.0, "remasking": "random"}, {"revise": "remdm-cap:0.1"}, {"cache": "dual", "block_len": 4},
    ],
    ids=str,
)  # fmt: skip
def test_recorded_evaluations_write_the_same_tokens(pair, fields, options):
    model, recorded, record = pair(**fields)
    assert generate(recorded, PROMPTS, config(**options)) == generate(model, PROMPTS, config(**options))
    assert record.played >= 3
    again = record.recorded
    assert generate(recorded, PROMPTS, config(**options)) == generate(model, PROMPTS, config(**options))
    assert record.recorded - again <= 1  # shapes that the first answer met once only


def test_it_equals_the_evaluation_to_the_last_bit_without_the_shortcut_of_the_last_layer():
    record, model = Recorder(), tiny_model()
    recorded = Graphed(model, record)
    seen = {}
    for name, predict in {"whole": Whole(model), "recorded": recorded}.items():
        canvas = Canvas.continuation(PROMPTS, 12, model.config)
        seen[name] = [step.probability for step in stream(predict, canvas, config(cache="dual"))]
    assert record.played > 5
    for one, other in zip(*seen.values(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"revise": "wino:0.1,0.9"}, {"cache": "refresh:4,2,0.5"}], ids=str)
def test_what_changes_its_shape_in_every_step_is_not_recorded(pair, options):
    model, recorded, record = pair()
    prompts = PROMPTS[:1]
    assert generate(recorded, prompts, config(**options)) == generate(model, prompts, config(**options))
    assert record.recorded == 0 or "wino" in options.get("revise", "")
    assert record.recorded <= 1  # WINO's evaluations before there is a shadow


def test_streams_in_turns_do_not_mix_up_their_keys_and_values(pair):
    model, recorded, record = pair()
    canvases = [Canvas.continuation([row], 12, model.config) for row in ([3, 1, 4], [9, 2, 6])]
    alone = [[step.x for step in stream(model, canvas, config(cache="dual"))] for canvas in canvases]
    turns = zip(*(stream(recorded, canvas, config(cache="dual")) for canvas in canvases), strict=True)
    for (one, other), *known in zip(turns, *alone, strict=True):
        assert one.x.equal(known[0]) and other.x.equal(known[1])
    assert record.played


def test_only_a_few_recordings_are_kept(pair, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    model, recorded, record = pair()
    for length in range(3, 8):
        prompt, short = [[1] * length], config(gen_len=4, block_len=4, steps=4)
        assert generate(recorded, prompt, short) == generate(model, prompt, short)
        assert len(recorded.seen) <= 2
    assert record.recorded == 5


def test_keys_and_values_of_another_shape_go_when_no_cache_uses_them(pair):
    _, recorded, _ = pair()
    for length in (3, 4, 5):
        generate(recorded, [[1] * length], config(cache="dual"))
        gc.collect()
        assert len(recorded.lent) == 1
        assert {shape[0] for shape in recorded.seen} == {id(recorded.lent[0][1])}


def test_on_a_cpu_there_is_nothing_to_record():
    model = tiny_model()
    assert graphed(model) is model and graphed(model, "off") is model
    with pytest.raises(BadInput, match="graphs: expected one of auto, off, got 'on'"):
        graphed(model, "on")


def test_the_scripts_have_the_option():
    parser = Parser("", "")
    add_sampling(parser)
    assert parser.parse_args([]).graphs == "auto" and parser.parse_args(["--graphs", "off"]).graphs == "off"
