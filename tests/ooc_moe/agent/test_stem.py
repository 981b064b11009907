from dataclasses import replace

import pytest
import torch

from ooc_moe.agent.stem import Stem
from ooc_moe.config.agent import PRESETS


@pytest.mark.parametrize("preset", ["tiny", "demo", "full"])
@pytest.mark.parametrize("size", [42, 50, 64, 84, 85])
def test_the_stem_takes_its_sizes_from_the_frames(preset: str, size: int) -> None:
    config = replace(PRESETS[preset], frame_size=size)
    if preset == "full":
        config = replace(config, dim=32)
    frames_MSHW = torch.randint(0, 256, (3, config.frame_stack, size, size), dtype=torch.uint8)
    tokens_MD = Stem(config)(frames_MSHW)
    assert tokens_MD.shape == (3, config.dim)
    assert tokens_MD.isfinite().all()


def test_pixels_are_seen_from_zero_to_one() -> None:
    torch.manual_seed(0)
    stem = Stem(PRESETS["tiny"])
    frames_MSHW = torch.randint(0, 256, (2, 4, 42, 42), dtype=torch.uint8)
    torch.testing.assert_close(stem(frames_MSHW), stem.layers(frames_MSHW.float() / 255))


def test_weights_begin_orthogonal_with_gain_root_two_and_no_bias() -> None:
    for layer in Stem(PRESETS["demo"]).layers:
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            rows = layer.weight.flatten(1)
            gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
            torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-4, rtol=0)
            assert not layer.bias.any()
