"""OpenAI's protocol, as its own client, LiteLLM's and curl speak it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from benchmarks.pocket.instructions import Meaning
from benchmarks.pocket.scenes import Scene, answer, draw_scene, psnr, sample_subjects
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.session import Session
from tests.runtime.serving.conftest import (
    SIDE,
    Served,
    base64_of,
    decoded,
    file_of,
    pixels,
    png,
    until,
)

SIZE = f"{SIDE}x{SIDE}"


@pytest.fixture(scope="module")
def pocket(pocket_service: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pocket_service.url}/v1", api_key=pocket_service.key)


@pytest.fixture(scope="module")
def pocket_http(pocket_service: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {pocket_service.key}"}
    with httpx.Client(base_url=pocket_service.url, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def scene() -> Scene:
    return draw_scene([sample_subjects()[7]], np.random.default_rng(8))


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, **options)


# Pocket, which makes pictures that can be judged -------------------------------------------------


def test_openai_edits_pictures_rightly_and_references_are_encoded_once(
    pocket: openai.OpenAI, pocket_http: httpx.Client, scene: Scene
) -> None:
    picture, meaning = scene.picture((SIDE, SIDE)), Meaning("night")
    right = answer(meaning, [scene], (SIDE, SIDE))
    made = pocket.images.edit(
        image=file_of(picture), prompt=meaning.plain, model="klein-kv", extra_body={"seed": 0}
    )
    assert made.data is not None
    assert made.usage is not None
    first = decoded(made.data[0].b64_json)
    assert psnr(first, right) > max(20, psnr(picture, right) + 5)
    assert made.size == SIZE
    assert made.usage.input_tokens_details.image_tokens == (SIDE // 16) ** 2
    assert first.info["parameters"].startswith(meaning.plain)
    assert "Seed: 0" in first.info["parameters"]

    uploaded = pocket_http.post("/v1/references", files={"image": file_of(picture)})
    assert uploaded.status_code == 201
    assert uploaded.json()["known"]  # the edit has made them
    ask = {"prompt": meaning.plain, "references": uploaded.json()["id"], "seed": 0}
    known = pocket_http.post("/v1/images/edits", json=ask)
    assert known.headers["x-references"] == "known"
    again = pixels(known.json()["data"][0]["b64_json"])
    assert np.array_equal(again, np.asarray(first))
    text = pocket_http.get("/metrics").text
    assert 'klein_kv_edits_total{references="known"}' in text
    assert "klein_kv_engine_reference_store_bytes" in text
    assert meaning.plain not in text


def test_references_are_encoded_before_a_prompt_is_known(pocket_http: httpx.Client) -> None:
    images = [("image[]", png(seed=i)) for i in (11, 12)]
    made = pocket_http.post("/v1/references", files=images).json()
    assert not made["known"]
    assert made["tokens"] == 2 * (SIDE // 16) ** 2
    assert made["images"] == [{"width": SIDE, "height": SIDE}] * 2
    ask = {"prompt": "swap", "references": [made["id"]], "num_inference_steps": 1, "seed": 1}
    plain = pocket_http.post("/v1/images/edits", json=ask)
    styled = pocket_http.post("/v1/images/edits", json=ask | {"lora": "cyanotype:0.5"})
    assert plain.headers["x-references"] == "known"  # the first edit of these
    assert styled.headers["x-references"] == "new"  # keys and values are an adapter's own
    assert plain.json()["data"] != styled.json()["data"]


def test_openai_streams_previews_of_an_edit(pocket: openai.OpenAI, scene: Scene) -> None:
    def edit(**more: Any) -> Any:
        image = file_of(scene.picture((SIDE, SIDE)))
        return pocket.images.edit(image=image, prompt=Meaning("night").plain, **more)

    events = list(edit(stream=True, partial_images=3, extra_body={"seed": 3}))
    kinds = [event.type for event in events]
    assert kinds == ["image_edit.partial_image"] * 3 + ["image_edit.completed"]
    final = pixels(events[-1].b64_json)
    for event in events[:-1]:
        preview = np.asarray(decoded(event.b64_json).resize((SIDE, SIDE)))
        assert np.corrcoef(preview.ravel(), final.ravel())[0, 1] > 0.8
    alone, both = (edit(n=n, extra_body={"seed": 4 - n, "num_inference_steps": 1}) for n in (1, 2))
    assert both.data[1].b64_json == alone.data[0].b64_json  # image i has seed + i


def test_openai_masks_what_changes(pocket: openai.OpenAI, scene: Scene) -> None:
    picture = scene.picture((SIDE, SIDE))
    hole = picture.convert("RGBA")
    hole.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    made = pocket.images.edit(
        image=file_of(picture),
        mask=file_of(hole),
        prompt=Meaning("background", "red").plain,
        extra_body={"seed": 0},
    )
    assert made.data is not None
    moved = np.abs(pixels(made.data[0].b64_json).astype(float) - np.asarray(picture))
    half = SIDE // 2
    assert moved[:, half:].mean() > 10
    assert not moved[:, :half].any()


def test_an_edit_that_runs_out_of_memory_runs_again(
    pocket: openai.OpenAI, pocket_service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit() -> Any:
        more = {"seed": 1, "num_inference_steps": 2}
        made = pocket.images.edit(image=png(seed=31), prompt="night", extra_body=more)
        assert made.data is not None
        return pixels(made.data[0].b64_json)

    expected, run, room = edit(), Session.run, pocket_service.engine
    failing = ["cached_step"]

    def run_out(session: Session, graph: str, inputs: Any) -> Any:
        if graph in failing:
            failing.remove(graph)
            raise MemoryError
        return run(session, graph, inputs)

    monkeypatch.setattr(Session, "run", run_out)
    before = room.gauges()
    assert np.array_equal(edit(), expected)
    after = room.gauges()
    assert not failing
    assert after["out_of_memory_total"] == before["out_of_memory_total"] + 1
    assert after["reference_store_entries"] == 1  # all others were given up


# An engine that can be steered -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_openai_sends_files(steered: Served, count: int) -> None:
    files: Any = [png(64 + 16 * i, 64, i) for i in range(count)]
    client_of(steered).images.edit(
        image=files[0] if count == 1 else files,
        prompt="a",
        model="steered",
        size="128x144",
        quality="high",
        extra_body={"seed": 5, "num_inference_steps": 3, "lora": "style:0.5"},
    )
    job = steered.engine.jobs[-1]
    assert [image.shape for image in job.references] == [(64, 64 + 16 * i, 3) for i in range(count)]
    assert (job.width, job.height, job.seed, job.steps) == (128, 144, 5, 3)
    assert job.loras == (("style", 0.5),)
    assert len(job.digest) == 64


def test_images_come_in_every_form(steered: Served) -> None:
    file = png(64, 64)
    uri = f"data:image/png;base64,{base64_of(file)}"
    ask: dict[str, Any] = {"prompt": "a", "seed": 1}
    forms: list[dict[str, Any]] = [
        {"data": ask, "files": {"image": file}},
        {"data": ask, "files": [("image[]", file)]},
        {"files": [("url[]", (None, uri)), ("prompt", (None, "a"))]},
        {  # Open WebUI's
            "data": {"prompt": "a", "model": "steered", "n": "1", "size": "128x128"}
            | {"response_format": "b64_json", "background": "auto"},
            "files": {"image": ("image.png", file, "image/png")},
        },
        {"json": ask | {"image": uri}},
        {"json": ask | {"url": [uri]}},
        {"json": ask | {"images": [{"image_url": uri}]}},
        {"json": ask | {"images": [{"image_url": {"url": uri}}]}},
        {"json": ask | {"image": uri, "lora": [{"name": "style", "weight": 0.5}]}},
    ]
    with httpx.Client(base_url=steered.url) as http:
        ids = [http.post("/v1/references", files={"image": file}).json()["id"]]
        forms += [{"json": ask | {"references": ids}}, {"json": ask | {"references": ids * 2}}]
        for form in forms:
            response = http.post("/v1/images/edits", **form)
            assert response.status_code == 200, response.text
    jobs = steered.engine.jobs[1:]
    assert {job.digest for job in jobs[:-1]} == set(ids)
    assert len(jobs[-1].references) == 2
    assert jobs[-1].digest not in ids


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_of_the_answer(steered: Served, kind: Any) -> None:
    made = client_of(steered).images.generate(
        prompt="a", size="128x128", output_format=kind, output_compression=50
    )
    assert made.output_format == kind
    assert made.data is not None
    assert decoded(made.data[0].b64_json).format == kind.upper()


@pytest.mark.parametrize(
    ("more", "code", "param", "kind"),
    [
        ({"n": 11}, "invalid_value", "n", openai.BadRequestError),
        ({"model": "dall-e-3"}, "model_not_found", "model", openai.NotFoundError),
        ({"extra_body": {"cfg": 3}}, "unknown_parameter", "cfg", openai.BadRequestError),
        (
            {"extra_body": {"references": "nothing"}},
            "unsupported_parameter",
            "image",
            openai.BadRequestError,
        ),
    ],
)
def test_openai_is_told_what_is_wrong(
    steered: Served, more: dict[str, Any], code: str, param: str, kind: type[openai.APIStatusError]
) -> None:
    ask: dict[str, Any] = {"prompt": "a", "size": "128x128"} | more
    with pytest.raises(kind) as told:
        client_of(steered).images.generate(**ask)
    error: Any = told.value
    assert (error.code, error.param) == (code, param)
    assert error.type == "invalid_request_error"
    assert error.request_id.startswith("req_")
    assert not steered.engine.jobs


def test_openai_retries_what_is_worth_it(steered: Served) -> None:
    refusals = [ServiceError("queue_full", "full", retry_after_s=0.01)] * 2

    async def act() -> None:
        if refusals:
            raise refusals.pop()

    steered.engine.act = act
    client = client_of(steered, max_retries=2)
    assert client.images.generate(prompt="a", size="128x128").data
    assert len(steered.engine.jobs) == 3

    async def fail() -> None:
        raise KeyError("secret at 0x7f0012345678 in /root/x.py")

    steered.engine.act = fail
    with pytest.raises(openai.InternalServerError) as told:
        client.images.generate(prompt="a", size="128x128")
    assert told.value.body == {
        "message": "the request failed",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert len(steered.engine.jobs) == 4  # not once more


@pytest.mark.parametrize("late", [False, True])
def test_a_refusal_of_a_stream(
    steered: Served, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    if late:
        monkeypatch.setattr("klein_kv.runtime.serving.api.streaming._FIRST_S", 0.02)
        monkeypatch.setattr("klein_kv.runtime.serving.api.streaming._SILENCE_S", 0.02)
    errors = [ServiceError("deadline", "too late"), OSError("secret")]

    async def act() -> None:
        await asyncio.sleep(0.1)
        raise errors.pop(0)

    steered.engine.act = act
    kind = openai.APIError if late else openai.InternalServerError
    client = client_of(steered, max_retries=0)
    for code in ("deadline", "internal_error"):
        with pytest.raises(kind) as told:
            list(client.images.generate(prompt="a", size="128x128", stream=True))
        assert told.value.code == code
        assert "secret" not in str(told.value)


def test_closing_a_stream_cancels_the_job(steered: Served) -> None:
    steered.engine.act = lambda: asyncio.sleep(30)
    with pytest.raises(openai.APITimeoutError):
        client_of(steered, max_retries=0, timeout=0.3).images.generate(
            prompt="a", size="128x128", stream=True
        )
    until(lambda: steered.engine.cancelled == 1)


def test_deadlines_come_from_field_and_header(http: httpx.Client, steered: Served) -> None:
    ask = {"prompt": "a", "size": "128x128"}
    url = f"{steered.url}/v1/images/generations"
    http.post(url, json=ask | {"timeout": 5})
    http.post(url, json=ask, headers={"x-timeout-s": "7.5"})
    http.post(url, json=ask | {"timeout": 1e9})
    assert [job.timeout_s for job in steered.engine.jobs] == [5, 7.5, 600]
    refused = http.post(url, json=ask, headers={"x-timeout-s": "soon"})
    assert refused.json()["error"]["param"] == "x-timeout-s"


def test_references_are_a_resource(steered: Served) -> None:
    with httpx.Client(base_url=steered.url) as http:
        made = http.post("/v1/references", files={"image": png(64, 80)}).json()
        path = f"/v1/references/{made['id']}"
        assert http.get(path).json()["images"] == [{"width": 64, "height": 80}]
        assert http.delete(path).json() == {
            "id": made["id"],
            "object": "references",
            "deleted": True,
        }
        assert http.get(path).json()["error"]["code"] == "reference_not_found"
        first = http.post("/v1/references", files={"image": png(512, 512, 1)}).json()
        http.post("/v1/references", files={"image": png(512, 512, 2)})  # the shelf is full
        assert http.get(f"/v1/references/{first['id']}").status_code == 404


def test_models_and_health(http: httpx.Client, steered: Served) -> None:
    client = client_of(steered)
    assert [model.id for model in client.models.list()] == ["org/steered"]
    assert client.models.retrieve("steered").id == "org/steered"
    assert client.images.generate(prompt="a", model="gpt-image-1", size="128x128").data
    assert http.get(f"{steered.url}/health/ready").status_code == 200
    metrics = http.get(f"{steered.url}/metrics").text
    assert 'klein_kv_requests_total{code="200",route="/v1/models/{name:path}"}' in metrics
    assert "klein_kv_engine_queue_depth 3.0" in metrics
    steered.engine.ready = False
    response = http.get(f"{steered.url}/health/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert http.get(f"{steered.url}/health/live").json() == {"status": "live"}
    steered.engine.facts = None  # it is being opened
    assert http.get(f"{steered.url}/v1/models").json()["error"]["code"] == "not_ready"


def test_litellm_edits_and_generates(steered: Served) -> None:
    script = f"""
