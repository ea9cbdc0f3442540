"""Training observability for PyTorch: ``watch = gradwatch.watch(model, optimizer)`` is all a loop needs.

Importing this package imports neither torch nor the OpenTelemetry SDK; ``watch()`` does.
"""

from gradwatch.checkpoints.finding import latest_checkpoint
from gradwatch.settings import SettingsError
from gradwatch.watching import Watch, run, watch

__all__ = ["SettingsError", "Watch", "latest_checkpoint", "run", "watch"]
