"""Estimated lengths of records, and batches of like length."""

from support.one_step import arguments

from vig import SelectiveTrainer
from vig.training.lengths import TOKENS_OF_AN_IMAGE, estimated_length


def of(answer: str, **more) -> dict:
    return {"id": answer, "conversations": [{"from": "human", "value": "1234"}, {"from": "gpt", "value": answer}], **more}


def test_estimated_length() -> None:
    assert estimated_length(of("12345678")) == 3
    assert estimated_length(of("1234", images=["a.png", "b.png"])) == 2 + 2 * TOKENS_OF_AN_IMAGE
    assert estimated_length(of("1234", length=77)) == 77 and estimated_length(of("1234", n=5), "n") == 5
    assert estimated_length([{"role": "user", "content": "1234"}, {"role": "assistant", "content": "1234"}]) == 2
    assert estimated_length({"id": "odd"}) == estimated_length(None) == 0


def test_batches_are_of_like_length(llava, tmp_path) -> None:
    """Of records of two lengths, at most two batches mix them: the first, which has the longest, and that at the border."""
    data = [of("short" if number % 2 else "a much longer answer than that " * 4) for number in range(16)]
    args = arguments(tmp_path, train_sampling_strategy="group_by_length", gradient_accumulation_steps=1, num_train_epochs=1, max_steps=-1)
    trainer = SelectiveTrainer(llava[0], args, processing_class=llava[1], train_dataset=data, eval_dataset=data)
    for batches in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        padded = [bool((batch["attention_mask"] == 0).any()) for batch in batches]
        assert len(padded) in (2, 8) and sum(padded) <= 2
