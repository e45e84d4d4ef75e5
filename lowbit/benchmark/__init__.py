"""`lowbit bench`: one layer, every width, against torch and other engines.

- `command.py`: the arguments of the command
- `run.py`: what to run, and the loop over it
- `case.py`: shapes, float layers, lowbit's own candidates
- `candidate.py`: what is timed
- `peers/`: the other engines, one file each
- `ceilings.py`: what the machine can do at most
- `measure.py`: alternated timing of one case
- `result.py`: rows, groups and tables
- `plot.py`: the picture
- `matrix.py`, `worker.py`: every case of the linear layer, in processes, saved one by one
- `summary.py`: what a matrix of results says, cell by cell
- `targets.py`: what the kernels are to reach
- `page.py`, `roofline.py`: the page and the picture of a matrix
"""
