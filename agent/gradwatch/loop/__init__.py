"""What happens on the training thread: hooks around optimizer steps, and what they leave behind."""
