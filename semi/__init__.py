"""Semi-supervised training of heatmap pose models: ICON on pseudo-label and consistency teachers."""
