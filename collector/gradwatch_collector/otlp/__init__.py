"""The OTLP receiver: requests in, records out, errors as the specification wants them."""

from gradwatch_collector.otlp.intake import Intake
from gradwatch_collector.otlp.receiver import routes

__all__ = ["Intake", "routes"]
