"""The check of an installation's kernels: a wrong one is named, and another backend takes its place."""

import json
import warnings

import pytest
import torch
from moe_cases import Shape, assert_follows, double, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels import self_check as module
from clipup_kernels.backends import cpp, extension, registry
from clipup_kernels.self_check import Finding, cache_file, check_again, check_once, known_faults, self_check

pytestmark = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


@pytest.fixture(autouse=True)
def trusted(monkeypatch, tmp_path, force_backend):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    registry.trust_all()


@pytest.fixture
def broken_expert_mlp(monkeypatch):
    """The forward pass of the C++ backend, with one wrong entry where there are several rows."""
    right = cpp.expert_mlp_forward

    def wrong(*arguments):
        y, z = right(*arguments)
        y[-1, -1] += 0.1 * y.abs().max()
        return y, z

    monkeypatch.setattr(cpp, "expert_mlp_forward", wrong)
    registry.function_of.cache_clear()


def failed(findings):
    return {(finding.op, finding.dtype) for finding in findings if finding.reason is not None}


def test_every_op_is_checked_in_every_type_and_right_ones_pass():
    findings = self_check("cpu")
    ops = {*registry.ROUTING, *registry.ROWS, *registry.PRODUCTS}
    types = ("float32", "bfloat16", "float16")
    assert {(finding.op, finding.dtype) for finding in findings} == {(op, dtype) for op in ops for dtype in types}
    assert failed(findings) == set() == set(ck.backend_info()["failed_checks"])


def test_a_wrong_op_is_named_and_another_backend_computes_it(force_backend, broken_expert_mlp):
    if registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name != "cpp":
        pytest.skip("this CPU's expert_mlp is torch's")
    findings = self_check("cpu", [torch.float32])

    assert failed(findings) == {("expert_mlp_forward", "float32")}
    (finding,) = [finding for finding in findings if finding.reason is not None]
    assert 0.05 < finding.error < 0.2 and finding.backend == "cpp"
    assert "its error is 1.0e-01 of the largest entry, allowed 2e-03" in finding.reason
    assert list(ck.backend_info()["failed_checks"]) == ["cpp expert_mlp_forward float32"]
    assert ck.backend_info()["cpu"]["expert_mlp"]["float32"] == "torch_eager"
    assert ck.backend_info()["cpu"]["combine"]["float32"] == "cpp"
    shape = Shape(37, 19, 53, 5, 3)
    gates, plan = route(shape)
    x, experts = randn(37, 19, seed=1), make_experts(shape)
    oracle = ck.reference.expert_mlp(double(x), double(gates), plan, *double(experts))
    assert_follows(ck.expert_mlp(x, gates, plan, *experts), oracle, torch.float32)


def test_a_forced_backend_that_failed_is_refused(force_backend, broken_expert_mlp):
    force_backend("cpp")
    self_check("cpu", [torch.float32])
    with pytest.raises(RuntimeError, match="CLIPUP_BACKEND=cpp is set, but .* failed its self-check"):
        registry.choose("expert_mlp_forward", torch.float32, "cpu")


def test_an_op_that_raises_or_gives_nan_fails(monkeypatch):
    def does_not_compile(*arguments):
        raise RuntimeError("no such instruction\nwith a long log")

    monkeypatch.setattr(cpp, "permute", does_not_compile)
    monkeypatch.setattr(cpp, "combine", lambda rows, gates, offsets, choices, row: rows[: len(row)] * torch.nan)
    findings = {finding.op: finding for finding in self_check("cpu", [torch.float32])}
    assert findings["permute"].reason == "RuntimeError: no such instruction" and findings["permute"].error is None
    assert findings["combine"].reason.startswith("its error is inf")


def test_the_check_runs_once_and_its_result_holds_for_the_next_program(broken_expert_mlp, monkeypatch, tmp_path):
    if registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name != "cpp":
        pytest.skip("this CPU's expert_mlp is torch's")
    with pytest.warns(RuntimeWarning, match="expert_mlp_forward in float32 failed its .* on cpp .*clipup doctor"):
        first = check_once("cpu")
    registry.trust_all()  # as in another program
    with monkeypatch.context() as changed:
        changed.setattr(module, "self_check", lambda device: pytest.fail("it ran again"))
        with pytest.warns(RuntimeWarning):
            assert check_once("cpu") == first
    assert registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name == "torch_eager"
    assert failed(check_again("cpu")) == failed(first)  # it checks the kernel, not what took its place
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert failed(check_again("cpu")) == set()


@pytest.mark.parametrize("content", ["", "[", "{}", '[{"op": 3}]', "[" * 100_000])
def test_a_damaged_result_is_made_again(content):
    path = cache_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert len(check_once("cpu")) > 10
    assert all(Finding(**finding).reason is None for finding in json.loads(path.read_text()))


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert failed(check_once("cpu")) == set()


def test_results_are_kept_by_card_and_versions(monkeypatch):
    here = cache_file("cpu")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert cache_file("cpu") != here
    monkeypatch.undo()
    monkeypatch.setattr(module, "processor_name", lambda device: "another card")
    assert cache_file("cpu") != here


def test_a_known_fault_of_a_kind_of_card_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "Triton 3.7 has been seen to miscompile" in known_faults("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert known_faults("cuda") is None is known_faults("cpu")
