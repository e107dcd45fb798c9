"""One page that shows what was scored: how VIG is distributed, which words the image tells, and the samples at both ends."""

from vig.report.page import write_report

__all__ = ["write_report"]
