"""A GPU gives the results of a CPU: within 1e-4 in float32, within the stated bound in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import EXACT, HALF
from support.one_step import arguments
from support.tiny import TinyEncoder
from torch import Tensor

from encoders import FeatureStore, build_encoder, encode_images
from encoders.store.fingerprints import weights_digest
from mof import MoFForConditionalGeneration, MoFProcessor, blind_pairs
from mof.adapter import FUSIONS, build_mixer
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.projection import build_sieve, principal_directions
from vig import SelectiveTrainer, score

ENCODERS: dict[str, dict[str, Any]] = {
    "mini-clip": {},
    "mini-dino": {},
    "dinov3-vit-s16": {"image_size": 64, "pretrained": False},
    "timm:convnext_atto": {"image_size": 64, "pretrained": False},
}


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    found, expected = found.float().cpu(), expected.float()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, **EXACT)
    else:
        assert (found - expected).norm() <= HALF * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders(device: str, name: str, dtype: torch.dtype) -> None:
    encoder = build_encoder(name, **ENCODERS[name])
    pixels = torch.randint(0, 256, (3, 3, 70, 50), dtype=torch.uint8)  # to be resized by the encoder
    expected = encoder.embed_with_tokens(pixels)
    assert weights_digest(copy.deepcopy(encoder).to(device)) == weights_digest(encoder)
    moved = copy.deepcopy(encoder).to(device, dtype)
    embedding, features = moved.embed_with_tokens(pixels.to(device))
    assert_near(embedding, expected[0], dtype)
    assert_near(features.tokens, expected[1].tokens, dtype)
    assert_near(moved(pixels).tokens, expected[1].tokens, dtype)  # pixels travel to the encoder
    if moved.has_text:
        texts = ["a red circle", "two squares"]
        assert_near(moved.embed_text(texts), encoder.embed_text(texts), dtype)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_mixers_and_their_gradients(device: str, fusion: str) -> None:
    sizes = {"width": 24, "patch_size": 4, "image_size": 24, "mean": 0.4}
    encoders = {name: TinyEncoder(**sizes, seed=seed) for seed, name in enumerate("ab")}
    mixer = build_mixer(fusion, encoders, 32, pool=2)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    moved = copy.deepcopy(mixer).to(device)
    expected, found = mixer(pixels), moved(pixels.to(device))
    torch.testing.assert_close(found.cpu(), expected, **EXACT)
    for tokens in (expected, found):
        tokens.square().mean().backward()
    for (name, one), other in zip(mixer.named_parameters(), moved.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad.cpu(), one.grad, **EXACT, msg=name)


@pytest.mark.parametrize("tokens", ["float16", "int8"])
def test_feature_stores(device: str, tmp_path: Path, records: list[dict[str, Any]], tokens: Any) -> None:
    encoders = {name: build_encoder(name) for name in ("mini-clip", "mini-dino")}
    stores = []
    for place in ("cpu", device):
        encode_images(
            tmp_path / "images", encoders, tmp_path / f"on-{place}-{len(stores)}", tokens=tokens, batch_size=5, device=place, progress=False
        )
        stores.append(FeatureStore(tmp_path / f"on-{place}-{len(stores)}"))
    expected, found = stores
    assert found.names == expected.names
    for name in encoders:
        np.testing.assert_allclose(found.embeddings(name), expected.embeddings(name), atol=1e-4)
        one, other = (store.tokens(name, slice(None)).float() for store in stores)
        torch.testing.assert_close(other, one, atol=0.02 * float(one.abs().max()) if tokens == "int8" else 2e-3, rtol=2**-9)


@pytest.mark.parametrize("null", ["blur", "attention", "drop"])
def test_scores(device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path, null: str) -> None:
    model, processor = llava
    options = {"image_folder": tmp_path / "images", "null": null, "measures": ("loss", "logit", "entropy")}
    expected = score(model, processor, records, **options)
    found = score(copy.deepcopy(model).to(device), processor, records, tmp_path / "scores", **options)
    assert found.ids == expected.ids and not found.failures
    for one, other in zip(found, expected, strict=True):
        for name in ("token_vig", "token_loss", "token_logit", "null_token_entropy"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("padding_free", [False, True])
def test_training_steps(device: str, llava: Any, records: list[dict[str, Any]], tmp_path: Path, padding_free: bool) -> None:
    model, processor = llava
    trained = []
    for place in ("cpu", device):
        moved = copy.deepcopy(model).to(place)
        args = arguments(tmp_path / "trainer", max_steps=3, use_cpu=place == "cpu", learning_rate=0.01)
        options = {"processing_class": processor, "image_folder": tmp_path / "images", "padding_free": padding_free}
        trainer = SelectiveTrainer(moved, args, train_dataset=records, **options)
        trainer.train()
        trained.append((trainer.state.log_history[0]["loss"], moved.cpu().state_dict()))
    (loss, weights), (other_loss, others) = trained
    assert other_loss == pytest.approx(loss, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def spread(count: int, width: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    things = rng.standard_normal((count // 4, width)) * (1 + np.arange(width)) ** -0.5
    x = things[rng.integers(count // 4, size=count)] + noise * rng.standard_normal((count, width)) * (1 + np.arange(width)) ** -0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_blind_pairs(device: str) -> None:
    clip, dino = spread(4400, 48, 0.2), spread(4400, 64, 1.0)
    found = blind_pairs(clip, dino, 0.93, 0.6, device=device)
    clips, dinos = clip.astype(np.float64) @ clip.T, dino.astype(np.float64) @ dino.T
    sure = np.argwhere(np.triu((clips > 0.93 + 2e-6) & (dinos < 0.6 - 2e-6), 1))
    perhaps = np.argwhere(np.triu((clips > 0.93 - 2e-6) & (dinos < 0.6 + 2e-6), 1))
    pairs = set(zip(found.i.tolist(), found.j.tolist(), strict=True))
    assert len(sure) > 50 and set(map(tuple, sure.tolist())) <= pairs <= set(map(tuple, perhaps.tolist()))
    np.testing.assert_allclose(found.clip_similarity, clips[found.i, found.j], atol=1e-5)
    assert np.array_equal(found.i, blind_pairs(clip, dino, 0.93, 0.6).i)


def test_the_sieve_of_a_gpu_lets_the_same_pairs_through(device: str) -> None:
    """Its way through many squares at once, which a CPU does not go by itself."""
    rows = EmbeddingRows(spread(700, 48, 0.2), "clip", device)
    made = build_sieve(rows, principal_directions(rows.read(slice(0, 700)), 28), 0.9)
    squares = [(slice(0, 352), slice(0, 352)), (slice(0, 352), slice(352, 700)), (slice(352, 700), slice(352, 700))]
    expected = {pair for square in squares for pair in zip(*(x.tolist() for x in made.close(*square)), strict=True)}
    found = list(zip(*(x.tolist() for x in made.close_at_once(squares)), strict=True))
    assert len(found) > 100 and set(found) == expected and len(set(found)) == len(found)


def test_generation(device: str, tiny_model: MoFForConditionalGeneration, tiny_processor: MoFProcessor) -> None:
    pixels = list(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    texts = ["<image>\nWhat is it?", "First <image> then <image>?"]
    batch = tiny_processor(images=pixels, text=texts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    expected = tiny_model.generate(**batch, **options)
    found = copy.deepcopy(tiny_model).to(device).generate(**batch.to(device), **options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits).cpu(), torch.stack(expected.logits), **EXACT)


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attention_implementations(device: str, tiny_model: MoFForConditionalGeneration, tmp_path: Path, attention: str) -> None:
    """transformers' name of an attention implementation reaches the language model, and padding stays hidden."""
    tiny_model.save_pretrained(tmp_path)
    ids, mask = torch.randint(10, 200, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    model = MoFForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention).to(device).eval()
    assert model.language_model.config._attn_implementation == attention
    expected = tiny_model(input_ids=ids, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, -1].cpu(), expected, **EXACT)
