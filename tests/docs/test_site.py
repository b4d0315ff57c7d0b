"""The documentation site: it builds without a warning or a broken link, describes every public name, and needs no network."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_sumagg
import modeling_sumagg.decoder
import modeling_sumagg.ops
import modeling_sumagg.streams
import modeling_sumagg.training


ROOT = Path(__file__).parents[2]


def build(source: Path, site: Path) -> subprocess.CompletedProcess:
    """The command of CONTRIBUTING.md, for the pages below `source`."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", ROOT / "docs", source, site]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    process = build(ROOT, folder)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


def public_names() -> set[str]:
    """Every public name by the place that users import it from."""
    packages = (modeling_sumagg, modeling_sumagg.ops, modeling_sumagg.decoder, modeling_sumagg.configuration)
    names = {f"{package.__name__}.{name}" for package in packages for name in package.__all__}
    for package in (modeling_sumagg.streams, modeling_sumagg.training):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            own = [
                name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
            ]
            own = [name for name in own if name[0] != "_" and callable(getattr(module, name))]
            names |= {f"{module.__name__}.{name}" for name in getattr(module, "__all__", own)}
    return names


@pytest.mark.slow
def test_the_reference_describes_every_public_name(site):
    described = set()
    for page in (site / "docs" / "api").glob("*.html"):
        described |= set(re.findall(r'<dt[^>]* id="([\w.]+)"', page.read_text(encoding="utf-8")))
    # Some can be imported from several places, and are described under one of them.
    objects = {id(resolve(name)) for name in described}
    missing = [name for name in sorted(public_names()) if name not in described and id(resolve(name)) not in objects]
    assert len(public_names()) > 80
    assert not missing


def resolve(name: str) -> object:
    """The object of a dotted name, or the name where there is none, as of a field without a default."""
    try:
        return pkgutil.resolve_name(name)
    except AttributeError:
        return name


@pytest.mark.slow
def test_every_family_has_a_page_with_typeset_equations(site):
    for model_type in modeling_sumagg.FAMILIES:
        page = (site / "docs" / "families" / f"{model_type}.html").read_text(encoding="utf-8")
        assert page.count("<math") >= 3 and "<mo>&#x02211;</mo>" in page, model_type
        # Nothing of the notation is left as it was typed, and no environment is unknown to the converter.
        article = page.partition("<article")[2].partition("</article>")[0]
        assert not re.findall(r"\$|\\[a-zA-Z]+|<m\w+>&(?:amp;)?</|linebreak", article), model_type


@pytest.mark.slow
def test_a_page_loads_nothing_from_other_servers(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 20
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//|<link[^>]* href=\"(?:https?:)?//|@import|url\(http"
    )
    assert not [page for page in pages if loads.search(page.read_text(encoding="utf-8"))]


def test_every_page_is_in_the_table_of_contents():
    index = ROOT / "docs" / "index.md"
    listed = set(re.findall(r"^([\w./]+)$", index.read_text(encoding="utf-8"), re.MULTILINE))
    paths = [path for pattern in ("*.md", "docs/*/*.*", "examples/*.md") for path in ROOT.glob(pattern)]
    pages = {os.path.relpath(path.with_suffix(""), index.parent) for path in paths}
    assert len(pages) >= 20
    assert not pages - listed


@pytest.mark.slow
@pytest.mark.parametrize(
    "link",
    ["[page](missing.md)", "[title](index.md#missing)", "[`Name`](#modeling_sumagg.Missing)", "![](missing.png)"],
)
def test_a_broken_link_fails(tmp_path, link):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    page.write_text(f"# Title\n\n[title](#title) {link}\n")
    process = build(tmp_path, tmp_path / "site")
    assert process.returncode != 0 and "missing" in process.stderr.lower()
    page.write_text("# Title\n\n[title](#title)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
