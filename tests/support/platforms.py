"""Tests that only some platforms can run."""

import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, /dev/full, namespaces or GNU's timeout")
