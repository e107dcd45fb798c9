"""Draw the pictures of the README and of the documentation as SVG, in light and dark colours, into docs/images.

python docs/scripts/draw.py                    # from the answer in docs/images/answer.json
python docs/scripts/draw.py --run runs/miniature   # score this answer anew, with the aligned model of the default run
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageFont
from svg import Canvas

IMAGES = Path(__file__).parent.parent / "images"
ANSWER, SCENE = IMAGES / "answer.json", IMAGES / "scene.png"
SEED, RECORD = 77, "caption-25"  # a scene that the default run does not train on
CLIP, DINO = "{clip}", "{dino}"
FULL = 3.0  # nats of VIG at which a token has its full colour


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of the default run")
    run = parser.parse_args().run
    if run is not None:
        score_answer(run / "seed-0" / "align-interleaved")
    answer = json.loads(ANSWER.read_text())
    scene = Image.open(SCENE).convert("RGB")
    draw_overview(scene, answer)
    draw_interleaving()
    draw_vig(scene, answer)
    draw_pair_search()


def score_answer(folder: Path) -> None:
    """Write the tokens of one caption with their losses, and its scene."""
    from mof import MoFForConditionalGeneration, MoFProcessor
    from mof.miniature import write_dataset
    from vig import score

    model, processor = MoFForConditionalGeneration.from_pretrained(folder), MoFProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as data:
        write_dataset(Path(data), align=30, finetune=4, pairs=1, seed=SEED)
        record = next(entry for entry in json.loads((Path(data) / "align.json").read_text()) if entry["id"] == RECORD)
        scored = next(iter(score(model, processor, [record], measures=["loss"], null="blur", image_folder=Path(data) / "images")))
        Image.open(Path(data) / "images" / record["image"]).save(SCENE)
    tokens = [processor.tokenizer.decode([int(token)]) for token in scored.token_ids]
    losses = {"loss": scored.token_loss, "null_loss": scored.null_token_loss, "vig": scored.token_vig}
    ANSWER.write_text(json.dumps({"tokens": tokens, **{name: np.round(values, 2).tolist() for name, values in losses.items()}}, indent=1))


def draw_overview(scene: Image.Image, answer: dict) -> None:
    """Draw the way of an image into the language model, and an answer that is coloured by VIG."""
    canvas = Canvas(840, 470, "An image is cut into two grids of patches, by CLIP and by DINOv2. Their tokens alternate before the "
                    "language model. Below, each word of an answer is coloured by how much the image helped it.")  # fmt: skip
    canvas.text(75, 32, "image", 20, "{soft}", "middle")
    canvas.image(10, 48, 130, _address(scene))
    for y, name, colour in ((6, "CLIP", CLIP), (134, "DINOv2", DINO)):
        canvas.line((148, 113), (190, y + 50), arrow=True)
        canvas.image(200, y, 100, _address(scene))
        _grid(canvas, 200, y, 20, colour)
        canvas.text(308, y + 56, name, 20, colour, font_weight="600")
        canvas.line((402, y + 50), (430, 113), arrow=True)
    canvas.text(545, 70, "tokens, interleaved", 20, "{soft}", "middle")
    for n in range(8):
        canvas.box(440 + 27 * n, 98, 23, 30, (CLIP, DINO)[n % 2], rx=4)
    canvas.text(440, 156, "c0 d0 c1 d1 ...", 18, "{soft}")
    canvas.line((662, 113), (694, 113), arrow=True)
    canvas.box(704, 68, 128, 90, "{panel}", "{line}", rx=10, stroke_width=2)
    canvas.text(768, 106, "language", 20, anchor="middle")
    canvas.text(768, 132, "model", 20, anchor="middle")
    canvas.line((768, 166), (768, 262), arrow=True)
    canvas.box(10, 270, 822, 186, "{panel}", rx=10)
    canvas.text(26, 302, "its answer: how much did the image help each word?", 20, "{soft}")
    _coloured_answer(canvas, answer, 26, 346, 800, lines=2)
    for n, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        canvas.box(26 + 40 * n, 418, 40, 18, f"rgba({{helped}}, {0.75 * share + 0.02:.2f})", "{line}", stroke_width=0.5)
    canvas.text(238, 434, "VIG 0 to 3 nats: loss without the image - loss with it", 18, "{soft}")
    canvas.write(IMAGES / "overview")


def _coloured_answer(canvas: Canvas, answer: dict, x: float, y: float, right: float, lines: int, size: int = 22) -> None:
    """Write an answer with a colour behind each token, over some lines."""
    at, font = x, ImageFont.truetype(findfont("DejaVu Sans"), size)
    for token, vig in zip(answer["tokens"], answer["vig"], strict=True):
        word = token.strip()
        width = font.getlength(word) + 4
        if token.startswith(" ") and at > x:
            at += size * 0.2
        if at + width > right and token.startswith(" "):
            at, y, lines = x, y + size * 1.75, lines - 1
        if not lines or word == "</s>":
            return
        strength = min(abs(vig) / FULL, 1) * 0.75
        if strength > 0.02:
            canvas.box(at, y - size, width, size * 1.36, f"rgba({{{'helped' if vig > 0 else 'misled'}}}, {strength:.2f})", rx=4)
        canvas.text(at + width / 2, y, word, size, anchor="middle")
        at += width


def draw_interleaving() -> None:
    """Draw how the token i of the encoder k gets the place N i + k."""
    canvas = Canvas(760, 330, "Two grids of three by three patches, numbered row by row. In the sequence, the tokens of a patch stand "
                    "side by side: c0, d0, c1, d1 and so on.")  # fmt: skip
    for left, name, letter, colour in ((110, "CLIP", "c", CLIP), (470, "DINOv2", "d", DINO)):
        canvas.text(left + 75, 28, name, 20, colour, "middle", font_weight="600")
        _grid(canvas, left, 42, 50, colour, 3)
        for n in range(9):
            canvas.text(left + 25 + 50 * (n % 3), 74 + 50 * (n // 3), f"{letter}{n}", 18, anchor="middle")
    canvas.text(365, 126, "same place,", 18, "{soft}", "middle")
    canvas.text(365, 150, "two views", 18, "{soft}", "middle")
    for n in range(18):
        colour, letter = ((CLIP, "c"), (DINO, "d"))[n % 2]
        canvas.box(20 + 40 * n, 236, 36, 40, "{panel}", colour, rx=4, stroke_width=2.5)
        canvas.text(38 + 40 * n, 262, f"{letter}{n // 2}", 16, anchor="middle")
        canvas.text(38 + 40 * n, 300, str(n), 14, "{soft}", "middle")
    canvas.text(20, 324, "place in the sequence = 2 i + k, for patch i of encoder k = 0 or 1", 16, "{soft}")
    canvas.write(IMAGES / "interleaving")


def draw_vig(scene: Image.Image, answer: dict) -> None:
    """Draw the loss of the first answer tokens with the image and with the blurred image."""
    from vig.nulls import NullImages

    blurred = NullImages("blur", 0)("scene", [scene])[0]
    tokens = answer["tokens"][:12]
    canvas = Canvas(
        760, 400, "Bars show the loss of each token of an answer with the image and with the blurred image. The difference is the VIG."
    )
    for y, picture, words in ((20, scene, "with the image"), (170, blurred, "with the blurred image")):
        canvas.image(20, y + 20, 90, _address(picture))
        canvas.text(20, y + 10, words, 16, "{soft}")
    step = 44
    for y, key in ((130, "loss"), (280, "null_loss")):
        canvas.line((210, y), (210 + step * len(tokens), y))
        canvas.text(200, y - 40, "loss", 16, "{soft}", "end")
        for n, loss in enumerate(answer[key][: len(tokens)]):
            height = min(loss, 9) * 11
            canvas.box(218 + step * n, y - height, 28, height, "{soft}", rx=2)
    for n, (token, vig) in enumerate(zip(tokens, answer["vig"], strict=False)):
        strength = min(abs(vig) / FULL, 1) * 0.75
        canvas.box(212 + step * n, 308, step - 4, 56, f"rgba({{{'helped' if vig > 0 else 'misled'}}}, {strength:.2f})", rx=4)
        canvas.text(212 + step * n + (step - 4) / 2, 330, token.strip(), 13, anchor="middle")
        canvas.text(212 + step * n + (step - 4) / 2, 354, f"{vig + 0:.1f}".replace("-0.0", "0.0"), 16, anchor="middle")
    canvas.text(20, 330, "VIG = lower loss", 16, "{soft}")
    canvas.text(20, 350, "- upper loss, nats", 16, "{soft}")
    canvas.text(20, 390, "One caption of the default run's aligned model; the numbers are measured.", 15, "{soft}")
    canvas.write(IMAGES / "vig")


def draw_pair_search() -> None:
    """Draw the squares of the comparison of all images with all, and the three steps in a square."""
    canvas = Canvas(760, 330, "The matrix of all pairs is cut into squares on and above the diagonal. In each square a cheap product "
                    "of whole numbers throws out nearly all pairs, and exact cosines decide on the rest.")  # fmt: skip
    canvas.text(20, 26, "all images x all images", 18, "{soft}")
    for r in range(6):
        for c in range(6):
            chosen = (r, c) == (1, 4)
            fill = CLIP if chosen else "{panel}" if c >= r else "none"
            canvas.box(20 + 42 * c, 42 + 42 * r, 40, 40, fill, "{line}", stroke_width=1, rx=3, stroke_opacity=1 if c >= r else 0.25)
    canvas.line((230, 105), (330, 78), arrow=True)
    canvas.text(20, 320, "i < j: squares below the diagonal are not needed", 16, "{soft}")
    steps = (
        ("1  sieve", "a cheap upper bound throws", "nearly all pairs out"),
        ("2  cosines", "float32, both encoders,", "only for pairs that are left"),
        ("3  choice", "CLIP above, DINOv2 below;", "largest gap first"),
    )
    for n, (name, first, second) in enumerate(steps):
        y = 30 + 92 * n
        canvas.box(340, y, 400, 74, "{panel}", "{line}", rx=8)
        canvas.text(356, y + 44, name, 20, (CLIP, DINO, "{ink}")[n], font_weight="600")
        canvas.text(478, y + 32, first, 16)
        canvas.text(478, y + 56, second, 16)
        if n < 2:
            canvas.line((540, y + 75), (540, y + 91), arrow=True)
    canvas.write(IMAGES / "pair-search")


def _grid(canvas: Canvas, left: float, top: float, cell: float, colour: str, cells: int = 5) -> None:
    for n in range(cells + 1):
        canvas.line((left + n * cell, top), (left + n * cell, top + cells * cell), colour=colour)
        canvas.line((left, top + n * cell), (left + cells * cell, top + n * cell), colour=colour)


def _address(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


if __name__ == "__main__":
    main()
