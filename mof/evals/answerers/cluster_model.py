"""ClusterModel answers prompts by a model on each actor of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from encoders.cluster import Cluster, GivenUp, worked
from mof.evals.answerers.local_model import LocalModel
from mof.evals.answering import Answer, Prompt


@dataclass(frozen=True)
class PromptItem:
    """A PromptItem holds prompts that are answered together."""

    start: int
    """The position of the first among all prompts."""
    prompts: Sequence[Prompt]

    def halves(self) -> list[PromptItem]:
        middle = len(self.prompts) // 2
        return [PromptItem(self.start, self.prompts[:middle]), PromptItem(self.start + middle, self.prompts[middle:])] if middle else []


class ClusterModel:
    """ClusterModel sends a `LocalModel` to the actors. It answers in the batches of the `LocalModel`."""

    def __init__(self, model: LocalModel, cluster: Cluster) -> None:
        self.name, self.settings, self._model, self._cluster = model.name, model.settings, model, cluster

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Yield the answers. Prompts that kill every process that answers them get an answer with the error."""
        size = self._model.batch_size
        items = (PromptItem(start, prompts[start : start + size]) for start in range(0, len(prompts), size))
        for _, parts in worked(partial(ModelOnActor, self._model), items, self._cluster):
            for part, answers in parts:
                if isinstance(answers, GivenUp):
                    answers = [Answer("", error=answers.reason)] * len(part.prompts)
                yield from enumerate(answers, start=part.start)


class ModelOnActor:
    """ModelOnActor is the function that answers the prompts of an item."""

    def __init__(self, model: LocalModel) -> None:
        model.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model

    def __call__(self, item: PromptItem) -> list[Answer]:
        return [answer for _, answer in sorted(self._model.answer(item.prompts), key=lambda pair: pair[0])]
