"""Compare decoding methods on trained models of the miniature, each beside the controls that the critique (arXiv 2504.10020) demands.

    python recipes/train_llava_mof_vig.py --output runs/default
    python recipes/compare_decoding.py runs/default/seed-0/finetune-interleaved* --output decoding.json --plot decoding.png
    python recipes/compare_decoding.py runs/smollm2_photos/seed-0/* --photos DATA --output photos.json  # CHAIR on COCO's photos

Every model answers the same questions about held-out scenes: pairs (MMVP's form), questions after a false statement, POPE's yes-or-no
questions, and requests for a caption (CHAIR). Each method has its published default and three strengths, decoded greedily. Controls:
- `sampled` answers are drawn at temperature 1, as VCD's and ICD's are; `sampled, cut alone` keeps tokens with p >= 0.1 max p
  and contrasts nothing. Under greedy decoding, the cut alone changes no answer.
- `yes prompt` asks, before each yes-or-no question, to say yes where possible; `yes +c` adds c to the logit of "Yes".
VAR's published tau of 20 is above every |RMSNorm(h)| of a model 192 wide: 4.3 is the same share of the highest value that is possible.
LACING's models were trained with blank images in some records, and these were not. mini-lm has 4 layers, so PAI edits two and VAR one.
PAI's attention alone (gamma=1) and its guidance alone (alpha=0) were added after the first run.

recipes/predictions.md holds the predictions, which were written down before the first run.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from encoders.console import Console
from encoders.images.reading import read_image
from encoders.runs import versions
from encoders.saved_models import load_network, load_processor
from encoders.whole_files import write_json
from mof.data.prompts import ready_for_prompts
from mof.evals.chair import CocoWords, read_objects, score_chair
from mof.evals.mmvp import read_mmvp
from mof.evals.mmvp import score as score_pairs
from mof.evals.option_matching import match_answer
from mof.evals.pope import read_pope, says_neither, score_pope
from mof.evals.text_tables import TextTable
from mof.miniature.benchmarks import CHAIR, IMAGES, MMVP, POPE, write_benchmarks
from mof.miniature.language import DESCRIBE
from mof.miniature.misleading import misleading_questions
from study.command import Options, run_recipe
from study.decoding_plot import plot_decoding
from vig.analyses.misleading_text import named_option
from vig.decoding import build_decoding

console = Console()
Row = dict[str, Any]
Rows = Sequence[Row]
BATCH = 64
MEASURES = ("pairs", "misled", "yes or no", "captions")
SHARE = 20 / 4096**0.5  # VAR's tau over the highest |RMSNorm(h)| that the 7B model allows


@dataclass(frozen=True)
class Way:
    """A way is a way to decode: a decoding method or a control."""

    name: str
    decoding: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `generate`."""
    before: str = ""
    """Text before each yes-or-no question."""
    yes: float = 0.0
    """The number that is added to the logit of the token that makes an answer "Yes" in place of "No"."""
    measures: tuple[str, ...] = MEASURES


def ways(width: int) -> list[Way]:
    """Return all ways for a language model of this width."""
    tau = f"var:tau={SHARE * width**0.5:.2f}"
    greedy = {
        "vcd": ["vcd", "vcd:alpha=0.25", "vcd:alpha=0.5", "vcd:alpha=2"],
        "icd": ["icd", "icd:alpha=0.25", "icd:alpha=0.5", "icd:alpha=2"],
        "m3id": ["m3id", "m3id:decay=0.1", "m3id:decay=0.3", "m3id:decay=1"],
        "pai": [
            "pai",
            "pai:alpha=0.5:gamma=1",
            "pai:alpha=0:gamma=2",
            "pai:alpha=0.5:gamma=1.5",
            "pai:alpha=0.5:gamma=2",
            "pai:alpha=1:gamma=3",
        ],
        "var": [tau, f"{tau}:keep=0", "var:tau=3", "var:tau=3:keep=0"],
        "lacing": ["lacing", "lacing:scale=1.25", "lacing:scale=2", "lacing:scale=2.5"],
    }
    sample = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    told, asked = ("yes or no",), ("pairs", "yes or no", "captions")
    return [
        Way("greedy"),
        *(Way(text, text) for texts in greedy.values() for text in texts),
        *(Way(f"yes {value:+g}", yes=value, measures=told) for value in (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)),
        Way("yes prompt", before="Whenever possible, please select Yes. ", measures=told),
        Way("sampled", options=sample, measures=asked),
        Way("sampled, cut alone", options={**sample, "min_p": 0.1}, measures=asked),
        *(Way(f"sampled, {text}", text, sample, measures=asked) for text in ("vcd", "icd")),
    ]


