"""What the variants change, and what they leave unchanged."""

from dataclasses import replace
from pathlib import Path

import pytest

from ooc_moe.session.session import open_session
from ooc_moe.study.studies import find_study
from ooc_moe.study.variants import VARIANTS
from ooc_moe_client.in_memory import InMemoryStore
from tests.ooc_moe.study.made_up_studies import GAMES, SYNTHETIC


@pytest.mark.parametrize("name", VARIANTS)
def test_in_every_variant_heads_norms_and_embedding_belong_to_a_game(name: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[name].change(SYNTHETIC.recipe), run_dir=tmp_path / "run")
    store = InMemoryStore()
    for spec in config.agent.bank_specs(config.name, config.seed):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names(config.name)) as session:
        agent = session.agent
        for game in GAMES[:2]:
            agent.add_game(game)
        own = [set(agent.game_parameters(game)) for game in GAMES[:2]]
        assert own[0].isdisjoint(own[1])
        for parameters in own:
            names = {name.split(".", 2)[2] for name, parameter in agent.named_parameters() if parameter in parameters}
            assert names >= {
                "policy.weight",
                "value.weight",
                "embedding_TD",
                "norm.weight",
                "blocks.0.norm.weight",
                "blocks.0.moe.norm.weight",
            }


@pytest.mark.parametrize("study", ["synthetic", "atari-cpu"])
def test_dense_has_the_active_and_dense_total_all_of_the_experts_parameters(study: str) -> None:
    recipe = find_study(study).recipe
    active = recipe.agent.num_layers * recipe.agent.top_k * recipe.agent.dim * recipe.agent.hidden * 2
    total = recipe.agent.estimate_params().experts
    dense, all_of_it = (VARIANTS[name].change(recipe).agent.estimate_params().experts for name in ("dense", "dense-total"))
    assert dense == pytest.approx(active, rel=0.02)
    assert all_of_it == pytest.approx(total, rel=0.02)


def test_only_the_full_recipe_and_cloning_and_consolidation_protect_what_is_shared() -> None:
    protection = {name: variant.change(SYNTHETIC.recipe).protection for name, variant in VARIANTS.items()}
    assert protection == dict.fromkeys(VARIANTS, "none") | {
        "full": SYNTHETIC.recipe.protection,
        "full-share": SYNTHETIC.recipe.protection,
        "dense-replay": SYNTHETIC.recipe.protection,
        "pools-freeze": "freeze",
        "dense-clone": "clone",
        "dense-ewc": "ewc",
    }
    assert protection["full"] == "replay"


def test_a_rival_is_not_weighed_by_what_was_chosen_for_the_recipe() -> None:
    weights = {
        name: variant.change(replace(SYNTHETIC.recipe, protection_weight=0.3)).protection_weight for name, variant in VARIANTS.items()
    }
    assert weights == dict.fromkeys(VARIANTS) | {"full": 0.3, "full-share": 0.3, "dense-replay": 0.3}
