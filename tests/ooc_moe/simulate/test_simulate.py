"""The simulator beside what it claims to be: the real cache, the best of all choices, arithmetic by hand; and its commands."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_moe.cli.main import main
from ooc_moe.cli.simulate import SIMULATE
from ooc_moe.metrics.trace import Mark, Trace, TraceInfo, read_trace, write_trace
from ooc_moe.simulate.replay import Latency, Link, Prefetch, Setup, replay
from ooc_moe.simulate.sweep import Sweep, capacity, latency, run, seconds
from ooc_moe.simulate.synthetic_traces import SyntheticTraceConfig, make_trace, with_turns
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec

# 10 s from DRAM, 110 s from NVMe, 1 s of compute: sums are exact.
TIMES = Latency(dram=Link(latency_s=2, bytes_per_s=1), nvme=Link(latency_s=92, bytes_per_s=1), compute_s=1)
KEYS = st.lists(st.integers(0, 7), min_size=1, max_size=60)


def trace_of(keys, marks=(), *, num_banks=1):
    info = TraceInfo(source="test", num_banks=num_banks, expert_bytes=8)
    return Trace(info=info, keys_A=np.array(keys, dtype=np.uint32), marks=tuple(marks) or (Mark(0, "a", False),))


def hits(keys, hbm_experts, policy, **options):
    return replay(trace_of(keys, **options), Setup(hbm_experts=hbm_experts, policy=policy)).training.hits


def most_hits(keys, hbm_experts):
    """By trying every victim at every miss."""

    @functools.cache
    def best(position, resident):
        if position == len(keys):
            return 0
        key = keys[position]
        if key in resident:
            return 1 + best(position + 1, resident)
        if len(resident) < hbm_experts:
            return best(position + 1, resident | {key})
        return max(best(position + 1, resident - {victim} | {key}) for victim in resident)

    return best(0, frozenset())


# Beside the real cache


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(1, 8))
def test_replayed_lru_hits_as_often_as_the_real_cache_that_told_the_trace(experts, capacity_experts):
    store, asked = InMemoryStore(), []
    layout = Layout(parameters=(TensorSpec(name="w1", shape=(2,)),), optimizer=())
    store.create_bank(BankSpec(name="b", num_experts=8, layout=layout, seed=0))
    with ExpertCache(store, "b", capacity_experts=capacity_experts, on_access=asked.extend) as cache:
        for expert in experts:
            with cache.reading([expert]):
                pass
            with cache.reading([expert], counted=False):
                pass
        stats = cache.stats()
    assert asked == experts
    replayed = replay(trace_of(asked), Setup(hbm_experts=capacity_experts)).training
    assert (replayed.accesses, replayed.hits) == (stats.accesses, stats.hits)


# Beside the optimum


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(1, 4))
def test_belady_is_as_good_as_trying_every_victim(keys, hbm_experts):
    assert hits(keys, hbm_experts, "belady") == most_hits(tuple(keys), hbm_experts)


@settings(deadline=None)
@given(KEYS, st.integers(1, 7))
def test_no_policy_beats_belady(keys, hbm_experts):
    assert max(hits(keys, hbm_experts, policy) for policy in ("lru", "s3fifo", "random")) <= hits(keys, hbm_experts, "belady")


@settings(deadline=None)
@given(KEYS)
def test_lru_never_loses_by_more_room(keys):
    found = [hits(keys, hbm_experts, "lru") for hbm_experts in range(1, 9)]
    assert found == sorted(found)
    assert found[-1] == len(keys) - len(set(keys))


@settings(deadline=None)
@given(KEYS, st.integers(1, 4))
def test_each_bank_has_its_share_of_hbm(keys, per_bank):
    apart = [[key // 2 for key in keys if key % 2 == bank] for bank in range(2)]
    for policy in ("lru", "belady"):
        assert hits(keys, 2 * per_bank, policy, num_banks=2) == sum(hits(part, per_bank, policy) for part in apart if part)


# By hand


def test_stalls_follow_the_tier_and_training_is_apart_from_evaluation():
    marks = [Mark(0, "a", False), Mark(3, "a", True)]
    found = replay(trace_of([0, 1, 0, 1, 2, 0], marks), Setup(hbm_experts=1, dram_experts=2, latency=TIMES))
    assert dataclasses.asdict(found.training) | {"hits": 0, "from_nvme": 2, "from_dram": 1} == dataclasses.asdict(found.training)
    assert found.training.stall_s == 110 + 110 + 10
    # 1 lies in DRAM; 2 comes from NVMe and takes 0's place there, which was used before 1.
    assert (found.evaluation.from_dram, found.evaluation.from_nvme, found.evaluation.accesses) == (1, 2, 3)
    assert (found.training.compute_s, found.evaluation.stall_s) == (3, 10 + 110 + 110)


def test_what_a_perfect_detector_names_loads_behind_the_compute_one_after_another():
    turns = [("b", [5, 6, 6]), ("a", [0, 1, 2, 3]), ("b", [*[6] * 15, 5])]
    marks = [Mark(0, "b", False), Mark(3, "a", False), Mark(7, "b", False)]
    trace = trace_of([key for _, keys in turns for key in keys], marks)
    setup = Setup(hbm_experts=4, latency=TIMES)
    without = replay(trace, setup).training
    assert (without.hits, without.stall_s) == (1 + 14, 220 + 440 + 20)
    ahead = replay(trace, dataclasses.replace(setup, prefetch=Prefetch(source="perfect"))).training
    # In the first two turns each comes late, all but the first asked for one second of compute after its load began. In the last turn 6 is
    # late by all of its load, and 5 comes behind the compute of 6.
    assert (ahead.hits, ahead.stall_s) == (1 + 15, (110 + 109) + (110 + 3 * 109) + 10)
    assert (ahead.prefetched, ahead.late, ahead.useful, ahead.wasted, ahead.cancelled) == (8, 7, 1, 0, 0)
    assert (ahead.from_nvme, ahead.from_dram) == (6, 2)


def switching(num_turns=40, turn=400, seed=0):
    return make_trace(
        SyntheticTraceConfig(games=6, experts=120, accesses=num_turns * turn, switch_every=turn, layers=2, expert_bytes=8, seed=seed)
    )


FAST = Latency(dram=Link(latency_s=2e-3, bytes_per_s=1e9), nvme=Link(latency_s=5e-3, bytes_per_s=1e9), compute_s=1e-3)


def test_prefetching_pays_by_how_much_the_detector_knows():
    found = {
        name: replay(switching(), Setup(hbm_experts=30, latency=FAST, prefetch=prefetch)).training
        for name, prefetch in {
            "none": Prefetch(),
            "perfect": Prefetch(source="perfect"),
            "slow": Prefetch(source="detector", delay=60, accuracy=1),
            "never": Prefetch(source="detector", delay=10**6, accuracy=1),
            "sure": Prefetch(source="detector", delay=0, accuracy=1),
            "blind": Prefetch(source="detector", delay=0, accuracy=0),
        }.items()
    }
    assert found["perfect"].hits > found["slow"].hits > found["none"].hits
    assert found["perfect"].stall_s < found["none"].stall_s
    assert dataclasses.asdict(found["never"]) == dataclasses.asdict(found["none"])
    assert found["sure"] == found["perfect"]
    assert found["blind"].useful < 0.1 * found["perfect"].useful
    assert found["blind"].wasted > 0
    for counts in found.values():
        assert counts.prefetched == counts.useful + counts.late + counts.wasted + counts.cancelled
        assert counts.accesses == 16_000
        # What this game has asked for stays: a wrong guess costs loads, not hits.
        assert counts.hits >= 0.98 * found["none"].hits


@settings(max_examples=40, deadline=None)
@given(KEYS, st.integers(1, 7), st.integers(0, 20), st.sampled_from(["perfect", "detector", "random"]), st.sampled_from(["lru", "s3fifo"]))
def test_every_prefetch_has_one_fate_and_every_load_a_reason(keys, hbm_experts, delay, source, policy):
    half = len(keys) // 2
    marks = [Mark(0, "a", False), Mark(half, "b", True), Mark(half + half // 2, "a", False)]
    setup = Setup(hbm_experts=hbm_experts, policy=policy, latency=TIMES, prefetch=Prefetch(source=source, delay=delay, accuracy=0.5))
    found = replay(trace_of(keys, marks), setup)
    loads = misses = fates = prefetched = late_loading = 0
    for counts in (found.training, found.evaluation):
        loads += counts.from_dram + counts.from_nvme
        misses += counts.accesses - counts.hits
        prefetched += counts.prefetched
        fates += counts.useful + counts.late + counts.wasted + counts.cancelled
        late_loading += counts.late
    assert fates == prefetched
    assert misses - late_loading <= loads <= misses + prefetched
    assert found.training.accesses + found.evaluation.accesses == len(keys)


# Synthetic traces


def test_a_synthetic_trace_has_what_was_asked_for():
    made = SyntheticTraceConfig(games=5, experts=60, accesses=10_000, switch_every=500, layers=3, per_call=2, eval_every=4)
    trace = make_trace(made)
    assert len(trace.keys_A) == 10_000
    assert trace.num_experts == 60
    pools = {}
    for span in trace.spans():
        pools.setdefault(span.game, set()).update(trace.keys_A[span.start : span.stop].tolist())
    assert len(pools) == 5
    assert sum(map(len, pools.values())) == 60
    assert {len(pool) for pool in pools.values()} == {12}
    training = [span for span in trace.spans() if not span.evaluating]
    assert {(span.stop - span.start) % 500 for span in training[:-1]} == {0}
    assert min(span.stop - span.start for span in training[:-1]) == 500
    assert sum(span.evaluating for span in trace.spans()[:9]) == 5
    assert make_trace(made).keys_A.tolist() == trace.keys_A.tolist()
    assert make_trace(dataclasses.replace(made, seed=1)).keys_A.tolist() != trace.keys_A.tolist()


def test_zipf_zero_asks_for_all_alike_and_more_for_few():
    shares = []
    for zipf in (0, 2):
        counts = np.bincount(make_trace(SyntheticTraceConfig(games=1, experts=10, accesses=5000, layers=1, zipf=zipf)).keys_A)
        shares.append(counts.max() / 5000)
    assert shares[0] < 0.13
    assert 0.55 < shares[1] < 0.75


def test_other_turns_keep_each_games_order_and_leave_evaluation_out():
    marks = [Mark(0, "a", False), Mark(4, "b", False), Mark(6, "a", True), Mark(8, "a", False)]
    dealt = with_turns(trace_of([1, 2, 3, 4, 50, 60, 9, 9, 5], marks), 2)
    assert dealt.keys_A.tolist() == [1, 2, 50, 60, 3, 4, 5]
    assert [(span.game, span.start) for span in dealt.spans()] == [("a", 0), ("b", 2), ("a", 4)]


def test_switching_less_often_misses_less():
    trace = switching()
    rows = run(trace, Sweep(hbm=("25%",), policies=("lru", "belady"), switch_every=(50, 200, 800)))
    rates = [row.replayed.training.hit_rate for row in rows if row.replayed.setup.policy == "lru"]
    assert rates == sorted(rates)
    assert rates[2] > rates[0] + 0.05
    assert all(row.of_belady <= 1 for row in rows)


# Words, and bad ones


def test_words_are_understood():
    nvme, dram = Link(latency_s=0.25, bytes_per_s=3 * 10**9), Link(latency_s=1.5e-3, bytes_per_s=12 * 2**30)
    assert latency("nvme=250ms+3GB/s, dram=1.5ms+12GiB/s") == Latency(nvme=nvme, dram=dram)
    assert latency("nvme=250ms+3GB/s") == Latency(nvme=nvme)
    assert latency("nvme=10ms") == Latency(nvme=Link(latency_s=0.01, bytes_per_s=Latency().nvme.bytes_per_s))
    assert (capacity("hbm", "25%", 40), capacity("hbm", "0.1%", 40), capacity("hbm", "16", 40)) == (10, 1, 16)
    assert seconds("compute", "2s") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.trace"], "no.trace cannot be read"),
        ([], "--make FILE"),
        (["TRACE", "--make", "b.trace"], "--make FILE"),
        (["TRACE", "--hbm", "many"], "hbm: 'many' is not a number of experts"),
        (["TRACE", "--hbm", "0"], "hbm: '0'"),
        (["TRACE", "--dram", "1.5"], "dram: '1.5'"),
        (["TRACE", "--policy", "fifo"], "policy: 'fifo' is not one of"),
        (["TRACE", "--dram-policy", "belady"], "dram_policy: 'belady' is not one of"),
        (["--make", "new.trace", "--per-call", "0"], "per_call: 0 is not at least 1"),
        (["TRACE", "--prefetch", "oracle"], "prefetch: 'oracle' is not one of"),
        (["TRACE", "--latency", "tape=1s+1MB/s"], "latency: tier 'tape' is not one of dram, nvme"),
        (["TRACE", "--latency", "nvme"], "latency: 'nvme' is not tier=latency"),
        (["TRACE", "--latency", "nvme=1s+3"], "latency: 'nvme=1s\\+3' is not tier=latency"),
        (["TRACE", "--detect-after", "-1"], "detect_after: -1 is not at least 0"),
        (["TRACE", "--latency", "nvme=1s+0B/s"], "would never end"),
        (["TRACE", "--compute", "soon"], "compute: 'soon' is not a time"),
        (["TRACE", "--switch-every", "0"], "switch_every: 0 is not at least 1"),
        (["TRACE", "--switch-every", "x"], "switch_every: 'x'"),
        (["TRACE", "--detect-accuracy", "2"], "detect_accuracy: 2.0"),
        (["TRACE", "--plot", "p.sheet"], "plot: "),
        (["--make", "new.trace", "--experts", "3", "--games", "4"], "experts: 3 is less than one for each of 4 games"),
        (["--make", "new.trace", "--games", "0"], "games: 0 is not at least 1"),
        (["--make", "new.trace", "--eval-every", "0"], "eval_every: 0 is not at least 1"),
        (["--make", "TRACE"], "exists"),
        (["--make", "new.trace", "--hbm", "many"], "hbm: 'many'"),
    ],
)
def test_bad_words_are_refused_by_name(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "a.trace"
    write_trace(made, trace_of([0, 1, 2, 3]))
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", *(str(made) if word == "TRACE" else word for word in arguments)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "new.trace").exists()


def test_each_setting_of_a_made_trace_is_an_option():
    options = {option.name for group in SIMULATE.groups() for option in group.options}
    assert options >= {field.name for field in dataclasses.fields(SyntheticTraceConfig)}


def test_the_command_replays_saves_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ooc-moe", "simulate"])
    made, drawn, saved = tmp_path / "a.trace", tmp_path / "hits.png", tmp_path / "new" / "a.md"
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *("simulate", "--make", str(made), "--games", "4", "--experts", "80", "--accesses", "20000", "--switch-every", "1000,100"),
                *("--hbm", "10%,40%", "--plot", str(drawn), "--results", str(saved), "--json"),
            ]
        )
    assert stopped.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(read_trace(made).keys_A) == 20_000
    assert len(rows) == 2 * 2 * 7
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert drawn.stat().st_size > 10_000
    text = saved.read_text()
    for words in ("- command: `ooc-moe ", "20,000 accesses to 80 experts, 4 games", "| 1,000 | 8 (10%) | belady |", "million a second"):
        assert words in text
    assert str(tmp_path) not in text


def test_replaying_needs_no_torch():
    code = "import sys; import ooc_moe.cli.main, ooc_moe.simulate.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