class YesBias(LogitsProcessor):
    """YesBias adds a constant to the logit of a token, where sequences have this length."""

    def __init__(self, length: int, token: int, constant: float) -> None:
        self.length, self.token, self.constant = length, token, constant

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            scores[:, self.token] += self.constant
        return scores


class Answerer:
    """Answerer is a saved model of the miniature that answers questions about images in batches."""

    def __init__(self, folder: Path) -> None:
        self.processor = load_processor(folder)
        self.model = load_network(folder).eval()
        self.processor.tokenizer.padding_side = "left"
        ready_for_prompts(self.processor)
        remember(self.model.mixer)
        self.common, self.yes = self._yes()

    def answers(self, questions: Sequence[tuple[Any, str]], way: Way, tokens: int, seed: int) -> list[str]:
        """Return the answers to questions, each given as (image, question)."""
        torch.manual_seed(seed)
        method = None if way.decoding is None else build_decoding(way.decoding)
        made: list[str] = []
        for start in range(0, len(questions), BATCH):
            chats = [self._chat(*question) for question in questions[start : start + BATCH]]
            inputs = self._encode(chats)
            length = inputs["input_ids"].shape[1]
            options = {"do_sample": False, **way.options, **(method.options(chats, self._encode) if method else {})}
            if way.yes:
                options["logits_processor"] = [YesBias(length + self.common, self.yes, way.yes)]
            ids = self.model.generate(**inputs, **options, max_new_tokens=tokens)
            made += [text.strip() for text in self.processor.batch_decode(ids[:, length:], skip_special_tokens=True)]
        return made

    @staticmethod
    def _chat(picture: Any, question: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "image": read_image(picture)}, {"type": "text", "text": question}]}]

    def _encode(self, chats: list[Any], **options: Any) -> Any:
        shared = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
        return self.processor.apply_chat_template(chats, **{"add_generation_prompt": True, **shared, **options})

    def _yes(self) -> tuple[int, int]:
        """Return the number of tokens with which both "Yes." and "No." begin, and the next token of "Yes."."""
        talk = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompt = self._encode([talk])["input_ids"].shape[1]
        said = ({"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in ("Yes.", "No."))
        yes, no = (self._encode([[*talk, turn]], add_generation_prompt=False)["input_ids"][0, prompt:].tolist() for turn in said)
        common = next(place for place, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other)
        return common, yes[common]


def remember(mixer: nn.Module) -> None:
    """Make the mixer keep the tokens of each image, because hundreds of questions are about the same images."""
    known: dict[bytes, Tensor] = {}
    genuine: Callable[[Tensor], Tensor] = mixer.forward

    def forward(pixels: Tensor) -> Tensor:
        keys = [picture.numpy().tobytes() for picture in pixels]
        new = {key: picture for key, picture in zip(keys, pixels, strict=True) if key not in known}
        if new:
            known.update(zip(new, genuine(torch.stack(list(new.values()))), strict=True))
        return torch.stack([known[key] for key in keys])

    mixer.forward = forward


@dataclass(frozen=True)
class Questions:
    """Questions holds the questions of a benchmark, and the function that computes figures from their answers."""

    asked: list[tuple[Any, str]]
    """(image, question)."""
    tokens: int
    figures: Callable[[list[str]], dict[str, Any]]


def draw(folder: Path, pairs: int, scenes: int, seed: int) -> dict[str, Questions]:
    """Draw the benchmarks into the folder, and return the questions of each."""
    write_benchmarks(folder, pairs=pairs, scenes=scenes, seed=seed)
    rows = read_mmvp(folder / MMVP)
    misled = misleading_questions(math.ceil(pairs / 2), np.random.default_rng(seed))
    pope = read_pope(folder / POPE)
    distinct = list(dict.fromkeys((question.image, question.text) for question in pope))  # the three strategies share most questions
    place = {key: number for number, key in enumerate(distinct)}

    def of_pairs(answers: list[str]) -> dict[str, Any]:
        right = [match_answer(text, row.options) == row.labels["released"] for row, text in zip(rows, answers, strict=True)]
        return {"accuracy": score_pairs(rows, right).pair_accuracy, "words": mean_words(answers), "right": right}

    def of_misled(answers: list[str]) -> dict[str, Any]:
        right = [named_option(text, row["options"]) == row["answer"] for row, text in zip(misled, answers, strict=True)]
        return {"accuracy": float(np.mean(right)), "right": right}

    def of_pope(answers: list[str]) -> dict[str, Any]:
        every = [answers[place[question.image, question.text]] for question in pope]
        figures = score_pope(pope, every)["mean"]
        return {**figures, "neither": float(np.mean(list(map(says_neither, answers)))), "words": mean_words(answers)}

    told = [(row["image"], f"{row['false_statement']}\n{row['question']}") for row in misled]
    return {
        "pairs": Questions([(row.image, row.question) for row in rows], 16, of_pairs),
        "misled": Questions(told, 16, of_misled),
        "yes or no": Questions([(folder / IMAGES / image, text) for image, text in distinct], 4, of_pope),
        "captions": captions_of(folder / IMAGES, folder / CHAIR, folder / CHAIR / "synonyms.txt", "", DESCRIBE, 90),
    }


def captions_of(images: Path, annotations: Path, synonyms: Path, end: str, request: str, tokens: int) -> Questions:
    """Return CHAIR's request for a caption of each image, with COCO's files `instances{end}.json` and `captions{end}.json`."""
    words, pictures = CocoWords(synonyms), sorted(images.iterdir())
    objects = read_objects(words, [annotations / f"instances{end}.json"], [annotations / f"captions{end}.json"])

    def figures(answers: list[str]) -> dict[str, Any]:
        captions = {str(int(file.stem)): text for file, text in zip(pictures, answers, strict=True)}
        score = score_chair(words, objects, captions)
        return {"chair_i": score.chair_i, "chair_s": score.chair_s, "words": score.mean_length, "mentions": score.mentions_per_caption}

    return Questions([(file, request) for file in pictures], tokens, figures)


def mean_words(answers: Sequence[str]) -> float:
    return float(np.mean([len(text.split()) for text in answers]))


def measure(folder: Path, benchmarks: Mapping[str, Questions], known: Rows, names: Sequence[str] | None, seed: int) -> Iterator[Row]:
    """Yield a row with the figures of each way to decode (or of those with these names), of one model. Known figures are taken over."""
    answerer = Answerer(folder)
    key = {"model": folder.name, "seed": folder.parent.name}
    for way in ways(answerer.model.config.get_text_config().hidden_size):
        row = next((row for row in known if row.items() >= {**key, "way": way.name}.items()), {**key, "way": way.name, "seconds": 0.0})
        missing = [name for name in way.measures if name in benchmarks and name not in row]
        if way.name not in (names or [way.name]) or not missing:
            continue
        started = time.perf_counter()
        for name in missing:
            questions = benchmarks[name]
            asked = [(picture, way.before + text) for picture, text in questions.asked]
            row = {**row, name: questions.figures(answerer.answers(asked, way, questions.tokens, seed))}
        yield {**row, "seconds": row["seconds"] + time.perf_counter() - started}


def table_of(rows: Sequence[dict[str, Any]], model: str) -> TextTable:
    """Return a table with a model's figures in % (means over seeds), and the gain of each way in pairs with a 95 % interval over pairs."""
    headings = {
        "pairs": ("pairs", "accuracy"), "misled": ("misled", "accuracy"), "yes or no": ("yes or no", "accuracy"),
        "says yes": ("yes or no", "yes_ratio"), "F1": ("yes or no", "f1"), "CHAIR s": ("captions", "chair_s"),
    }  # fmt: skip
    cells = {}
    ours = [row for row in rows if row["model"] == model]
    for way in dict.fromkeys(row["way"] for row in ours):
        same = [row for row in ours if row["way"] == way]
        shares = [mean_of(same, *keys) for keys in headings.values()]
        length = mean_of(same, "captions", "words")
        shown = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        cells[way] = [*shown, "" if length is None else f"{length:.1f}", gain_in_pairs(ours, way)]
    return TextTable(f"{model}, %", [*headings, "words of a caption", "gain in pairs"], cells, "way")


def gain_in_pairs(rows: Sequence[dict[str, Any]], way: str) -> str:
    """Return the gain in points over greedy decoding, or for sampled ways over plain sampling, on the same pairs of all seeds."""
    base = "sampled" if way.startswith("sampled") else "greedy"
    asked = [row for row in rows if "right" in row.get("pairs", {})]
    right = {(row["way"], row["seed"]): np.array(row["pairs"]["right"]).reshape(-1, 2).all(axis=1) for row in asked}
    seeds = [seed for name, seed in right if name == way and (base, seed) in right]
    if way == base or not seeds:
        return ""
    gains = 100 * np.concatenate([right[way, seed].astype(float) - right[base, seed] for seed in seeds])  # [pairs of all seeds]
    return f"{gains.mean():+.1f} \u00b1{1.96 * gains.std(ddof=1) / len(gains) ** 0.5:.1f}"


def mean_of(rows: Sequence[dict[str, Any]], measure: str, figure: str) -> float | None:
    values = [row[measure][figure] for row in rows if row.get(measure, {}).get(figure) is not None]
    return float(np.mean(values)) if values else None


def known_rows(file: Path, drawn: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows in the file, or an empty list without a file.

    Raises:
        ValueError: for a file with answers to other questions.
    """
    if not file.exists():
        return []
    content = json.loads(file.read_text())
    if content["drawn"] != drawn:
        raise ValueError(f"{file} has answers to other questions ({content['drawn']}, not {drawn}): give another --output")
    return content["rows"]


def main() -> None:
    options = Options(__doc__)
    options.add_argument("models", type=Path, nargs="+", help="folders of saved models, SEED/NAME: rows of one name are seeds of a model")
    options.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    options.add_argument("--ways", nargs="+", help="names of ways as the table has them; default: all")
    options.add_argument("--pairs", type=int, default=15, help="pairs for each of the nine patterns; half as many are asked misled")
    options.add_argument("--scenes", type=int, default=60, help="scenes for yes-or-no questions and captions")
    options.add_argument("--seed", type=int, default=5, help="seed of the held-out scenes, and of sampling")
    options.add_argument("--photos", type=Path, help="folder with COCO's photos and annotations, whose captions are asked for instead")
    options.add_argument("--plot", type=Path, help="PNG or SVG file")
    options.output("JSON file for the figures; answers that it has are not asked for again", required=True)
    args = options.parse_args()
    drawn = {"pairs": args.pairs, "scenes": args.scenes, "seed": args.seed} | ({"photos": args.photos.name} if args.photos else {})
    rows = known_rows(args.output, drawn)
    with tempfile.TemporaryDirectory() as folder:
        if args.photos:
            coco, synonyms = args.photos / "coco", args.photos / "chair/synonyms.txt"
            every = {"captions": captions_of(coco / "train2017", coco, synonyms, "_train", "Describe this image in one sentence.", 40)}
        else:
            every = draw(Path(folder) / "benchmarks", args.pairs, args.scenes, args.seed)
        benchmarks = {name: every[name] for name in args.measures if name in every}
        for model in args.models:
            for row in measure(model, benchmarks, rows, args.ways, args.seed):
                rows = [old for old in rows if any(old[key] != row[key] for key in ("model", "seed", "way"))] + [row]
                write_json(args.output, {"rows": rows, "drawn": drawn, "versions": versions("torch", "transformers")})
                console.print(f"{row['seed']}/{row['model']}: {row['way']}, {row['seconds']:.0f} s")
    console.print(*(table_of(rows, model) for model in dict.fromkeys(row["model"] for row in rows)))
    if args.plot:
        plot_decoding(rows, args.plot)


if __name__ == "__main__":
    run_recipe(main)
