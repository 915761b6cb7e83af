"""Run-length encodings of masks: that of COCO and that of Label Studio.

Shape suffixes: Y X the mask, N runs.
"""

import numpy as np
from numpy.typing import NDArray

_WORD, _SIZES = 8, (3, 4, 8, 16)  # bits of a value; bits of a run's length, by their number in a block
_LONGEST = 2 ** _SIZES[-1]  # values of a run in a block


def coco_rle(mask_YX: NDArray[np.bool_]) -> str:
    """Return the `counts` of COCO's compressed encoding of a mask.

    Runs go down the columns, and the first is one of zeros. A count is written as its difference from the count two
    before it (the first three as they are), five bits a character, the lowest first (cocoapi, maskApi.c, rleToString).
    """
    counts_N = _runs(mask_YX.T.reshape(-1))
    x_N = counts_N.copy()
    x_N[3:] -= counts_N[1:-2]
    chars = np.zeros((len(x_N), 13), np.uint8)  # 13 characters of 5 bits hold 64
    more_N = np.ones(len(x_N), bool)
    for place in range(chars.shape[1]):
        low_N, x_N = x_N & 31, x_N >> 5
        going_N = more_N & (x_N != np.where(low_N & 16, -1, 0))
        chars[more_N, place] = (low_N + 32 * going_N + 48)[more_N]
        more_N = going_N
        if not more_N.any():
            break
    return chars[chars > 0].tobytes().decode()


def brush_rle(mask_YX: NDArray[np.bool_]) -> list[int]:
    """Return Label Studio's encoding of a mask, a list of bytes.

    The mask is an RGBA image, row by row, all four channels 255 inside and 0 outside, in the format of rle-pack: 32
    bits for the number of values, 5 for the bits of a value less one, 4 x 4 for the sizes of a length less one; then
    blocks: a bit 1 (a run), 2 bits for the size, the length less one, the value.
    """
    runs_N = 4 * _runs(mask_YX.reshape(-1))
    blocks_N = -(-runs_N // _LONGEST)  # a run of zero values has none
    last_N = np.cumsum(blocks_N) - 1
    length = np.full(int(blocks_N.sum()), _LONGEST)
    some = blocks_N > 0
    length[last_N[some]] = runs_N[some] - _LONGEST * (blocks_N[some] - 1)
    value = np.repeat(np.arange(len(runs_N)) % 2 * 255, blocks_N)
    bits = np.concatenate(
        [
            _bits(np.array([4 * mask_YX.size]), 32).reshape(-1),
            _bits(np.array([_WORD - 1]), 5).reshape(-1),
            _bits(np.array(_SIZES) - 1, 4).reshape(-1),
            np.concatenate([_bits(np.full(len(length), 0b111), 3), _bits(length - 1, 16), _bits(value, 8)], 1).reshape(
                -1
            ),
        ]
    )
    packed: list[int] = np.packbits(bits).tolist()
    return packed


def _runs(flat: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the lengths of the runs of zeros and ones in turn; the first is of zeros, and may be 0."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0] if flat[:1].any() else [], edges, [len(flat)]]).astype(np.int64)
    return np.diff(ends, prepend=0)


def _bits(number_N: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Return the lowest bits of each number, the highest of them first."""
    return (number_N[:, None] >> np.arange(count - 1, -1, -1) & 1).astype(np.uint8)
