"""Tensors in nested values, in shards, and on their way from a device."""
