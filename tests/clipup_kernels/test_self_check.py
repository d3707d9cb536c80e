"""The check of an installation's kernels: a wrong one is named, and another backend takes its place."""

import os
import subprocess
import sys

import pytest
import torch
from moe_cases import assert_follows_oracle, experts_case

import clipup_kernels as ck
from clipup_kernels import self_check as module
from clipup_kernels.backends import cpp, extension, registry, torch_eager, torch_matmul
from clipup_kernels.self_check import cache_file, check_again, check_once, self_check
from clipup_kernels.self_check_cases import SIZES, cases_of_ops
from clipup_kernels.types import ACTIVATIONS

pytestmark = pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")


@pytest.fixture(autouse=True)
def trusted(monkeypatch, tmp_path, force_backend):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(registry, "BACKENDS", [b for b in registry.BACKENDS if b.name != "torch_matmul"])
    monkeypatch.setattr(registry, "_DISTRUSTED", {})


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
    return right


def failed(findings):
    return {(finding.op, finding.dtype) for finding in findings if finding.reason is not None}


@pytest.mark.parametrize("setting", [torch.device("cpu"), torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_every_op_is_checked_in_every_type_and_right_ones_pass_whatever_the_caller_has_set(setting):
    with setting:
        findings = self_check("cpu")
    ops = {*registry.ROUTING, *registry.ROWS, *registry.PRODUCTS}
    types = ("float32", "bfloat16", "float16")
    assert {(finding.op, finding.dtype) for finding in findings} == {(op, dtype) for op in ops for dtype in types}
    assert failed(findings) == set() == set(ck.backend_info()["failed_checks"])


def test_products_rounded_to_tf32_fail_in_float32_unless_torch_allows_them(monkeypatch):
    right = cpp.grouped_linear

    def rounded(rows, weight, *others):
        return right(
            *((one.view(torch.int32) + 2**12 >> 13 << 13).view(torch.float32) for one in (rows, weight)), *others
        )

    monkeypatch.setattr(cpp, "grouped_linear", rounded)
    assert failed(self_check("cpu", [torch.float32])) == {("grouped_linear", "float32")}
    torch.set_float32_matmul_precision("high")
    allowed = self_check("cpu", [torch.float32])
    torch.set_float32_matmul_precision("highest")
    assert failed(allowed) == set()


def test_the_backend_that_takes_the_place_of_a_wrong_one_is_checked_too(monkeypatch):
    matmul = next(one for one in registry.BACKENDS if one.name == "cpp")._replace(
        name="torch_matmul", modules=dict.fromkeys(registry.PRODUCTS, "backends.torch_matmul")
    )
    monkeypatch.setattr(registry, "BACKENDS", (matmul, *registry.BACKENDS))
    for backend in (torch_matmul, cpp):
        monkeypatch.setattr(
            backend, "grouped_linear", lambda rows, weight, *_: rows.new_zeros(len(rows), weight.shape[1])
        )
    findings = [finding for finding in self_check("cpu", [torch.float32]) if finding.op == "grouped_linear"]
    assert [finding.backend for finding in findings] == ["torch_matmul", "cpp"]
    assert registry.choose("grouped_linear", torch.float32, "cpu").backend.name == "torch_eager"


def test_a_check_without_memory_fails_no_op(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(cpp, "permute", full)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        check_once("cpu")
    assert ck.backend_info()["failed_checks"] == {} and not cache_file("cpu").exists()


def test_on_a_gpu_every_activation_and_form_is_tried_with_the_tiles_of_many_rows():
    cases = cases_of_ops(torch.bfloat16, SIZES["cuda"])[("expert_mlp_forward", torch.bfloat16)]
    tried = {(case[-2], case[-4] is not None) for case in cases if len(case[0]) == 1600}
    assert tried >= {(name, False) for name in ACTIVATIONS} | {("silu", True), ("quick_gelu", True)}
    logits = [case[0] for case in cases_of_ops(torch.bfloat16, SIZES["cuda"])[("topk_gating", torch.float32)]]
    assert {5, 16} <= {logit.shape[1] for logit in logits}


def test_an_illegal_access_ends_the_check_as_no_op_works_after_it(monkeypatch):
    def dead(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cpp, "permute", dead)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    case = cases_of_ops(torch.float32, SIZES["cpu"])[("permute", torch.float32)]
    backend = registry.choose("permute", torch.float32, "cpu").backend
    with pytest.raises(RuntimeError, match="illegal memory access"):
        module._check("permute", backend, case, torch.float32, torch.device("cuda"))


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert failed(check_once("cpu", torch.float32)) == set() and not recwarn


def test_a_wrong_op_is_named_and_another_backend_computes_it(broken_expert_mlp):
    findings = self_check("cpu", [torch.float32])
    (finding,) = [finding for finding in findings if finding.reason is not None]
    assert (finding.op, finding.dtype, finding.backend) == ("expert_mlp_forward", "float32", "cpp")
    assert 0.05 < finding.error < 0.2 and "1.0e-01" in finding.reason
    info = ck.backend_info()
    assert list(info["failed_checks"]) == ["cpp expert_mlp_forward float32"]
    assert info["cpu"]["expert_mlp"]["float32"] == "torch_eager" and info["cpu"]["combine"]["float32"] == "cpp"
    assert_follows_oracle(experts_case())
    with pytest.raises(RuntimeError, match="packed_expert_mlp"):  # it runs the same code
        registry.choose("packed_expert_mlp", torch.float32, "cpu")


def test_a_forced_backend_that_failed_is_refused(force_backend, broken_expert_mlp):
    force_backend("cpp")
    with pytest.warns(RuntimeWarning, match="expert_mlp_forward in float32 .*CLIPUP_BACKEND"):
        check_once("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="CLIPUP_BACKEND=cpp"):
        registry.choose("expert_mlp_forward", torch.float32, "cpu")
    info = ck.backend_info()
    assert info["cpu"]["expert_mlp"]["float32"] is None and info["cpu"]["combine"]["float32"] == "cpp"


def raises(*arguments):
    raise RuntimeError("no such instruction\nwith a long log")


def in_place(rows, gates, *plan):
    out = torch_eager.combine(rows, gates, *plan)
    rows.zero_()
    return out


def only_with_z(*arguments):
    y, z = torch_eager.expert_mlp_forward(*arguments)
    return (y if arguments[-1] else 1.5 * y), z


def unwritten(*arguments):
    """As if everything was in memory already, left by an earlier call; but not in memory filled with NaN."""
    y = torch_eager.combine(*arguments)
    memory = torch.empty_like(y)
    return torch.where(memory.isnan(), memory, y)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("permute", raises),
        ("permute", lambda x, *plan: torch_eager.permute(x.double(), *plan)),
        ("combine", lambda rows, gates, offsets, choices, row: rows[: len(row)] * torch.nan),
        ("combine", in_place),
        ("combine", unwritten),
        ("expert_mlp_forward", only_with_z),
        ("dispatch", lambda indices, *_: (indices,) * 3),
    ],
)
def test_an_op_that_raises_or_is_wrong_in_any_way_fails(monkeypatch, op, function):
    monkeypatch.setattr(cpp, op, function)
    assert failed(self_check("cpu", [torch.bfloat16])) == {(op, "bfloat16")}
    first = registry.type_of_first(op, torch.bfloat16)
    assert registry.choose(op, first, "cpu").backend.name == "torch_eager"


def test_a_result_without_failures_is_kept_for_the_next_program_by_type(monkeypatch):
    check, checked = module.self_check, []
    monkeypatch.setattr(module, "self_check", lambda device, types: checked.append(list(types)) or check(device, types))
    for types in ([torch.float32], [torch.float32], [torch.bfloat16, torch.float32], [torch.bfloat16]):
        findings = check_once("cpu", types)
        assert {finding.dtype for finding in findings} == {str(dtype).removeprefix("torch.") for dtype in types}
    assert checked == [[torch.float32], [torch.bfloat16]] and failed(findings) == set()
    cache_file("cpu").write_text("[")
    assert check_once("cpu", [torch.float32]) and checked[2:] == [[torch.float32]]


def test_a_failure_is_found_again_by_the_next_program_until_it_is_repaired(broken_expert_mlp, monkeypatch):
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="expert_mlp_forward in float32"):
            first = check_once("cpu", torch.float32)
        assert failed(check_again("cpu")) >= failed(first)  # it checks the kernel, not what took its place
        registry._DISTRUSTED.clear()
    monkeypatch.setattr(cpp, "expert_mlp_forward", broken_expert_mlp)
    assert failed(check_once("cpu", torch.float32)) == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [("processor_name", lambda _: "another card"), ("_installation", lambda: [("triton/rows.py", 100, 1)])],
)
def test_results_are_kept_by_card_installation_and_tier(monkeypatch, name, value):
    here = cache_file("cpu")
    monkeypatch.setattr(module, name, value)
    other = cache_file("cpu")
    monkeypatch.setenv(registry.FORCE_TIER, "portable")
    assert len({here, other, cache_file("cpu")}) == 3


def test_of_two_ranks_one_checks_and_the_other_reads_its_result(tmp_path):
    program = (
        "import torch\n"
        "from clipup_kernels import self_check as module\n"
        "check = module.self_check\n"
        "module.self_check = lambda *arguments: print('checked') or check(*arguments)\n"
        "print(len(module.check_once('cpu', torch.float32)))\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [rank.communicate()[0].split() for rank in ranks]
    assert sum("checked" in words for words in told) == 1
    assert len({words[-1] for words in told}) == 1
