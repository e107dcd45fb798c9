"""LocalModel answers by a model in this process: ours, or any image-text-to-text model of transformers with its processor."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from encoders import read_image
from encoders.saved_models import load_network, load_processor
from encoders.store.fingerprints import weights_digest
from mof.data.prompts import prompt_inputs, ready_for_prompts
from mof.evals.answering import Answer, Prompt
from mof.evals.decoding import Decoding

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # suffixes of files whose content `weights_digest` covers

# Shapes: B prompts (or options) of a batch, L tokens of the longest, N tokens of the longest option, V the vocabulary.


class LocalModel:
    """LocalModel gives greedy answers, in batches padded on the left, and log-likelihoods of options.

    In float32 the size of a batch does not change the answers; in 16 bits it may if two tokens are nearly as likely. Settings
    of a checkpoint for sampling, beams and repetition penalties are not followed: penalties count the padding, too.

    Args:
        model: the model, which is put into evaluation mode.
        processor: a processor with a chat template; without it (as for InstructBLIP) it gets the bare text.
        name: the model's name in tables.
        identity: text that differs between models, for the cache and the folder of an evaluation.
        decoding: a decoding method in place of plain decoding. There are no log-likelihoods then, as they would be plain.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        *,
        identity: str = "",
        batch_size: int = 8,
        max_new_tokens: int = 256,
        decoding: Decoding | None = None,
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(f"batch_size and max_new_tokens should be at least 1, got {batch_size} and {max_new_tokens}")
        self.model, self.processor, self.name, self.batch_size = model.eval(), processor, name, batch_size
        self._tokenizer, self.decoding = processor.tokenizer, decoding
        self._tokenizer.padding_side = "left"
        if not model.config.is_encoder_decoder:  # an encoder reads whole texts, with their end
            ready_for_prompts(processor)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._generation = copy.deepcopy(model.generation_config)
        # None would be taken from the checkpoint again.
        self._generation.update(
            do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, no_repeat_ngram_size=0,
            max_length=None, max_new_tokens=max_new_tokens, pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip
        self.settings: dict[str, Any] = {
            "kind": "model", "identity": identity, "dtype": str(model.dtype).removeprefix("torch."),
            "max_new_tokens": max_new_tokens, "decoding": "greedy" if decoding is None else str(decoding),
        }  # fmt: skip

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: str = "float32", device: str | None = None, trust_remote_code: bool = False, **options: Any
    ) -> LocalModel:
        """Load a folder that `save_pretrained` wrote, onto `device`, or else onto the GPU if there is a GPU.

        Its identity is made of the weights in memory, encoders included, and of the folder's other files.

        Args:
            trust_remote_code: run Python files of the folder; without it, a folder that needs its own files is refused.

        Raises:
            ValueError: for a folder without config.json, weights that are not finite, or a file that was changed since it was saved.
        """
        folder = Path(folder)
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
        model = load_network(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        for parameter_name, weights in model.named_parameters():
            if weights.is_floating_point() and not weights.isfinite().all():
                raise ValueError(
                    f"{folder}: {parameter_name} holds values that are not finite; its training diverged, or the file is damaged"
                )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        identity = f"weights {weights_digest(model)}, files {_files_digest(folder)}"
        return cls(model, processor, str(folder), identity=identity, **options)

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Yield the answers. A prompt whose image, template or pass raises gets an answer with the error."""
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            try:
                answers = self._answers(batch)
            except Exception:  # errors of any library; the other prompts of the batch are answered
                answers = [self._answer_alone(prompt) for prompt in batch]
            yield from enumerate(answers, start=start)

    def _answer_alone(self, prompt: Prompt) -> Answer:
        try:
            return self._answers([prompt])[0]
        except Exception as error:
            return Answer("", error=f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def _answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        made = self._generate(prompts)
        likelihoods = [self._option_likelihoods(prompt) for prompt in prompts]
        return [
            Answer(text, scores, used, written, option_tokens=lengths)
            for (text, used, written), (scores, lengths) in zip(made, likelihoods, strict=True)
        ]

    def _generate(self, prompts: Sequence[Prompt]) -> list[tuple[str, int, int]]:
        """Return text, number of tokens read and number of tokens written, per prompt."""
        chats = [_chat(prompt, None) for prompt in prompts]
        inputs = self.encode(chats)
        further = {} if self.decoding is None else self.decoding.options(chats, self.encode)
        ids = inputs["input_ids"]  # [B, L]
        tokens = self.model.generate(**inputs, **further, generation_config=self._generation)
        if tokens.shape[1] >= ids.shape[1] and torch.equal(tokens[:, : ids.shape[1]], ids):  # a few models give the prompt back
            tokens = tokens[:, ids.shape[1] :]  # [B, new]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        used = inputs["attention_mask"].sum(dim=1).tolist()
        made = (tokens != self._tokenizer.pad_token_id).sum(dim=1).tolist()
        return [(text.strip(), *counts) for text, *counts in zip(texts, used, made, strict=True)]

    def _option_likelihoods(self, prompt: Prompt) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None]:
        """Return the log-likelihood of each option's tokens after the prompt, and their numbers."""
        if not prompt.options or self.decoding is not None or self.model.config.is_encoder_decoder:
            return None, None
        start = self.encode([_chat(prompt, None)])
        alone = start["input_ids"][0][start["attention_mask"][0].bool()].tolist()
        inputs = self.encode([_chat(prompt, option) for option in prompt.options])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [B, L]
        lengths = [len(row) - _common(alone, row) for row in (row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))]
        longest = max(lengths)  # N
        takes_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        keep = {"logits_to_keep": longest + 1} if takes_keep else {}
        logits = self.model(**inputs, **keep).logits[:, -longest - 1 : -1].float()  # [B, N, V]
        targets = ids[:, -longest:]  # [B, N]
        scores = logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [B, N]
        sums = tuple(float(row[longest - length :].double().sum()) for row, length in zip(scores, lengths, strict=True))
        if any(map(math.isnan, sums)):
            raise ValueError(f"the logits hold NaN: {self.model.dtype} may overflow, so load the model as float32 or bfloat16")
        return sums, tuple(lengths)

    def encode(self, chats: Sequence[Any]) -> Any:
        """Return the model's inputs for conversations, all with the beginning of an answer or all without."""
        if self.processor.chat_template is None:
            texts = [_bare_text(chat) for chat in chats]
            images = [[part["image"] for message in chat for part in message["content"] if part["type"] == "image"] for chat in chats]
            if len({len(own) for own in images}) > 1:  # bare texts do not say whose images they are; each prompt is then tried alone
                raise ValueError(f"a batch has prompts with {', '.join(str(len(own)) for own in images)} images and no chat template")
            inputs = self.processor(images=[*chain.from_iterable(images)] or None, text=texts, padding=True, return_tensors="pt")
            return inputs.to(self.model.device, self.model.dtype)
        continues = chats[0][-1]["role"] == "assistant"
        options = {"add_generation_prompt": not continues, "continue_final_message": continues, "processor_kwargs": {"padding": True}}
        inputs = prompt_inputs(self.processor, chats, **options)
        return inputs.to(self.model.device, self.model.dtype)


def _chat(prompt: Prompt, option: str | None) -> list[dict[str, Any]]:
    """Return messages in the form that processors take, with the images in their parts."""
    chat = prompt.filled(lambda image: {"type": "image", "image": read_image(image)})
    return chat if option is None else [*chat, {"role": "assistant", "content": [{"type": "text", "text": option}]}]


def _bare_text(chat: Sequence[dict[str, Any]]) -> str:
    """Return the texts of a conversation, a line each, with the beginning of the answer in the last line."""
    parts = [(message["role"], part["text"]) for message in chat for part in message["content"] if part["type"] == "text"]
    lines = "\n".join(text for role, text in parts if role != "assistant")
    return " ".join([lines, *(text for role, text in parts if role == "assistant")])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def _files_digest(folder: Path) -> str:
    """Return a digest of the folder's configuration, tokenizer and chat template: all files but the weights."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in WEIGHTS):
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:32]
