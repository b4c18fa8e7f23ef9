"""What a run will take on so many GPUs, before any of them is asked for: `python -m parallel.plan CONFIG --gpus N`.

What a block does is found by running it without data (world, trace, blocks), what DeepSpeed holds and ranks send by
formulas that tests hold against real runs (state, passing, resent). From both come memory, communication and time of an
arrangement (hardware, estimate), of all of them (search, table), of one rank (rank), and the answer to whether a run
fits its GPUs (fits, misfit). Failures are goodput's; scaling writes the tables of docs/scaling.md.
"""
