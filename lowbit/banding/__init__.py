"""INT16 where INT8 shows: an image-to-image network, whose output has bands at INT8.

`bench/banding.py` runs it.
"""
