"""The GPU kernels proved and measured by one command, `make gpu`; `make gpu DRY=1` walks through all of it on the CPU.

`__main__.py` runs the steps, each a program of its own in this folder, so that a crash, an endless loop or a broken
CUDA context costs one step and not the others' results. `report.py` turns what they found into a page to read.
"""
