"""The plan beside arithmetic by hand, beside a real cache that plays the same updates, and its words to the user."""

import dataclasses
import json
from pathlib import Path

import pytest

from ooc_moe.cli.main import main
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.simulate.plan import Rates, measure, plan, table
from ooc_moe_wire.errors import InvalidRequest

RATES = Rates(dram=0.25, nvme=0.5, seed=1.0, push=2.0)
PPO = PPOConfig(num_envs=4, rollout_steps=8, epochs=2, minibatch_segments=4)


def config(num_games=3, **agent):
    return RunConfig(
        run_dir=Path("plan"),
        games=tuple(f"game{number}" for number in range(num_games)),
        agent=dataclasses.replace(PRESETS["tiny"], **agent),
        ppo=PPO,
        steps_per_game=64,
    )


def test_bytes_are_those_of_the_layout():
    made = plan(config(), RATES)
    layout = PRESETS["tiny"].expert_layout()
    # Two layers with a pool of four each.
    assert (made.working_set, made.num_experts, made.hbm_experts) == (8, 24, 8)
    assert made.hbm_bytes == 8 * layout.body_bytes
    assert made.gradient_bytes == 8 * layout.parameter_bytes
    assert made.nvme_bytes == 24 * layout.record_bytes == made.dram_bytes_for_all
    assert made.dram_bytes == 8 * layout.record_bytes
    assert made.switch_bytes_in == made.switch_bytes_out == 8 * layout.body_bytes
    assert made.switch_s == {"dram": 2.0, "nvme": 4.0, "seed": 8.0}
    one, three = (dataclasses.replace(PRESETS["tiny"], num_games=number).estimate_params().dense for number in (1, 3))
    assert made.dense_bytes == 4 * three + 12 * one


def test_games_whose_layers_share_a_pool_need_half_and_token_routing_needs_all():
    assert plan(config(pools="shared"), RATES).working_set == 4
    assert plan(config(banks="per-layer"), RATES).working_set == 8
    token = plan(config(routing="token"), RATES)
    assert (token.working_set, token.num_experts) == (16, 16)


def test_borrowed_experts_are_loaded_and_read_but_neither_trained_nor_kept_twice():
    layout = PRESETS["tiny"].expert_layout()
    alone, lent = (plan(config(hbm_experts=12, shared_experts=shared), RATES) for shared in (0, 2))
    assert (lent.working_set, lent.borrowed, lent.num_experts) == (8 + 2 * 2, 4, 24)
    assert lent.switch_bytes_in == alone.switch_bytes_in + 4 * layout.parameter_bytes
    assert lent.switch_s["dram"] > alone.switch_s["dram"]
    for same in ("gradient_bytes", "nvme_bytes", "nvme_spare_bytes", "switch_bytes_out", "loads_per_update"):
        assert getattr(lent, same) == getattr(alone, same), same
    assert plan(config(hbm_experts=11, shared_experts=2), RATES).loads_per_update > 0
    # There are no more to borrow than the games before own; the only one borrows nothing.
    assert plan(config(num_games=2, shared_experts=7), RATES).borrowed == 2 * 4
    assert plan(config(num_games=1, shared_experts=2), RATES).borrowed == 0
    # With one slot as below, and one expert borrowed: acting asks for 3, a minibatch forward and backward for 3, its optimizer for 2.
    one_slot = plan(config(hbm_experts=1, pools="shared", num_layers=1, pool_size=2, top_k=2, shared_experts=1), RATES)
    assert one_slot.loads_per_update == (10 * 3 - 3) + (4 * (3 + 3 + 2) - 3)


def test_loads_begin_where_a_game_no_longer_fits():
    loads = [plan(config(hbm_experts=capacity), RATES).loads_per_update for capacity in (16, 8, 7, 4, 2)]
    assert loads[:2] == [0, 0]
    assert 0 < loads[2] < loads[3] < loads[4]
    # With one slot every access loads. Acting: 8 steps and 2 values at ends of segments, 2 experts each. Learning: 4 minibatches of
    # forward, backward and optimizer. What comes first is no reload.
    one_slot = plan(config(hbm_experts=1, pools="shared", num_layers=1, pool_size=2, top_k=2), RATES)
    assert one_slot.loads_per_update == (10 * 2 - 2) + (4 * 3 * 2 - 2)


