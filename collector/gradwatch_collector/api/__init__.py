"""The JSON API and the shapes it answers in."""
