"""How it learns: data, augmentation, losses, metrics and the loop."""
