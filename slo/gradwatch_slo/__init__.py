"""SLOs for training: OpenSLO objectives, what their SLIs mean, exact small-sample verdicts, error budgets.

Pure domain: no SQL, no HTTP, no clock. Callers hand in what they counted and a moment.
"""
