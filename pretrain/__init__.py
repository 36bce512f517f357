"""Self-supervised pretraining: a backbone from unlabelled pictures."""
