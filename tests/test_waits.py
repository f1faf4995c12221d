"""What a GPU would have to wait for, counted on a CPU: operations whose result the host needs before it can go on."""

import math
from collections import Counter

import pytest
import torch
from oracles import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import minillada.model
from minillada import SampleConfig, SFTConfig, stream
from minillada.errors import BadInput, BadLuck
from minillada.model import attend
from minillada.sampler import Canvas
from minillada.training import distributed, sft
from minillada.training.sft import Items
from minillada.weights.device import slow_experts

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal"}
ATOMICS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put_", "_index_put_impl_"}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
MOE = {"n_expert": 6, "n_expert_active": 2, "d_expert": 8, "router": "sigmoid", "n_expert_group": 3}


class Count(TorchDispatchMode):
    """Count operations by their names."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.__name__.split(".")[0]] += 1
        if func.__name__.startswith("index") and isinstance(args[1], (list, tuple)):
            self.seen["nonzero"] += any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )  # x[mask] counts first
        return func(*args, **(kwargs or {}))

    def of(self, names):
        return sum(self.seen[name] for name in names)


@pytest.mark.parametrize("fields", [{}, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"cache": "prefix"}, {"cache": "dual", "cfg_scale": 0.5}, {"remasking": "entropy", "top_p": 0.9},
        {"commit": "threshold:0.5", "temperature": 1.0}, {"commit": "klass:0.3,0.5"}, {"commit": "entropy-bound:0.3"},
        {"commit": "ancestral", "remasking": "random", "temperature": 1.0}, {"revise": "remdm-cap:0.1"},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_waits_once(fields, options):
    model = tiny_model(**fields)
    canvas, last, counts = Canvas.continuation(PROMPTS, 16, model.config), 0, []
    config = SampleConfig(**{"gen_len": 16, "steps": 16, "block_len": 16} | options)
    steps = stream(model, canvas, config)
    next(steps)  # which also looks at the canvas and cuts it into windows
    while True:
        with Count() as count:
            step = next(steps, None)
        if step is None:
            break
        counts.append(count.of(WAITS))
        last = step.nfe
    assert last >= 2 and min(counts) == 1
    if options.get("commit") == "ancestral" or "revise" in options:  # passes that ask nothing wait twice, and are free
        assert all(count % 2 for count in counts)
    else:
        assert max(counts) == 1


@pytest.mark.parametrize("fields", [{}, {**MOE, "d_shared_expert": 8}], ids=["dense", "experts"])
def test_an_evaluation_waits_for_nothing_and_adds_in_a_fixed_order(fields):
    model, tokens = tiny_model(**fields), torch.arange(12).view(2, 6)
    with torch.no_grad(), Count() as count:
        model(tokens, where=(torch.tensor([0, 1]), torch.tensor([3, 4])))
    assert count.of(WAITS | ATOMICS) == 0 and count.seen["mm"] + count.seen["addmm"] + count.seen["_grouped_mm"]


def test_a_backward_pass_of_experts_adds_no_row_twice():
    """So that the order in which a GPU adds does not matter: every gradient of a gather goes to a row of its own."""
    rows = []

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.__name__.split(".")[0] in ("index_add", "index_add_", "index_select_backward"):
                rows.append(args[2])
            return func(*args, **(kwargs or {}))

    moe = tiny_model(**MOE).layers[0].ffn
    y = moe(torch.randn(9, 16, generator=torch.Generator().manual_seed(0), requires_grad=True))
    with Gathers():
        y.sum().backward()
    assert rows and all(len(set(row.tolist())) == len(row) for row in rows)


@pytest.mark.parametrize("steps", [1, 4])
def test_logits_that_are_not_finite_are_found_at_the_next_wait_or_at_the_end(steps):
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    canvas = Canvas.continuation(PROMPTS, 4, model.config)
    written = stream(model, canvas, SampleConfig(gen_len=4, steps=steps, block_len=4))
    next(written)
    with pytest.raises(BadInput, match=r"^logits at step 0, columns 5 on: expected finite numbers, got NaN"):
        next(written)


def test_on_a_gpu_attention_is_never_cudnns_and_the_switch_stays_as_it_was(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    seen, cudnn = [], torch.backends.cuda.cudnn_sdp_enabled
    kernel = minillada.model.F.scaled_dot_product_attention
    spy = lambda *args, **more: seen.append((cudnn(), torch.backends.cuda.flash_sdp_enabled())) or kernel(*args, **more)
    monkeypatch.setattr(minillada.model.F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 2, 4, 8)
    before = cudnn()
    attend(q.as_subclass(OnGPU), q, q, None)
    attend(q, q, q, None)
    assert seen == [(False, True), (before, True)] and cudnn() == before


def test_processes_on_cpus_need_no_gpu_each(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    distributed.check_gpus("cpu")
    with pytest.raises(BadLuck, match="device: expected a GPU for each of the processes on this machine, got 1; start"):
        distributed.check_gpus("cuda")


def test_slow_experts_are_said(monkeypatch):
    moe, dense = tiny_model(**MOE).config, tiny_model().config
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert slow_experts(moe, "cuda", torch.bfloat16) == slow_experts(dense, "cuda", torch.float16) == []
    assert slow_experts(moe, "cpu", torch.float32) == []
    assert len(slow_experts(moe, "cuda", torch.float16)) == len(slow_experts(moe, "mps", torch.bfloat16)) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    (line,) = slow_experts(moe, "cuda", torch.bfloat16)
    assert line.startswith("experts: bfloat16 on this device")


@pytest.mark.parametrize(("precision", "low"), [("bfloat16", True), ("float32", False)])
def test_sft_validates_in_the_precision_it_trains_in(precision, low, monkeypatch):
    c, seen = tiny_model().config, []
    items = Items(None, None, 1.0, 1.0, "", [[([1], [2, 14])]], [[([1], [2, 14])]], 3)
    config = SFTConfig(start="somewhere", data="some.jsonl", precision=precision)
    real = sft.log_likelihoods
    spy = lambda *args, **more: seen.append(torch.is_autocast_enabled("cpu")) or real(*args, **more)
    monkeypatch.setattr(sft, "log_likelihoods", spy)
    assert sft.SFT(items, config, c).validate(tiny_model())["bound"] > 0
    assert seen == [low]
