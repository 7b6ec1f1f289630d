"""Flax Linen modules and the models built from them."""
