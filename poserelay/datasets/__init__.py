"""Datasets: annotated persons as top-down crops, and pictures without annotations."""
