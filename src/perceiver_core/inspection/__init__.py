"""Model inspection: strategies and costs of reads, and plots of attention maps, position features, architectures."""
