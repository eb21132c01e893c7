"""Whatever a user sees is described: assets, checks, jobs, settings; so are all functions."""

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings

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
    assert len(sections(Settings)) == 17


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
