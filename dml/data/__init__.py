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

DESCRIPTIONS: dict[str, str] = {
    "cars": "Cars-196 (16,185 photos of 196 models of cars), classes 1-98 against 99-196",
    "cub": "CUB-200-2011 (11,788 photos of 200 kinds of birds), classes 1-100 against 101-200",
    "demo": "drawn products, made on the spot: for trying the whole way, not for comparing methods",
    "inshop": "DeepFashion In-Shop (52,712 photos of 7,982 clothes), with queries and a gallery",
    "sop": "Stanford Online Products (120,053 photos of 22,634 things)",
}
"""One line each, for `dml list datasets`."""
