"""Model inspection: strategies and costs of reads, attention maps, and plots of position features and models."""
