"""What a service allows, and where it listens."""

import ipaddress
from dataclasses import dataclass, fields

from klein_kv.errors import RequestError
from klein_kv.runtime.serving.security.addresses import is_host_pattern

__all__ = ["ServeSettings", "is_loopback"]

_LEAST_KEY = 16
_MAY_BE_0 = ("port", "shelf_bytes", "kept_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits and permissions; each is checked before anything is decoded or computed.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_keys: any of them opens the service; none needs a loopback address.
        open_to_all: listen elsewhere without a key all the same.
        model_names: names of the model besides its own, for clients that insist on one.
        max_body_bytes: of a request.
        max_bodies_bytes: of all requests that are being served at a time.
        body_timeout_s: seconds for a request to arrive.
        max_pixels: of an uploaded image, before it is reduced.
        max_references: images of a request.
        max_prompt: characters.
        max_images: images per prompt.
        max_side: pixels of an image that is made.
        max_connections: requests and WebSockets at a time; more are refused.
        timeout_s: seconds for a request that names no deadline, waiting included.
        shelf_bytes: prepared pixels of uploaded references.
        threads: threads that decode and encode images.
        url_hosts: hosts that images are fetched from; none turns remote URLs off.
        send_hosts: hosts that webhooks and uploads of results are sent to; none turns them off.
        kept_bytes: of clients' files behind URLs; the same for results that are asked for later.
        kept_s: the longest time that either is kept.
        metadata: write prompt and seed into images.
        matte: colour under transparent references.

    Raises:
        RequestError: a value out of range, or an address that needs a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    open_to_all: bool = False
    model_names: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 512 << 20
    body_timeout_s: float = 60.0
    max_pixels: int = 4096 * 4096
    max_references: int = 4
    max_prompt: int = 32000
    max_images: int = 10
    max_side: int = 2048
    max_connections: int = 256
    timeout_s: float = 600.0
    shelf_bytes: int = 256 << 20
    threads: int = 2
    url_hosts: tuple[str, ...] = ()
    send_hosts: tuple[str, ...] = ()
    kept_bytes: int = 256 << 20
    kept_s: float = 3600.0
    metadata: bool = True
    matte: str | None = "white"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and field.name not in _MAY_BE_0 and not value > 0:
                raise RequestError(f"{field.name} is {value!r}, expected more than 0")
        if not 0 <= self.port < 65536:
            raise RequestError(f"port is {self.port}, expected 0 to 65535")
        if any(len(key) < _LEAST_KEY or not key.isascii() for key in self.api_keys):
            raise RequestError(
                f"an API key is shorter than {_LEAST_KEY} characters or not ASCII; make one with "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        for host in (*self.url_hosts, *self.send_hosts):
            if not is_host_pattern(host):
                raise RequestError(
                    f"{host!r} is no host, expected for example images.example.com, or "
                    "*.example.com for all names below it"
                )
        if not (self.api_keys or self.open_to_all or is_loopback(self.host)):
            raise RequestError(
                f"host is {self.host!r}, which others can reach, and there is no API key; give one "
                "(--api-key-file), listen on 127.0.0.1, or say --open-to-all"
            )


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
