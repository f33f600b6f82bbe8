"""Model inspection: strategies and costs of reads (cross-attentions), attention maps, and plots."""
