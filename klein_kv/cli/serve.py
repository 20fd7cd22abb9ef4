"""`klein-kv serve`: artifacts as a service."""

import argparse
import os
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, add_pipeline, gigabytes, pipeline_options, size
from klein_kv.errors import RequestError

__all__ = ["add_serve"]

_KEY_VARIABLE = "KLEIN_KV_API_KEY"


def add_serve(add: AddVerb) -> None:
    """Adds `klein-kv serve`."""
    sub = add("serve", _serve, "Serve OpenAI's image API, and references that are encoded once.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    option = sub.add_argument
    several = partial(option, action="append", default=[])
    option("--host", default="127.0.0.1", help="another one needs a key (127.0.0.1)")
    option("--port", type=int, default=8000, help="0 takes a free one (8000)")
    key_help = f"keys that open the service, one per line; or one in ${_KEY_VARIABLE}"
    option("--api-key-file", type=Path, metavar="FILE", help=key_help)
    option("--open-to-all", action="store_true", help="listen elsewhere without a key all the same")
    several(
        "--warm-up",
        type=_warm_up,
        metavar="WxH[:REFS]",
        help="an edit to load and compile for before the service is ready; again for more",
    )
    lora_help = "an adapter that requests may name; again for more"
    several("--lora", type=_named_file, metavar="NAME=FILE", help=lora_help)
    option("--queue", type=int, default=16, help="requests that may wait (16)")
    ray_help = "a replica on every GPU of a Ray cluster, HOST:PORT; or of this machine: local"
    option("--ray", metavar="ADDRESS", help=ray_help)
    option("--replicas", type=int, help="of --ray (one per GPU), each with its --queue")
    option("--timeout", type=float, default=600, metavar="S", help="of a request (600)")
    option("--drain-timeout", type=float, default=30, metavar="S", help="after SIGTERM (30)")
    url_help = "fetch images from it over https; again for more (none)"
    several("--allow-url-host", metavar="HOST", help=url_help)
    send_help = "send results and webhooks to it over https; again for more (none)"
    several("--allow-send-host", metavar="HOST", help=send_help)
    option("--keep", type=float, default=256, metavar="MIB", help="of files behind URLs (256)")
    option("--keep-for", type=float, default=3600, metavar="S", help="the same files (3600)")
    several("--model-name", help="another name for the model")
    option("--max-body", type=float, default=64, metavar="MIB", help="of a request (64)")
    option("--max-megapixels", type=float, default=16.8, help="of an uploaded image (16.8)")
    option("--max-images", type=int, default=10, help="of one prompt (10)")
    option(
        "--references",
        type=gigabytes,
        metavar="GB",
        help="for keys and values of references (default: what is free)",
    )
    option("--no-metadata", action="store_true", help="leave prompt and seed out")
    add_pipeline(sub)


def _serve(args: argparse.Namespace) -> Result:
    import uvicorn  # noqa: F401 - the extra is missed before anything is loaded

    from klein_kv.runtime.pipeline import KleinKVPipeline
    from klein_kv.runtime.serving.engine_room import EngineRoom
    from klein_kv.runtime.serving.runner import DeviceLostError, PipelineRunner, WarmUp
    from klein_kv.runtime.serving.server import serve
    from klein_kv.runtime.serving.settings import ServeSettings

    if args.queue < 1:
        raise RequestError(f"--queue is {args.queue}, expected 1 or more")
    if args.replicas is not None and (args.ray is None or args.replicas < 1):
        raise RequestError(f"--replicas is {args.replicas}, expected 1 or more, with --ray")
    settings = ServeSettings(
        host=args.host,
        port=args.port,
        api_keys=_keys(args.api_key_file),
        open_to_all=args.open_to_all,
        model_names=tuple(args.model_name),
        max_body_bytes=int(args.max_body * 2**20),
        max_bodies_bytes=int(args.max_body * 2**20) * 8,
        max_pixels=int(args.max_megapixels * 1e6),
        max_images=args.max_images,
        timeout_s=args.timeout,
        url_hosts=tuple(args.allow_url_host),
        send_hosts=tuple(args.allow_send_host),
        kept_bytes=int(args.keep * 2**20),
        kept_s=args.keep_for,
        metadata=not args.no_metadata,
        matte=args.matte,
    )

    open_pipeline = partial(  # it may have to cross to another process
        KleinKVPipeline.from_pretrained,
        args.artifacts.absolute(),
        reference_cache_bytes=args.references,
        **pipeline_options(args),
    )
    loras, sizes = dict(args.lora), tuple(WarmUp(*x) for x in args.warm_up)
    open_runner = partial(PipelineRunner, open_pipeline, sizes, loras)
    if args.ray is not None:
        from klein_kv.runtime.serving.replicas.cluster import RayCluster

        cluster = RayCluster(args.ray, open_runner, args.queue, args.replicas, args.device)
        with closing(cluster):
            settings = replace(settings, threads=settings.threads * cluster.count)
            serve(cluster.open_engine, settings, drain_timeout_s=args.drain_timeout)
        return {}, "", 0
    try:
        serve(
            partial(EngineRoom, open_runner, args.queue),
            settings,
            drain_timeout_s=args.drain_timeout,
        )
    except DeviceLostError as error:
        print(f"klein-kv serve: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # to take down what lies on such a device may never end
    return {}, "", 0


def _keys(file: Path | None) -> tuple[str, ...]:
    """Keys of a file, or of the environment."""
    if file is not None:
        keys = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
        if not keys:
            raise RequestError(f"{file} holds no key, expected one per line")
        return keys
    key = os.environ.get(_KEY_VARIABLE, "").strip()  # noqa: TID251 - of the program, not the library
    return (key,) if key else ()


def _warm_up(text: str) -> tuple[int, int, int]:
    """WxH or WxH:REFS."""
    sides, _, references = text.partition(":")
    if references and not references.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size with references, expected for example 1024x1024:2"
        )
    return (*size(sides), int(references or 0))


def _named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, file = text.partition("=")
    if not (name.replace("-", "").replace("_", "").replace(".", "").isalnum() and file):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no named file, expected for example style=style.safetensors"
        )
    return name, Path(file).absolute()
