"""What is decided before anything goes to a GPU; runs without one."""

import pytest

from dml.errors import ConfigError, MissingExtra
from dml.index.gpu import SCRATCH_BYTES, choose_device, device_numbers, plan_copies

GIB = 1 << 30


class Faiss:
    """The two names of a faiss with GPUs that the decision looks at."""

    StandardGpuResources = object

    def __init__(self, gpus):
        self.gpus = gpus

    def get_num_gpus(self):
        return self.gpus


class CpuFaiss:
    """A faiss without GPUs."""


@pytest.mark.parametrize(
    ("device", "numbers"), [("cuda", [0]), ("cuda:1", [1]), ("cuda:0,1", [0, 1]), ("cuda:3,0", [3, 0])]
)
def test_devices_are_read(device, numbers):
    assert device_numbers(device) == numbers


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:0,", "gpu:0", "cuda:-1"])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(ConfigError, match="Unknown device"):
        device_numbers(device)


def test_the_same_gpu_twice_is_refused():
    with pytest.raises(ConfigError, match="named twice"):
        device_numbers("cuda:0,0")


def test_auto_takes_a_gpu_only_where_there_is_one_for_the_kind():
    def choose(device, faiss, on_gpu=True):
        return choose_device(device, "ivf", on_gpu=on_gpu, faiss=faiss)

    assert choose("auto", Faiss(2)) == "cuda:0"
    assert choose("auto", Faiss(2), on_gpu=False) == "cpu"
    assert choose("auto", Faiss(0)) == choose("auto", CpuFaiss()) == "cpu"
    assert choose("cuda:0,1", Faiss(2)) == "cuda:0,1"
    with pytest.raises(ConfigError, match='no "cuda:2".*sees 2 GPUs'):
        choose("cuda:0,2", Faiss(2))
    with pytest.raises(MissingExtra, match="GPU support"):
        choose("cuda:0", CpuFaiss())


def test_each_gpu_gets_all_where_it_fits_and_a_part_where_only_that_does():
    room = SCRATCH_BYTES
    assert plan_copies(4 * GIB, [8 * GIB], device="cuda:0") is False
    assert plan_copies(4 * GIB, [8 * GIB, 8 * GIB], device="cuda:0,1") is False
    assert plan_copies(10 * GIB, [8 * GIB, 8 * GIB], device="cuda:0,1") is True
    assert plan_copies(4 * GIB, [4 * GIB + room], device="cuda:0") is False
    assert plan_copies(100 * GIB, [None], device="cuda:0") is False


@pytest.mark.parametrize(
    ("needed", "free"), [(4 * GIB, [4 * GIB]), (20 * GIB, [8 * GIB, 8 * GIB]), (10 * GIB, [8 * GIB, 2 * GIB])]
)
def test_what_does_not_fit_is_refused_before_it_is_tried(needed, free):
    with pytest.raises(ConfigError, match=r"needs .* GiB on cuda.*float16"):
        plan_copies(needed, free, device="cuda:0,1")
