"""The demo: real training runs, healthy and sick, on scikit-learn's handwritten digits."""
