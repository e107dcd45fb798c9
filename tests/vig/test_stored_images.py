"""Scoring, training and answering on features out of a store, against the same model with its encoders running.

The store keeps float16, so the running encoders are made to round what they give to float16 too; then all must be equal.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from support.commands import mof
from transformers import TrainingArguments

from encoders import FeatureStore, ImageError, StoredImages, View, encode_images, read_image
from mof.data.collator import SupervisedCollator
from vig import SelectiveTrainer, score


def rounding(model):
    """A copy whose encoders give what a float16 store keeps."""
    model = copy.deepcopy(model)
    for encoder in model.mixer.encoders.values():
        own = encoder.patch_tokens
        encoder.patch_tokens = lambda x, own=own: own(x).half().float()
    return model


@pytest.fixture
def stored(tiny_model, tiny_processor, image_folder, tmp_path):
    """The images and the blurred images, and a model whose encoders cannot run."""
    view, encoders = tiny_processor.image_processor.view, dict(tiny_model.mixer.encoders.items())
    for name, of in (("features", view), ("blurred", View(view.image_size, view.fit, view.background, blurred=True))):
        encode_images(image_folder, encoders, tmp_path / name, tokens="float16", view=of, embeddings=False)
    blind = copy.deepcopy(tiny_model)
    for encoder in blind.mixer.encoders.values():
        encoder.patch_tokens = None
    blurred = View(view.image_size, view.fit, view.background, blurred=True)
    pair = (
        StoredImages(FeatureStore(tmp_path / "features"), encoders, view),
        StoredImages(FeatureStore(tmp_path / "blurred"), encoders, blurred),
    )
    return blind, pair


def test_scores(tiny_model, tiny_processor, records, image_folder, stored, tmp_path) -> None:
    blind, pair = stored
    options = {"image_folder": image_folder}
    expected = score(rounding(tiny_model), tiny_processor, records, **options)
    got = score(blind, tiny_processor, records, tmp_path / "scores", stored_images=pair, **options)
    assert got.ids == expected.ids == [record["id"] for record in records]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.token_vig, b.token_vig, atol=2e-6)
        assert a.loss == pytest.approx(b.loss, abs=2e-6) and np.abs(b.token_vig).max() > 1e-4
    with pytest.raises(ValueError, match="null"):  # a score file says what its images came from
        score(blind, tiny_processor, records, tmp_path / "scores", **options)
    with pytest.raises(ValueError, match="stored_images"):
        score(blind, tiny_processor, records, stored_images=pair[::-1], **options)
    with pytest.raises(ValueError, match="stored_images"):
        score(blind, tiny_processor, records, null="zero", stored_images=pair, **options)


def test_training(tiny_model, tiny_processor, records, text_only, image_folder, stored, tmp_path) -> None:
    blind, (images, _) = stored
    for encoder, running in zip(blind.mixer.encoders.values(), tiny_model.mixer.encoders.values(), strict=True):
        encoder.patch_tokens = running.patch_tokens  # a batch without any image shows them a blank one
    weights = []
    for model, source in ((rounding(tiny_model), None), (copy.deepcopy(blind), images)):
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", seed=1
        )
        trainer = SelectiveTrainer(
            model,
            arguments,
            train_dataset=[*records, text_only],
            processing_class=tiny_processor,
            image_folder=image_folder,
            stored_images=source,
        )
        trainer.train()
        weights.append({key: value for key, value in model.state_dict().items() if ".encoders." not in key})
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=1e-5)


def test_found_by_content(tiny_processor, records, image_folder, stored, tmp_path) -> None:
    """Under another name in another folder; and an image that was never encoded."""
    _, (images, _) = stored
    record = next(record for record in records if isinstance(record.get("image"), str))
    shutil.copy(image_folder / record["image"], tmp_path / "moved")
    moved = SupervisedCollator(tiny_processor, image_folder=tmp_path, stored_images=images)([{**record, "image": "moved"}])
    assert torch.equal(moved["encoder_features"][0], images(image_folder / record["image"]).features)
    other = read_image(image_folder / record["image"]).rotate(90)
    other.save(tmp_path / "new.png")
    with pytest.raises(ImageError, match=r"new\.png"):
        images(tmp_path / "new.png")
    with pytest.raises(ImageError, match="got a Image"):
        images(other)


def test_other_encoders_and_views_are_refused(tiny_model, tiny_processor, stored) -> None:
    _, (images, blurred) = stored
    encoders, view = dict(tiny_model.mixer.encoders.items()), tiny_processor.image_processor.view
    with pytest.raises(ValueError, match="fingerprint.*view"):
        StoredImages(images.store, encoders, blurred.view)
    changed = copy.deepcopy(encoders)
    next(iter(changed["b"].tower.parameters())).data += 1
    with pytest.raises(ValueError, match="fingerprint.*weights"):
        StoredImages(images.store, changed, view)
    with pytest.raises(ValueError, match="'c'"):
        StoredImages(images.store, {"c": encoders["b"]}, view)


def test_stored_and_read_images_do_not_mix(tiny_processor, records, image_folder, stored) -> None:
    _, (images, _) = stored
    file = image_folder / records[0]["image"]
    with pytest.raises(ValueError, match="1 of 2"):
        tiny_processor.image_processor([images(file), file])


def test_from_the_command_line(records, image_folder, tiny_folder, tmp_path) -> None:
    """`mof encode --model` writes what `mof vig score --features --blurred-features` reads."""
    (tmp_path / "records.json").write_text(json.dumps(records))

    def done(*words: object) -> str:
        result = mof(*words)
        assert result.exit_code == 0, result.output
        return result.output

    encode = ("encode", "--model", tmp_path / "model", "--images", image_folder, "--tokens", "int8", "--device", "cpu")
    done(*encode, "--output", tmp_path / "features")
    done(*encode, "--blurred", "--output", tmp_path / "blurred")
    common = ("vig", "score", "--model", tmp_path / "model", "--records", tmp_path / "records.json", "--images", image_folder)
    features = ("--features", tmp_path / "features", "--blurred-features", tmp_path / "blurred")
    assert f"{len(records)} of {len(records)} records scored" in done(*common, "--output", tmp_path / "scores", *features)
