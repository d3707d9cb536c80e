"""Figures as HTML and inline SVG, drawn from numbers and images; they know nothing of models.

The demo's report, the experts' page and the study's page share them. Charts are not drawn by matplotlib here, since
readers would lose the page's text color (dark mode) and tooltips, and several of its figures on one page reuse ids and
style each other (docs/experts.md). Benchmark charts, shown as images, are drawn by it (``benchmarks/charts.py``).
"""
