"""The check of an installation's kernels: a wrong one is named, and another backend takes its place."""

import contextlib
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from moe_cases import Shape, assert_follows, double, make_experts, randn, route

import clipup_kernels as ck
from clipup_kernels import self_check as module
from clipup_kernels.backends import cpp, extension, registry, torch_eager, torch_matmul
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
    assert findings["combine"].reason.startswith("its results are not finite")


def test_results_of_another_type_or_in_changed_arguments_fail(monkeypatch):
    right = cpp.combine

    def in_place(rows, gates, *plan):
        out = right(rows, gates, *plan)
        rows.zero_()
        return out

    monkeypatch.setattr(cpp, "permute", lambda x, *plan: torch_eager.permute(x.double(), *plan))
    monkeypatch.setattr(cpp, "combine", in_place)
    findings = {finding.op: finding for finding in self_check("cpu", [torch.bfloat16])}
    for op in ("permute", "combine"):
        assert "not of the right type" in findings[op].reason and findings[op].error is None


def test_an_inference_form_that_is_wrong_fails(monkeypatch):
    right = cpp.expert_mlp_forward

    def wrong_without_z(*arguments):
        y, z = right(*arguments)
        return (y if arguments[-1] else 1.5 * y), z

    monkeypatch.setattr(cpp, "expert_mlp_forward", wrong_without_z)
    if registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name != "cpp":
        pytest.skip("this CPU's expert_mlp is torch's")
    assert failed(self_check("cpu", [torch.float32])) == {("expert_mlp_forward", "float32")}


def test_the_backend_that_takes_the_place_of_a_wrong_one_is_checked_too(monkeypatch):
    matmul = registry.by_name("torch_matmul")._replace(preferred=lambda dtype: "it is preferred here")
    others = [backend for backend in registry.BACKENDS if backend.name != "torch_matmul"]
    monkeypatch.setattr(registry, "BACKENDS", (matmul, *others))
    for backend in (torch_matmul, cpp):
        monkeypatch.setattr(
            backend, "grouped_linear", lambda rows, weight, *_: rows.new_zeros(len(rows), weight.shape[1])
        )
    findings = [finding for finding in self_check("cpu", [torch.float32]) if finding.op == "grouped_linear"]
    assert [finding.backend for finding in findings] == ["torch_matmul", "cpp"]
    assert registry.choose("grouped_linear", torch.float32, "cpu").backend.name == "torch_eager"


def test_what_failed_stays_failed_while_other_types_and_devices_are_checked(monkeypatch):
    monkeypatch.setattr(cpp, "permute", lambda x, *plan: x.new_zeros(len(plan[1]), x.shape[1]))
    self_check("cpu", [torch.float16])
    chosen = []
    right = cpp.combine

    def looks(rows, *others):
        chosen.append(registry.choose("permute", torch.float16, "cpu").backend.name)
        return right(rows, *others)

    monkeypatch.setattr(cpp, "combine", looks)
    self_check("cpu", [torch.float32])
    registry.distrust("triton", "permute", torch.float32, "it is broken", 1)
    assert set(chosen) == {"torch_eager"}
    assert set(ck.backend_info()["failed_checks"]) == {
        "cpp permute float16", "cpp permute float32", "triton permute float32 cuda:1",
    }  # fmt: skip
    triton = registry.by_name("triton")
    assert registry.failed_check(triton, "permute", torch.float32, 0) is None
    assert "it is broken" in registry.failed_check(triton, "permute", torch.float32, 1)


def test_a_failed_op_on_packed_weights_is_refused(broken_expert_mlp):
    if registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name != "cpp":
        pytest.skip("this CPU's expert_mlp is torch's")
    assert registry.choose("packed_expert_mlp", torch.float32, "cpu").backend.name == "cpp"
    self_check("cpu", [torch.float32])
    with pytest.raises(RuntimeError, match="no backend computes packed_expert_mlp .* failed its self-check"):
        registry.choose("packed_expert_mlp", torch.float32, "cpu")


def test_backend_info_and_the_warning_tell_what_became_of_a_forced_backend_that_failed(
    force_backend, broken_expert_mlp
):
    force_backend("cpp")
    with pytest.warns(RuntimeWarning, match="calls raise an error, because CLIPUP_BACKEND names .* --device cpu"):
        check_once("cpu")
    info = ck.backend_info()
    assert info["cpu"]["expert_mlp"]["float32"] is None and info["cpu"]["combine"]["float32"] == "cpp"
    assert "cpp expert_mlp_forward float32" in info["failed_checks"]


def test_backend_info_shows_what_computes_ops_whose_first_argument_has_another_type(monkeypatch):
    monkeypatch.setattr(cpp, "dispatch", lambda indices, *_: (indices,) * 3)
    monkeypatch.setattr(cpp, "topk_gating", lambda logits, *_: (logits,) * 6)
    self_check("cpu", [torch.bfloat16])
    for op in ("dispatch", "topk_gating"):
        assert set(ck.backend_info()["cpu"][op].values()) == {"torch_eager"}


