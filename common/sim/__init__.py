"""CPU simulator of the kernels: g++ compiles the unchanged sources against twins of common/ptx.

``build.py`` compiles kernels, ``launcher.py`` runs them, ``ptx/`` holds the twins and ``runtime/``
the fibers and checks behind them. ``docs/simulator.md``: what is checked, how to read the errors.
"""
