"""NaN and infinity: refused, with the first graph and step that gave one."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.errors import NotFiniteError
from klein_kv.runtime.backends.backend import Buffer

Break = Callable[[str, int, str, float], None]


@pytest.fixture
def break_graph(any_ours: KleinKVPipeline, monkeypatch: pytest.MonkeyPatch) -> Break:
    """Puts one bad number into an output of the nth run of a graph, in every request.

    The decoder's is all bad: its norms and attention spread one over the whole image.
    """
    backend, run = any_ours.backend, any_ours.backend.run

    def start(target: str, count: int, output: str, value: float) -> None:
        runs: Counter[str] = Counter()

        def broken(graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
            outputs = run(graph, inputs)
            if graph == "text_encoder":  # a request begins
                runs.clear()
            runs[graph] += 1
            if (graph, runs[graph]) == (target, count):
                array = np.array(backend.download(outputs[output]))
                bad = slice(None) if graph == "vae_decoder" else array.size // 2
                array.reshape(-1)[bad] = value
                outputs[output] = backend.upload(array)
            return outputs

        monkeypatch.setattr(backend, "run", broken)

    return start


def ask(pipe: KleinKVPipeline, picture: Callable[..., Image.Image], output_type: str) -> Any:
    reference = picture(96, 80)
    sizes = {"height": 64, "width": 96, "max_sequence_length": 64}
    return pipe("a kite", image=reference, seed=1, output_type=output_type, **sizes)


@pytest.mark.parametrize(
    ("graph", "count", "output", "value", "where"),
    [
        ("text_encoder", 1, "encoder_hidden_states", math.nan, "text_encoder."),
        ("vae_encoder", 1, "ref_hidden_states", math.inf, "vae_encoder."),
        ("first_step", 1, "v_ref.0", math.nan, "first_step in step 1."),
        ("cached_step", 2, "latents", math.nan, "cached_step in step 3."),
        ("cached_step", 3, "latents", -math.inf, "cached_step in step 4."),
        # It overflows in float16 where latents are fine; eight bits hide it.
        ("vae_decoder", 1, "sample", math.nan, "vae_decoder."),
    ],
)
def test_first_graph_and_step_are_named(
    any_ours: KleinKVPipeline,
    picture: Callable[..., Image.Image],
    break_graph: Break,
    graph: str,
    count: int,
    output: str,
    value: float,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was a black image, and nobody said a word."""
    break_graph(graph, count, output, value)
    last = graph == "vae_decoder"
    for output_type in ("pil", "np", "pt") if last else ("pil", "latent"):
        with pytest.raises(NotFiniteError) as caught:
            ask(any_ours, picture, output_type)
        assert f"the first is {output} of {where}" in str(caught.value)
        assert "broken in training or merging" in str(caught.value)
    assert any_ours.session.watch is None
    monkeypatch.setattr(any_ours, "check_finite", False)
    assert ask(any_ours, picture, "pil").images


def test_good_requests_download_one_row(any_ours, picture, monkeypatch):
    downloads = []
    download = any_ours.backend.download

    def note(buffer):
        array = download(buffer)
        downloads.append(array.shape)
        return array

    monkeypatch.setattr(any_ours.backend, "download", note)
    generator = torch.Generator().manual_seed(3)
    result = any_ours("a kite", height=64, width=96, num_images_per_prompt=2, generator=generator)
    assert len(result.images) == 2
    assert [shape for shape in downloads if len(shape) == 1] == [(96,), (96,)]
    if any_ours.backend.name == "torch":  # ONNX Runtime downloads whole tensors alone
        assert [shape for shape in downloads if len(shape) == 4 and shape[1] == 3] == []
