"""Makes ``python -m clipup`` run the ``clipup`` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
