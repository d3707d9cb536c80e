"""``python -m clipup`` is the program ``clipup``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
