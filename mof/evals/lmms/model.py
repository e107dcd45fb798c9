"""MofLmms makes any saved image-text-to-text model a model of lmms-eval."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from encoders.progress import tracked
from mof.evals.answerers import LocalModel
from mof.evals.answering import Answer, AnswerCache, Prompt, answer_all
from mof.evals.decoding import load_decoding

LONGEST_ANSWER = 1024  # tokens, if a task sets no limit


class MofLmms(lmms):
    """MofLmms answers by `mof.evals.answerers.LocalModel`: greedily, also if a task asks for a temperature.

    Args:
        pretrained: folder of a saved model with its processor.
        cache: file that keeps answers, so that a run that was cut off goes on where it stopped.
        device: by default the GPU, if there is one.
        decoding: a decoding method, NAME[:OPTION=VALUE...]. There are no log-likelihoods then.

    Raises:
        ValueError: for a folder without a model, several processes, or a batch size that is no number.
    """

    is_simple = True  # lmms-eval's word for: takes an image and a text, not messages

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "float32",
        batch_size: int | str = 8,
        cache: str | None = None,
        device: str | None = None,
        decoding: str | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("mof runs in one process: start lmms-eval without accelerate or torchrun")
        if not str(batch_size).isdigit():  # lmms-eval also has "auto", which tries sizes out on models of its own
            raise ValueError(f"batch_size must be a number for mof, got {batch_size!r}: give the number of prompts in a batch, as in 8")
        size, method = int(batch_size), load_decoding(decoding)
        self._loaded = LocalModel.load(pretrained, dtype=dtype, device=device, batch_size=size, decoding=method)
        self.unanswered: dict[str, list[str]] = {}
        """Task -> the reasons why prompts have no answer. lmms-eval takes each of them for an empty answer."""
        self._cache = None if cache is None else AnswerCache(Path(cache))

    @property
    def settings(self) -> dict[str, Any]:
        """Return everything that can change an answer, except its length, which each task sets."""
        return {name: value for name, value in self._loaded.settings.items() if name != "max_new_tokens"}

    def _answerer(self, max_new_tokens: int) -> LocalModel:
        """Return the same model, with another length of answers."""
        loaded = self._loaded
        return LocalModel(
            loaded.model, loaded.processor, loaded.name, identity=loaded.settings["identity"], batch_size=loaded.batch_size,
            max_new_tokens=max_new_tokens, decoding=loaded.decoding,
        )  # fmt: skip

    def _answer(self, prompts: Sequence[Callable[[], Prompt]], max_new_tokens: int) -> list[Answer]:
        """Answer prompts that are made a batch at a time: their images would not all fit into memory."""
        answerer, size = self._answerer(max_new_tokens), self._loaded.batch_size
        answers: list[Answer] = []
        for start in tracked(range(0, len(prompts), size), "batches"):
            answers += answer_all(answerer, [make() for make in prompts[start : start + size]], self._cache)[0]
        return answers

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        by_length: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            by_length.setdefault(int(request.args[1].get("max_new_tokens", LONGEST_ANSWER)), []).append(place)
        results: dict[int, GenerationResult] = {}
        for length, places in by_length.items():
            answers = self._answer([partial(self._prompt, requests[place]) for place in places], length)
            for place, answer in zip(places, answers, strict=True):
                if answer.error is not None:
                    self.unanswered.setdefault(requests[place].args[4], []).append(answer.error)
                counts = TokenCounts(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
                results[place] = GenerationResult(cut(answer.text, requests[place].args[1].get("until")), counts)
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (loss, whether greedy decoding begins with the continuation). lmms-eval takes the least, so this is a loss."""
        if not requests:
            return []
        options = [self._continuation(request) for request in requests]
        longest = max(len(self._loaded.processor.tokenizer(option).input_ids) for option in options)
        prompts = [partial(self._prompt, request, (option,)) for request, option in zip(requests, options, strict=True)]
        losses = []
        for answer, option in zip(self._answer(prompts, longest), options, strict=True):
            if answer.error is not None:
                raise ValueError(f"a prompt has no answer: {answer.error}")
            if answer.log_likelihoods is None:
                raise ValueError(f"{self._loaded.name} gives no log-likelihoods: choose tasks that generate")
            losses.append((-answer.log_likelihoods[0], answer.text.startswith(option.strip())))
        return losses

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("several rounds of questions: not among the benchmarks of our suites")

    def document(self, request: Instance) -> Any:
        id, task, split = request.args[3:6]
        return self.task_dict[task][split][id]

    def _prompt(self, request: Instance, options: tuple[str, ...] = ()) -> Prompt:
        context, _, to_visual = request.args[:3]
        images = (to_visual(self.document(request)) if to_visual is not None else None) or []
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"task {request.args[4]} shows something else than images; mof takes images only")
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": context}]
        return Prompt(str(request.args[3]), [{"role": "user", "content": content}], list(images), options)

    def _continuation(self, request: Instance) -> str:
        target = request.args[1]
        return str(target if isinstance(target, str) else target(self.document(request)))


def cut(text: str, stops: str | Sequence[str] | None) -> str:
    """Return the text before the first of the stops."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
