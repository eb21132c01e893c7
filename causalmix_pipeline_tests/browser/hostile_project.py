"""A small project whose domains, sources and file names try to be more than text."""

import json
import random
from pathlib import Path

import yaml

from causalmix_pipeline_tests.conftest import SOURCES, WORDS, write_project

#: Domains that take the place of those of the tiny project, in its order.
DOMAINS = {
    "math": "<script>window.hacked=1</script>",
    "code": '"><img src=x onerror=window.hacked=2>|`a`*b*_c_\n[x](javascript:window.hacked=3)',
    "talk": "\u202e![i](http://example.com/x.png) 'evil' " + "W" * 300,
}

#: Sources, in the order of the tiny project's.
LABELS = {"short": "<b onmouseover=window.hacked=4>\u200f", "long": "`|`\\|" + "s" * 300}

#: File names; a slash and a zero byte are all that a name can't hold.
FILES = {"short": '"><img src=x onerror=window.hacked=5>|a', "long": "b\n[y](javascript:alert(1))"}


def write_hostile_pool(root: Path, *, n: int, seed: int) -> None:
    """Write the tiny project's pool with hostile labels and names."""
    rng = random.Random(seed)
    for domain, label in DOMAINS.items():
        for source, n_words in SOURCES.items():
            folder = root / domain
            folder.mkdir(parents=True, exist_ok=True)
            rows = []
            for i in range(n):
                words = [rng.choice(WORDS[domain]) for _ in range(n_words)]
                words[:: n_words // 5] = [f"{rng.random():.6f}" for _ in words[:: n_words // 5]]
                text = " ".join(words)
                rows.append(
                    {"text": text, "domain": label, "source": LABELS[source], "group": f"g{i // 2}"}
                )
            rows.append({"text": 7, "domain": label, "source": LABELS[source], "group": "g"})
            lines = "\n".join(map(json.dumps, rows))
            (folder / f"{FILES[source]}.jsonl").write_text(lines + "\n")


def write_hostile_project(root: Path) -> Path:
    """Write both pools, the tasks and the settings; return the settings file."""
    config = write_project(root)
    for pool, n, seed in (("hostile_experiment", 30, 1), ("hostile_live", 24, 2)):
        write_hostile_pool(root / pool, n=n, seed=seed)
    raw = yaml.safe_load(config.read_text())
    raw["pools"] = {"experiment": "hostile_experiment", "live": "hostile_live"}
    raw["columns"] = {"group": "group", "domain": "domain", "source": "source"}
    raw["automation"] |= {"sensor_interval_seconds": 3600}
    raw["quality"] = {"max_rejected_share": 0.5}
    evil = root / "eval" / f"{FILES['short']}.jsonl"
    (root / "eval" / "math.jsonl").rename(evil)
    raw["tasks"][0]["path"] = str(evil.relative_to(root))
    config.write_text(yaml.safe_dump(raw))
    return config
