"""Figures as HTML and inline SVG, drawn from numbers and images; they know nothing of models.

The demo's report, the experts' page and the study's page share them. matplotlib draws the charts of ``charts.py``; the
others are markup of their own, so the experts' page needs no charting library.
"""
