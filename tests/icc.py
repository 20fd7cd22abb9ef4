"""ICC profiles made by hand (ICC.1:2001-04), and what colours they mean, in numpy."""

import struct
from typing import Any

import numpy as np

# Columns: red, green, blue in XYZ under D50.
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
D50 = np.array([0.9642, 1.0, 0.8249])
GAMMA = 563 / 256  # 2.2, in the format's eighths of a byte


def rgb_profile(primaries: Any = DISPLAY_P3) -> bytes:
    """A matrix profile with these primaries and `GAMMA`."""
    columns = {f"{name}XYZ": _xyz(primaries[:, i]) for i, name in enumerate("rgb")}
    return _profile("RGB ", "XYZ ", columns | {f"{name}TRC": _curve(GAMMA) for name in "rgb"})


def grey_profile(gamma: float) -> bytes:
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile(cyan: tuple[int, int, int]) -> bytes:
    """White paper, cyan ink of a colour Lab, and other inks that are black."""
    lab = np.zeros((2, 2, 2, 2, 3), np.uint8)
    lab[..., 1:] = 128
    for ink, colour in ((0, (100, 0, 0)), (1, cyan)):
        lab[ink, 0, 0, 0] = round(colour[0] * 2.55), colour[1] + 128, colour[2] + 128
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + lab.tobytes() + 3 * ramp
    return _profile("CMYK", "Lab ", {"A2B0": table})


def srgb_from_rgb(levels: Any, primaries: Any = DISPLAY_P3) -> Any:
    """What `rgb_profile` means by levels [..., 3] 0..255, as sRGB levels, not rounded."""
    return srgb_from_xyz((np.asarray(levels) / 255) ** GAMMA @ primaries.T)


def srgb_from_lab(lab: tuple[int, int, int]) -> Any:
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return srgb_from_xyz(np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * D50)


def srgb_from_xyz(xyz: Any) -> Any:
    return srgb_from_linear(xyz @ np.linalg.inv(SRGB).T)


def srgb_from_linear(linear: Any) -> Any:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def _profile(space: str, connection: str, tags: dict[str, bytes]) -> bytes:
    name = b"test"
    tags = {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(79),
        "cprt": b"text\0\0\0\0none\0",
        "wtpt": _xyz(D50),
        **tags,
    }
    index, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        index += struct.pack(">4sII", tag.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == "CMYK" else b"mntr"
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x",
        start + len(body),
        0x02400000,
        kind,
        space.encode(),
        connection.encode(),
        b"acsp",
        _xyz(D50)[8:],
    )
    return header + struct.pack(">I", len(tags)) + index + body
