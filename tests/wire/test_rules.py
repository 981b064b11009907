import subprocess
import sys
from dataclasses import dataclass

import pytest

from ooc_moe_wire import rules
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import BankExists, InvalidRequest, LostUpdate, NotTheWriter, SnapshotExists, StaleVersion, UnknownExpert
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec

SPEC = BankSpec(name="b", num_experts=4, layout=Layout(parameters=(TensorSpec(name="w", shape=(3,)),)), seed=7)


@dataclass(frozen=True)
class Kept:
    is_written: bool
    label: str = ""


@dataclass(frozen=True)
class Sent:
    writer_id: str
    push_number: int


def test_the_rules_need_no_torch():
    code = "import sys, ooc_moe_wire.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("base", "current", "error"), [(3, 4, StaleVersion), (0, 4, StaleVersion), (4, 3, LostUpdate), (4, 0, LostUpdate)])
def test_an_update_starts_from_the_current_version(base: int, current: int, error: type):
    rules.check_base_version("b", 1, base_version=current, current=current)
    with pytest.raises(error, match=f"expert 1 of bank 'b': base_version {base} is not the current version {current}"):
        rules.check_base_version("b", 1, base_version=base, current=current)


def test_a_push_is_repeated_by_its_writer_under_its_number():
    assert rules.is_repeat(Sent("me", 3), "me", 3)
    assert not rules.is_repeat(Sent("me", 3), "me", 4)
    assert not rules.is_repeat(Sent("another", 3), "me", 3)


def test_a_restore_gives_a_record_to_every_expert_that_has_one_now_or_had_one_then():
    seeded, then = Kept(False), {1: Kept(True, "1"), 5: Kept(True, "5")}
    restored = rules.restored_records([3, 1, 0], then, seeded)
    assert list(restored.items()) == [(0, seeded), (1, then[1]), (3, seeded), (5, then[5])]


def test_a_fork_begins_with_the_written_records():
    source = {4: Kept(True, "4"), 2: Kept(False), 1: Kept(True, "1")}
    assert list(rules.forked_records(source).items()) == [(1, source[1]), (4, source[4])]


def test_a_snapshot_counts_written_experts_and_their_bytes():
    assert rules.snapshot_counts([(10, [Kept(True), Kept(False)]), (100, [Kept(True), Kept(True)]), (1000, [])]) == (3, 210)


def test_a_bank_grows_and_never_shrinks():
    assert rules.grown(SPEC, 9).num_experts == 9
    assert rules.grown(SPEC, 3) == SPEC
    with pytest.raises(InvalidRequest, match="num_experts"):
        rules.grown(SPEC, 1 << 40)


def test_a_bank_is_created_again_by_an_equal_spec_of_any_size():
    rules.check_same_bank(SPEC, rules.grown(SPEC, 9))
    with pytest.raises(BankExists, match="bank 'b' exists with another layout"):
        rules.check_same_bank(
            SPEC, BankSpec(name="b", num_experts=4, layout=Layout(parameters=(TensorSpec(name="w", shape=(4,)),)), seed=7)
        )
    with pytest.raises(BankExists, match="another seed: 7, not 8"):
        rules.check_same_bank(SPEC, BankSpec(name="b", num_experts=4, layout=SPEC.layout, seed=8))


def test_an_open_bank_belongs_to_its_writer():
    rules.check_writer("b", "")
    rules.check_writer("b", "", "me")
    rules.check_writer("b", "me", "me")
    for asking in ("me", ""):
        with pytest.raises(NotTheWriter, match="writer 'other' has it open"):
            rules.check_writer("b", "other", asking)


def test_the_first_expert_outside_the_bank_is_named():
    rules.check_experts("b", [0, 3], 4)
    for strangers, named in (([1, 4, 5], 4), ([-1], -1)):
        with pytest.raises(UnknownExpert, match=f"expert {named}: bank 'b' has experts 0 to 3"):
            rules.check_experts("b", strangers, 4)


def test_the_name_of_a_snapshot_is_given_taken_or_made_of_its_id():
    assert rules.snapshot_id_and_name("mine", 3, {"snapshot-3"}) == (3, "mine")
    assert rules.snapshot_id_and_name("", 3, {"mine"}) == (3, "snapshot-3")
    assert rules.snapshot_id_and_name("", 3, {"snapshot-3", "snapshot-4"}) == (5, "snapshot-5")
    rules.check_same_snapshot("mine", ["a", "b"], ["b", "a"])
    with pytest.raises(SnapshotExists, match="snapshot 'mine' exists, of other banks"):
        rules.check_same_snapshot("mine", ["a"], ["a", "b"])


def test_a_snapshot_name_is_measured_in_bytes():
    rules.check_snapshot_name("é" * 64)
    with pytest.raises(InvalidRequest, match="130 bytes are more than 128"):
        rules.check_snapshot_name("é" * 65)


@pytest.mark.parametrize("banks", [[], ["a", "a"]])
def test_a_snapshot_is_of_different_banks(banks: list[str]):
    with pytest.raises(InvalidRequest, match="one or more different banks"):
        rules.check_snapshot_banks(banks)


def test_an_expert_that_is_not_written_is_listed_with_zeros():
    assert rules.listed_checksums(None) == Checksums(0, 0)
    assert rules.listed_checksums(Checksums(1, 2)) == Checksums(1, 2)
