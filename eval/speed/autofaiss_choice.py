"""Run by an interpreter that has autofaiss: ROWS.npy OUT.index THREADS. Imports nothing of ours.

autofaiss chooses the kind of index and its effort by its own defaults, but for the metric.
"""

import os
import sys


def main() -> None:
    rows, out, threads = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    import faiss
    import numpy as np
    from autofaiss import build_index  # type: ignore[import-not-found]

    faiss.omp_set_num_threads(int(threads))
    found, _ = build_index(
        np.load(rows), save_on_disk=False, metric_type="ip", nb_cores=int(threads), verbose=40
    )
    faiss.write_index(found, out)


if __name__ == "__main__":
    main()
