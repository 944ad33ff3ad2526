"""Training of siamtrack's networks. Run from the checkout: ``python -m training.train RECIPE``."""
