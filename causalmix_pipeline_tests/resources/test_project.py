"""The project resource turns settings into what assets work with."""

import pytest

from causalmix_pipeline.adapters.local_workers import LocalWorkers
from causalmix_pipeline.adapters.ray_workers import RayWorkers
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.resources import project as project_module
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


def test_proxies_from_scratch_are_trained_on_the_cpu_unless_a_gpu_is_asked_for(
    tmp_path, monkeypatch
):
    """Documents are scored by as many processes as before, proxies by one for each GPU."""
    monkeypatch.setattr(project_module, "visible_gpus", lambda: ("0", "1"))
    usual = Project(config_file=str(write_project(tmp_path, backend={"workers": 3})))
    assert usual.backend.device == "cpu"
    assert usual.backend.workers == LocalWorkers(3)
    assert usual.backend.stack_size(ProxyConfig(), 500) == 4

    backend = {"device": "cuda", "max_retries": 5}
    asked = Project(config_file=str(write_project(tmp_path, backend=backend)))
    assert asked.backend.device == "cuda"
    assert asked.backend.workers == LocalWorkers(0, 5, ("0", "1"))
    assert asked.workers == LocalWorkers(0, 5)
    assert asked.backend.stack_size(ProxyConfig(), 500) == 64


def test_gpus_of_a_cluster_are_reserved_for_training_alone(tmp_path, monkeypatch):
    """This machine needs none."""
    monkeypatch.setattr(project_module, "visible_gpus", lambda: ())
    backend = {"kind": "ray", "device": "cuda", "gpus_per_run": 0.5}
    project = Project(config_file=str(write_project(tmp_path, backend=backend)))

    assert project.backend.device == "cuda"
    assert project.backend.workers == RayWorkers(n_gpus_per_task=0.5)
    assert project.workers == RayWorkers()


def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(project_module, "visible_gpus", lambda: ())
    project = Project(config_file=str(write_project(tmp_path, backend={"device": "cuda"})))

    with pytest.raises(ConfigError, match=r"backend\.device must be cpu or auto .* got cuda"):
        _ = project.backend
