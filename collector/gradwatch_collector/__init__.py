"""OTLP in, SQL, run life-cycle, findings, ``/metrics`` and the JSON API."""
