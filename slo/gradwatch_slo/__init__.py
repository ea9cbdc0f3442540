"""SLOs for training: OpenSLO objectives, SLIs over runs, exact small-sample verdicts, error budgets.

Pure domain: no SQL, no HTTP, no clock. Callers hand in :class:`~gradwatch_slo.runs.RunFacts` and a moment.
"""
