"""Measuring pyperc beside plain torch: `python -m pyperc bench`.

`measure` holds the one way of timing; `cases` the shapes, what they cost and who computes them; `tables` one module for
each table; `command` the command line; `plots` the figures.
"""
