"""Quantization-aware training on real data: a small network for Fashion-MNIST, at several widths.

`bench/qat.py` runs it.
"""
