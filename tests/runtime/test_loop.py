"""The denoising loop: which graphs run, on which buffers, and what stays where it is."""

from itertools import pairwise

import numpy as np
import onnxruntime as ort
import psutil
import pytest

from klein_kv.artifacts.positions import grid_ids, text_ids
from klein_kv.artifacts.signature import GraphSet, kv_names
from klein_kv.runtime.loop import LoopInputs, denoise_loop
from klein_kv.schedule import make_schedule

GRAPHS = GraphSet("kv", "float32")
SHORT = {"seed": 0, "max_sequence_length": 64}


@pytest.fixture
def calls(tiny_ours, watch):
    return watch(tiny_ours)


def graphs(calls):
    return [run.graph for run in calls]


def steps_of(calls):
    return [run for run in calls if run.graph == "cached_step"]


def test_graphs_of_an_edit(tiny_ours, calls, picture):
    tiny_ours("a red kite", image=[picture(128, 128), picture(128, 64)], **SHORT)
    steps = ["first_step", *3 * ["cached_step"]]
    encoders = ["text_encoder", "vae_encoder", "vae_encoder"]
    assert graphs(calls) == [*encoders, *steps, "vae_decoder"]


def test_graphs_without_references(tiny_ours, calls):
    """Latents go from step to step without a copy."""
    tiny_ours("a red kite", height=128, width=128, **SHORT)
    assert graphs(calls) == ["text_encoder", *4 * ["cached_step"], "vae_decoder"]
    for name in kv_names(3):
        assert calls[1].inputs[name].shape() == [1, 0, 2, 32]
    for one, following in pairwise(steps_of(calls)):
        assert following.inputs["hidden_states"] is one.outputs["latents"]


def test_graphs_with_references_at_hand(tiny_ours, calls, picture):
    references = tiny_ours.encode_references(picture(128, 128))
    tiny_ours("a red kite", references=references, **SHORT)
    expected = ["vae_encoder", "encode_references", "text_encoder", *4 * ["cached_step"]]
    assert graphs(calls) == [*expected, "vae_decoder"]
    for name, buffer in references.kv.items():
        assert {run.inputs[name].data_ptr() for run in steps_of(calls)} == {buffer.data_ptr()}


@pytest.fixture
def addresses(monkeypatch):
    """Where ONNX Runtime itself reads every input and writes every output, run by run."""
    runs, bound = [], {}
    bind, run = ort.IOBinding.bind_ortvalue_input, ort.InferenceSession.run_with_iobinding

    def spy_bind(binding, name, buffer):
        bound[name] = buffer.data_ptr()
        bind(binding, name, buffer)

    def spy_run(session, binding, *args):
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
    tiny_ours("a red kite", image=image, num_images_per_prompt=per_prompt, **SHORT)
    steps = [run for run in addresses if "out:noise_pred" in run]
    assert len(steps) == 4
    (first,) = (run.outputs for run in calls if run.graph == "first_step")
    for name in kv_names(3):
        assert first[name].shape() == [1, 64, 2, 32]
        assert {run[name] for run in steps[1:]} == {steps[0][f"out:{name}"]}


def loop_inputs(pipeline, ref_tokens):
    net, rng = pipeline.config.transformer, np.random.default_rng(0)
    upload = pipeline.backend.upload

    def normal(*shape):
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


def run_loop(pipeline, inputs, steps, after_step=None):
    schedule = make_schedule({"use_dynamic_shifting": True}, steps, 16)
    denoise_loop(pipeline.backend, schedule, inputs, GRAPHS, after_step)
    return schedule


def test_memory_does_not_grow_with_steps(tiny_ours):
    tokens, resident = 16384, []
    inputs = loop_inputs(tiny_ours, tokens)
    nbytes = tiny_ours.config.transformer.kv_bytes(tokens, "float32")
    before = {name: buffer.data_ptr() for name, buffer in inputs.kv.items()}
    first = inputs.kv["k_ref.0"].numpy().copy()
    run_loop(tiny_ours, inputs, 25, lambda *_: resident.append(psutil.Process().memory_info().rss))
    # Five steps to warm up; then twenty copies would be half a gigabyte.
    assert nbytes > 25e6
    assert max(resident[5:]) - resident[4] < nbytes / 2
    assert {name: buffer.data_ptr() for name, buffer in inputs.kv.items()} == before
    np.testing.assert_array_equal(inputs.kv["k_ref.0"].numpy(), first)


def test_time_and_step_sizes_and_an_early_end(tiny_ours, calls):
    schedule = run_loop(tiny_ours, loop_inputs(tiny_ours, 0), 5, lambda i, _state: i == 2)
    assert len(calls) == 3
    for i, (_, inputs, _) in enumerate(calls):
        assert inputs["timestep"].numpy() == [schedule.model_timestep(i, "float32")]
        assert inputs["sigma_step"].numpy() == [schedule.sigma_steps[i]]
