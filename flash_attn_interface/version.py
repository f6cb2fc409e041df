"""Version numbers; `setup.py` reads this file as text, so it must stay two literals."""

__version__ = "2.8.3"
"""FlashAttention-2's version whose interface we implement; clients check it against a range."""

RELEASE = "0.1.0"
"""Our own release. The Ampere and Hopper distributions must carry the same one."""
