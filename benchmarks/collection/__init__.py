"""What the collector takes, keeps and needs: the parts of benchmarks/collector.py."""
