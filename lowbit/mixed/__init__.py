"""Which layer needs how many bits: `lowbit.sensitivity` and `lowbit.search`.

layers       a float model whose layers are swapped for lowbit layers and back, in place
measure      qualities and times of such a model; what is measured goes to a journal
journal      a JSON-lines file from which an interrupted run goes on
sensitivity  each layer's effect, alone and accumulated
effects      the result of that
budget       what a search has to keep to
knapsack     the choice of one scheme per layer
search       the choice, measured and refined
found        the result of that
command      both on the command line
"""
