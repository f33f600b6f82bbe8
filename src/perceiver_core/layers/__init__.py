"""Parts that the blocks use: a linear layer, weight initialization, and random draws for dropout."""
