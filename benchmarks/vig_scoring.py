"""Compare time and memory of `vig.score` with two plain forward passes per batch that make all logits, for the same token VIGs.

    python benchmarks/vig_scoring.py                       # vocabularies of 32k and 128k, some minutes on a CPU core
    python benchmarks/vig_scoring.py --vocabularies 32000 --repeats 3
    python benchmarks/vig_scoring.py --measures            # vig.score also gives logits and entropies, the plain way does not

The model is a LLaVA with a Llama of 8 layers and width 512, and a small vision tower. A record has 576 image tokens, three records have
the same image, and 12 % of a record's tokens are answers. Both methods start from the same records as tokens and pixels (the time for
reading them is not measured) and return the VIG of every answer token. The plain method takes 8 records at a time. Our method takes the
default number of tokens. Each method first scores the records of an image before the clock starts; our check of the first record against
a plain forward pass falls into this time, because a run does it once. The methods take turns, each time in a new process, which prints a
line. The shortest time of --repeats counts, and the peak memory beyond the model and the records (Linux). Compare the ratios, because
absolute times mean little on shared cores. A run with --measures on one core (commit 07830ac, one repeat; a study ran on the other core)
printed these ratios of the plain method to ours:

    vocabulary     vig.score: time, memory     with measures: time, memory
        32,000                   3.4,  5.6                       3.5,  6.5
       128,000                   5.7, 13.7                       5.4, 22.4

The time of the measures is less than the differences between runs. With MALLOC_MMAP_THRESHOLD_=262144 each array gets new memory from
the system, as earlier versions of this benchmark had it. This costs our method more: it was 2.9 and 4.7 times faster (2.7 and 4.3 with
measures), with 7.5 and 28 times less memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from memory import peak, resident
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mof.data.answer_tokens import Example
from mof.data.collator import collate
from vig.output_head import Values, cross_entropy, loss_logit_entropy
from vig.scoring.answer_losses import AnswerLosses
from vig.scoring.batches import Batch, make_batches
from vig.scoring.pairs import Pair

IMAGE_TOKENS, SYSTEM_TOKENS, IMAGES, RECORDS_PER_IMAGE = 576, 35, 8, 3
BATCH = 8  # records of a plain batch
ANSWERS = 0.12  # share of answers among a record's tokens


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=vocabulary, initializer_range=0.05
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=5)).eval()


def build_pairs(vocabulary: int) -> list[Pair]:
    """Return records of 701 to 760 tokens in a shuffled order. The null image is another random image."""
    rng = np.random.default_rng(0)
    system = rng.integers(10, vocabulary, SYSTEM_TOKENS).tolist()
    pairs = []
    for image in range(IMAGES):
        pixels = [torch.from_numpy(rng.standard_normal((1, 3, 336, 336), dtype=np.float32)) for _ in range(2)]
        for index in range(RECORDS_PER_IMAGE):
            start = SYSTEM_TOKENS + IMAGE_TOKENS
            total = int(rng.integers(start + 90, start + 150))
            answers = round(ANSWERS * total)
            ids = torch.tensor([*system, *[5] * IMAGE_TOKENS, *rng.integers(10, vocabulary, total - start).tolist()])
            mask = torch.arange(total) >= total - answers
            clean, null = (Example(f"{image}-{index}", ids, mask, {"pixel_values": image}) for image in pixels)
            pairs.append(Pair(clean.id, "", clean, null, np.array([], dtype=np.int64), str(image), start))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def plain(model: LlavaForConditionalGeneration, pairs: list[Pair]) -> dict[str, np.ndarray]:
    """Return id -> token VIGs, from two forward passes per batch with the logits of all positions."""
    result = {}
    for start in range(0, len(pairs), BATCH):
        taken = pairs[start : start + BATCH]
        losses = []
        for examples in ([pair.clean for pair in taken], [pair.null for pair in taken]):
            batch = collate(examples, 0)
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits.float()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
            losses.append(loss.view(len(taken), -1))
        for row, pair in enumerate(taken):
            answers = labels[row, 1:] != -100
            result[pair.id] = (losses[1] - losses[0])[row, answers].numpy()
    return result


class Ours:
    """Ours returns id -> token VIGs, computed as in `vig.score`."""

    def __init__(self, values: Values, model: LlavaForConditionalGeneration) -> None:
        self.losses = AnswerLosses(model, 0, values)

    def __call__(self, pairs: list[Pair], batch_tokens: int = 16384) -> dict[str, np.ndarray]:
        result = {}
        for batch in make_batches(pairs, batch_tokens, 64):
            both = (self.losses(branch, batch.prefix) for branch in _branches(batch))  # [N] or [N, 3] each
            clean, null = (values.view(len(values), -1)[:, 0] for values in both)  # [N], [N]
            counts = [int(pair.clean.answer_mask.sum()) for pair in batch.pairs]
            for pair, vig in zip(batch.pairs, (null - clean).split(counts), strict=True):
                result[pair.id] = vig.numpy()
        return result


def _branches(batch: Batch) -> tuple[list[list[Example]], list[list[Example]]]:
    return [[pair.clean for pair in group] for group in batch.groups], [[pair.null for pair in group] for group in batch.groups]


METHODS: dict[str, Callable[[LlavaForConditionalGeneration], Callable[[list[Pair]], dict[str, np.ndarray]]]] = {
    "two plain forwards": lambda model: partial(plain, model),
    "vig.score": partial(Ours, cross_entropy),
    "with measures": partial(Ours, loss_logit_entropy),
}


def measure(method: str, vocabulary: int, file: str) -> None:
    """Print the seconds and the peak memory in GB beyond model and records, in this process (Linux). Write the token VIGs into `file`."""
    model, pairs = build_model(vocabulary), build_pairs(vocabulary)
    score = METHODS[method](model)
    score([pair for pair in pairs if pair.images == pairs[0].images])  # a first run for thread pools, workspaces and our check
    before, start = resident(), time.perf_counter()
    result = score(pairs)
    print(time.perf_counter() - start, peak() - before)
    np.savez(file, **result)


def run(method: str, vocabulary: int, file: Path) -> tuple[float, float]:
    """Return what `measure` prints in a new process."""
    command = [sys.executable, __file__, "--measure", method, str(vocabulary), str(file)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    seconds, memory = map(float, printed.split())
    print(f"vocabulary {vocabulary:>7,}  {method:<18} {seconds:7.2f} s  {memory:5.2f} GB", flush=True)
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measures", action="store_true", help="measure vig.score with all measures of a token, too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a measurement in a separate process
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.measure:
        method, vocabulary, file = arguments.measure
        measure(method, int(vocabulary), file)
        return
    slow, *fast = methods = [name for name in METHODS if arguments.measures or name != "with measures"]
    for vocabulary in arguments.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.npz" for name in methods}
            runs = [{name: run(name, vocabulary, files[name]) for name in methods} for _ in range(arguments.repeats)]
            results = {name: dict(np.load(file)) for name, file in files.items()}
        seconds, memory = ({name: min(each[name][part] for each in runs) for name in methods} for part in (0, 1))
        for name in fast:
            apart = max(float(np.abs(results[name][id] - vigs).max()) for id, vigs in results[slow].items())
            print(
                f"vocabulary {vocabulary:>7,}  {name:<18} {seconds[slow] / seconds[name]:7.2f} x faster  "
                f"{memory[slow] / memory[name]:5.1f} x less memory  largest difference {apart:.1e} nats",
                flush=True,
            )


if __name__ == "__main__":
    main()
