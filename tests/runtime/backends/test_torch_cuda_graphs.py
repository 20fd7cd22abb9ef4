"""Replayed steps: what is copied, captured and kept. Capture itself needs a GPU; a stand-in runs
the captured work again at every replay, into the tensors that it wrote first."""

import pytest
import torch

from klein_kv.runtime.backends.pytorch import cuda_graphs as torch_cuda_graphs
from klein_kv.runtime.backends.pytorch.cuda_graphs import StepGraphs

KV = ["k_ref.0", "v_ref.0"]


class Recorder:
    """A step, and what captures it; counts everything."""

    def __init__(self):
        self.captures = 0
        self.replays = 0
        self.contiguous = True
        self.read = []

    def step(self, inputs):
        self.read.append({name: x.data_ptr() for name, x in inputs.items() if x.numel()})
        self.contiguous &= all(x.is_contiguous() for x in inputs.values())
        seen = sum(inputs[name].sum() for name in KV if name in inputs)
        latents = inputs["latents"] * inputs["timestep"] + seen
        return {"noise_pred": latents - 1, "latents": latents}

    def capture(self, work):
        self.captures += 1
        outputs = work()

        def replay():
            self.replays += 1
            for name, value in work().items():
                outputs[name].copy_(value)

        for value in outputs.values():
            value.fill_(float("nan"))  # capturing computes nothing
        return replay, outputs


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def graphs(recorder):
    return StepGraphs(recorder.step, KV, recorder.capture)


def references(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, tokens, 2, 3, generator=generator) for name in KV}


def inputs(kv, i=0, tokens=4):
    generator = torch.Generator().manual_seed(100 + i)
    latents = torch.randn(1, tokens, 5, generator=generator)
    return {"latents": latents, "timestep": torch.tensor([1.0 + i])} | kv


def check(graphs, x):
    """Right outputs, and inputs that stay the caller's."""
    before = {name: value.clone() for name, value in x.items()}
    outputs = graphs(x)
    assert all(torch.equal(x[name], before[name]) for name in x)
    expected = Recorder().step(x)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value)
    return outputs


@pytest.mark.parametrize("kv", [references(6), {}], ids=["references", "plain_step has none"])
def test_first_run_is_eager_then_one_capture_and_replays(kv, recorder):
    graphs = StepGraphs(recorder.step, list(kv), recorder.capture)
    outputs = [check(graphs, inputs(kv, i)) for i in range(4)]
    assert (recorder.captures, recorder.replays) == (1, 3)
    assert len({tuple(sorted(read.items())) for read in recorder.read}) == 1, "fixed addresses"
    pointers = [x.data_ptr() for out in outputs for x in out.values()]
    assert len(set(pointers)) == len(pointers), "outputs are the caller's own"


def test_keys_and_values_are_copied_once_per_request(graphs, monkeypatch):
    """Steps of a request, and a later request on the same set, copy none of it."""
    copied, copy = [], torch.Tensor.copy_

    def spy(target, source, *args, **options):
        copied.append(source.numel())
        return copy(target, source, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", spy)
    one, two = references(1000), references(1000, seed=1)
    for kv, expected in ((one, 2), (one, 0), (two, 2), (one, 2)):
        copied.clear()
        for i in range(4):
            graphs(inputs(kv, i))
        assert sum(count == one["k_ref.0"].numel() for count in copied) == expected
        check(graphs, inputs(kv, 4))


def test_a_set_at_a_former_ones_address_is_copied(graphs):
    """Freed keys and values are forgotten: the allocator gives their memory to the next set."""
    for seed in range(5):
        for i in range(2):
            check(graphs, inputs(references(50, seed), i))


def test_larger_sets_move_the_place_and_smaller_ones_share_it(graphs, recorder):
    for tokens, captures in ((4, 1), (9, 2), (4, 3), (9, 3), (0, 4), (9, 4)):
        kv = references(tokens)
        for i in range(2):
            check(graphs, inputs(kv, i))
        assert recorder.captures == captures, tokens
    places = [read["k_ref.0"] for read in recorder.read if "k_ref.0" in read]
    assert len(set(places[3:])) == 1
    assert places[0] != places[3]


def test_shapes_are_captured_apart_and_the_longest_unused_goes(graphs, recorder, monkeypatch):
    monkeypatch.setattr(torch_cuda_graphs, "_MOST_SHAPES", 2)
    kv = references(3)
    for tokens, captures in ((4, 1), (5, 2), (4, 2), (6, 3), (4, 3), (5, 4)):  # 6 displaces 5
        for i in range(2):
            check(graphs, inputs(kv, i, tokens))
        assert recorder.captures == captures


def test_inputs_that_are_not_contiguous(graphs, recorder):
    kv = references(6)
    for i in range(3):
        x = inputs(kv, i)
        x["latents"] = x["latents"].transpose(1, 2).contiguous().transpose(1, 2)
        check(graphs, x)
    assert recorder.contiguous


def test_failed_capture_is_tried_again(graphs, recorder):
    kv, capture = references(6), graphs._capture

    def fail(_work):
        raise RuntimeError("capture failed")

    check(graphs, inputs(kv))
    graphs._capture = fail
    with pytest.raises(RuntimeError, match="capture failed"):
        graphs(inputs(kv, 1))
    graphs._capture = capture
    check(graphs, inputs(kv, 1))
    assert recorder.captures == 1