def test_stalls_lie_between_all_hidden_and_none():
    made = plan(config(hbm_experts=4), RATES, steps_per_s=16)
    assert made.update_compute_s == 2
    assert made.game_compute_s == 4
    assert made.update_load_s == 0.25 * made.loads_per_update
    assert made.update_stall_s == (made.update_load_s - 2, made.update_load_s)
    small = plan(config(hbm_experts=4), RATES, dram_bytes=4096)
    assert small.update_load_s == 0.5 * made.loads_per_update
    assert plan(config(), RATES, steps_per_s=16).update_stall_s == (0, 0)


def test_durations_are_written_in_the_unit_that_fits_them():
    rates = Rates(dram=0.000297, nvme=0.0101, seed=1.0, push=2.0)
    rows = {quantity: (value, remark) for quantity, value, remark in table(plan(config(), rates), rates).rows}
    assert rows["a switch takes, from dram"] == ("2.38 ms", "297 µs an expert; no overlap")
    assert rows["a switch takes, from nvme"] == ("80.8 ms", "10.1 ms an expert; no overlap")
    assert rows["a switch takes, from seed"] == ("8 s", "1 s an expert; no overlap")
    assert rows["stall in an update"][0] == "0 s to 0 s"


@pytest.mark.parametrize(
    ("options", "agent", "finding"),
    [
        ({}, {}, None),
        ({"gpu_bytes": 10**9}, {}, "not worth it: all 24 experts fit into HBM; keep them there with --hbm-experts 24"),
        ({"gpu_bytes": 10**5}, {}, "will not work: gradients and dense parameters alone need"),
        ({"gpu_bytes": 340_000}, {}, "will not work: HBM has room for 5 experts beside gradients and dense parameters, not 8"),
        (
            {"gpu_bytes": 450_000},
            {"hbm_experts": 4},
            "HBM is configured too small for a game, although the GPU has room: give --hbm-experts 10",
        ),
        ({"nvme_bytes": 10**5}, {}, "will not work: the run needs"),
        ({}, {"hbm_experts": 24}, "not worth it: all 24 experts fit into the HBM configured (24)"),
        ({}, {"hbm_experts": 6}, "slow: a game's 8 experts do not fit into HBM's 6"),
        ({"steps_per_s": 16.0}, {"hbm_experts": 6}, " s beside 2 s of compute"),
    ],
)
def test_it_says_plainly_what_will_not_work_and_what_is_not_worth_it(options, agent, finding):
    findings = plan(config(**agent), RATES, **options).findings
    assert not findings if finding is None else any(finding in said for said in findings), findings


@pytest.mark.parametrize("name", ["gpu_bytes", "dram_bytes", "nvme_bytes", "steps_per_s"])
def test_sizes_of_nothing_are_refused_by_name(name):
    with pytest.raises(InvalidRequest, match=f"{name}: 0 is not above 0"):
        plan(config(), RATES, **{name: 0})


def test_loads_are_measured_through_a_real_daemon(tmp_path):
    rates = measure(PRESETS["tiny"], tmp_path)
    assert all(0 < seconds < 1 for seconds in dataclasses.asdict(rates).values())
    assert list(tmp_path.iterdir()) == []


def test_the_command_plans_presets_and_runs(tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config().to_json())
    for chosen, experts in ((["--config", str(run_dir)], 24), (["--preset", "demo", "--num-games", "5"], 40)):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *chosen, "--hbm-experts", "6", "--gpu-bytes", "1GB", "--nvme-bytes", "1GB", "--steps-per-s", "100", "--json"])
        assert stopped.value.code == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["num_experts"], printed["hbm_experts"]) == (experts, 6)
        assert len(printed["findings"]) == 2
    (tmp_path / "run.toml").write_text("num_layers = 2\npool_size = 3\n")
    for chosen, experts in (
        (["--config", str(run_dir / "config.json")], 24),
        (["--preset", "tiny", "--config", str(tmp_path / "run.toml"), "--num-games", "4"], 4 * 2 * 3),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *chosen, "--json"])
        assert json.loads(capsys.readouterr().out)["num_experts"] == experts
    with pytest.raises(SystemExit):
        main(["plan", "--preset", "demo", "--gpu-bytes", "1MB"])
    assert "will not work" in capsys.readouterr().out
    for bad, said in (
        (["--preset", "huge"], "preset: 'huge' is not one of tiny, demo, full"),
        (["--config", "huge"], "config: huge cannot be read: No such file"),
        (["--gpu-bytes", "lots"], "gpu_bytes: 'lots'"),
        (["--latency", "x"], "latency: 'x'"),
        (["--num-games", "0"], "num_games: 0 is not at least 1"),
        (["--measure", "--device", "tpu"], "device: 'tpu' is neither cpu nor cuda"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *bad])
        assert said in capsys.readouterr().err
