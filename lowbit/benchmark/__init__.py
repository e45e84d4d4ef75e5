"""`lowbit bench`: one layer, every width, against torch and other engines.

- `command.py`: the arguments of the command
- `run.py`: what to run, and the loop over it
- `shapes.py`: the texts that name linears and convolutions
- `case.py`: float layers, lowbit's own candidates
- `candidate.py`: what is timed
- `peers/`: the other engines, one file each
- `ceilings.py`: what the machine can do at most
- `measure.py`: alternated timing of one case
- `result.py`: rows, groups and tables
- `plot.py`: the picture
- `matrix.py`: every case of linears, of convolutions
- `networks.py`: whole networks
- `runner.py`, `worker.py`: cases in processes of their own, saved one by one
- `summary.py`: what a matrix of results says, cell by cell
- `targets.py`, `conv_targets.py`: what the kernels are to reach
- `page.py`, `conv_page.py`, `page_parts.py`: the pages of a matrix
- `roofline.py`, `rates.py`: their pictures
"""
