"""Figures as HTML and inline SVG, drawn from numbers and images; they know nothing of models.

The demo's report, the experts' page and the study's page share them. Charts are not matplotlib's here because a reader
would lose something: on a page its text keeps one color where ours takes the page's (dark mode), its points and cells
have no tooltips, and it scales and names itself for files, so that several figures on one page share ids and style each
other. Benchmark charts, which are shown as images, are drawn by matplotlib (``benchmarks/charts.py``).
"""
