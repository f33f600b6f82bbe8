"""Linear layer, weight initialization, and random draws that activation checkpointing repeats."""
