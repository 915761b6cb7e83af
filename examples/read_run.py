"""Read a run: print each row, and save the map of the first ok row over its original image's frame.

python read_run.py RUN [PICTURE.png]
"""

import sys

import numpy as np
from PIL import Image

import saltern
from saltern.pipeline.runs.reader import map_in_original


def main(path: str, picture: str = "map.png") -> None:
    run = saltern.open_run(path)
    first = None
    for row in run:
        if row.status != "ok":
            print(f"{row.key}: {row.status}: {row.error}")
            continue
        print(
            f"{row.key}: predicted {row.predicted}, explained {row.target} with score {row.score:.3f}; "
            f"map {row.map().shape}, mask covers {row.mask().mean():.0%}, boxes {row.boxes}"
        )
        first = first or row
    if first is not None:
        map_YX = map_in_original(first)  # NaN outside of the network's crop
        low, high = np.nanmin(map_YX), np.nanmax(map_YX)
        grey_YX = np.nan_to_num((map_YX - low) / max(high - low, 1e-12)) * 255
        Image.fromarray(grey_YX.astype(np.uint8)).save(picture)
        print(f"{picture}: the map of {first.key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
