"""The record of the machine that results carry."""

import json

import torch

from clipup_kernels import backend_info
from clipup_kernels.machine import describe_machine, processor_name


def test_a_record_names_the_processor_and_what_the_kernels_use_of_it():
    machine = describe_machine()

    assert machine["processor"] == processor_name() != ""
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    of_backends = ("compiled", "instructions", "matmul_dtypes")
    assert {name: machine[name] for name in of_backends} == {name: backend_info()[name] for name in of_backends}
    assert json.loads(json.dumps(machine)) == machine
