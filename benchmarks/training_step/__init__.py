"""Whole training steps of our recipes beside the same models in `transformers`, in AutoEP and in plain PyTorch."""
