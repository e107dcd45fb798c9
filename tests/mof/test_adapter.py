"""Fusion against strided assignments, loops over cells and explicit sums."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from encoders import Encoder, PatchFeatures, build_encoder
from mof import AdditiveMoF, ConcatMoF, CrossAttentionMoF, GatedMoF, InterleavedMoF, SequenceMoF
from mof.adapter import FUSIONS, SSL_RATIOS, build_mixer
from mof.mixer import Mixer

HIDDEN = 20


class FixedEncoder(Encoder):
    """Gives random tokens of one grid, always the same, and cannot change its input size."""

    def __init__(self, width: int, side: int, seed: int, patch_size: int = 4) -> None:
        super().__init__(
            torch.nn.Linear(1, 1),
            width=width,
            depth=1,
            patch_size=patch_size,
            image_size=side * patch_size,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        self.seed = seed

    def patch_tokens(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(len(x), self.grid[0] * self.grid[1], self.width, generator=generator)

    def image_embedding(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)


@pytest.fixture
def three() -> dict[str, Encoder]:
    """Three encoders that agree in nothing: width, patch size, resolution, flexibility."""
    return {"fixed": FixedEncoder(12, 4, seed=5), "a": build_encoder("tiny-a"), "b": build_encoder("tiny-b")}


def test_three_encoders_interleave_as_a_strided_assignment(three: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = InterleavedMoF(three, HIDDEN)
    expected = torch.empty(2, 3 * 16, HIDDEN)
    for k, (name, encoder) in enumerate(three.items()):
        linear, _, second = mixer.adapters[name]
        hidden = F.gelu(encoder(pixels).tokens @ linear.weight.T + linear.bias)
        expected[:, k::3] = hidden @ second.weight.T + second.bias
    assert mixer.tokens_per_image == 48
    torch.testing.assert_close(mixer(pixels), expected)


def test_order_is_the_encoders_not_the_features(three: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = InterleavedMoF(three, HIDDEN)
    features = mixer.encode(pixels)
    assert torch.equal(mixer.fuse(dict(reversed(features.items()))), mixer.fuse(features))


def test_changing_one_adapter_moves_only_its_slots(three: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = InterleavedMoF(three, HIDDEN)
    before = mixer(pixels)
    with torch.no_grad():
        mixer.adapters["a"][2].bias += 1
    moved = (mixer(pixels) != before).any(-1).any(0)
    assert moved[1::3].all()
    assert not moved[0::3].any() and not moved[2::3].any()


def test_changing_one_patch_moves_only_its_slots() -> None:
    """Spatial order: position (row 1, column 2) of a 4 x 4 grid is slots 2*6 and 2*6 + 1."""
    mixer = InterleavedMoF({"one": build_encoder("tiny-a"), "two": build_encoder("tiny-a")}, HIDDEN)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    changed = image.clone()
    changed[:, :, 8:16, 16:24] = 255
    moved = (mixer(changed) != mixer(image)).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [12, 13]


def test_flexible_encoders_are_resized_to_the_common_grid(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    assert tiny_encoders["b"].grid == (6, 6)
    mixer = InterleavedMoF(tiny_encoders, HIDDEN, grid=(5, 5))
    assert tiny_encoders["a"].image_size == 40 and tiny_encoders["b"].image_size == 20
    assert mixer.tokens_per_image == 50 and mixer(pixels).shape == (2, 50, HIDDEN)
    assert mixer.image_size == 40


@pytest.mark.parametrize("grid", [(3, 3), (7, 7), (12, 4), (5, 9)])
def test_other_encoders_are_interpolated(grid: tuple[int, int], pixels: Tensor) -> None:
    """Against bilinear interpolation written as two matrices, triangle filters widened when shrinking."""
    encoder = FixedEncoder(5, 6, seed=2)
    mixer = ConcatMoF({"fixed": encoder}, HIDDEN, grid=grid)
    matrices = []
    for side in grid:
        centres = (torch.arange(side) + 0.5) * 6 / side
        weights = (1 - ((torch.arange(6) + 0.5)[None] - centres[:, None]).abs() / max(6 / side, 1)).clamp(min=0)  # [side, 6]
        matrices.append(weights / weights.sum(1, keepdim=True))
    maps = encoder(pixels).tokens.view(2, 6, 6, 5)
    expected = torch.einsum("ri,cj,bijd->brcd", *matrices, maps).flatten(1, 2)
    torch.testing.assert_close(mixer.encode(pixels)["fixed"], expected)


@pytest.mark.parametrize("pool", [2, (1, 2), (4, 1)])
def test_pooling_averages_neighbours(pool: int | tuple[int, int], pixels: Tensor) -> None:
    encoder = FixedEncoder(7, 4, seed=3)
    mixer = InterleavedMoF({"fixed": encoder}, HIDDEN, pool=pool)
    down, across = (pool, pool) if isinstance(pool, int) else pool
    grid = encoder(pixels).tokens.view(2, 4, 4, 7)
    cells = [
        grid[:, row : row + down, column : column + across].mean((1, 2)) for row in range(0, 4, down) for column in range(0, 4, across)
    ]
    torch.testing.assert_close(mixer.encode(pixels)["fixed"], torch.stack(cells, 1))
    assert mixer.tokens_per_image == len(cells) == mixer(pixels).shape[1]


@pytest.mark.parametrize("block", [2, 4])
def test_unshuffling_keeps_every_number(block: int, pixels: Tensor) -> None:
    encoder = FixedEncoder(7, 4, seed=3)
    mixer = ConcatMoF({"fixed": encoder}, HIDDEN, pool=block, unshuffle=True)
    maps = encoder(pixels).tokens.view(2, 4, 4, 7).permute(0, 3, 1, 2)
    expected = F.pixel_unshuffle(maps, block).flatten(2).transpose(1, 2)  # [2, 16 / block ** 2, 7 * block ** 2]
    assert torch.equal(mixer.encode(pixels)["fixed"], expected)
    assert mixer.widths == {"fixed": 7 * block**2} and mixer(pixels).shape == (2, 16 // block**2, HIDDEN)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_oblong_blocks_are_unshuffled_in_every_fusion(fusion: str, pixels: Tensor) -> None:
    """A token sees the cells of its block and no other; layers are added before the cells of a block are put side by side."""
    deep, last = FixedEncoder(10, 4, seed=1), FixedEncoder(5, 4, seed=2)
    deep.layers, deep.layer_widths = (1, 0), (5, 5)
    mixer = build_mixer(fusion, {"deep": deep, "last": last}, HIDDEN, pool=(1, 2), unshuffle=True, weigh_layers=True)
    assert mixer.widths == {"deep": 10, "last": 10} and mixer.token_grid == (4, 2)
    averaged, tokens = deep(pixels).tokens.view(2, 4, 4, 2, 5).mean(3), last(pixels).tokens.view(2, 4, 4, 5)
    features = {}
    for name, maps in (("deep", averaged), ("last", tokens)):
        blocks = [torch.stack([maps[:, row, column], maps[:, row, column + 1]], -1) for row in range(4) for column in (0, 2)]
        features[name] = torch.stack([block.flatten(1) for block in blocks], 1)  # [2, 8, 5 * 2], the cells of a channel side by side
    plain = build_mixer(fusion, {"deep": FixedEncoder(10, 4, seed=1), "last": FixedEncoder(10, 4, seed=2)}, HIDDEN, grid=(4, 2))
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if not key.startswith("layer_weights")})
    torch.testing.assert_close(mixer(pixels), plain.fuse(features))


def test_fusions_can_be_compared_at_equal_token_counts(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    interleaved = InterleavedMoF(tiny_encoders, HIDDEN, pool=(1, 2))
    concat = ConcatMoF(tiny_encoders, HIDDEN)
    assert interleaved(pixels).shape == concat(pixels).shape == (2, 16, HIDDEN)


def test_additive_is_the_weighted_sum(pixels: Tensor) -> None:
    clip, dino = FixedEncoder(8, 4, seed=1), FixedEncoder(8, 4, seed=2)
    mixer = AdditiveMoF({"clip": clip, "dino": dino}, HIDDEN, weights={"dino": 0.75, "clip": 0.25})
    mixed = 0.25 * clip(pixels).tokens + 0.75 * dino(pixels).tokens
    torch.testing.assert_close(mixer(pixels), mixer.adapter(mixed))
    halves = AdditiveMoF({"clip": clip, "dino": dino}, HIDDEN)
    assert halves.weights == {"clip": 0.5, "dino": 0.5}


def test_ratio_sweep_runs_from_one_encoder_to_the_other(pixels: Tensor) -> None:
    encoders = {"clip": FixedEncoder(8, 4, seed=1), "dino": FixedEncoder(8, 4, seed=2)}
    mixers = [AdditiveMoF(encoders, HIDDEN, weights={"clip": 1 - a, "dino": a}) for a in SSL_RATIOS]
    for mixer in mixers:
        mixer.adapter = torch.nn.Identity()
    outputs = [mixer(pixels) for mixer in mixers]
    torch.testing.assert_close(outputs[0], encoders["clip"](pixels).tokens)
    torch.testing.assert_close(outputs[-1], encoders["dino"](pixels).tokens)
    steps = [float((after - before).norm()) for before, after in pairwise(outputs)]
    np.testing.assert_allclose(np.array(steps) / steps[0], np.diff(SSL_RATIOS) / SSL_RATIOS[1], rtol=1e-4)


def test_gates_start_with_equal_weights(three: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = GatedMoF(three, HIDDEN)
    torch.testing.assert_close(mixer(pixels), sum(mixer.adapters[name](encoder(pixels).tokens) for name, encoder in three.items()) / 3)


def test_concat_puts_channels_side_by_side(three: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = ConcatMoF(three, HIDDEN)
    tokens = np.concatenate([encoder(pixels).tokens.numpy() for encoder in three.values()], axis=-1)
    assert tokens.shape == (2, 16, 12 + 16 + 24)
    torch.testing.assert_close(mixer(pixels), mixer.adapter(torch.from_numpy(tokens)))


def test_sequence_holds_the_interleaved_tokens_in_another_order(three: dict[str, Encoder], pixels: Tensor) -> None:
    interleaved, sequence = InterleavedMoF(three, HIDDEN), SequenceMoF(three, HIDDEN)
    sequence.load_state_dict(interleaved.state_dict())
    side_by_side, behind = interleaved(pixels), sequence(pixels)
    assert sequence.tokens_per_image == 48
    for k, name in enumerate(three):
        assert torch.equal(behind[:, 16 * k : 16 * (k + 1)], side_by_side[:, k::3])
        assert torch.equal(behind[:, sequence.token_places[name]], side_by_side[:, interleaved.token_places[name]])


def by_hand(mixer: Mixer, features: dict[str, Tensor]) -> Tensor:
    """Every token [B, T, D] of a fusion, computed for itself: image by image and position by position."""
    names, (rows, columns) = list(mixer.encoders), mixer.token_grid
    images, positions = len(features[names[0]]), mixer.positions
    cells = rows * columns
    tokens = torch.zeros(images, mixer.tokens_per_image, HIDDEN)
    for b in range(images):
        own = {name: features[name][b] for name in names}  # of [positions, C]
        for p in range(cells):
            match mixer.fusion:
                case "interleaved" | "sequence":
                    for k, name in enumerate(names):
                        tokens[b, len(names) * p + k if mixer.fusion == "interleaved" else cells * k + p] = mixer.adapters[name](
                            own[name][p]
                        )
                case "additive":
                    tokens[b, p] = mixer.adapter(sum(mixer.weights[name] * own[name][p] for name in names))
                case "concat":
                    tokens[b, p] = mixer.adapter(torch.cat([own[name][p] for name in names]))
                case "gated":
                    scores = (mixer.gate.weight @ torch.cat([own[name][p] for name in names]) + mixer.gate.bias).exp()
                    adapted = [mixer.adapters[name](own[name][p]) for name in names]
                    tokens[b, p] = sum(score * part for score, part in zip(scores, adapted, strict=True)) / scores.sum()
                case "cross_attention":
                    down, across = mixer.window
                    width = columns * across
                    seen = [
                        down * (p // columns) * width + across * (p % columns) + i * width + j for i in range(down) for j in range(across)
                    ]
                    assert max(seen) < positions
                    cell = torch.stack([mixer.adapters[name](own[name][place]) for name in names for place in seen])
                    tokens[b, p] = mixer.attention.out_proj(heads_by_hand(mixer, mixer.queries[p], cell))
    return tokens


def heads_by_hand(mixer: Mixer, query: Tensor, cell: Tensor) -> Tensor:
    """What each head of a query [D] reads in the tokens [n, D] of its window."""
    (asks, keys, values), size = mixer.attention.in_proj_weight.chunk(3), HIDDEN // mixer.heads  # [D, D] each
    ask_bias, key_bias, value_bias = mixer.attention.in_proj_bias.chunk(3)
    query, out = asks @ query + ask_bias, torch.empty(HIDDEN)
    for head in (slice(start, start + size) for start in range(0, HIDDEN, size)):
        looks = ((cell @ keys.T + key_bias)[:, head] @ query[head] / size**0.5).softmax(0)
        out[head] = looks @ (cell @ values.T + value_bias)[:, head]
    return out


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("sides", "options", "images"),
    [
        ([4, 4, 4], {}, 2),
        ([4, 5, 3], {"grid": (3, 5)}, 1),  # three sizes of encoders, none of them on the oblong grid
        ([6, 4], {"grid": (6, 4), "pool": (3, 1)}, 2),
        ([6, 4], {"grid": (2, 6), "pool": (1, 3), "unshuffle": True}, 2),
        ([5], {}, 3),  # a single encoder
        ([4, 2], {"grid": (1, 7)}, 0),  # no image
    ],
)
def test_tokens_are_those_computed_by_hand(fusion: str, sides: list[int], options: dict, images: int, pixels: Tensor) -> None:
    widths = [8] * len(sides) if fusion == "additive" else [8, 5, 11]
    encoders = {f"e{k}": FixedEncoder(widths[k], side, seed=k) for k, side in enumerate(sides)}
    windows = {(2, 4): (2, 1), (4, 4): (2, 2), (3, 5): (1, 5), (2, 2): (1, 2)}
    extra: dict = {"additive": {"weights": {name: 0.1 + k for k, name in enumerate(encoders)}}}.get(fusion, {})
    if fusion == "cross_attention":
        grid, pool = options.get("grid", (sides[0], sides[0])), options.get("pool", (1, 1))
        extra = {"heads": 2, "window": windows.get((grid[0] // pool[0], grid[1] // pool[1]), (1, 1))}
    mixer = build_mixer(fusion, encoders, HIDDEN, **options, **extra)
    for name, parameter in mixer.named_parameters():
        if name.startswith("gate.") or name == "attention.in_proj_bias":  # they start as zeros
            torch.nn.init.normal_(parameter, generator=_seeded(3))
    features = {name: tokens[:images] for name, tokens in mixer.encode(pixels.repeat(2, 1, 1, 1)).items()}
    fused = mixer.fuse(features)
    assert fused.shape == (images, mixer.tokens_per_image, HIDDEN)
    torch.testing.assert_close(fused, by_hand(mixer, features))
    places = [place for part in mixer.token_places.values() for place in part]
    assert sorted(places) == list(range(mixer.tokens_per_image))


@pytest.mark.parametrize("fusion", ["additive", "gated", "concat", "cross_attention"])
def test_fused_tokens_are_of_all_encoders(fusion: str) -> None:
    encoders = {"clip": FixedEncoder(8, 4, seed=1), "dino": FixedEncoder(8, 4, seed=2)}
    mixer = build_mixer(fusion, encoders, HIDDEN)
    assert mixer.token_places == {"clip + dino": range(16)} and mixer.token_grid == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_every_fusion_compiles_to_a_single_graph(fusion: str, pixels: Tensor) -> None:
    encoders = {"a": build_encoder("tiny-a"), "b": build_encoder("tiny-a", image_size=48)}
    extra = {"window": (1, 2)} if fusion == "cross_attention" else {}
    mixer = build_mixer(fusion, encoders, HIDDEN, pool=(2, 1), unshuffle=True, **extra).eval()
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), mixer(pixels))


@pytest.mark.parametrize("fusion", sorted(FUSIONS.keys() - {"additive"}))
def test_gradient_reaches_adapters_and_no_encoder(fusion: str, tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = build_mixer(fusion, tiny_encoders, HIDDEN).train()
    mixer(pixels).square().mean().backward()
    for name, parameter in mixer.named_parameters():
        if name.startswith("encoders."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert not any(module.training for module in mixer.encoders["a"].modules())


def test_trainable_encoder_gets_gradient(pixels: Tensor) -> None:
    mixer = InterleavedMoF({"a": build_encoder("tiny-a", trainable=True), "b": build_encoder("tiny-b")}, HIDDEN)
    mixer(pixels).square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixer.encoders["a"].parameters())
    assert all(parameter.grad is None for parameter in mixer.encoders["b"].parameters())


@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        ("interleaved", {"pool": 2}),
        ("interleaved", {"grid": (8, 8), "pool": (2, 4)}),
        ("additive", {"weights": {"a": 0.375, "c": 0.625}}),
        ("concat", {}),
        ("sequence", {"weigh_layers": True}),
        ("gated", {"pool": 2, "unshuffle": True}),
        ("cross_attention", {"grid": (8, 8), "pool": 2, "window": (1, 2), "heads": 5}),
    ],
)
def test_spec_rebuilds_the_mixer(fusion: str, options: dict, pixels: Tensor) -> None:
    mixer = build_mixer(fusion, {"a": build_encoder("tiny-a"), "c": build_encoder("tiny-a", image_size=40)}, HIDDEN, **options)
    spec = mixer.spec
    encoders = {name: build_encoder(**entry) for name, entry in spec["encoders"].items()}
    again = build_mixer(spec["fusion"], encoders, HIDDEN, **spec["fusion_options"])
    again.load_state_dict(mixer.state_dict())
    assert torch.equal(again(pixels), mixer(pixels))


def test_bfloat16_tokens_stay_bfloat16(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = InterleavedMoF({**tiny_encoders, "fixed": FixedEncoder(8, 6, seed=1)}, HIDDEN, grid=(4, 4), pool=2)
    exact = mixer(pixels)
    mixer.encoders["fixed"].patch_tokens = lambda x: torch.randn(2, 36, 8, generator=_seeded(1)).bfloat16()
    coarse = mixer.to(torch.bfloat16)(pixels)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), exact, atol=0.05, rtol=0.05)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_errors_say_what_was_given(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="encoder"):
        InterleavedMoF({}, HIDDEN)
    with pytest.raises(ValueError, match=r"\['a.b'\]"):
        InterleavedMoF({"a.b": tiny_encoders["a"]}, HIDDEN)
    with pytest.raises(ValueError, match=r"\['keys', 'type'\]"):
        InterleavedMoF({"keys": tiny_encoders["a"], "type": tiny_encoders["b"]}, HIDDEN)
    with pytest.raises(ValueError, match="4 x 4.*3 x 3"):
        InterleavedMoF(tiny_encoders, HIDDEN, pool=3)
    with pytest.raises(ValueError, match="0 x 4"):
        InterleavedMoF(tiny_encoders, HIDDEN, grid=(0, 4))
    with pytest.raises(ValueError, match="'a': 16, 'b': 24"):
        AdditiveMoF(tiny_encoders, HIDDEN)
    with pytest.raises(ValueError, match=r"\['a'\].*\{'dino': 1.0\}"):
        AdditiveMoF({"a": tiny_encoders["a"]}, HIDDEN, weights={"dino": 1.0})
    with pytest.raises(ValueError, match=r"finite.*\{'a': nan\}"):
        AdditiveMoF({"a": tiny_encoders["a"]}, HIDDEN, weights={"a": float("nan")})
    assert CrossAttentionMoF(tiny_encoders, HIDDEN, window=2).token_grid == (2, 2)
    with pytest.raises(ValueError, match="2 x 3.*4 x 4"):
        CrossAttentionMoF(tiny_encoders, HIDDEN, window=(2, 3))
    with pytest.raises(ValueError, match=f"3 .*{HIDDEN}"):
        CrossAttentionMoF(tiny_encoders, HIDDEN, heads=3)
    with pytest.raises(ValueError, match="'stacked'.*interleaved, sequence, additive"):
        build_mixer("stacked", tiny_encoders, HIDDEN)


def test_features_that_do_not_meet_are_refused(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    mixer: Mixer = InterleavedMoF(tiny_encoders, HIDDEN)
    features = mixer.encode(pixels)
    with pytest.raises(ValueError, match="16 .*'a': 16, 'b': 15"):
        mixer.fuse({**features, "b": features["b"][:, 1:]})
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['a'\]"):
        mixer.fuse({"a": features["a"]})


def test_encoder_resized_by_another_mixer_is_refused(tiny_encoders: dict[str, Encoder], pixels: Tensor) -> None:
    mixer = InterleavedMoF({"b": tiny_encoders["b"]}, HIDDEN)
    clone = copy.deepcopy(mixer)
    expected = mixer(pixels)
    InterleavedMoF(tiny_encoders, HIDDEN)
    for resized in (mixer, copy.deepcopy(mixer)):
        with pytest.raises(ValueError, match="'b'.*4 x 4.*6 x 6"):
            resized(pixels)
    assert torch.equal(clone(pixels), expected)  # it has an encoder of its own


@pytest.mark.parametrize("fusion", ["interleaved", "concat", "gated"])
def test_layers_are_added_with_learnt_weights(fusion: str, pixels: Tensor) -> None:
    deep, last = FixedEncoder(32, 4, seed=1), FixedEncoder(16, 4, seed=2)
    deep.layers, deep.layer_widths = (1, 0), (16, 16)
    encoders = {"deep": deep, "last": last}
    mixer = build_mixer(fusion, encoders, HIDDEN, weigh_layers=True)
    plain = build_mixer(fusion, encoders, HIDDEN, weigh_layers=False)
    assert mixer.widths == {"deep": 16, "last": 16} and plain.widths == {"deep": 32, "last": 16}
    with torch.no_grad():
        mixer.layer_weights["deep"].copy_(torch.tensor([0.0, 3.0]).log1p())  # weights 1/5 and 4/5
    upper, lower = deep(pixels).tokens.chunk(2, dim=-1)
    single = build_mixer(fusion, {"deep": FixedEncoder(16, 4, seed=1), "last": last}, HIDDEN)
    single.load_state_dict({key: value for key, value in mixer.state_dict().items() if not key.startswith("layer_weights")})
    features = {"deep": 0.2 * upper + 0.8 * lower, "last": last(pixels).tokens}
    torch.testing.assert_close(mixer(pixels), single.fuse(features))


def test_layers_of_different_widths_cannot_be_weighed() -> None:
    encoder = FixedEncoder(9, 4, seed=1)
    encoder.layer, encoder.layers, encoder.layer_widths = [-1, 0], (1, 0), (4, 5)
    with pytest.raises(ValueError, match=r"\[-1, 0\].*'odd'"):
        InterleavedMoF({"odd": encoder}, HIDDEN, weigh_layers=True)


def test_encoder_contract_is_all_that_is_used(pixels: Tensor) -> None:
    """PatchFeatures of a rectangular grid are interpolated too."""
    encoder = FixedEncoder(6, 4, seed=8)
    encoder.forward = lambda x: PatchFeatures(torch.ones(len(x), 8, 6), (2, 4))
    assert torch.equal(ConcatMoF({"odd": encoder}, HIDDEN).encode(pixels)["odd"], torch.ones(2, 16, 6))
