"""Compare time per token and memory of each decoding method with plain greedy decoding.

    python benchmarks/decoding.py                          # on the GPU if there is a GPU
    python benchmarks/decoding.py --batch-size 4 --tokens 64

The model is a LLaVA with a Llama of 8 layers and width 512, and a small vision tower. A prompt has 576 image tokens and 40 tokens of
text. The methods take turns, and the shortest time of --repeats counts: seconds to the first token (the prompt), and milliseconds of the
median further token. Peak memory is the memory beyond the model (Linux; on a GPU, the device's memory). Compare the ratios, because
absolute times mean little on shared cores.
"""

import argparse
import ctypes
import statistics
import time
from typing import Any

import torch
from memory import peak, resident
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StoppingCriteria, StoppingCriteriaList

from vig.decoding import build_decoding

IMAGE_TOKENS, TEXT_TOKENS, VOCABULARY = 576, 40, 32_000
METHODS = ("plain", "vcd", "icd", "m3id", "lacing", "pai:alpha=0", "pai:gamma=1", "pai", "var")


def build_model(device: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=VOCABULARY, initializer_range=0.05
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=5)).eval().to(device)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=[5])
    return model.bfloat16() if device == "cuda" else model


def prompts(model: LlavaForConditionalGeneration, batch: int, images: bool) -> dict[str, torch.Tensor]:
    """Return prompts, with new random images each time or without images."""
    text = torch.randint(10, VOCABULARY, (batch, TEXT_TOKENS))
    ids = torch.cat([text[:, :20], torch.full((batch, IMAGE_TOKENS), 5), text[:, 20:]], dim=1) if images else text
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made |= {"pixel_values": torch.randn(batch, 3, 336, 336).to(model.dtype)} if images else {}
    return {name: value.to(model.device) for name, value in made.items()}


class Clock(StoppingCriteria):
    """Clock records the time after each token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        input_ids[:, -1].cpu()  # waits for the device
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def seconds(model: LlavaForConditionalGeneration, text: str, batch: int, tokens: int) -> tuple[float, float]:
    """Return the seconds to the first token, and the seconds of the median further token."""
    options: dict[str, Any] = {}
    inputs = prompts(model, batch, images=True)
    if text != "plain":
        method = build_decoding(text)
        options["custom_generate"] = method
        if method.contrasts:
            options["null_inputs"] = prompts(model, batch, images=method.null != "drop")
    clock = Clock()
    model.generate(**inputs, **options, do_sample=False, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([clock]))
    first, *further = (after - before for before, after in zip(clock.times, clock.times[1:], strict=False))
    return first, statistics.median(further)


def peak_memory(model: LlavaForConditionalGeneration, text: str, batch: int, tokens: int) -> float:
    """Return the peak memory in GB beyond the model, in this process (Linux) or on the GPU."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(model, text, batch, tokens)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    before = resident()
    seconds(model, text, batch, tokens)
    return peak() - before


def give_back_above(size: int) -> None:
    """Make the C library give back each freed piece of memory of at least `size` bytes at once (Linux)."""
    ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS[1:]))
    arguments = parser.parse_args()
    size = arguments.batch_size, arguments.tokens
    methods = ("plain", *arguments.methods)
    give_back_above(2**18)
    model = build_model("cuda" if torch.cuda.is_available() else "cpu")
    seconds(model, "plain", 1, 2)  # thread pools, workspaces
    memory = {text: peak_memory(model, text, *size) for text in methods}
    give_back_above(2**25)  # the library's own setting
    times = {text: [seconds(model, text, *size)] for text in methods}
    for _ in range(arguments.repeats - 1):
        for text in methods:
            times[text].append(seconds(model, text, *size))
    best = {text: [min(measured) for measured in zip(*times[text], strict=True)] for text in methods}
    for text, (first, each) in best.items():
        print(
            f"{text:<12} prompt {first:6.3f} s {first / best['plain'][0]:5.2f} x   token {1000 * each:7.2f} ms "
            f"{each / best['plain'][1]:5.2f} x   {memory[text]:5.2f} GB {memory[text] / memory['plain']:5.2f} x"
        )


if __name__ == "__main__":
    main()
