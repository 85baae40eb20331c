"""What our commands set for their process; the user's own settings win, and importing sets nothing."""

import json
import os
import subprocess
import sys

import pytest

from dml.startup import AVX512_CORE, AVX512_FLAGS, best_core, processor_flags

NAMES = ("OPENBLAS_CORETYPE", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def environment_after(code, **settings):
    """The variables above after some code in a fresh process that starts with none of them but the given."""
    script = f"{code}\nimport json, os\nprint(json.dumps({{n: os.environ.get(n) for n in {NAMES!r}}}))"
    start = {name: value for name, value in os.environ.items() if name not in NAMES} | settings
    return json.loads(last_line(script, start))


def last_line(script, environment=None):
    """What a fresh process prints last."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[-1]


PREPARE = "from dml.startup import prepare_process; prepare_process()"


def test_newer_kernels_are_named_only_where_the_processor_has_all_they_want():
    assert best_core(AVX512_FLAGS | {"sse2", "avx2"}) == AVX512_CORE
    for missing in AVX512_FLAGS:
        assert best_core(AVX512_FLAGS - {missing}) is None
    assert best_core(frozenset()) is None


def test_our_commands_name_the_kernels_of_this_processor():
    expected = best_core(processor_flags()) if faiss_is_a_wheel() else None
    assert environment_after(PREPARE)["OPENBLAS_CORETYPE"] == expected
    assert environment_after(PREPARE)["OMP_WAIT_POLICY"] == "passive"


def faiss_is_a_wheel():
    """As it is before faiss is imported, which this process may have done."""
    return last_line("from dml.startup import faiss_brings_openblas as f; print(f())") == "True"


def test_the_user_s_own_settings_win():
    own = {"OPENBLAS_CORETYPE": "Haswell", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "100"}
    assert environment_after(PREPARE, **own) == own
    assert environment_after(PREPARE, OPENBLAS_CORETYPE="")["OPENBLAS_CORETYPE"] == ""


def test_importing_the_library_sets_nothing():
    code = "import dml, dml.index, dml.collection, dml.startup, dml.cli.main"
    assert environment_after(code) == dict.fromkeys(NAMES)


def test_nothing_is_set_once_faiss_is_loaded():
    pytest.importorskip("faiss")
    assert environment_after(f"import faiss\n{PREPARE}")["OPENBLAS_CORETYPE"] is None


@pytest.mark.parametrize("core", [None, "Haswell"])
def test_faiss_s_blas_takes_the_kernels_that_were_named(core):
    pytest.importorskip("faiss")
    pytest.importorskip("threadpoolctl")
    script = f"""
{PREPARE}
import faiss, json
from threadpoolctl import threadpool_info
print(json.dumps([one["architecture"] for one in threadpool_info() if "faiss" in one["filepath"]
                  and one["internal_api"] == "openblas"]))
"""
    start = {name: value for name, value in os.environ.items() if name not in NAMES}
    start |= {} if core is None else {"OPENBLAS_CORETYPE": core}
    found = json.loads(last_line(script, start))
    wanted = core or best_core(processor_flags())
    if not found or wanted is None:
        pytest.skip("this faiss has no OpenBLAS of its own, or the processor no AVX-512")
    assert found == [wanted]


def test_the_blas_threshold_is_set_in_our_commands_and_nowhere_else():
    pytest.importorskip("faiss")
    code = "\nfrom dml.index import make_index; make_index('faiss_flat', 4, device='cpu')\nimport faiss\n"
    code += "print(faiss.cvar.distance_compute_blas_threshold)"

    def threshold(before):
        return int(last_line(before + code))

    from dml.index.faiss_index import BLAS_FROM

    untouched = last_line("import faiss; print(faiss.cvar.distance_compute_blas_threshold)")
    assert threshold(PREPARE) == BLAS_FROM
    assert threshold("") == int(untouched)
    own = f"{PREPARE}\nfrom dml.index.faiss_index import import_faiss\nimport_faiss()\n"
    own += "import faiss; faiss.cvar.distance_compute_blas_threshold = 77\n"
    assert threshold(own) == 77  # set once, at the start: what is set later stays
