"""Objectives over the stored runs: what their indicators count, and how it is kept counted."""
