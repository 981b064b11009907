"""The settings of a run: flag, environment, file, preset and default, in this order; and `config show`, which says where each is from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ooc_moe.cli.main import main
from ooc_moe.cli.settings import RunOptions, configurable, run_groups
from ooc_moe.config.agent import PRESETS, AgentConfig, Preset
from ooc_moe.config.run import AdmissionName, PlaneName, PPOConfig, RunConfig
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.store import Plane

Train = Callable[..., RunConfig]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """Runs `ooc-moe train` up to the training, and returns the configuration that would be trained."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("ooc_moe.run.train.train", lambda config, console: configs.append(config))
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> RunConfig:
        with pytest.raises(SystemExit) as end:
            main(["train", *map(str, words)])
        assert end.value.code == 0
        return configs.pop()

    return call


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, tuple[Any, str]]]:
    """Runs `ooc-moe config show --json`, and returns (value, source) by setting."""

    def call(*words: object) -> dict[str, tuple[Any, str]]:
        with pytest.raises(SystemExit) as end:
            main(["config", "show", "--json", *map(str, words)])
        assert end.value.code == 0
        return {each["setting"]: (each["value"], each["source"]) for each in json.loads(capsys.readouterr().out)}

    return call


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command which is refused prints."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


# What the options are


def test_no_two_configurations_share_a_name_and_every_field_is_an_option() -> None:
    names = [option.name for group in run_groups() for option in group.options]
    assert len(set(names)) == len(names)
    classes = (RunOptions, RunConfig, AgentConfig, PPOConfig)
    fields = [field.name for each in classes for field in dataclasses.fields(each) if field.name not in ("agent", "ppo")]
    assert sorted(names) == sorted(fields)


def test_the_words_for_presets_planes_and_admission_are_those_that_exist() -> None:
    assert Preset.__args__ == tuple(PRESETS)
    assert set(PlaneName.__args__) == {plane.value for plane in Plane}
    assert set(AdmissionName.__args__) == {mode.value for mode in AdmissionMode}


def test_every_size_of_the_agent_and_of_ppo_is_reached_by_its_flag(train: Train) -> None:
    agent = dataclasses.replace(
        PRESETS["tiny"],
        num_games=3,
        frame_size=50,
        frame_stack=2,
        num_actions=6,
        stem_channels=(4, 8),
        stem_kernels=(6, 3),
        stem_strides=(3, 2),
        dim=24,
        hidden=40,
        num_layers=3,
        num_heads=3,
        context=8,
        dropout=0.1,
        num_experts=20,
        grow=False,
        banks="per-layer",
        pool_size=3,
        shared_experts=1,
        pools="shared",
        top_k=3,
        router_noise=0.5,
        balance_weight=0.2,
        attention="shared",
        hbm_experts=9,
        dram_experts=10,
        prefetch_experts=4,
    )
    ppo = PPOConfig(
        num_envs=2,
        rollout_steps=16,
        epochs=1,
        minibatch_segments=4,
        learning_rate=0.1,
        anneal=False,
        gamma=0.5,
        gae_lambda=0.4,
        clip=0.3,
        entropy_coef=0.02,
        value_coef=0.25,
        max_grad_norm=2.0,
        replay_routing=False,
    )
    words = ["--games", "krull", "--preset", "tiny"]
    for config, usual in ((agent, PRESETS["tiny"]), (ppo, PPOConfig())):
        for field in dataclasses.fields(config):
            value, name = getattr(config, field.name), field.name.replace("_", "-")
            if value != getattr(usual, field.name):
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", text]
    config = train(*words)
    assert (config.agent, config.ppo) == (agent, ppo)


@pytest.mark.parametrize(
    "words",
    [
        ("--games", "krull,pixel/catch"),
        ("--games=krull,pixel/catch",),
        ("--games", "krull", "pixel/catch"),
        ("--games", "krull", "--games", "pixel/catch"),
        ("--games", "krull, pixel/catch"),
    ],
)
def test_a_list_may_be_written_with_commas_or_as_several_words(train: Train, words: tuple[str, ...]) -> None:
    assert train(*words, "--seed", 3).games == ("krull", "pixel/catch")


def test_underscores_in_a_flag_are_dashes(train: Train) -> None:
    assert train("--games", "krull", "--hbm_experts", 9).agent.hbm_experts == 9


# Where a setting comes from


def test_a_flag_overrides_the_environment_which_overrides_the_file_which_overrides_the_preset_and_the_defaults(
    show: Any, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        """
        games = ["krull", "boxing"]
        preset = "tiny"
        seed = 1
        epochs = 4
        grow = false

        [agent]
        hbm_experts = 10
        dram_experts = 11
        stem_channels = [4, 8]

        [ppo]
        learning_rate = 2e-4
        """
    )
    monkeypatch.setenv("OOC_MOE_SEED", "2")
    monkeypatch.setenv("OOC_MOE_DRAM_EXPERTS", "12")
    monkeypatch.setenv("OOC_MOE_DETECT_UNKNOWN", "off")
    monkeypatch.setenv("OOC_MOE_TOKEN_FILE", "for the client, one day")
    monkeypatch.setenv("OOC_MOE_SERVER_DATA_DIR", "for the daemon")
    words = ("--config", file, "--seed", 3, "--num-envs", 4)
    settings = show(*words)
    assert settings["seed"] == (3, "flag")
    assert settings["num_envs"] == (4, "flag")
    assert settings["dram_experts"] == (12, "environment OOC_MOE_DRAM_EXPERTS")
    assert settings["detect_unknown"] == (False, "environment OOC_MOE_DETECT_UNKNOWN")
    assert settings["hbm_experts"] == (10, f"file {file}")
    assert settings["games"] == (["krull", "boxing"], f"file {file}")
    assert settings["stem_channels"] == ([4, 8], f"file {file}")
    assert settings["preset"] == ("tiny", f"file {file}")
    assert settings["dim"] == (16, "preset tiny")
    assert settings["gamma"] == (0.99, "default")
    config = train(*words)
    assert (config.seed, config.ppo.num_envs, config.agent.dram_experts, config.agent.hbm_experts, config.agent.dim) == (3, 4, 12, 10, 16)
    assert (config.ppo.epochs, config.ppo.learning_rate, config.agent.grow, config.detect_unknown) == (4, 2e-4, False, False)
    assert config.games == ("krull", "boxing")


