"""Break it on purpose: one thing at a time in a copy of the library, and the tests must notice.

A mutant names a function and what it must hold once (mutants.py); one that finds no place any more
fails in the default run.
"""

import ast
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import forked_pytest
from mutants import MUTANTS
from patterns import replaced

ROOT = Path(__file__).resolve().parents[2]
TESTED = [
    "pyproject.toml", "tests/conftest.py",
    *(
        f"tests/helpers/{name}.py"
        for name in (
            "dtensor_ranks", "each_rank", "many_ranks", "norm_calls", "norm_cases", "paths",
        )
    ),
    "tests/gatednorm/conftest.py",
    *(
        f"tests/gatednorm/test_{name}.py"
        for name in (
            "cpu", "distributed", "fp8", "functional", "kernels", "launch", "linear", "linear_fp8",
            "numerics", "refusals",
        )
    ),
]  # fmt: skip
# Fast tests first; `-x` stops at the first that notices.
SUBSETS = {
    "cpu": [
        "test_numerics.py::test_every_combination_of_options",
        "test_numerics.py::test_bits_of_the_reference",
        "test_numerics.py::test_gradients_take_the_rounded_values",
        "test_cpu.py",
        "test_linear.py",
        "-k", "cpu and not family and not kernels and not generated",
    ],
    "kernels": [
        "test_kernels.py::test_every_masked_load_says_what_lies_outside",
        "test_kernels.py::test_backward_switches",
        "test_kernels.py::test_sums_across_warps",
        "test_numerics.py::test_strides",
        "test_numerics.py::test_every_combination_of_options",
        "test_kernels.py::test_wide_schedule",
        "test_kernels.py::test_any_number_of_workers",
        "test_kernels.py::test_offsets_beyond_32_bits",
        "test_kernels.py::test_a_row_whose_squares_overflow",
        "test_numerics.py::test_bits_of_the_reference",
        "test_numerics.py::test_gradients_take_the_rounded_values",
        "test_linear.py",
        "test_fp8.py",
        "test_linear_fp8.py",
        "-k", "not cpu",
    ],
    "calls": ["test_launch.py", "test_refusals.py", "test_functional.py"],
    "ranks": ["test_distributed.py::test_against_whole_rows[groups]", "-m", ""],
    "dtensors": ["test_distributed.py::test_against_whole_rows[dtensors-2]", "-m", ""],
}  # fmt: skip


FP8 = "test_fp8.py::"
BYTES = f"{FP8}test_bytes_and_scales[kernels-rms-"
# The test that soonest notices mutants whose name starts so; of several the longest start counts.
FIRST = {
    "test_kernels.py::test_sums_across_warps": ("second piece", "two row", "chain", "layer"),
    "test_kernels.py::test_wide_schedule": ("wide", "mean"),
    "test_kernels.py::test_what_ranks_know": ("ranks kernel",),
    "test_kernels.py::test_a_row_whose_squares_overflow": ("mean of inf",),
    "test_kernels.py::test_offsets_beyond_32_bits": ("offsets",),
    "test_kernels.py::test_any_number_of_workers": ("reduce", "last tile", "db of", "dw of the"),
    "test_numerics.py::test_gradients_take_the_rounded_values": ("dw of values", "dz of values"),
    "test_numerics.py::test_bits_of_the_reference": ("no rounding", "rounds"),
    "test_numerics.py::test_strides": ("strides", "two outer", "third outer"),
    "test_numerics.py::test_every_combination_of_options": (
        "zero-centred", "slope of the sigmoid", "silu and", "always silu", "never zero", "bias",
    ),
    "test_numerics.py::test_the_slope_of_a_gate_that_is_nearly_open": ("slope of an open",),
    "test_functional.py::test_any_number_of_rows_after_another": ("call: other inner",),
    "test_refusals.py::test_bad_input": ("call: the gate",),
    "test_refusals.py::test_bad_out": ("call: columns", "call: other strides"),
    "test_linear.py": ("output", "cpu: output"),
    f"{FP8}test_rows_and_columns_of_a_tensor[kernels-1x128-columns]": (
        "fp8: scales of the first", "fp8: columns with the",
    ),
    f"{FP8}test_rows_and_columns_of_a_tensor[kernels-1x128-rows]": ("fp8: values of rows",),
    f"{FP8}test_rows_and_columns_of_a_tensor[kernels-128x128-columns]": ("fp8: scale of a square",),
    f"{FP8}test_columns_of_the_result": (
        "fp8: statistics", "fp8: padding", "fp8: columns w", "fp8: columns o", "fp8: column ",
    ),
    f"{FP8}test_wide_rows": ("fp8: largest of the first h", "fp8: largest of the l", "fp8: chunk"),
    f"{FP8}test_a_power_of_two_for_each_32_columns[kernels-0.0]": ("fp8: scale of zeros",),
    f"{FP8}test_a_power_of_two_for_each_32_columns[kernels-inf]": ("fp8: infinity",),
    f"{BYTES}gate_after-silu-g96-M130-D96-fp32-mxfp8-False]": (
        "fp8: exponent", "fp8: row of a swizzled", "fp8: tiles of",
    ),
    f"{BYTES}gate_after-silu-g128-M5x3-D128-fp32-1x128-True]": ("fp8: head",),
    f"{BYTES}gate_after-silu-g24-M5x3-D24-fp32-rowwise-True]": ("fp8: a row of heads",),
    f"{BYTES}gate_after-silu-bias-g32-M5-D256-fp32-strided-1x128-False]": ("fp8: blocks across",),
    f"{BYTES}plain-silu-mamba2-g1536-M3-D1536-fp32-rowwise-False]": ("fp8: largest of",),
    f"{BYTES}gate_after-silu-zero_centered-g129-M5-D129-fp32-strided-tensorwise-False]": (
        "fp8: given",
    ),
    f"{FP8}test_pairs_of_four_bits_with_two_scales[kernels]": ("fp8: nvfp4",),
    f"{FP8}test_bytes_and_scales": ("fp8: ",),
    "test_linear_fp8.py::test_the_three_products_and_the_gradients"
    "[kernels-rms-gate_after-sigmoid-g64-M2x3x4-D64-fp32-strided]": ("fp8 linear",),
    "test_cpu.py::test_groups_of_one_channel_have_no_gradient": ("cpu: the forward's mean",),
    "test_distributed.py::test_against_whole_rows[compiled]": ("ranks: groups of a rank",),
    "test_distributed.py::test_against_whole_rows[dtensors-4]": ("dtensors: dw of one",),
    "test_cpu.py::test_blocks_that_cut_inside_outer_dimensions": ("cpu: statistics", "cpu: last"),
}  # fmt: skip


