"""vig.report writes a page about the scores: the distribution of VIG, the words that the image tells, and the samples at both ends."""

from vig.report.page import write_report

__all__ = ["write_report"]
