"""Fine-tuning: a pose model from a backbone and labelled persons."""
