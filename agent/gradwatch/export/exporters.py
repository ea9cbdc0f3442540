"""The exporter that settings ask for. Needs no torch: the supervisor reports with it too."""

from __future__ import annotations

from collections.abc import Callable

from gradwatch.export.spool import Spool, places
from gradwatch.redaction import redact_text
from gradwatch.settings import Settings
from gradwatch.telemetry import Exporter


def otlp_exporter(settings: Settings, pace: Callable[[], None]) -> Exporter:
    """Delivery over OTLP/HTTP, with a spool for what cannot be delivered.

    Importing what it takes costs a third of a second: that happens here, at the first call.
    """
    from gradwatch.export.delivery import Delivery
    from gradwatch.export.otlp import OtlpEncoder, compressed_signals
    from gradwatch.export.transport import Transport

    spool = None
    if settings.spool_max_bytes:
        spool = Spool(places(settings.directory), settings.endpoint, settings.spool_max_bytes)
    transport = Transport(settings.endpoint, settings.headers)
    encoder = OtlpEncoder(pace, compressed_signals(settings.endpoint))
    return Delivery(encoder, transport, spool, redact_text(settings.endpoint))
