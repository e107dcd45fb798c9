"""The counts of a selection: of all samples and tokens, and by source."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counts:
    """Numbers of scored records and answer tokens, and of those that are kept."""

    samples_kept: int
    samples_total: int
    tokens_kept: int
    tokens_total: int

    @property
    def sparsity(self) -> float:
        """Share of the scored answer tokens that get no loss."""
        return 1 - self.tokens_kept / self.tokens_total if self.tokens_total else 0.0


@dataclass(frozen=True)
class Summary(Counts):
    """The counts of a selection. They do not include text-only records, which are kept whole."""

    threshold: float | None
    """The threshold of the samples, in nats for VIG; None for a random selection."""
    failed: int
    """Records that could not be scored; training leaves them out."""
    text_only: int
    """Records without an image that the scoring run met."""
    measure: str = "VIG"
    """The name of the measure to which the threshold belongs."""
    sources: dict[str, Counts] = field(default_factory=dict)
    """The counts by source, if the selection has sources."""

    def __str__(self) -> str:
        rule = "at random" if self.threshold is None else f"with {self.measure} >= {self.threshold:.4f}"
        text = (
            f"{self.samples_kept} of {self.samples_total} samples and {self.tokens_kept} of {self.tokens_total} answer "
            f"tokens {rule}, sparsity {self.sparsity:.1%}"
        )
        text += f"; {self.text_only} text-only kept whole" if self.text_only else ""
        text += f"; {self.failed} failed left out" if self.failed else ""
        width = max(map(len, self.sources), default=0)
        for source, counts in self.sources.items():
            text += (
                f"\n  {source:<{width}}  {counts.samples_kept:>7} of {counts.samples_total:>7} samples  "
                f"{counts.tokens_kept:>9} of {counts.tokens_total:>9} answer tokens  sparsity {counts.sparsity:6.1%}"
            )
        return text
