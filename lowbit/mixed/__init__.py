"""Which layer needs how many bits: `lowbit.sensitivity` and `lowbit.search`.

layers       a float model whose layers are swapped for lowbit layers and back, in place
measure      qualities and times of such a model; what is measured goes to a journal
journal      a JSON-lines file from which an interrupted run goes on
sensitivity  each layer's effect, alone and accumulated
effects      the result of that
budget       what a search has to keep to
knapsack     the choice of one scheme per layer
choices      choices, measured with layers put into the float model one by one, and refined
finals       choices as `lowbit.quantize` converts them, and which of them is returned
search       all of it: the choice, measured, refined and confirmed
found        the result of that
command      both on the command line
"""
