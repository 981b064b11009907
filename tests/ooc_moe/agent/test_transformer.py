import pytest
import torch

from ooc_moe.agent.transformer import CausalAttention, KeysValues, episode_mask

BATCH, TIME, DIM, HEADS = 2, 6, 8, 2


@pytest.fixture
def attention() -> CausalAttention:
    torch.manual_seed(0)
    attention = CausalAttention(DIM, HEADS)
    torch.nn.init.normal_(attention.out.weight)
    return attention


@pytest.fixture
def x_BTD() -> torch.Tensor:
    return torch.randn(BATCH, TIME, DIM, generator=torch.Generator().manual_seed(1))


def starts(*frames: int) -> torch.Tensor:
    """Row 0 begins episodes at `frames`, row 1 at none."""
    starts_BT = torch.zeros(BATCH, TIME, dtype=torch.bool)
    starts_BT[0, list(frames)] = True
    return starts_BT


def naive_attention(attention: CausalAttention, x_BTD: torch.Tensor, starts_BT: torch.Tensor) -> torch.Tensor:
    """Frame by frame, head by head."""
    out_BTD = torch.zeros_like(x_BTD)
    size = DIM // HEADS
    q_BTD, k_BTD, v_BTD = attention.qkv(x_BTD).split(DIM, dim=-1)
    for b in range(BATCH):
        for t in range(TIME):
            first = max([s for s in range(t + 1) if starts_BT[b, s]], default=0)
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = k_BTD[b, first : t + 1, part] @ q_BTD[b, t, part] / size**0.5
                out_BTD[b, t, part] = scores.softmax(0) @ v_BTD[b, first : t + 1, part]
    return attention.out(out_BTD)


@pytest.mark.parametrize("frames", [(), (0,), (3,), (1, 2, 5)])
def test_attention_equals_its_naive_twin_with_and_without_episode_starts(attention, x_BTD, frames) -> None:
    starts_BT = starts(*frames)
    with torch.no_grad():
        actual = attention(x_BTD, mask=episode_mask(starts_BT))
        torch.testing.assert_close(actual, naive_attention(attention, x_BTD, starts_BT))


def test_changing_a_frame_changes_nothing_before_it(attention, x_BTD) -> None:
    before = attention(x_BTD, mask=None)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4:] += 1
    after = attention(changed_BTD, mask=None)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).any(dim=-1).all()


def test_changing_an_earlier_episode_changes_nothing_in_the_present_one(attention, x_BTD) -> None:
    mask = episode_mask(starts(3))
    before = attention(x_BTD, mask=mask)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, :3] += 1
    after = attention(changed_BTD, mask=mask)
    assert torch.equal(before[0, 3:], after[0, 3:])
    assert not torch.allclose(before[1, 3:], after[1, 3:]), "row 1 is one episode, and sees the change"


def test_a_start_at_the_first_frame_only_needs_no_mask() -> None:
    assert episode_mask(starts(0)) is None
    assert episode_mask(starts(2)) is not None


def test_frame_by_frame_attention_equals_the_whole_segment_at_once(attention, x_BTD) -> None:
    memory = KeysValues(torch.zeros(BATCH, HEADS, TIME, DIM // HEADS), torch.zeros(BATCH, HEADS, TIME, DIM // HEADS))
    with torch.no_grad():
        whole = attention(x_BTD, mask=None)
        for t in range(TIME):
            step = attention.step(x_BTD[:, t : t + 1], memory, t, mask=None)
            torch.testing.assert_close(step[:, 0], whole[:, t])
