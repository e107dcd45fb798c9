"""Tiles against grids counted by hand, encodings of each tile alone, and the path from a record to scores, training and answers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import build_llm
from torch.utils.data import DataLoader
from transformers import AutoProcessor, PreTrainedTokenizerFast

from encoders import StoredImage, View, build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.adapter import FUSIONS, build_mixer
from mof.data.collator import SupervisedCollator
from mof.evals.answerers import LocalModel
from mof.evals.encoder_worth import WithoutEncoder
from mof.llava.loading import Loaded, save_checkpoint
from mof.tiles import tile_grid, tiled_pixels
from vig import score

NOISE = np.random.default_rng(0)


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def tiled(tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast) -> MoFProcessor:
    return MoFProcessor.from_parts(tiny_model, tiny_tokenizer, max_tiles=4)


@pytest.mark.parametrize(
    ("width", "height", "most", "expected"),
    [
        (32, 32, 4, (1, 1)),  # all its pixels fit into a tile
        (20, 31, 9, (1, 1)),
        (64, 64, 4, (2, 2)),
        (640, 640, 4, (2, 2)),
        (64, 32, 4, (1, 2)),
        (32, 96, 4, (3, 1)),
        (300, 100, 4, (1, 3)),
        (100, 300, 2, (2, 1)),
        (64, 64, 3, (1, 1)),  # two tiles in a row would keep no more pixels than a single tile
        (640, 640, 1, (1, 1)),
        (100_000, 1, 4, (1, 1)),  # a strip without a whole row of pixels in any grid
    ],
)
def test_the_grid_follows_the_shape(width: int, height: int, most: int, expected: tuple[int, int]) -> None:
    assert tile_grid(height, width, 32, most) == expected


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 32), (32, 64)])
@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_tiles_that_need_no_resizing_are_the_parts_of_the_image(width: int, height: int, fit: str) -> None:
    image, view = noisy(width, height), View(32, fit)
    pixels = tiled_pixels(image, view, 4)
    assert torch.equal(pixels[0], view.pixels(image))
    parts = [image.crop((x, y, x + 32, y + 32)) for y in range(0, height, 32) for x in range(0, width, 32)]
    assert torch.equal(pixels[1:], torch.stack([view.pixels(part) for part in parts]))


def test_a_padded_image_has_its_background_at_both_ends() -> None:
    tiles = tiled_pixels(Image.new("RGB", (128, 96), (200, 0, 0)), View(32, "pad", (1, 2, 3)), 4)[1:]  # 64 x 48 of 64 x 64 pixels
    assert len(tiles) == 4
    for upper, lower in (tiles[:2], tiles[2:].flip(-2)), (tiles[2:].flip(-2), tiles[:2]):
        assert torch.equal(upper, lower)
    assert tiles[0, :, :7, 5].T.tolist() == [[1, 2, 3]] * 7 and tiles[0, :, 9:, 5].T.tolist() == [[200, 0, 0]] * 23


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_image_of_two_by_two_tiles_is_five_encodings_in_order(fusion: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The embeddings that enter the language model, against the fused tokens of the thumbnail and of each quarter alone."""
    encoders = {"a": build_encoder("tiny-a"), "c": build_encoder("tiny-a", image_size=40)}
    mixer = build_mixer(fusion, encoders, 32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer).eval()
    processor = MoFProcessor.from_parts(model, tiny_tokenizer, max_tiles=4)
    side = mixer.image_size
    image = noisy(2 * side, 2 * side)
    inputs = processor(images=[image], text="a<image>b", return_tensors="pt")
    seen: list[torch.Tensor] = []
    model.language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    quarters = [image.crop((x, y, x + side, y + side)) for y in (0, side) for x in (0, side)]
    view = processor.image_processor.view
    expected = torch.cat([mixer(view.pixels(part).unsqueeze(0))[0] for part in (image, *quarters)])  # [5 * T, D]
    assert len(expected) == 5 * mixer.tokens_per_image
    torch.testing.assert_close(seen[0][0, 1:-1], expected)


def test_a_changed_patch_moves_its_slots_only(tiny_model: MoFForConditionalGeneration, tiled: MoFProcessor) -> None:
    image = np.full((64, 64, 3), 90, dtype=np.uint8)
    changed = image.copy()
    changed[40:48, 16:24] = 255  # lower left tile: row 1, column 2 of the 4 x 4 grid of 8 pixels
    before, after = (tiled(images=[Image.fromarray(x)], text="<image>", return_tensors="pt")["pixel_values"] for x in (image, changed))
    moved = (tiny_model.mixer(after) != tiny_model.mixer(before)).any(-1)  # [5, 32]
    assert moved[3, 0::2].nonzero().flatten().tolist() == [6]  # of encoder a; encoder b sees a smaller copy, in which borders blur
    assert moved[3, 13] and not moved[[1, 2, 4]].any() and moved[0].any()


