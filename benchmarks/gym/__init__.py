"""The fault gym: real training runs, healthy and with faults of a known kind, place and step."""
