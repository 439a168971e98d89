"""Composable compression callbacks for PyTorch Lightning."""
