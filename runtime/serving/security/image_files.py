"""How intricate an image file is, told before a decoder takes it on.

Decoders bound pixels, not the steps to them: each of a hundred thousand scans of a JPEG goes over
all of its pixels, and each of a million segments or chunks is a round of a loop in Python.
"""

import re

__all__ = ["is_intricate"]

_MOST_SEGMENTS = 1000  # of a JPEG; profiles have one for every 64 KiB
_MOST_SCANS = 64  # encoders write about 10
_MOST_JUNK = 4096  # bytes between segments
_MOST_CHUNKS = 1000  # of a PNG, and one more for every KiB: encoders write 8 KiB or more at a time
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SCAN, _END = 0xDA, 0xD9
_MEASURED = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE} - {0xC8}
"""Markers that a segment with a length follows, as libjpeg and Pillow have it."""


def is_intricate(data: bytes) -> bool:
    """Whether a JPEG or PNG has more parts than encoders write."""
    if data[:2] == b"\xff\xd8":
        return _is_intricate_jpeg(data)
    return data[:4] == b"\x89PNG" and _is_intricate_png(data)


def _is_intricate_jpeg(data: bytes) -> bool:
    place, segments, scans = 2, 0, 0
    while (marker := _MARKER.search(data, place)) is not None:
        code = data[marker.start() + 1]
        if code == _END and scans:
            return False  # what comes then is not read: films, other images
        segments += 1
        scans += code == _SCAN
        junk = 0 if scans > 1 or (scans and code != _SCAN) else marker.start() - place
        if segments > _MOST_SEGMENTS or scans > _MOST_SCANS or junk > _MOST_JUNK:
            return True
        place = marker.end()
        if code in _MEASURED:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return not scans and len(data) - place > _MOST_JUNK


def _is_intricate_png(data: bytes) -> bool:
    place, chunks = 8, 0
    while place < len(data):
        chunks += 1
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return chunks > _MOST_CHUNKS + len(data) // 1024
