"""What is measured beside gradients: memory, time by phase, data wait, collectives, inputs, weights."""
