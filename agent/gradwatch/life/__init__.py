"""How a process ends, and what it leaves behind when it ends badly."""
