"""The commands, thin: each reads its options, calls the package and prints."""
