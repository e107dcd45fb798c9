"""What every encoder promises, checked on one of each backend."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from support.tiny_towers import DEPTH, block_outputs, blocks_of
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from encoders import Encoder, PatchFeatures, build_encoder

Build = Callable[..., Encoder]


def pixels(size: int = 31, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_shapes_and_grid(encoder: Encoder) -> None:
    features = encoder(pixels())
    assert isinstance(features, PatchFeatures)
    assert features.grid == encoder.grid == (4, 4)
    assert encoder.image_size == 4 * encoder.patch_size
    assert features.tokens.shape == (2, 16, encoder.width) == (2, 16, 24)


def test_embeddings_have_unit_norm(encoder: Encoder) -> None:
    embedding = encoder.embed_image(pixels())
    assert embedding.shape == (2, encoder.embed_dim)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2))
    if encoder.has_text:
        texts = encoder.embed_text(["a photo of a dog", "a red cat", "a"])
        assert texts.shape == (3, encoder.embed_dim)
        assert torch.allclose(texts.norm(dim=-1), torch.ones(3))
        with pytest.raises(ValueError, match="a dog"):
            encoder.embed_text("a dog")  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match=encoder.name):
            encoder.embed_text(["a photo of a dog"])


@pytest.mark.parametrize("layer", [*range(-DEPTH - 1, DEPTH + 1)])
def test_layer_is_that_blocks_output_and_no_later_block_runs(build: Build, layer: int) -> None:
    encoder, image = build(layer=layer), pixels()
    wanted = layer if layer >= 0 else DEPTH + 1 + layer
    whole = block_outputs(blocks_of(encoder), lambda: encoder.embed_image(image))
    assert len(whole) == 1 + DEPTH
    ran: list[object] = []
    hooks = [block.register_forward_pre_hook(lambda block, _: ran.append(block)) for block in blocks_of(encoder)]
    tokens = encoder(image).tokens
    for hook in hooks:
        hook.remove()
    # Leaving a forward pass before its first block starts that block without running any of it.
    assert ran[:wanted] == list(blocks_of(encoder))[:wanted] and len(ran) <= max(wanted, 1)
    assert encoder.blocks == wanted
    assert torch.equal(tokens, whole[wanted][:, -16:])


@pytest.mark.parametrize("options", [{}, pytest.param({"norm": True, "layer": [-2, 0, 1]}, marks=pytest.mark.slow)], ids=str)
@torch.no_grad()
def test_compiled_in_one_graph(build: Build, options: dict) -> None:
    """Without an eager pass before, and again after other passes; `fullgraph` refuses a graph break."""
    torch.compiler.reset()  # it counts how often the same code was compiled, whatever the encoder
    encoder = build(**options)
    image = pixels(encoder.image_size)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    expected = compiled(image).tokens
    for _ in range(2):
        torch.testing.assert_close(encoder(image).tokens, expected)
        assert torch.equal(compiled(image).tokens, expected)
    copied = torch.compile(copy.deepcopy(encoder), backend="eager", fullgraph=True)
    assert torch.equal(copied(image).tokens, expected)


def test_default_layer(encoder: Encoder) -> None:
    assert encoder.layer == (-2 if encoder.has_text else -1)
    assert not encoder.norm


def test_impossible_layer_is_refused(build: Build) -> None:
    for layer in (DEPTH + 1, -DEPTH - 2):
        with pytest.raises(ValueError, match=f"layer {layer}.*{DEPTH} blocks"):
            build(layer=layer)


# --- pixels ---


def test_uint8_and_float_agree(encoder: Encoder) -> None:
    image = pixels()
    assert torch.equal(encoder(image).tokens, encoder(image / 255).tokens)
    assert torch.allclose(encoder(image).tokens, encoder((image / 255).half()).tokens, atol=0.1)


def test_prepare_is_resize_and_normalise(encoder: Encoder) -> None:
    image = torch.rand(2, 3, 41, 23)
    side = [encoder.image_size] * 2
    resized = resize(image, side, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    expected = normalize(resized, list(encoder.mean), list(encoder.std))
    assert torch.allclose(encoder.prepare(image), expected, atol=1e-6)


def test_pixels_of_the_right_size_are_not_resampled(encoder: Encoder) -> None:
    image = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    expected = normalize(image, list(encoder.mean), list(encoder.std))
    assert torch.allclose(encoder.prepare(image), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 28, 28), "[3, 28, 28]"),
        (torch.zeros(2, 1, 28, 28), "[2, 1, 28, 28]"),
        (torch.zeros(2, 28, 28, 3, dtype=torch.uint8), "[2, 28, 28, 3]"),
        (torch.zeros(0, 3, 28, 28, dtype=torch.uint8), "[0, 3, 28, 28]"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.bool), "bool"),
        (torch.randn(2, 3, 28, 28) * 2, "before normalisation"),
        (torch.full((2, 3, 28, 28), 255.0), "255"),
        (torch.full((2, 3, 28, 28), float("nan")), "nan"),
    ],
)
def test_what_is_no_batch_of_plain_pixels_is_refused(encoder: Encoder, wrong: Tensor, message: str) -> None:
    for call in (encoder, encoder.embed_image):
        with pytest.raises(ValueError) as error:
            call(wrong)
        assert message in str(error.value)


def test_dtype_follows_the_tower(encoder: Encoder) -> None:
    image = pixels()
    exact = encoder(image).tokens
    half = encoder.to(torch.bfloat16)
    assert half.prepare(image).dtype == half(image).tokens.dtype == torch.bfloat16
    assert half.embed_image(image).dtype == torch.float32
    assert (half(image).tokens.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


# --- freezing ---


def test_frozen_by_default(encoder: Encoder) -> None:
    parent = nn.Sequential(encoder)
    parent.train()
    assert encoder.frozen and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(pixels()).tokens.requires_grad
    assert not encoder.embed_image(pixels()).requires_grad


def test_trainable_gets_gradients_up_to_its_layer(build: Build) -> None:
    encoder = build(trainable=True, layer=-2)
    assert not encoder.training
    assert nn.Sequential(encoder).train() and encoder.training
    encoder(pixels()).tokens.sum().backward()
    blocks = blocks_of(encoder)
    touched = [any(parameter.grad is not None for parameter in block.parameters()) for block in blocks]
    assert touched == [True] * (DEPTH - 1) + [False]
    with torch.no_grad():
        assert not encoder(pixels()).tokens.requires_grad


# --- other sizes ---


def test_resize_to_another_grid(encoder: Encoder) -> None:
    encoder.resize_to((6, 6))
    assert encoder.grid == (6, 6) and encoder.image_size == 6 * encoder.patch_size
    assert encoder(pixels()).tokens.shape == (2, 36, 24)
    assert encoder.embed_image(pixels()).shape == (2, encoder.embed_dim)


def test_a_grid_that_no_size_gives_leaves_the_size_as_it_is(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    size, grid = encoder.image_size, encoder.grid
    monkeypatch.setattr(type(encoder), "measure_grid", lambda self: grid if self.image_size == size else (1, 1))
    with pytest.raises(ValueError, match="no size up to"):
        encoder.resize_to((6, 6))
    assert (encoder.image_size, encoder.grid) == (size, grid)


def test_resizing_twice_is_resizing_once(build: Build) -> None:
    torch.manual_seed(0)
    once = build()
    torch.manual_seed(0)
    twice = build()
    native = twice(image := pixels()).tokens
    once.resize_to((6, 6))
    twice.resize_to((2, 2))
    twice.resize_to((6, 6))
    assert torch.equal(once(image).tokens, twice(image).tokens)
    twice.resize_to((4, 4))
    assert torch.equal(native, twice(image).tokens)


def test_weights_loaded_after_a_resize_count_as_the_new_original(build: Build) -> None:
    source, target = build(), build()
    for encoder in (source, target):
        encoder.resize_to((6, 6))
    target.load_state_dict({key: value * 2 for key, value in source.state_dict().items()})
    source.load_state_dict(target.state_dict())
    target.resize_to((3, 3))
    source.resize_to((3, 3))
    assert torch.equal(source(image := pixels()).tokens, target(image).tokens)


@pytest.mark.parametrize("grid", [(4, 5), (0, 0), (-1, -1)])
def test_grids_that_cannot_be_met_are_named(encoder: Encoder, grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"4x4.*{grid[0]}x{grid[1]}"):
        encoder.resize_to(grid)


def test_size_that_is_no_multiple_of_the_patch_is_refused(build: Build) -> None:
    patch = build().patch_size
    with pytest.raises(ValueError, match=f"image_size {3 * patch + 1}.*{patch}.*try {3 * patch}"):
        build(image_size=3 * patch + 1)


def test_fixed_encoder_refuses_other_sizes(encoder: Encoder) -> None:
    encoder.flexible = False
    encoder.resize_to((4, 4))
    with pytest.raises(ValueError, match="4x4.*6x6"):
        encoder.resize_to((6, 6))
    with pytest.raises(ValueError, match=str(encoder.image_size)):
        encoder.set_image_size(6 * encoder.patch_size)


# --- building it again ---


def test_spec_builds_the_same_encoder(build: Build) -> None:
    patch = build().patch_size
    encoder = build(image_size=6 * patch, layer=2, norm=True, trainable=True)
    spec = json.loads(json.dumps(encoder.spec))
    assert set(spec) - {"config"} == {"name", "image_size", "layer", "norm", "trainable"}
    again = build_encoder(**spec, pretrained=False)
    assert again.spec == encoder.spec and again.grid == (6, 6)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(image := pixels()).tokens, again(image).tokens)


def test_norm_is_the_towers_final_norm(build: Build) -> None:
    image = pixels()
    torch.manual_seed(0)
    plain = build(layer=2)(image).tokens
    torch.manual_seed(0)
    encoder = build(layer=2, norm=True)
    names = ["visual.ln_post", "visual.trunk.norm", "vision_model.post_layernorm", "norm", "layernorm"]
    modules = dict(encoder.tower.named_modules())
    final = next(modules[name] for name in names if name in modules)
    assert isinstance(final, nn.LayerNorm)
    with torch.no_grad():
        assert torch.allclose(encoder(image).tokens, final(plain), atol=1e-5)
