"""The fair benchmark: methods that differ in nothing but the method, tuned alike, measured with seeds.

After "A Metric Learning Reality Check" (Musgrave et al., ECCV 2020)::

    suite.py       what is compared: one recipe for all rows, what each row changes, what is tuned
    folds.py       class-disjoint folds inside the training classes, and the pictures a run may see
    results.py     one JSON file per finished run, and what they say about a row
    plan.py        which runs come next: tuning (with pruning), then seeds
    measure.py     one run: train, select on the validation fold, note figures and cost
    baselines.py   vectors without training: grey values, a random net, a pretrained trunk
    worker.py      a process that takes one free run after the other
    run.py         workers side by side, and what they report
    claims.py      frozen recipes, looks at the test classes, and the file that counts them
    statistics.py  intervals and paired tests
    compare.py     the tables
    page.py        docs/benchmarks.md
    plot.py        its pictures
    replay.py      one run again
"""
