"""The demonstration: a tiny CLIP is upcycled, trained on pictograms and compared with the dense baseline.

``clipup.demo.run.run`` does all of it and writes ``report.json`` and ``report.html``; the command is ``clipup demo``.
"""
