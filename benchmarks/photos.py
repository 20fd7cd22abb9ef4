"""Two real photographs of different sizes, as references for the demo and the benchmarks.

They come out of scikit-image's wheel, so nothing is downloaded: "astronaut" (Eileen Collins, NASA,
public domain) and "coffee" (Rachel Michetti, CC0).

    python benchmarks/photos.py OUT
"""

import sys
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

__all__ = ["photographs"]

# Name, box to crop (left, top, right, bottom) and size to write (width, height), all in pixels.
_PHOTOGRAPHS = (
    ("astronaut.png", (24, 0, 424, 500), (256, 320)),
    ("coffee.png", (0, 0, 600, 400), (384, 256)),
)


def photographs(folder: Path) -> list[Path]:
    """Write the photographs as RGB files into `folder`, made if need be; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, box, size in _PHOTOGRAPHS:
        with as_file(files("skimage") / "data" / name) as source, Image.open(source) as image:
            photograph = image.convert("RGB").crop(box).resize(size, Image.Resampling.LANCZOS)
        path = folder / name
        photograph.save(path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/photos.py OUT")
    for written in photographs(Path(sys.argv[1])):
        print(written)
