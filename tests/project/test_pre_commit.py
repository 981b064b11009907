"""The hooks of pre-commit are the commands of `make lint`."""

import re

import yaml

from tests.project.pages import PAGES, ROOT


def hooks() -> list[dict[str, object]]:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    return list(repository["hooks"])


def test_they_are_the_commands_of_make_lint_in_order() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", PAGES["Makefile"], flags=re.MULTILINE)
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert len(lint) == 4
    assert [hook["entry"] for hook in hooks()] == lint


def test_they_look_at_the_whole_tree_whatever_was_changed() -> None:
    for hook in hooks():
        assert hook["language"] == "system"
        assert hook["always_run"]
        assert not hook["pass_filenames"]
