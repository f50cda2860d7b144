"""How gradients are summed over ranks.

- A full global batch is cut into *ranks × microbatches* contiguous **slices** (`plan/slices.py`); rank r runs its K
  in order. One process with `--accumulate` N × K runs the very same slices.
- The order of samples is a function of (seed, epoch); the random numbers of a slice, of (seed, step, slice).
- Each slice adds `w · ∇loss` with w its weight in units of the global batch (where that is tokens or what else, about
  so: times a power of two that ranks agree on with their first slices, which costs no bit; a batch of one slice
  weighs one); the sync sums over ranks and divides by the sum of weights: exact for uneven slices, and after a full
  batch that sum is one.
- What a mean is over is counted for torch's own losses, read off autograd's graph where a model or a callable
  computes it (`core/task/loss_weight.py`: the divisor that the mean kept for backward, at no cost), and the samples
  of the slice where a step gives no weight. Where it cannot be read and a batch has several slices the loss is
  refused. Factors, and the ratio of counts of several terms, have to be the same in all slices of a step, which rides
  on the sync (`core/sync/loss_forms.py`).
- In evaluation the model runs without gradients; of what it or a callable computes only functions that give a scalar
  are called once more, for their graph (`core/task/loss_graph.py`).
- On CPU the sum over ranks is in rank order (`core/channels/`), and the thread count is part of the plan.

So with one microbatch a rank the bits are those of one process with N microbatches; with K > 1 the sums associate
differently and agree to rounding (1e-12 in float64 in the tests).

With `--reproducible` the number of slices is fixed, and so is everything that depends on who computes one
(`core/sync/slice_accumulator.py`): random numbers of every generator, the slice of a stream, losses and metrics
(summed slice by slice), buffers (each slice finds those before the step, and the step moves them by the mean of what
slices did). Gradients are summed along one binary tree (`core/comm/reduction_order.py`). A rank sums the largest
nodes within its slices, ranks exchange those and sum the rest; of four slices, 1, 2 or 4 ranks have one node each and
3 ranks too; of twelve, 3 ranks have two.

Across ranks, *dropout* draws other numbers in every slice, as it should. *BatchNorm* normalises each slice with its
own statistics; running statistics differ by rank and are averaged (integers: rank 0's) at the end of each epoch,
before evaluation. With `--sync-batchnorm` (`core/sync/sync_batchnorm.py`) the k-th slices of all ranks are normalised
together, and N ranks train as one process with whole microbatches; ranks that a short batch leaves out take part with
samples that count for nothing. A short last batch fills fewer slices rather than leave one sample alone, on which
BatchNorm cannot train.
"""
