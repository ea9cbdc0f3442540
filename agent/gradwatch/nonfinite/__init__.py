"""NaN and Inf: the witnesses of a step, and where its first bad value was born."""
