"""``gradwatch run``: a process that starts training, sees how it ends, and starts it again when asked to."""
