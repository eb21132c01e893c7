"""Whatever a user sees is described: assets, checks, jobs, settings; so are all functions."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel

from causalmix_pipeline.core.covariates import DOMAIN_COVARIATES, METRICS, MODEL_METRICS
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.reference import commands, option_names, options, reference
from causalmix_pipeline.reference import sections as sections_by_path
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline_tests.doc_pages import PAGES, ROOT

REFERENCE = (ROOT / "docs" / "REFERENCE.md").read_text()
PACKAGE = Path(__file__).parents[1] / "causalmix_pipeline"


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    return build_definitions(tmp_path_factory.mktemp("none") / "causalmix.yaml")


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += sections(kind)
    return found


@pytest.mark.parametrize("section", sections(Settings), ids=lambda s: s.__name__)
def test_every_setting_is_described(section):
    for name, field in section.model_fields.items():
        assert field.description and len(field.description) > 15, name
        assert field.description[0].isupper() or field.description.split()[0].islower(), name


def test_every_section_of_the_settings_is_found():
    assert len(sections(Settings)) == 20


def test_every_field_of_the_resources_is_described():
    assert Project.model_fields["config_file"].description


def test_every_asset_is_described_grouped_and_has_a_kind(definitions):
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description and len(node.description) > 40, key
        assert node.group_name in {"experiment", "live", "effects", "recommendation"}, key
        assert node.kinds, key


def test_every_asset_says_when_it_becomes_stale(definitions):
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        if graph.get(key).is_materializable:
            assert "Stale when" in " ".join(graph.get(key).description.split()), key
            assert graph.get(key).code_version, key


def test_every_check_job_sensor_and_schedule_is_described(definitions):
    graph, repository = definitions.resolve_asset_graph(), definitions.get_repository_def()

    for key in graph.asset_check_keys:
        assert graph.get(key).description, key
    jobs = [job for job in repository.get_all_jobs() if job.name != "__ASSET_JOB"]
    for thing in [*jobs, *repository.sensor_defs, *repository.schedule_defs]:
        assert thing.description, thing.name


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_module_and_public_function_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    missing = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"
               and not ast.get_docstring(n)]  # fmt: skip
    assert ast.get_docstring(tree)
    assert missing == []


# The reference


def test_the_reference_is_what_the_code_says():
    assert reference() == REFERENCE, (
        "docs/REFERENCE.md is old: python -m causalmix_pipeline.reference docs/REFERENCE.md"
    )


def part_of(title: str) -> str:
    """A section of the reference."""
    return REFERENCE.split(f"\n{title}\n")[1].split("\n" + title.split()[0] + " ")[0]


def test_every_command_and_option_stands_in_the_reference():
    for name, function in commands().items():
        part = part_of(f"### causalmix {name}")
        for parameter, _, info in options(function):
            assert info.help and len(info.help) > 10, (name, parameter.name)
            for option in option_names(parameter, info):
                assert f"`{option}`" in part, (name, option)


def test_every_setting_stands_in_the_reference():
    assert set(sections_by_path("", Settings).values()) == set(sections(Settings))
    for path, section in sections_by_path("", Settings).items():
        part = part_of(f"### {path or 'At the top'}")
        for name in section.model_fields:
            assert f"| `{f'{path}.{name}'.lstrip('.')}` |" in part


def test_every_asset_check_job_and_sensor_stands_in_the_reference(definitions):
    graph, repository = definitions.resolve_asset_graph(), definitions.get_repository_def()

    for key in graph.get_all_asset_keys():
        assert part_of(f"### {key.to_user_string()}")
    for key in graph.asset_check_keys:
        assert f"| `{key.name}` |" in part_of("## Checks")
    jobs = [job.name for job in repository.get_all_jobs() if job.name != "__ASSET_JOB"]
    watching = [each.name for each in (*repository.sensor_defs, *repository.schedule_defs)]
    assert all(f"| `{name}` |" in part_of("## Jobs") for name in jobs)
    assert all(f"| `{name}` |" in part_of("## Sensors and schedule") for name in watching)


@pytest.mark.parametrize("name", [*METRICS, *MODEL_METRICS, *DOMAIN_COVARIATES])
def test_every_covariate_is_explained(name):
    assert f"| `{name}` |" in (ROOT / "docs" / "COVARIATES.md").read_text()
    assert f"`{name}`" in part_of("## Covariates")


# Links


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_reached_from_the_readme(page):
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        at = todo.pop()
        seen.add(at)
        links = re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", at.read_text())
        found = {(at.parent / link).resolve() for link in links if "://" not in link}
        todo += found - seen
    assert page in seen


def test_the_picture_is_small_and_real():
    picture = (ROOT / "docs" / "images" / "report.png").read_bytes()

    assert picture.startswith(b"\x89PNG") and 20_000 < len(picture) < 300_000


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
