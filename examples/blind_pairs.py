"""The pairs of images in a folder that CLIP takes for the same and DINOv2 does not: `python examples/blind_pairs.py IMAGES OUTPUT`.

The encoders named here know only drawings; for photos, give `--clip clip-vit-l14 --dino dinov2-vit-l14`. `mof blind-pairs` does the
same and also writes a gallery.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from encoders import FeatureStore, build_encoder, encode_images
from mof import blind_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path, help="the features and pairs.csv come here")
    parser.add_argument("--clip", default="mini-clip")
    parser.add_argument("--dino", default="mini-dino")
    given = parser.parse_args()
    store = given.output / "features"
    encode_images(given.images, {name: build_encoder(name) for name in (given.clip, given.dino)}, store)
    features = FeatureStore(store)
    pairs = blind_pairs(features.embeddings(given.clip), features.embeddings(given.dino), clip_above=0.9, dino_below=0.6, max_pairs=100)
    pairs.to_csv(given.output / "pairs.csv", features.names)
    print(pairs)


if __name__ == "__main__":
    main()
