"""What the GPU's thread asks of a pipeline that has no keys and values to keep."""

from pathlib import Path

import numpy as np
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.errors import RequestError
from klein_kv.runtime.serving.front import digest_of
from klein_kv.runtime.serving.jobs import EditJob, Job
from klein_kv.runtime.serving.runner import PipelineRunner, StoppedError


def test_plain_weights_edit_without_keeping_references(plain_artifacts: Path) -> None:
    runner = PipelineRunner(
        lambda: KleinKVPipeline.from_pretrained(plain_artifacts, device="cpu", threads=1)
    )
    images = (np.full((64, 64, 3), 99, np.uint8), np.zeros((64, 80, 3), np.uint8))
    digest = digest_of(images)
    job = EditJob(prompt="a", references=images, digest=digest, steps=2, seed=3, num_images=2)
    made = [runner.edit(job, lambda: True, lambda *_: None) for _ in range(2)]
    assert [edited.references_known for edited in made] == [False, False]
    assert [image.size for image in made[0].images] == [(64, 64)] * 2
    assert made[0].images == made[1].images
    assert made[0].images[0] != made[0].images[1]  # seed and seed + 1
    assert made[0].stages_s["plain_steps"] > 0
    with pytest.raises(RequestError, match="plain weights"):
        runner.encode(Job(images, digest))
    with pytest.raises(StoppedError):
        runner.edit(job, lambda: False, lambda *_: None)
    assert runner.works(thoroughly=True)
    runner.close()
