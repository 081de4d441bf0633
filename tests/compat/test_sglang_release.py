"""SGLang's two files as re-exports: which releases they fit, and one release that has both."""

import re

import pytest

from gatednorm.compat import sglang_files
from installed import install, run

FLA, MAMBA = sglang_files.FILES
MODULE = "sglang." + FLA.removesuffix(".py").replace("/", ".")


@pytest.fixture
def package(tmp_path):
    """A package with the two files and one that imports from the first."""
    for path in (FLA, MAMBA):
        file = tmp_path / "sglang" / path
        file.parent.mkdir(parents=True)
        file.write_text(f"# {path}\n")
    (tmp_path / "sglang" / "model.py").write_text(f"from {MODULE} import RMSNorm as Norm\n")
    return tmp_path / "sglang"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_replaced_and_undone(package, capsys):
    before = contents(package)
    sglang_files.main([str(package)])
    for path, (door, names) in sglang_files.FILES.items():
        assert (package / path).with_name("layernorm_gated.py.before-gatednorm").exists()
        found = {}
        exec((package / path).read_text(), found)
        assert {found[name].__module__ for name in names} <= {
            "gatednorm.compat.common", "gatednorm.compat.mamba", "gatednorm.reference",
            f"gatednorm.compat.{door}",
        }  # fmt: skip
    sglang_files.main([str(package), "--undo"])
    assert contents(package) == before
    verbs = re.findall(r"^(\w+): ", capsys.readouterr().out, re.MULTILINE)
    assert verbs == ["replaced", "replaced", "restored", "restored"]


REFUSED = {
    "no_such_file": (
        lambda p: (p / MAMBA).unlink(),
        [],
        r"mamba.*must be there, as in SGLang 0\.5\.5",
    ),
    "an_importer_wants_more": (
        lambda p: (p / "new.py").write_text(f"from {MODULE} import RMSNorm, _layer_norm_fwd\n"),
        [],
        r"new\.py imports _layer_norm_fwd from .*; use gatednorm\.patch\('sglang'\)",
    ),
    "twice": (sglang_files.replace, [], "replaced already; --undo puts it back"),
    "nothing_to_undo": (lambda p: None, ["--undo"], "so there is nothing to undo"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, options, message, package, capsys):
    change(package)
    before = contents(package)
    with pytest.raises(SystemExit, match="2"):
        sglang_files.main([str(package), *options])
    assert re.search(message, capsys.readouterr().err)
    assert contents(package) == before


@pytest.mark.slow
def test_a_release_with_both_files(tmp_path):
    """SGLang 0.5.5, its own functions under Triton's interpreter; sglang_release.py says what
    stands in for the rest of it."""
    folder = install(tmp_path, "sglang==0.5.5")
    out = run(folder, "sglang_release.py", folder / "sglang")
    assert re.findall("^(replaced|restored|4.*|undone.*)", out, re.MULTILINE) == [
        "replaced", "replaced", "400 results, 6 signatures", "restored", "restored",
        "undone: the same bits as before",
    ]  # fmt: skip
