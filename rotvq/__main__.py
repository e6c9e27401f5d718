"""`python -m rotvq`: the same as the command `rotvq`. The only module written by hand; all others come from notebooks."""
from rotvq.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
