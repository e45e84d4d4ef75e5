"""What the demo converts to: every layer to one scheme, and a mixture by overrides."""

SCHEMES = ("w8a8", "w8a8-static", "w4a8", "w2a8", "w1a8", "w1a1", "w8a16", "w4a16")

MIXED = "mixed"
MIXED_SCHEME = "w4a8-g32"
MIXED_OVERRIDES = {"re:_conv_stem|.*_(depthwise|project)_conv": "w8a8"}
"""The layers that 4 bits hurt most stay at 8: the first, the depthwise, the projections."""

MIXED_RECIPE = f"{MIXED_SCHEME}, with w8a8 for the first, depthwise and projection layers"
