"""A run as one page: a self-contained HTML file made from the run folder's event log."""

from __future__ import annotations

from fedllm.report.page import write_report
from fedllm.report.run_history import RunHistory, effective, load

__all__ = ["RunHistory", "effective", "load", "write_report"]
