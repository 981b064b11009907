"""The comparison of policies, on tiny traces."""

from functools import lru_cache

from hypothesis import given
from hypothesis import strategies as st

from ooc_moe.bench import policies
from ooc_moe.bench.policies import Pattern, compare, hit_rate, markdown, patterns
from tests.ooc_moe.commands import exit_code


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 8))
def test_the_simulated_lru_hits_as_often_as_pythons(trace, cache_experts):
    cached = lru_cache(maxsize=cache_experts)(lambda expert: expert)
    for expert in trace:
        cached(expert)
    assert hit_rate("lru", trace, cache_experts) == cached.cache_info().hits / len(trace)


def test_each_trace_is_compared_with_each_cache_and_the_optimum_is_never_beaten():
    made = patterns(1, length=3000, num_games=6)
    rows = list(compare(made, (0.1, 0.5)))
    assert [(row.pattern.name, row.cache_share) for row in rows] == [(trace.name, share) for trace in made for share in (0.1, 0.5)]
    for row in rows:
        lru, s3fifo, belady = row.hit_rates
        assert 0 <= max(lru, s3fifo) <= belady < 1
    assert len({row.hit_rates for row in rows}) > len(made)


def test_the_same_seed_gives_the_same_rows_and_another_does_not():
    rows = [[row.hit_rates for row in compare(patterns(seed, length=2000, num_games=5), (0.2,))] for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]


def test_lru_never_hits_in_a_scan_larger_than_the_cache_and_the_optimum_does():
    scan = list(range(10)) * 20
    assert hit_rate("lru", scan, 5) == 0
    assert hit_rate("belady", scan, 5) > 0.4


def test_s3_fifo_keeps_a_working_set_through_scans_that_flush_lru():
    games, evaluation = [number % 20 for number in range(200)], list(range(100, 400))
    trace = (games + evaluation) * 5
    assert hit_rate("s3fifo", trace, 40) > hit_rate("lru", trace, 40) + 0.02


def test_the_games_trace_asks_for_two_experts_of_one_pool_in_each_layer():
    trace = next(trace for trace in patterns(0, length=640, num_games=3) if trace.name == "games")
    step = trace.experts[:8]
    assert {expert // policies.GAME_EXPERTS for expert in trace.experts[:320]} == {step[0] // policies.GAME_EXPERTS}
    assert [expert % policies.GAME_EXPERTS // policies.POOL_EXPERTS for expert in step] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(set(step)) == 8


def test_the_command_prints_the_table_and_saves_it_with_what_made_it(tmp_path, monkeypatch, capsys):
    tiny = [Pattern(name="loop", what="0 1 2 again and again", experts=[0, 1, 2] * 5)]
    monkeypatch.setattr(policies, "patterns", lambda seed: tiny)
    saved = tmp_path / "new" / "policies.md"
    assert exit_code("bench", "policies", "--seed", "5", "--results", str(saved)) == 0
    assert "LRU" in capsys.readouterr().out
    text = saved.read_text()
    for words in ("`ooc-moe bench policies --seed 5`", "commit", "versions", "machine", "| loop | 3 | 15 | 2 (50%) | 0.0% |"):
        assert words in text
    assert str(tmp_path) not in text


def test_the_file_says_what_each_trace_is():
    rows = list(compare([Pattern(name="loop", what="0 1 2 again and again", experts=[0, 1, 2])], (0.5,)))
    assert '- trace "loop": 0 1 2 again and again' in markdown(rows, command="x")