def test_tokens_are_known_before_the_image_is_seen(tiled: MoFProcessor) -> None:
    sizes = [(64, 64), (32, 32), (20, 70)]  # rows, columns
    images = [noisy(width, height) for height, width in sizes]
    inputs = tiled(images=images, text=["<image>", "<image> or <image>"], padding=True, return_tensors="pt")
    promised = tiled._get_num_multimodal_tokens(sizes)
    assert promised.num_image_patches == [5, 1, 4] and promised.num_image_tokens == [5 * 32, 32, 4 * 32]
    assert inputs["pixel_values"].shape == (10, 3, 32, 32) and "tile_counts" not in inputs
    assert (inputs["input_ids"] == tiled.image_token_id).sum(1).tolist() == [5 * 32, 5 * 32]
    fewer = tiled(images=images[0], text="<image>", max_tiles=1, return_tensors="pt")
    assert fewer["pixel_values"].shape == (1, 3, 32, 32) and (fewer["input_ids"] == tiled.image_token_id).sum() == 32


def test_tiles_are_saved_with_the_processor(tiled: MoFProcessor, tiny_model: MoFForConditionalGeneration, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    tiled.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.image_processor.max_tiles == 4
    image = noisy(90, 64)
    first, second = (processor(images=image, text="<image>", return_tensors="pt") for processor in (tiled, again))
    assert all(torch.equal(first[key], second[key]) for key in first) and len(first["pixel_values"]) > 1


def test_records_with_tiles_are_scored_trained_on_and_answered(
    tiny_model: MoFForConditionalGeneration, tiled: MoFProcessor, tmp_path: Path
) -> None:
    sizes = [(64, 64), (32, 32), (64, 20)]
    records = []
    for i, size in enumerate(sizes):
        noisy(*size).save(tmp_path / f"{i}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": talk})
    scores = score(tiny_model, tiled, records, image_folder=tmp_path, batch_size=3)
    alone = [score(tiny_model, tiled, [record], image_folder=tmp_path).vig[0] for record in records]
    np.testing.assert_allclose(scores.vig, alone, atol=1e-5)
    assert len(scores) == 3 and np.abs(scores.vig).min() > 1e-5

    batch = next(iter(DataLoader(records, batch_size=3, collate_fn=SupervisedCollator(tiled, image_folder=tmp_path))))
    loss = tiny_model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in tiny_model.mixer.adapters.parameters())

    chats = [
        [{"role": "user", "content": [{"type": "image", "image": tmp_path / f"{i}.png"}, {"type": "text", "text": "What?"}]}]
        for i in (0, 1)
    ]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt", "padding": True}
    asked = [tiled.apply_chat_template([chat], **options) for chat in chats]
    together = tiled.apply_chat_template(chats, **options)
    for beams in (1, 3):
        limits = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        both = tiny_model.generate(**together, **limits)[:, -5:]
        for own, answer in zip(asked, both, strict=True):
            assert torch.equal(tiny_model.generate(**own, **limits)[0, -5:], answer)


def test_the_mean_of_an_encoder_is_over_all_tiles(tiny_model: MoFForConditionalGeneration, tiled: MoFProcessor, tmp_path: Path) -> None:
    files = []
    for i, size in enumerate([(64, 64), (32, 32)]):
        noisy(*size).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    without = WithoutEncoder(LocalModel(tiny_model, tiled, "tiny"), "a", "mean", files)
    pixels = tiled(images=files, text="<image><image>", return_tensors="pt")["pixel_values"]  # [6, 3, 32, 32]
    torch.testing.assert_close(without._mean.float(), tiny_model.mixer.encode(pixels)["a"].mean(0))


def test_what_has_no_tiles_is_refused(
    tiled: MoFProcessor, tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="max_tiles.*0"):
        MoFProcessor.from_parts(tiny_model, tiny_tokenizer, max_tiles=0)
    with pytest.raises(ValueError, match="max_tiles=1.*4"):
        tiled.image_processor([StoredImage("key", torch.zeros(8))])
    assert "encoder_features" in copy.copy(tiled).image_processor([StoredImage("key", torch.zeros(8))], max_tiles=1)


@pytest.mark.parametrize(("names", "layout"), [("a", "hf-llava"), ("a", "llava"), ("ab", "released-mof")])
def test_published_layouts_have_no_tiles(names: str, layout: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    mixer = InterleavedMoF({name: build_encoder(f"tiny-{name}") for name in names}, 32)
    model = MoFForConditionalGeneration.from_parts(mixer, build_llm(tiny_tokenizer), tiny_tokenizer)
    processor = MoFProcessor.from_parts(model, tiny_tokenizer, max_tiles=4)
    with pytest.raises(ValueError, match="up to 4 tiles"):
        save_checkpoint(Loaded(model, processor, "mof", 0), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
