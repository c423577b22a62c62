"""Weights as bytes, and back."""
