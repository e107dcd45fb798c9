"""The page of `mof demo` has two parts: a question about an image, and two images that an encoder may take for the same.

    GET  /?token=TOKEN   the page
    POST /ask            {"question", "image"} -> the page that explains the answer (`mof chat --explain`)
    POST /compare        {"images": [image, image]} -> the similarity of the images to each encoder

An image is {"name": the file's name, "content": its bytes in base64}.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from encoders import Encoder, read_image
from encoders.backends.hf import FAMILIES, HFEncoder
from encoders.images.opening import ImageLimits
from encoders.pages import render
from encoders.presets import caveat
from mof.evals.decoding import Decoding
from mof.local_server import LocalServer, as_json, posted
from mof.pairs.image_collection import SAME_PICTURE, ThumbnailEncoder
from mof.pairs.search import blind_pairs

# Shapes: E = width of an embedding.

LONGEST_QUESTION = 10_000  # characters
SAME, BETWEEN, DIFFERENT = "takes them for the same", "sees some difference", "sees two different images"


class Demo:
    """A demo has a model, and encoders that compare images.

    Args:
        explain: writes the page about an answer, as `vig.report.explanation.write_explanation` does.
        encoders: name -> encoder with an embedding of whole images; there may be none.
        clip_above, dino_below: the thresholds of `mof.blind_pairs`.
        method: a decoding method, whose answer is shown beside the plain answer.
        name: the model's name on the page.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        explain: Callable[..., None],
        encoders: Mapping[str, Encoder],
        *,
        clip_above: float = 0.95,
        dino_below: float = 0.6,
        method: Decoding | None = None,
        max_new_tokens: int = 128,
        name: str = "",
    ) -> None:
        self.model, self.processor, self.encoders, self.name = model, processor, encoders, name
        self.thresholds, self.limits = (clip_above, dino_below), ImageLimits()
        self._explain, self._method, self._longest = explain, method, max_new_tokens
        self._lock = Lock()  # an answer edits the model's attention while it is made

    def ask(self, document: Any) -> str:
        """Return the page that explains the answer to {"question", "image"}.

        Raises:
            ValueError: for a document of another form, for an image that cannot be read, and as `explain` does.
        """
        question = _entry(document, "question", str).strip()
        if not question or len(question) > LONGEST_QUESTION:
            raise ValueError(f"expected a question of 1 to {LONGEST_QUESTION:,} characters, got {len(question):,}")
        content = [{"type": "image", "image": self._image(document.get("image"))}, {"type": "text", "text": question}]
        with self._lock, TemporaryDirectory() as folder:
            page = Path(folder, "answer.html")
            chat = [{"role": "user", "content": content}]
            options = {"model_name": self.name, "max_new_tokens": self._longest}
            self._explain(page, self.model, self.processor, chat, self._method, **options)
            return page.read_text(encoding="utf-8")

    def compare(self, document: Any) -> dict[str, Any]:
        """Return the similarity of two images to each encoder, the encoder's verdict, and the pairs of encoders that disagree.

        Raises:
            ValueError: for a document that does not hold two images, or an image that cannot be read.
        """
        images = [self._image(image) for image in _entry(document, "images", list)]
        if len(images) != 2:
            raise ValueError(f"expected two images, got {len(images)}")
        with self._lock:
            embeddings = {name: embed(encoder, images) for name, encoder in self.encoders.items()}
        alike = {name: float(rows[0] @ rows[1]) for name, rows in embeddings.items()}
        thumbnails = embed(ThumbnailEncoder(), images)
        return {
            "encoders": [{"name": name, "similarity": cosine, "sees": self._sees(cosine)} for name, cosine in alike.items()],
            "blind": [(a, b) for a, b in permutations(embeddings, 2) if len(blind_pairs(embeddings[a], embeddings[b], *self.thresholds))],
            "copies": float(thumbnails[0] @ thumbnails[1]) > SAME_PICTURE,
        }

    def _sees(self, cosine: float) -> str:
        clip_above, dino_below = self.thresholds
        return SAME if cosine > clip_above else DIFFERENT if cosine < dino_below else BETWEEN

    def _image(self, given: Any) -> Image.Image:
        """Return the image of {"name", "content"}. ValueError for another document, ImageError for an image that cannot be read."""
        name, content = _entry(given, "name", str)[:100], _entry(given, "content", str)
        try:
            return read_image(base64.b64decode(content, validate=True), name or "the image", self.limits)
        except binascii.Error as error:
            raise ValueError(f"{name}: expected the image's bytes in base64: {error}") from None


class DemoServer(LocalServer):
    """DemoServer serves the page of a demo. `port` and `token` are as in `LocalServer`."""

    def __init__(self, demo: Demo, port: int = 0, token: str | None = None) -> None:
        longest = 2 * (demo.limits.max_bytes * 4 // 3) + 4 * LONGEST_QUESTION + 10_000  # two images in base64
        clip_above, dino_below = demo.thresholds
        page = render(
            Path(__file__).with_name("demo.html"),
            model=demo.name,
            encoders=list(demo.encoders),
            caveat=caveat(encoder.name for encoder in demo.encoders.values()),
            clip_above=clip_above,
            dino_below=dino_below,
        )

        async def ask(request: Request) -> Response:
            return HTMLResponse(await run_in_threadpool(demo.ask, await posted(request, longest)))

        async def compare(request: Request) -> Response:
            return as_json(await run_in_threadpool(demo.compare, await posted(request, longest)))

        routes = [
            Route("/", lambda request: HTMLResponse(page)),
            Route("/ask", ask, methods=["POST"]),
            Route("/compare", compare, methods=["POST"]),
        ]

        def failed(_: Request, error: Exception) -> Response:
            return as_json({"error": f"the model failed: {error}"}, 500)

        # the GPU's memory, and a place or token beyond the model's tables
        super().__init__(routes, "mof demo", port, token, {RuntimeError: failed, IndexError: failed})


def own_encoders(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, Encoder]:
    """Return name -> encoder, for the encoders of a model that have an embedding of whole images.

    They are the encoders of a mixture, or the vision tower of another model, as in a LLaVA of transformers, if `encoders` knows its kind.
    """
    mixer = getattr(model, "mixer", None)
    if mixer is not None:
        return {name: encoder for name, encoder in mixer.encoders.items() if encoder.embed_dim is not None}
    tower: Any = getattr(model.base_model, "vision_tower", None)
    if tower is None or tower.config.model_type not in FAMILIES:
        return {}
    try:
        encoder = HFEncoder(tower, "the vision tower", processor.image_processor)  # type: ignore[attr-defined]
    except ValueError:  # an image processor that makes no square of one size
        return {}
    return {} if encoder.embed_dim is None else {tower.config.model_type.removesuffix("_vision_model"): encoder}


@torch.no_grad()
def embed(encoder: Encoder, images: list[Image.Image]) -> Tensor:
    """Return the embeddings of images, [images, E] of unit norm on the CPU, as `mof blind-pairs` makes them."""
    return encoder.embed_image(torch.stack([encoder.pixels(image) for image in images])).cpu()


def _entry(document: Any, name: str, kind: type) -> Any:
    """Return the entry `name` of a document. ValueError if the document does not hold it, as an object of `kind`."""
    if not isinstance(document, dict) or not isinstance(document.get(name), kind):
        raise ValueError(f"expected an object with {name!r}, a {kind.__name__}")
    return document[name]
