"""Property tests here are judged by their results, never by how long a loaded machine takes."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
