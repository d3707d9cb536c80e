"""The project's own studies, not part of the library: data sets (``icon_data``, ``character_data``,
``lexicon_data``), and training runs, with committed logs and a page generated from them (``runner``).

    studies/icons/study.yaml                           the runs of a study, as a grid (``runner.config``)
    studies/icons/logs/clip_up-2500-lr0.002-s0.jsonl   the log of a run (``runner.log``)

``python -m studies icons OUT``, ``characters OUT`` and ``lexicon OUT`` build a data set, ``run STUDY`` makes or resumes
its runs, and ``report STUDY`` writes the page.
"""
