"""An image with more pixels than the encoders' input becomes several model inputs: a thumbnail and tiles.

Tiles have the size of an image without tiles, so they need nothing of encoders, fusions or the language model. The tokens of the thumbnail
come first, then the tokens of the tiles in reading order. In each tile, the fusion keeps its spatial order.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from encoders import View
from encoders.images.resizing import FILTERS

# Shapes: H, W = rows and columns of an image, S = side of a tile, K = 1 for the thumbnail + number of tiles.


def tile_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Return the rows and columns of the tiles of an image: the grid of LLaVA-NeXT.

    Of all grids with at most `most` tiles, it keeps most pixels of the image, and of these grids it has the fewest pixels to fill. An image
    that is no larger than a tile has the grid (1, 1).
    """
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    best = select_best_resolution((height, width), [(rows * side, columns * side) for rows, columns in grids])
    return (1, 1) if best is None else (best[0] // side, best[1] // side)  # None: a strip that shrinks to no pixel in every grid


def count_tiles(height: int, width: int, side: int, most: int) -> int:
    """Return K, the number of model inputs of an image. An image with a single tile has only the thumbnail, which is the same."""
    rows, columns = tile_grid(height, width, side, most)
    return 1 if rows * columns == 1 else 1 + rows * columns


def tiled_pixels(image: Image.Image, view: View, most: int) -> Tensor:
    """Return [K, 3, S, S] uint8: the view of the whole RGB image, then its tiles, row by row.

    Tiles are cut from the whole image, which is fitted into their grid as the view fits an image into a square.
    """
    thumbnail, side = view.pixels(image).unsqueeze(0), view.image_size  # [1, 3, S, S]
    rows, columns = tile_grid(image.height, image.width, side, most)
    if rows * columns == 1:
        return thumbnail
    size, method = (columns * side, rows * side), FILTERS[view.interpolation]
    if view.fit == "pad":
        canvas = ImageOps.pad(image, size, method, color=tuple(view.background))
    elif view.fit == "crop":
        canvas = ImageOps.fit(image, size, method)
    else:
        canvas = image.resize(size, method)
    tiles = rearrange(torch.from_numpy(np.array(canvas)), "(r s) (c t) k -> (r c) k s t", s=side, t=side)  # [K - 1, 3, S, S]
    return torch.cat([thumbnail, tiles])
