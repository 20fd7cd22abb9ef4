"""Two real photographs of different sizes, as references for the demo.

They come out of scikit-image's wheel, so nothing is downloaded: "astronaut" (Eileen Collins, NASA,
public domain) and "coffee" (Rachel Michetti, CC0).

    python benchmarks/photos.py OUT
"""

import sys
from pathlib import Path

from PIL import Image
from skimage import data

# Box to crop (left, top, right, bottom) and size to write (width, height), in pixels.
PHOTOGRAPHS = {
    "astronaut": ((24, 0, 424, 500), (256, 320)),
    "coffee": ((0, 0, 600, 400), (384, 256)),
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/photos.py OUT")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (box, size) in PHOTOGRAPHS.items():
        photograph = Image.fromarray(getattr(data, name)()).crop(box)
        photograph.resize(size, Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        print(folder / f"{name}.png")
