"""Studies: runs of training from small config files, each with a log that is committed, and a page made of the logs.

    studies/icons/clip_up-5000-lr0.002-s0.yaml         a run (``runs.StudyRun``)
    studies/icons/logs/clip_up-5000-lr0.002-s0.jsonl   what came out (``log``)

``clipup study run FILE`` runs or resumes it (``runner``), ``clipup study report`` writes the page (``report``).
"""
