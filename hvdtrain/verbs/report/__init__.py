"""What runs have come to: one page of HTML that holds everything it shows, and what tells two runs apart."""

from hvdtrain.verbs.report.command import compare, report

__all__ = ["compare", "report"]