def test_the_preset_itself_follows_the_same_order(show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text('preset = "tiny"')
    assert show()["dim"] == (64, "preset demo")
    assert show("--config", tmp_path / "run.toml")["dim"] == (16, "preset tiny")
    monkeypatch.setenv("OOC_MOE_PRESET", "demo")
    assert show("--config", tmp_path / "run.toml")["dim"] == (64, "preset demo")
    assert show("--config", tmp_path / "run.toml", "--preset", "full")["dim"] == (512, "preset full")


@pytest.mark.parametrize("given_as", ["config.json", ""])
def test_the_configuration_of_a_run_given_back_makes_the_same_run(train: Train, tmp_path: Path, given_as: str) -> None:
    first = train(
        *("--games", "krull,pixel/catch", "--preset", "tiny", "--name", "first", "--seed", 7, "--no-grow", "--protection-weight", 0.25),
        *("--learning-rate", 3e-4, "--trace", "t.trace", "--eval-unseen"),
    )
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(first.to_json())
    again = train("--config", run_dir / given_as, "--run-dir", first.run_dir)
    assert again == first
    other = train("--config", run_dir / given_as, "--name", "second", "--seed", 8, "--protection-weight", "none")
    assert other == dataclasses.replace(first, run_dir=Path("runs/second"), seed=8, protection_weight=None)


def test_the_directory_may_come_from_a_file_and_a_name_overrides_it(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('run_dir = "elsewhere/x"\ngames = "krull,pong"')
    assert train("--config", "run.toml").run_dir == Path("elsewhere/x")
    assert train("--config", "run.toml").games == ("krull", "pong")
    assert train("--config", "run.toml", "--name", "y").run_dir == Path("runs/y")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeed = 1", "unknown key 'seeed'; did you mean 'seed'?"),
        ("[agent]\nhbm_expert = 1\nbananas = 2", "unknown key 'hbm_expert'; did you mean 'hbm_experts'?, unknown key 'bananas'"),
        ("[agnt]\ndim = 1", "unknown key 'agnt'"),
        ("resume = true", "unknown key 'resume'"),
        ('seed = "x"', "seed: 'x' is not a whole number (file "),
        ("hbm_experts = 1.5", "hbm_experts: '1.5' is not a whole number"),
        ('routing = "dense"', "routing: 'dense' is not one of pool, token"),
        ("grow = 2", "grow: '2' is not true or false"),
        ("seed = ", "cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(capsys: Any, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    line = refusal(capsys, "train", "--games", "krull", "--config", file)
    assert said in line
    assert str(file) in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OOC_MOE_SEDE", "1", "environment: unknown variable 'OOC_MOE_SEDE'; did you mean 'OOC_MOE_SEED'?"),
        ("OOC_MOE_SEED", "x", "seed: 'x' is not a whole number (environment OOC_MOE_SEED)"),
        ("OOC_MOE_PREFETCH", "x", "prefetch: 'x' is not one of off, detector, schedule (environment OOC_MOE_PREFETCH)"),
        ("OOC_MOE_HBM_EXPERTS", "0", "hbm_experts: 0 is not at least 1"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_that_names_it(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    for command in ("train", "config show"):
        assert refusal(capsys, *command.split(), "--games", "krull").startswith(said)


def test_a_file_that_does_not_exist_is_named(capsys: Any, tmp_path: Path) -> None:
    assert "nothing.toml cannot be read" in refusal(capsys, "train", "--config", tmp_path / "nothing.toml")


def test_config_show_is_a_row_for_each_setting_and_needs_no_games(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["config", "show", "--seed", "5", "--store", "none"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["seed"] == ["5", "flag"]
    assert rows["store"] == ["none", "flag"]
    assert rows["stem_channels"] == ["16,32,32", "preset", "demo"]
    assert {option.name for option in configurable()} <= set(rows)
    assert lines[-1] == "train also needs --games"


def test_config_show_of_a_resumed_run_shows_what_it_continues_with(show: Any, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(RunConfig(run_dir=tmp_path, games=("krull",), agent=PRESETS["tiny"], seed=9).to_json())
    settings = show("--resume", "--run-dir", tmp_path, "--plane", "stream")
    assert settings["seed"] == (9, f"file {tmp_path / 'config.json'}")
    assert settings["plane"] == ("stream", "flag")
    assert "leave out --seed" in refusal(capsys, "config", "show", "--resume", "--run-dir", tmp_path, "--seed", 1)


def test_a_resumed_run_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("ooc_moe.run.train.resume", lambda run_dir, console, **options: asked.append((run_dir, options)))
    monkeypatch.setenv("OOC_MOE_STORE", "elsewhere:1")
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--name", "x", "--plane", "local", "--store", "host:1", "--checkpoint", "0-krull"])
    assert asked == [
        (tmp_path, {"store": None, "plane": None, "name": None}),
        (Path("runs/x"), {"store": "host:1", "plane": "local", "name": "0-krull"}),
    ]
