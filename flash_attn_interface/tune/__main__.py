"""`python -m flash_attn_interface.tune`; `command.py` has the arguments."""

from .command import main

if __name__ == "__main__":
    raise SystemExit(main())
