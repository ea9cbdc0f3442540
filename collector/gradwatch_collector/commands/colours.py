"""How statuses and severities look in a terminal; the words are there too."""

from __future__ import annotations

from typing import Final

from gradwatch_collector.findings import Severity
from gradwatch_slo.runs import Status

OF_STATUS: Final = {
    Status.RUNNING: "cyan",
    Status.SUCCEEDED: "green",
    Status.FAILED: "red",
    Status.LOST: "magenta",
    Status.CANCELLED: "yellow",
}
OF_SEVERITY: Final = {Severity.PAGE: "red", Severity.TICKET: "yellow", Severity.INFO: "cyan"}
