"""``capture="on_nonfinite"`` and ``gradwatch replay``: a bad step, kept and run again."""