def copy_of_the_library(folder: Path) -> None:
    shutil.copytree(
        ROOT / "gatednorm", folder / "gatednorm", ignore=shutil.ignore_patterns("__*__")
    )
    for name in TESTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, subset: str, name: str = "") -> tuple[int, str]:
    """All tests of a subset. Of a mutant first the one that should notice it, in a run of its own:
    to collect the others takes longer, and pytest 9 does not keep to an order of overlapping names.
    """
    tests = SUBSETS[subset]
    options = next((i for i, argument in enumerate(tests) if argument[0] == "-"), len(tests))
    starts = [(start, test) for test, starts in FIRST.items() for start in starts]
    fitting = [(len(start), test) for start, test in starts if name.startswith(start)]
    if fitting:
        code, output = _run(folder, [max(fitting)[1], *tests[options:]])
        if code:
            return code, output
    return _run(folder, tests)


def _run(folder: Path, tests: list[str]) -> tuple[int, str]:
    arguments = [
        "-x", "-q", "-p", "xdist.plugin", "-n", "0", "-p", "no:cacheprovider", "--assert=plain",
        # A mutant that writes out of bounds ruins the heap: its process may hang as well as crash.
        # Without a mutation the longest of these tests takes ten seconds.
        "-o", "faulthandler_timeout=150", "-o", "faulthandler_exit_on_timeout=true",
    ]  # fmt: skip
    return forked_pytest.run(folder, [*arguments, *tests], timeout=1800)


def subset_of(name: str) -> str:
    subsets = {"cpu": "cpu", "call": "calls", "ranks": "ranks", "dtensors": "dtensors"}
    return subsets.get(name.split(":")[0], "kernels")


def verdict(folder: Path, name: str) -> str:
    """What became of a mutant: the test that noticed it, or why it does not count."""
    file, text = replaced(ROOT / "gatednorm", *MUTANTS[name])
    folder.mkdir()
    copy_of_the_library(folder)
    (folder / file.relative_to(ROOT)).write_bytes(text)
    code, output = run_tests(folder, subset_of(name), name)
    shutil.rmtree(folder)
    if code == 0:
        return "NOT NOTICED"
    if code < 0:
        return f"noticed: killed by signal {-code}"
    for nonsense in ("SyntaxError", "NameError", "errors during collection", "no tests ran"):
        if nonsense in output:
            return f"BROKEN MUTANT ({nonsense})\n{output[-2000:]}"
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return f"BROKEN MUTANT (pytest's exit code {code})\n{output[-2000:]}"
    failed = re.search(r"^FAILED (.*?)( - |$)", output, re.MULTILINE)
    if failed:
        return f"noticed: {failed[1]}"
    # A heap in ruins: what ends then, and how, is chance.
    return "noticed: a test hung" if "Timeout (" in output else f"noticed: ended with code {code}"


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory) -> dict[str, Future]:
    """Every selected mutant at work in a pool, while the tests ask for them one by one."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [params["name"] for params in selected if "name" in params]
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        futures = {
            name: pool.submit(verdict, folder / str(i), name)
            for i, name in enumerate(names)
            if name in MUTANTS
        }
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("subset", SUBSETS)
def test_without_a_mutation_all_pass(tmp_path, subset):
    copy_of_the_library(tmp_path)
    code, output = run_tests(tmp_path, subset)
    assert code == 0, output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(verdicts, name, record_property):
    found = verdicts[name].result()
    record_property("mutants", f"{MUTANTS[name][0]:22} {name:50} {found}")
    assert found.startswith("noticed"), found


def test_every_mutant_has_its_place():
    """The default run says at once when the library changed and a mutant must follow."""
    lost = []
    for name, mutant in MUTANTS.items():
        try:
            file, text = replaced(ROOT / "gatednorm", *mutant)
            ast.parse(text)
            assert text != file.read_bytes(), name
        except LookupError as error:
            lost.append(f"{name}: {error}")
    assert not lost, "\n".join(lost)


MOVED = """
class Anywhere:
    def scaled(values,
               factor, more=None):
        # another name, another argument
        return sum(
            values,  factor *  factor, start=0,
        )   # {}
"""


def test_a_place_is_found_after_a_move(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep/other.py"
    file.write_text(MOVED)
    mutant = ("scaled", "sum(*any_rest, any_x * any_x)", "max(any_x + 1, *any_rest)")
    assert replaced(tmp_path, *mutant) == (
        file, MOVED.replace("""sum(
            values,  factor *  factor, start=0,
        )""", "(max(factor + 1, values, start=0))").encode(),
    )  # fmt: skip
    for pattern in ("sum(any_x, any_x)", "any_name + any_other", "any_argument"):
        with pytest.raises(LookupError, match=r"scaled must hold this once, not \d+ times"):
            replaced(tmp_path, "scaled", pattern, "0")
