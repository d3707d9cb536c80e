"""Figures as HTML and inline SVG, of numbers and images alone; they know no model."""