import io, litellm
where = dict(api_base="{steered.url}/v1", api_key="{steered.key}")
file = io.BytesIO({png(64, 64)!r})
file.name = "a.png"
edited = litellm.image_edit(
    model="openai/steered", image=[file], prompt="edited", size="128x128", **where
)
made = litellm.image_generation(
    model="openai/steered", prompt="made", size="128x144", seed=4, **where
)
print(len(edited.data[0].b64_json) > 99, len(made.data[0].b64_json) > 99)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": ""},  # it asks nobody for prices
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split()[-2:] == ["True", "True"], done.stderr[-2000:]
    edited, made = steered.engine.jobs
    assert (edited.prompt, len(edited.references)) == ("edited", 1)
    assert (made.prompt, made.height, made.seed) == ("made", 144, 4)


def test_curl_uploads_edits_and_is_refused(steered: Served, tmp_path: Any) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(64, 64))

    def curl(*words: str) -> Any:
        done = subprocess.run(
            ["curl", "-sS", *words], capture_output=True, text=True, check=True, timeout=20
        )
        return json.loads(done.stdout)

    edits = f"{steered.url}/v1/images/edits"
    assert curl("-F", f"image=@{file}", "-F", "prompt=a", edits)["data"]
    large = tmp_path / "large.png"
    large.write_bytes(bytes(500_000))
    told = curl("-F", f"image=@{large}", "-F", "prompt=a", edits)
    assert told["error"]["code"] == "payload_too_large"
    chunked = curl("-H", "transfer-encoding: chunked", "-F", f"image=@{large}", edits)
    assert chunked["error"]["code"] == "payload_too_large"
