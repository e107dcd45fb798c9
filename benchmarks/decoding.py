"""Time per token and memory of each decoding method against plain greedy decoding.

    python benchmarks/decoding.py                          # on the GPU where there is one
    python benchmarks/decoding.py --batch-size 4 --tokens 64

A LLaVA with a Llama of 8 layers, 512 wide, and a thin vision tower: 576 image tokens and 40 tokens of text per prompt. The times
are the shortest of --repeats, taken in turn in one process: seconds to the first token (the prompt), and milliseconds for each
further token. Peak memory beyond the model is measured in a process for each method (Linux; on a GPU, the device's memory). Read the
ratios: absolute times mean little on shared cores.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
from memory import peak, resident
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

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
    """Prompts with another picture each time, or without pictures."""
    text = torch.randint(10, VOCABULARY, (batch, TEXT_TOKENS))
    ids = torch.cat([text[:, :20], torch.full((batch, IMAGE_TOKENS), 5), text[:, 20:]], dim=1) if images else text
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made |= {"pixel_values": torch.randn(batch, 3, 336, 336).to(model.dtype)} if images else {}
    return {name: value.to(model.device) for name, value in made.items()}


def seconds(model: LlavaForConditionalGeneration, text: str, batch: int, tokens: int) -> float:
    options = {}
    inputs = prompts(model, batch, images=True)
    if text != "plain":
        method = build_decoding(text)
        options["custom_generate"] = method
        if method.contrasts:
            options["null_inputs"] = prompts(model, batch, images=method.null != "drop")
    start = time.perf_counter()
    made = model.generate(**inputs, **options, do_sample=False, max_new_tokens=tokens)
    made.cpu()  # waits for the device
    return time.perf_counter() - start


def peak_memory(model: LlavaForConditionalGeneration, text: str, batch: int, tokens: int) -> float:
    """The GB beyond the model, in this process (Linux), or on the GPU."""
    seconds(model, "plain", 1, 2)  # thread pools, workspaces
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(model, text, batch, tokens)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    before = resident()
    seconds(model, text, batch, tokens)
    return peak() - before


def memory_of(text: str, arguments: argparse.Namespace) -> float:
    sizes = ("--batch-size", str(arguments.batch_size), "--tokens", str(arguments.tokens))
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed is given back
    command = [sys.executable, __file__, "--memory", text, *sizes]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=at_once).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS[1:]))
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # a measurement in a process of its own
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(device)
    if arguments.memory:
        print(peak_memory(model, arguments.memory, arguments.batch_size, arguments.tokens))
        return
    methods = ("plain", *arguments.methods)
    prompt = dict.fromkeys(methods, float("inf"))
    whole = dict(prompt)
    for _ in range(arguments.repeats):
        for text in methods:
            prompt[text] = min(prompt[text], seconds(model, text, arguments.batch_size, 1))
            whole[text] = min(whole[text], seconds(model, text, arguments.batch_size, arguments.tokens))
    each = {text: 1000 * (whole[text] - prompt[text]) / (arguments.tokens - 1) for text in methods}
    for text in methods:
        print(
            f"{text:<12} prompt {prompt[text]:6.3f} s {prompt[text] / prompt['plain']:5.2f} x   "
            f"token {each[text]:7.2f} ms {each[text] / each['plain']:5.2f} x   all {whole[text] / whole['plain']:5.2f} x   "
            f"{memory_of(text, arguments):5.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
