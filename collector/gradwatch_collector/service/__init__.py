"""The running collector: writer, evaluator, upkeep, its own metrics, and the socket."""
