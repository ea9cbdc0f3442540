"""Parts of ``agent_overhead.py`` and ``agent_memory.py``: what watching costs, beside what peers cost."""
