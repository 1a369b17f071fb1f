"""As accurate as nnU-Net? Ours, nnU-Net and MONAI's DynUNet on real data, for the same processor time.

    pip install --no-deps -c constraints.txt --target PEERS nnunetv2 einops imagecodecs yacs scikit-learn \\
        joblib requests seaborn graphviz cloudpickle threadpoolctl  (and what input_pipeline.py needs)
    PYTHONPATH=src:PEERS python benchmarks/accuracy.py DIR [--data hippocampus] [--budget 60 240] [--judge]

Every training is one process on one thread. Its budget is in seconds of the process's time, all that is
done while training (reading, augmenting, steps) counted, preparing, imports and prediction not. So many
updates are made as the budget takes at the contender's pace, which is measured once, in turn with the
others' (`contest/pace.py`). Each contender keeps its own loss, optimiser, schedule, augmentation and
network; the schedule ends with the last update. The learning rate is the contender's own times 1/3, 1 or
3, chosen for each budget (or for another one: `--rates-of`) on a fifth of the training cases of the outer
fold (`--fold`), fixed by the fold's number. Nobody mirrors while predicting. nnU-Net computes in float32
on processors; where the processor has bfloat16 it is also given that.

The judge cases of the fold are not prepared, nor read, without `--judge`: with it, every contender is
trained again on all training cases at its best rate, once for each of `--seeds`, and scored on them. Each
such look leaves a line in benchmarks/results/looks.jsonl. Scores are means over cases on the images' own
voxels, of Dice and of surface Dice at 1 mm, with a paired bootstrap over cases and seeds together. On
phantoms (150 chests, of which 50 are trained on) there are CPM and sensitivity at 1 false positive, too, of
the same components of everybody's probabilities.

A contender is a name with settings: ours takes config keys ("ours:loss.top_k=1;loss.small=0"), nnU-Net and
DynUNet plan=default|small, precision=fp32|bf16, format=as_is|channels_last, mirror=true|false and lr,
DynUNet filters and heads. DIR holds what is prepared and a folder for each training. Paces and results are
appended to benchmarks/results; what is there is not trained again, here or on another machine.
"""

from __future__ import annotations

from contest.command import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    main(__doc__ or "")
