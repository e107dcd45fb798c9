"""A summary counts the samples and tokens of a selection, all together and by source."""

from __future__ import annotations

from dataclasses import dataclass, field

IN_NATS = ("VIG", "visnec", "entropy", "excess loss")
"""The measures whose values are differences of losses or entropies."""

MUCH = 0.4
"""The summary warns if at least this share of the helped tokens has no loss. In the study of noise (docs/results/noise.md), the share was
from 47 to 69 % in eleven selections that lost from 9 to 55 points and in one selection that gained 12; it was 0 in the seven selections
that gained from 12 to 33."""

ACCIDENTS = 0.1
"""The summary warns if at least this share of the samples is kept for words that the scorer cannot predict. In the same study, the share
was 18 and 12 % in two selections that lost 44 and 39 points, and from 0 to 3 % in the selections that gained. It was 16 and 17 % where two
fifths of the answers were an unseen sentence, or in another language: VIG then kept most of these."""


@dataclass(frozen=True)
class Counts:
    """Counts holds the numbers of scored and of kept records and answer tokens."""

    samples_kept: int
    samples_total: int
    tokens_kept: int
    tokens_total: int

    @property
    def sparsity(self) -> float:
        """Return the share of the scored answer tokens that get no loss."""
        return 1 - self.tokens_kept / self.tokens_total if self.tokens_total else 0.0


@dataclass(frozen=True)
class Summary(Counts):
    """Summary holds the counts of a selection. They do not include text-only records, which are kept whole."""

    threshold: float | None
    """The threshold of the samples, in nats for VIG; None for a random selection."""
    failed: int
    """Records that could not be scored; training leaves them out."""
    text_only: int
    """Records without an image that the scoring run met."""
    lowest: float | None = None
    """The lowest threshold of a source, where quotas give the sources different thresholds."""
    measure: str = "VIG"
    """The name of the measure to which the threshold belongs."""
    sources: dict[str, Counts] = field(default_factory=dict)
    """The counts by source, if the selection has sources."""
    helped_left_out: float = 0.0
    """Share of the kept samples' answer tokens that the image helped and that get no loss; 0 for a random selection, and for a measure that
    does not tell help from harm."""
    by_accident: float = 0.0
    """Share of the kept samples whose words have a mean loss of at least 3 nats, and that would not be among as many samples whose words
    the image made most probable; 0 for fewer than 50 records, for a random selection, and for a measure that does not tell help from
    harm."""

    def __str__(self) -> str:
        rule = "at random" if self.threshold is None else f"with {self.measure} >= {self._thresholds()}"
        text = (
            f"{self.samples_kept} of {self.samples_total} samples and {self.tokens_kept} of {self.tokens_total} answer "
            f"tokens {rule}, sparsity {self.sparsity:.1%}"
        )
        text += f"; {self.text_only} text-only kept whole" if self.text_only else ""
        text += f"; {self.failed} failed left out" if self.failed else ""
        text += "".join(f"\n{warning}" for warning in self.warnings)
        width = max(map(len, self.sources), default=0)
        for source, counts in self.sources.items():
            text += (
                f"\n  {source:<{width}}  {counts.samples_kept:>7} of {counts.samples_total:>7} samples  "
                f"{counts.tokens_kept:>9} of {counts.tokens_total:>9} answer tokens  sparsity {counts.sparsity:6.1%}"
            )
        return text

    def _thresholds(self) -> str:
        unit = " nats" if self.measure in IN_NATS else ""
        if self.lowest in (None, self.threshold):
            return f"{self.threshold:.4f}{unit}"
        return f"{self.lowest:.4f} to {self.threshold:.4f}{unit} (by source)"

    @property
    def warnings(self) -> list[str]:
        """Return what speaks against this selection, and what to do; texts of a few lines."""
        texts, much = [], self.helped_left_out >= MUCH
        if much:
            texts.append(
                f"{self.helped_left_out:.0%} of the kept samples' tokens that the image helped get no loss (their threshold is high). "
                "In the\nminiature study eleven of twelve such selections did harm; whole samples that the image did not harm did less "
                "(--floor\n--token-threshold none)"
            )
        if self.by_accident >= ACCIDENTS:
            gain = "" if much else ", or score with --measures loss and select with\n--by gain --token-threshold none"
            texts.append(
                f"{self.by_accident:.0%} of the kept samples hold words that the model can hardly predict, so {self.measure} is large by "
                f"accident.\nIn the miniature study this did harm; align on such answers and score again{gain}"
            )
        return texts
