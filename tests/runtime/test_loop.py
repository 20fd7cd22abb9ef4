"""The denoising loop: which graphs run, on which buffers, and what stays where it is."""

from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.positions import grid_ids, text_ids
from klein_kv.artifacts.signature import GraphSet, kv_names
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.loop import LoopInputs, denoise_loop
from klein_kv.schedule import make_schedule
from tests.runtime.conftest import Run

GRAPHS = GraphSet("kv", "float32")


@pytest.fixture
def calls(tiny_ours, watch):
    return watch(tiny_ours)


def graphs(calls: list[Run]) -> list[str]:
    return [run.graph for run in calls]


def test_graphs_of_an_edit(tiny_ours, calls, picture):
    tiny_ours("a red kite", image=[picture(128, 128), picture(128, 64)], seed=0)
    assert graphs(calls) == [
        "text_encoder",
        "vae_encoder",
        "vae_encoder",
        "first_step",
        *3 * ["cached_step"],
        "vae_decoder",
    ]


def test_graphs_without_references(tiny_ours, calls):
    tiny_ours("a red kite", height=128, width=128, seed=0)
    assert graphs(calls) == ["text_encoder", *4 * ["cached_step"], "vae_decoder"]
    for name in kv_names(3):
        assert calls[1].inputs[name].shape() == [1, 0, 2, 32]


def test_graphs_with_references_at_hand(tiny_ours, calls, picture):
    references = tiny_ours.encode_references(picture(128, 128))
    tiny_ours("a red kite", references=references, seed=0)
    expected = ["vae_encoder", "encode_references", "text_encoder", *4 * ["cached_step"]]
    assert graphs(calls) == [*expected, "vae_decoder"]
    for name, buffer in references.kv.items():
        later = [run.inputs for run in calls if run.graph == "cached_step"]
        assert {inputs[name].data_ptr() for inputs in later} == {buffer.data_ptr()}


@pytest.fixture
def addresses(monkeypatch):
    """Where ONNX Runtime itself reads every input and writes every output, run by run."""
    runs: list[dict[str, int]] = []
    bound: dict[str, int] = {}
    bind, run = ort.IOBinding.bind_ortvalue_input, ort.InferenceSession.run_with_iobinding

    def spy_bind(binding: Any, name: str, buffer: Any) -> None:
        bound[name] = buffer.data_ptr()
        bind(binding, name, buffer)

    def spy_run(session: Any, binding: Any, *args: Any) -> None:
        run(session, binding, *args)
        names = [f"out:{output.name}" for output in session.get_outputs()]
        values = [buffer.data_ptr() for buffer in binding.get_outputs()]
        runs.append(bound | dict(zip(names, values, strict=True)))
        bound.clear()

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", spy_bind)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", spy_run)
    return runs


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_keys_and_values_stay_where_they_are(per_prompt, tiny_ours, calls, addresses, picture):
    """Every cached step reads the very memory that the first step wrote: batch 1, no copy."""
    image = picture(128, 128)
    tiny_ours("a red kite", image=image, num_images_per_prompt=per_prompt, seed=0)
    steps = [run for run in addresses if "out:noise_pred" in run]
    assert len(steps) == 4
    (first,) = (run.outputs for run in calls if run.graph == "first_step")
    for name in kv_names(3):
        assert first[name].shape() == [1, 64, 2, 32]
        assert {run[name] for run in steps[1:]} == {steps[0][f"out:{name}"]}


def test_latents_go_from_step_to_step_without_a_copy(tiny_ours, calls):
    tiny_ours("a red kite", height=128, width=128, seed=0)
    steps = [run for run in calls if run.graph == "cached_step"]
    for one, following in pairwise(steps):
        assert following.inputs["hidden_states"] is one.outputs["latents"]


def loop_inputs(pipeline: KleinKVPipeline, ref_tokens: int) -> LoopInputs:
    net, rng = pipeline.config.transformer, np.random.default_rng(0)
    upload = pipeline.backend.upload

    def normal(*shape: int) -> Buffer:
        return upload(rng.standard_normal(shape, np.float32))

    head = net.num_attention_heads, net.attention_head_dim
    return LoopInputs(
        latents=normal(1, 16, net.in_channels),
        latents_shape=(1, 16, net.in_channels),
        text=normal(1, 8, net.joint_attention_dim),
        img_ids=upload(grid_ids(4, 4)),
        txt_ids=upload(text_ids(8)),
        kv={name: normal(1, ref_tokens, *head) for name in kv_names(net.num_blocks)},
    )


def test_memory_does_not_grow_with_steps(tiny_ours):
    tokens = 16384
    inputs = loop_inputs(tiny_ours, tokens)
    nbytes = tiny_ours.config.transformer.kv_bytes(tokens, "float32")
    before = {name: buffer.data_ptr() for name, buffer in inputs.kv.items()}
    first = inputs.kv["k_ref.0"].numpy().copy()
    resident: list[int] = []

    def after_step(_i: int, _state: LoopInputs) -> bool:
        resident.append(psutil.Process().memory_info().rss)
        return False

    schedule = make_schedule({"use_dynamic_shifting": True}, 25, 16)
    denoise_loop(tiny_ours.backend, schedule, inputs, GRAPHS, after_step)
    # Five steps to warm up; then twenty copies would be half a gigabyte.
    assert nbytes > 25e6
    assert max(resident[5:]) - resident[4] < nbytes / 2
    assert {name: buffer.data_ptr() for name, buffer in inputs.kv.items()} == before
    np.testing.assert_array_equal(inputs.kv["k_ref.0"].numpy(), first)


def test_early_end(tiny_ours):
    schedule = make_schedule({"use_dynamic_shifting": True}, 5, 16)
    steps: list[int] = []

    def after_step(i: int, _state: LoopInputs) -> bool:
        steps.append(i)
        return i == 1

    inputs = loop_inputs(tiny_ours, 0)
    denoise_loop(tiny_ours.backend, schedule, inputs, GRAPHS, after_step)
    assert steps == [0, 1]


def test_time_and_step_sizes(tiny_ours, calls):
    schedule = make_schedule({"use_dynamic_shifting": True}, 3, 16)
    denoise_loop(tiny_ours.backend, schedule, loop_inputs(tiny_ours, 0), GRAPHS)
    for i, (_, inputs, _) in enumerate(calls):
        assert inputs["timestep"].numpy() == [schedule.model_timestep(i, "float32")]
        assert inputs["sigma_step"].numpy() == [schedule.sigma_steps[i]]
