"""The project resource turns settings into what assets work with."""

import pytest

from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.resources.project import Project, default_resources
from causalmix_pipeline_tests.conftest import write_project


def test_settings_become_plan_ranges_columns_and_backend(tmp_path):
    design = {
        "n_runs": 20,
        "states": {"tilt": 1.5, "duplication": 0.3, "noise": 0.1, "size_range": [0.2, 0.9]},
        "noise_panel": {"mixtures": 3, "seeds": 4},
        "seed": 7,
    }
    project = Project(config_file=str(write_project(tmp_path, design=design)))

    plan, ranges = project.design_plan, project.state_ranges
    assert (plan.n_runs, plan.panel_mixtures, plan.panel_seeds, plan.seed) == (20, 3, 4, 7)
    assert (ranges.tilt_sd, ranges.repetition, ranges.noise) == (1.5, 0.3, 0.1)
    assert ranges.size_range == (0.2, 0.9)
    assert project.columns.group == "group"
    assert project.workers == project.backend.workers == LocalWorkers(2)
    assert project.run_store.root == tmp_path / "data" / "run_store"
    assert project.folder("export", "x.json") == tmp_path / "data" / "export" / "x.json"


def test_a_ray_backend_and_a_storage_elsewhere_are_built_from_their_settings(tmp_path):
    path = write_project(
        tmp_path, backend={"kind": "ray", "address": "auto"}, storage="s3://bucket/team"
    )
    project = Project(config_file=str(path))

    assert project.workers == project.backend.workers == RayWorkers("auto")
    assert project.run_store.root == "s3://bucket/team/run_store"
    assert default_resources(path)["io_manager"].base_dir == "s3://bucket/team/assets"


def test_the_file_is_read_at_the_run_not_at_the_load(tmp_path):
    path = write_project(tmp_path)
    resources = default_resources(path)
    write_project(tmp_path, seed=5)

    assert resources["project"].settings.seed == 5


def test_a_broken_file_fails_the_load_with_the_field(tmp_path):
    path = write_project(tmp_path, seed=-1)

    with pytest.raises(ConfigError, match="seed must be >= 0"):
        default_resources(path)


def test_assets_are_kept_below_the_data_folder(tmp_path):
    resources = default_resources(write_project(tmp_path))

    assert resources["io_manager"].base_dir == str(tmp_path / "data" / "assets")
