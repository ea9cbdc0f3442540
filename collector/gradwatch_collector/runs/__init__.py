"""How runs stand: registry, clocks, silence, checkpoints."""
