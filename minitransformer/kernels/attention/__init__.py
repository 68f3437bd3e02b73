"""Scaled dot-product attention and its variants."""
