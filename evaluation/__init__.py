"""Evaluation of pose models and of predictions; imports only the shared package."""
