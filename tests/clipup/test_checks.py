"""Values of numpy become Python's, whatever holds them; and what messages show of values."""

from collections import Counter, OrderedDict

import numpy as np
import pytest

from clipup.checks import check, without_numpy


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({np.int64(1): [np.float32(0.5), (np.bool_(True),)]}, {1: [0.5, (True,)]}),
        (OrderedDict({np.str_("b"): np.int8(2), "a": np.longdouble(0.25)}), OrderedDict({"b": 2, "a": 0.25})),
        (Counter({np.int64(3): np.int64(4)}), Counter({3: 4})),
        ({"array": np.arange(3), "scalar": np.array(1.5)}, {"array": [0, 1, 2], "scalar": 1.5}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_and_arrays_of_numpy_become_python_s(value, plain):
    found = without_numpy(value)
    assert found == plain and type(found) is type(plain) and list(found) == list(plain)
    assert {type(key) for key in found} == {type(key) for key in plain}
    assert [type(of_key) for of_key in found.values()] == [type(of_key) for of_key in plain.values()]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.5, "0.5"), ("x" * 300, "'" + "x" * 196 + "...")],
    ids=["short", "long"],
)
def test_a_refused_value_is_shown_up_to_a_length(value, said):
    with pytest.raises(ValueError) as refused:
        check("lr", value, False, "finite")
    assert str(refused.value) == f"lr must be finite, got {said}"
