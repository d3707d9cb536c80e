"""The project's own studies, not part of the library: data sets (``icon_data``, ``scene_data``), and training runs from
config files, with committed logs and a page generated from them (``runner``).

    studies/icons/clip_up-5000-lr0.002-s0.yaml         a run (``runner.config.StudyRun``)
    studies/icons/logs/clip_up-5000-lr0.002-s0.jsonl   its log (``runner.log``)

``python -m studies icons OUT`` and ``scenes OUT`` build a data set, ``run FILE`` runs or resumes a run, and
``report STUDY`` writes the page.
"""
