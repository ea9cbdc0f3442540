"""From the training thread's columns to a collector that may be away."""
