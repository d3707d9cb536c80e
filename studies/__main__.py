"""``python -m studies``, run in the root of the repository."""

from .cli import main

raise SystemExit(main())
