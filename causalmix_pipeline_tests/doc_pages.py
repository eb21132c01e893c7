"""The pages of the documentation, their fenced blocks, and a reader who does what they say."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from causalmix_pipeline.cli import main
from causalmix_pipeline.reference import commands, option_names, options
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.browser.served import serve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Languages of fenced blocks. What programs print, and drawings, are `text`, which isn't run.
LANGUAGES = ("sh", "python", "yaml", "text")

#: Make's targets: too long for here. Each names the test that runs what it does.
MAKE_TARGETS = {
    "compare": "assets/test_rivals.py::compared_project",
    "demo": "test_demo.py::test_the_story_is_told_twice_and_trains_once",
    "ui": "browser/test_ui.py::",
    "test": "test_docs.py::",
    "study": "benchmarks/state_matters.py::",
}

#: Commands of ours that aren't run here, and the test that runs each.
RUN_ELSEWHERE = {
    "compare": "assets/test_rivals.py::compared_project",
    "demo": "test_demo.py::test_the_story_is_told_twice_and_trains_once",
    "fetch-scorer": "adapters/test_scorer_weights.py::",
}

_INLINE = re.compile(r"`(causalmix [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block and where it begins."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that its first line names in a comment, such as `# rules.yaml`."""
        found = re.match(r"# ([\w.-]+\.(?:yaml|py))\b", self.text)
        return found[1] if found else None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, fence, lines = [], None, text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if fence is None:
                fence = i
            else:
                body = "\n".join(lines[fence + 1 : i]) + "\n"
                found.append(Block(lines[fence][3:].strip(), body, fence + 1))
                fence = None
    assert fence is None, f"a block that begins in line {fence} doesn't end"
    return found


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def inline_commands(text: str) -> list[list[str]]:
    """The words of each `causalmix ...` in running text."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(each.replace("\n", " ")) for each in _INLINE.findall(prose)]


def check_command(words: list[str]) -> None:
    """See that a command of ours exists and has the options it's given."""
    known = commands()
    name = words[1]
    assert name in known, f"no command {name} in: {shlex.join(words)}"
    names = {n for p, _, info in options(known[name]) for n in option_names(p, info)}
    for word in words[2:]:
        option = word.split("=")[0]
        wrong = option.startswith("-") and option not in {*names, "--help"}
        assert not wrong, f"no option {option} in: {shlex.join(words)}"


def merged(base: dict, over: dict) -> dict:
    """Settings over others, field by field of each section."""
    both = {k: base[k] | v for k, v in over.items()
            if isinstance(v, dict) and isinstance(base.get(k), dict)}  # fmt: skip
    return base | over | both


class Reader:
    """A person in the folder of a finished project, who does what a page says."""

    def __init__(
        self, folder: Path, set_variable: Callable[[str, str], None], *, applies: bool
    ) -> None:
        """Sit down in a folder.

        Args:
            folder: of a finished project; commands are called in it.
            set_variable: sets an environment variable for what follows.
            applies: whether settings are written into the project, or only read.
        """
        self.folder, self.set_variable, self.applies = folder, set_variable, applies
        self.printed: list[str] = []

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        if block.language == "yaml":
            self.write_yaml(block)
        elif block.language == "python":
            if block.file:
                (self.folder / block.file).write_text(block.text)
            self.call(lambda: exec(compile(block.text, "a page", "exec"), {}))
        elif block.language == "sh":
            for words in command_lines(block):
                self.run(words)

    def write_yaml(self, block: Block) -> None:
        """Settings must load over those of the project; another file is written."""
        assert block.file, f"line {block.line}: the first line must name the file: # rules.yaml"
        given = yaml.safe_load(block.text)
        if block.file != "causalmix.yaml":
            (self.folder / block.file).write_text(block.text)
            return
        config = self.folder / "causalmix.yaml"
        both = yaml.safe_dump(merged(yaml.safe_load(config.read_text()), given))
        (self.folder / "merged.yaml").write_text(both)
        load_settings(self.folder / "merged.yaml")
        if self.applies:
            config.write_text(both)

    def run(self, words: list[str]) -> None:
        """Run a command, or of one that would take long what can be run."""
        while "=" in words[0] or words[0] == "export":
            word = words.pop(0)
            if word != "export":
                self.set_variable(*word.split("=", 1))
            if not words:
                return
        known = {
            "causalmix": self.run_ours,
            "make": self.run_make,
            "pip": self.run_pip,
            "dagster": self.run_dagster,
            "chromium": self.run_chromium,
        }
        assert words[0] in known, f"don't know how to run: {shlex.join(words)}"
        known[words[0]](words)

    def run_ours(self, words: list[str]) -> None:
        """Run a command of ours in this process; the UI in one of its own, and end it."""
        check_command(words)
        if words[1] in RUN_ELSEWHERE:
            return
        if words[1] == "ui":
            with serve(self.folder / "causalmix.yaml", self.folder / "ui.log"):
                return
        if words[1] == "init":  # for one who has no settings yet
            (self.folder / "new").mkdir(exist_ok=True)
            with contextlib.chdir(self.folder / "new"):
                return self.call(lambda: main(words[1:]), words)
        self.call(lambda: main(words[1:]), words)

    def call(self, function: Callable[[], int | None], words: list[str] | None = None) -> None:
        """Call a function that must end well, and keep what it prints."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = function()
        self.printed.append(out.getvalue())
        assert not status, f"{shlex.join(words or [])}\n{out.getvalue()[-3000:]}"

    def run_make(self, words: list[str]) -> None:
        """Make must know the target, and a test must run what it does."""
        assert words[1] in MAKE_TARGETS, words
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)

    def run_pip(self, words: list[str]) -> None:
        """Every extra that is named must be declared."""
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for name, extras in re.findall(r"([\w.]+)\[([\w,-]+)\]", words[-1]):
            assert name in (".", declared["name"]), words
            assert set(extras.split(",")) <= set(declared["optional-dependencies"]), words

    def run_dagster(self, words: list[str]) -> None:
        """Dagster must load the workspace that it's to serve."""
        assert words[1] == "dev", words
        workspace = (self.folder / words[-1]).read_text()
        for name in re.findall(r"python_file: (\w+\.py)", workspace):
            if not (self.folder / name).exists():  # "the same for" it, as the page says
                shutil.copy(self.folder / "web_project.py", self.folder / name)
        home = self.folder / "data" / "dagster_home"
        done = subprocess.run(
            [sys.executable, "-m", "dagster", "definitions", "validate", "-w", words[-1]],
            cwd=self.folder, env=os.environ | {"DAGSTER_HOME": str(home)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def run_chromium(self, words: list[str]) -> None:
        """Take a picture of a report, where there is a browser."""
        if shutil.which(words[0]) is None:
            return
        picture = next(word.split("=")[1] for word in words if word.startswith("--screenshot="))
        (self.folder / picture).parent.mkdir(parents=True, exist_ok=True)
        folder = f"file://{self.folder}/data/reports"
        shutil.copy(
            self.folder / "data/reports/report.html", self.folder / "data/reports/demo_1.html"
        )
        page = words[-1].replace("file://$PWD/data/reports", folder)
        subprocess.run([*words[:-1], "--disable-gpu", page], cwd=self.folder, check=True,
                       capture_output=True)  # fmt: skip
        assert (self.folder / picture).stat().st_size > 1_000
