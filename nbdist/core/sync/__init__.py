"""Gradient synchronization: weighted all-reduce over ranks, deterministic sums, synchronized BatchNorm.

- A full global batch is cut into *ranks × microbatches* contiguous **slices** (`plan/slices.py`); rank r runs its K
  in order. One process with `--accumulate` N × K runs the same slices.
- The sample order depends on (seed, epoch) only; the random numbers of a slice on (seed, step, slice).
- Each slice adds `w · ∇loss`, with w its weight as a share of the global batch. The sync sums over ranks and divides
  by the sum of weights: exact for uneven slices, and a full batch of samples needs no division. Weights in tokens or
  other units are scaled by a power of two that ranks choose with their first slices, which changes no bit. If a batch
  is one slice, it weighs one.
- A slice's weight is the divisor of its mean loss. It is counted for torch's own losses, and read off autograd's
  graph if the model or a callable computes the loss (`core/task/loss_weight.py`: the mean saved it for backward). A
  step that gives no weight is weighed by samples. If the divisor cannot be read and a batch has several slices, the
  loss is refused. Factors, and the ratio of counts of several terms, must be the same in all slices of a step; the
  gradient sync carries that check (`core/sync/loss_forms.py`).
- Evaluation runs the model without gradients. Only functions that return a scalar are called once more with them, for
  their graph (`core/task/loss_graph.py`).
- On CPU the sum over ranks is in rank order (`core/comm/`), and the thread count is part of the plan.

So with one microbatch per rank the bits are those of one process with N microbatches. With K > 1 the sums associate
differently and agree to rounding (1e-12 in float64 in the tests).

With `--reproducible` the number of slices is fixed, and nothing depends on which rank computes a slice
(`core/sync/slice_accumulator.py`): random numbers of every generator, the slice of a stream, losses and metrics
(summed slice by slice), buffers (each slice starts from those before the step; the step changes them by the mean of
the slices' changes). Gradients are summed along one binary tree (`core/comm/reduction_order.py`). A rank sums the
largest tree nodes within its slices, then ranks exchange those and sum the rest. Of four slices, 1, 2, 3 or 4 ranks
have one node each; of twelve, 3 ranks have two.

*Dropout* draws other numbers in every slice. *BatchNorm* normalizes each slice with its own statistics; running
statistics differ by rank and are averaged (integers: rank 0's) at the end of each epoch, before evaluation. With
`--sync-batchnorm` (`core/sync/sync_batchnorm.py`) the k-th slices of all ranks are normalized together, and N ranks
train as one process with whole microbatches. Ranks without data in a short batch take part with samples of weight
zero. A short last batch fills fewer slices rather than leave one sample in a slice, on which BatchNorm cannot train.
"""
