"""Pictures, their labels and their splits: folders, manifests, benchmarks, the embedded demo set, batches.

This module and all reading of tables need no torch; only `images` and `augment` (training batches) do.
"""

DATASETS: dict[str, str] = {
    "cars": "dml.data.benchmarks:cars",
    "cub": "dml.data.benchmarks:cub",
    "demo": "dml.data.demo:open_demo",
    "inshop": "dml.data.benchmarks:inshop",
    "sop": "dml.data.benchmarks:sop",
}
"""Name -> import path of a function from the folder of the data set to an ImageTable; used as
"name:FOLDER"."""
