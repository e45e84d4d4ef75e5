"""A comparison as one HTML page: no network, no script, readable on a phone and on paper.

`details.py` takes what the page shows beyond the tables of a comparison, `pictures.py` the
pictures; `charts.py` turns numbers into the geometry of inline SVG, `page.py` fills the templates.
"""
