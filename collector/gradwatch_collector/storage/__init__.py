"""What is stored and how: tables, segments of series, compaction, retention, and reading it back."""
