import numpy as np
import pytest
import torch
from PIL import Image

from encoders.images.reading import blur
from vig.nulls import NULLS, NullImages


def picture(seed: int, size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("null", list(NULLS))
def test_null_images_keep_size_and_are_reproducible(null: str) -> None:
    images = [picture(0), picture(1, (17, 40))]
    donors = [picture(seed) for seed in range(4)]
    first = NullImages(null, 0, donors)("a", images)
    again = NullImages(null, 0, donors)("a", images)
    assert [image.size for image in first] == [(30, 20), (17, 40)]
    assert first == again  # PIL compares pixels


def test_null_images_by_name() -> None:
    image = picture(0)
    same, zero, mean, blurred = (NullImages(name, 0)("a", [image])[0] for name in ("same", "zero", "mean", "blur"))
    assert same == image
    assert not np.asarray(zero).any()
    assert np.abs(np.asarray(mean) - np.asarray(image).mean(axis=(0, 1))).max() <= 0.5
    assert blurred == blur(image)


def test_diffusion_is_the_noise_of_vcd() -> None:
    """Mean and spread after step 500 of 1000: sqrt(a) x + sqrt(1 - a) noise, by torch as in the released code."""
    steps = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - steps).cumprod(0)[500])
    grey = Image.new("RGB", (1200, 900), (128, 128, 128))
    noisy = np.asarray(NullImages("diffusion", 0)("a", [grey])[0], dtype=float)
    mean = np.array([0.48145466, 0.4578275, 0.40821073]) * 255
    spread = np.array([0.26862954, 0.26130258, 0.27577711]) * 255
    np.testing.assert_allclose(noisy.mean(axis=(0, 1)), mean + kept**0.5 * (128 - mean), atol=0.7)
    np.testing.assert_allclose(noisy.std(axis=(0, 1)), (1 - kept) ** 0.5 * spread, rtol=0.02)
    seen = np.asarray(Image.fromarray(noisy.astype(np.uint8)).resize((336, 252), Image.Resampling.BICUBIC), dtype=float)
    assert (seen.std(axis=(0, 1)) > 0.7 * noisy.std(axis=(0, 1))).all()  # it survives resizing to a model's input


@pytest.mark.parametrize("null", ["noise", "diffusion", "shuffle"])
def test_random_nulls_differ_by_image_and_seed_alone(null: str) -> None:
    donors = [picture(seed) for seed in range(50)]
    makers = [NullImages(null, seed, donors) for seed in (0, 1)]
    results = [maker("a", [image])[0] for maker in makers for image in donors[:3]]
    assert len({image.tobytes() for image in results}) > 3
    assert makers[0]("another record", [donors[2].copy()])[0] == results[2]  # so records on one image share their null image


def test_shuffle_takes_another_image(tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    image, other = picture(0), picture(1)
    donors = [image, image.copy(), str(broken), other]  # a copy, and one that cannot be read, are never taken
    maker = NullImages("shuffle", 0, donors)
    images = [image, *(picture(seed, (16, 16)) for seed in range(2, 20))]
    assert all(maker("a", [image])[0] != image for image in images)
    assert maker("a", [image]) == [other]
    with pytest.raises(ValueError, match="shuffle"):
        NullImages("shuffle", 0, [image])("a", [image])


def test_callable_null() -> None:
    image = picture(0)
    flip = NullImages(lambda image: image.transpose(Image.Transpose.ROTATE_180), 0)
    assert flip("a", [image]) == [image.transpose(Image.Transpose.ROTATE_180)]
    turn = NullImages(lambda image: image.transpose(Image.Transpose.ROTATE_90), 0)
    with pytest.raises(ValueError, match=r"'a'.*\(20, 30\).*\(30, 20\)"):
        turn("a", [image])


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'blurr'.*blur, same, zero, mean, noise, diffusion, shuffle, drop"):
        NullImages("blurr", 0)