@pytest.mark.parametrize("setting", ["default device", "device", "autocast"])
def test_the_check_does_not_depend_on_what_the_caller_has_set(monkeypatch, setting):
    monkeypatch.setattr(registry, "BACKENDS", registry.BACKENDS[1:] + registry.BACKENDS[:1])
    context = {
        "default device": contextlib.nullcontext(), "device": torch.device("meta"),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[setting]  # fmt: skip
    try:
        if setting == "default device":
            torch.set_default_device("meta")
        with context:
            assert failed(self_check("cpu", [torch.float32])) == set()
    finally:
        torch.set_default_device(None)


def test_without_memory_for_the_check_nothing_is_said_about_the_ops(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(cpp, "permute", full)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        check_once("cpu")
    assert ck.backend_info()["failed_checks"] == {} and not cache_file("cpu").exists()


@pytest.mark.parametrize(
    ("device", "dtypes", "message"),
    [("meta", [torch.float32], "device: got 'meta', expected cpu or cuda"), ("cpu", torch.float64, "dtypes: got .*64")],
)
def test_other_devices_and_types_are_refused(device, dtypes, message):
    with pytest.raises(ValueError, match=message):
        self_check(device, dtypes)


def test_a_result_without_failures_is_kept_for_the_next_program(monkeypatch):
    first = check_once("cpu")
    monkeypatch.setattr(module, "self_check", lambda device, types: pytest.fail("it ran again"))
    assert check_once("cpu") == first and failed(first) == set()


def test_types_are_checked_when_they_are_first_needed(monkeypatch):
    check, checked = module.self_check, []
    monkeypatch.setattr(module, "self_check", lambda device, types: checked.append(list(types)) or check(device, types))
    for types in ([torch.float32], [torch.float32], [torch.bfloat16, torch.float32], [torch.bfloat16]):
        findings = check_once("cpu", types)
        assert {finding.dtype for finding in findings} == {str(dtype).removeprefix("torch.") for dtype in types}
    assert checked == [[torch.float32], [torch.bfloat16]]


def test_a_failure_is_found_again_by_the_next_program_until_it_is_repaired(broken_expert_mlp, monkeypatch, tmp_path):
    if registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name != "cpp":
        pytest.skip("this CPU's expert_mlp is torch's")
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="expert_mlp_forward in float32 failed its .* on cpp .*clipup doctor"):
            first = check_once("cpu")
        assert registry.choose("expert_mlp_forward", torch.float32, "cpu").backend.name == "torch_eager"
        assert failed(check_again("cpu")) == failed(first)  # it checks the kernel, not what took its place
        registry.trust_all()  # as in another program
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert failed(check_once("cpu")) == failed(check_again("cpu")) == set()


_PASSED = {
    "op": "permute",
    "dtype": "float32",
    "chosen_by": "float32",
    "backend": "cpp",
    "allowed": 1.0,
    "reason": None,
}


@pytest.mark.parametrize(
    "content",
    [
        "", "[", "{}", "[]", '[{"op": 3}]', "[" * 100_000, json.dumps([{**_PASSED, "error": None}]),
        json.dumps([{**_PASSED, "error": 2.0}]), json.dumps([{**_PASSED, "error": 0.1, "op": None}]),
        json.dumps([{**_PASSED, "error": 0.1, "reason": "broken", "chosen_by": "nonsense"}]),
    ],
)  # fmt: skip
def test_a_damaged_or_failed_result_is_made_again(content):
    path = cache_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert len(check_once("cpu")) > 10
    assert all(Finding(**finding).reason is None for finding in json.loads(path.read_text()))


def test_a_pipe_in_the_place_of_the_result_is_not_waited_for():
    path = cache_file("cpu")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert failed(check_once("cpu")) == set()


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert failed(check_once("cpu")) == set()


def test_a_user_without_a_home_is_checked_too(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_file("cpu") is None and failed(check_once("cpu")) == set()


def test_a_result_that_cannot_be_put_in_place_leaves_no_temporary_file():
    path = cache_file("cpu")
    (path / "directory").mkdir(parents=True)
    check_once("cpu")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_results_are_kept_by_card_versions_and_tier(monkeypatch):
    here = cache_file("cpu")
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        lambda: monkeypatch.setattr(module, "processor_name", lambda device: "another card"),
        lambda: monkeypatch.setenv(registry.FORCE_TIER, "portable"),
        lambda: monkeypatch.setattr(module, "_installation", lambda: [("triton/rows.py", 100, 1)]),
    ):
        with monkeypatch.context():
            change()
            assert cache_file("cpu") != here
        monkeypatch.undo()
        here = cache_file("cpu")


@pytest.mark.parametrize("arguments", [["nonsense"], ["meta"], ["cuda"], []])
def test_the_program_refuses_devices_in_a_sentence(arguments, capsys):
    if torch.cuda.is_available() and arguments in ([], ["cuda"]):
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        module.main(arguments)
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_where_plain_torch_computes_everything_the_report_says_so(force_backend, capsys):
    force_backend("torch_eager")
    assert module.main(["cpu"]) == 0
    assert "nothing to check: plain torch computes every op here" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_on_a_gpu_the_tiles_of_usual_layers_are_checked(arch, kind):
    """A kernel is compiled for its tile and for whether the weights' sizes are multiples of the tile's."""
    configs = pytest.importorskip("clipup_kernels.triton.configs")

    def compiled(kernel, sizes):
        tokens, width, hidden, experts, k = sizes[:5]
        config = configs.heuristic(arch, kernel, kind, configs.bucket_of(tokens * k, experts), width, hidden)
        return config, *config.even(width, hidden).values()

    for kernel in configs.KERNELS:
        checked = {compiled(kernel, sizes) for sizes in module._SIZES["cuda"]}
        for tokens in (197, 4096, 50_000):
            for layer in ((768, 3072), (512, 2048), (1024, 4096)):
                assert compiled(kernel, (tokens, *layer, 8, 2)) in checked, (kernel, tokens, layer)


def test_a_known_fault_of_a_kind_of_card_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "Triton 3.7 has been seen to miscompile" in known_faults("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert known_faults("cuda") is None is known_faults("cpu")
