"""What is told of a pool from outside of a run."""

import os

import dagster as dg
import pytest

from causalmix_pipeline.core.errors import PoolError
from causalmix_pipeline.resources.observation import (
    EXPERIMENT_POOL,
    LIVE_POOL,
    make_observation,
    observe_pool,
    observed_version,
    pool_stat,
)
from causalmix_pipeline.resources.settings_file import load_settings


@pytest.fixture
def settings(project_file):
    return load_settings(project_file)


def test_the_cheap_fingerprint_follows_names_sizes_and_times(settings):
    path = settings.live_path / "math" / "short.jsonl"
    seen = [pool_stat(settings.live_path)]
    os.utime(path, (1, 1))
    seen.append(pool_stat(settings.live_path))
    path.rename(path.with_name("other.jsonl"))
    seen.append(pool_stat(settings.live_path))
    path.with_name("other.jsonl").write_text("x")
    seen.append(pool_stat(settings.live_path))

    assert len(set(seen)) == 4
    assert pool_stat(settings.live_path) == seen[-1]


def test_content_of_the_same_size_put_back_to_its_old_time_is_told_by_the_other_time(settings):
    path = settings.live_path / "math" / "short.jsonl"
    before, times = pool_stat(settings.live_path), path.stat()
    path.write_text(path.read_text().replace("g0", "g9"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert path.stat().st_size == times.st_size
    assert pool_stat(settings.live_path) != before


def test_a_link_to_nowhere_is_no_file(settings):
    before = pool_stat(settings.live_path)
    (settings.live_path / "gone.jsonl").symlink_to("nowhere")

    assert pool_stat(settings.live_path) == before


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(PoolError, match="holds no"):
        pool_stat(tmp_path)


def test_an_observation_tells_what_the_pool_holds(settings):
    observation = make_observation(LIVE_POOL, settings.live_path, "v")

    assert observation.data_version == "v"
    assert observation.metadata["files"].value == 6
    assert observation.metadata["megabytes"].value > 0


def test_only_new_content_is_observed(settings):
    with dg.DagsterInstance.ephemeral() as instance:
        assert observed_version(instance, LIVE_POOL) is None
        assert observe_pool(instance, settings, LIVE_POOL)
        assert not observe_pool(instance, settings, LIVE_POOL)
        first = observed_version(instance, LIVE_POOL)

        (settings.live_path / "math" / "short.jsonl").unlink()

        assert observe_pool(instance, settings, LIVE_POOL)
        assert observed_version(instance, LIVE_POOL) != first
        assert observed_version(instance, EXPERIMENT_POOL) is None
