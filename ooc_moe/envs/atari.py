"""Makes environments of Atari games with ale-py's native vector environment, which steps many games at once.

`AtariEnvs` passes every setting explicitly, because ale-py's defaults clip rewards and have no sticky actions. It also replaces actions
that would hang the emulator. ale-py is an optional dependency, imported when the first game is made.
"""

from __future__ import annotations

import numpy as np

from ooc_moe.envs.game import NUM_ACTIONS, Array, Episodes, Step, check_actions

ATARI_SCORES: dict[str, tuple[float, float]] = {
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7),
    "atlantis": (12850.0, 29028.1),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5),
    "beam_rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "centipede": (2090.9, 12017.0),
    "chopper_command": (811.0, 7387.8),
    "crazy_climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971.0),
    "double_dunk": (-18.6, -16.4),
    "enduro": (0.0, 860.5),
    "fishing_derby": (-91.7, -38.7),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4),
    "hero": (1027.0, 30826.4),
    "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3),
    "montezuma_revenge": (0.0, 4753.3),
    "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0),
    "riverraid": (1338.5, 17118.0),
    "road_runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7),
    "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7),
    "space_invaders": (148.0, 1668.7),
    "star_gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3),
    "time_pilot": (3568.0, 5229.2),
    "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2),
    "venture": (0.0, 1187.5),
    "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5),
    "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}
"""Raw scores of (random play, a human) over whole games, from Wang et al. 2016 (Dueling Networks), as dqn_zoo has them."""

ATARI_GAMES: tuple[str, ...] = tuple(ATARI_SCORES)
"""The 57 games of the benchmark, by their ROM names."""

FRAMES_PER_STEP = 4
STICKY_PROBABILITY = 0.25
NOOPS_MAX = 30
STEPS_MAX = 108_000 // FRAMES_PER_STEP
"""Half an hour of play, the limit of the benchmark (Machado et al. 2018)."""


class AtariEnvs:
    """A batch of environments of one Atari game. All 18 actions are offered, and rewards are the game's own points.

    Actions are sticky: in each emulated frame, the emulator repeats the previous action with probability 0.25.

    Args:
        game: one of `ATARI_GAMES`.
        num_envs: the number of environments.
        frame_size: height and width of a frame, in pixels.
        frame_stack: frames in an observation.
        num_threads: threads that emulate. Results do not depend on their number.
        max_episode_steps: the step limit of an episode, in steps of four frames each. None: the benchmark's limit.
    """

    def __init__(
        self, game: str, num_envs: int, *, frame_size: int, frame_stack: int, num_threads: int, max_episode_steps: int | None
    ) -> None:
        from ale_py.vector_env import AtariVectorEnv

        self.game = game
        self.num_envs = num_envs
        self.num_actions = NUM_ACTIONS
        self.observation_shape = (frame_stack, frame_size, frame_size)
        self._ale = AtariVectorEnv(
            game,
            num_envs,
            num_threads=num_threads,
            repeat_action_probability=STICKY_PROBABILITY,
            full_action_space=True,
            frameskip=FRAMES_PER_STEP,
            stack_num=frame_stack,
            img_height=frame_size,
            img_width=frame_size,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=True,
            noop_max=NOOPS_MAX,
            use_fire_reset=True,
            max_num_frames_per_episode=(max_episode_steps or STEPS_MAX) * FRAMES_PER_STEP,
        )
        self._legal_A = _legal_actions([action.value for action in self._ale.ale.get_action_set()])
        self._ended_N = np.zeros(num_envs, dtype=bool)
        self._episodes = Episodes(num_envs)

    def reset(self, seed: int) -> Array:
        """Begins a new episode in each environment and returns the first observations. Each environment's seed is derived from `seed`."""
        # Given one integer, ale-py counts up from it, and calls with neighbouring seeds would share episodes.
        seeds_N = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1
        observations, _ = self._ale.reset(seed=seeds_N.astype(np.int32))
        self._ended_N[:] = False
        self._episodes.reset()
        return np.asarray(observations)

    def step(self, actions: Array) -> Step:
        """Plays one action, an integer in 0..17, in each environment and returns the results."""
        check_actions(actions, self.num_envs)
        observations, rewards, terminated, truncated, info = self._ale.step(self._legal_A[actions])
        rewards = rewards.astype(np.float32)
        played = ~self._ended_N
        # `terminated` with lives left means a lost life: the episode goes on, and the next action is played.
        self._ended_N = truncated | (terminated & (info["lives"] == 0))
        return self._episodes.step(
            observations,
            rewards_N=rewards,
            terminated_N=terminated,
            truncated_N=truncated & ~terminated,
            played_N=played,
            ended_N=self._ended_N,
        )

    def close(self) -> None:
        """Stops the emulators and their threads, by dropping the only reference. ale-py's own close() leaves the threads running."""
        if hasattr(self, "_ale"):
            del self._ale


def _legal_actions(legal: list[int]) -> Array:
    """For each of the 18 actions, its index in `legal`, the list of the actions that the game accepts.

    An action that is not in the list gets the index of the same movement without the button, or that of doing nothing.

    Skiing accepts only 9 actions even if all 18 are requested, and an index beyond them hangs the emulator for ever.
    """
    first_with_button = 10
    index_A = np.zeros(NUM_ACTIONS, dtype=np.int32)
    for action in range(NUM_ACTIONS):
        without_button = action - 8 if action >= first_with_button else 0
        index_A[action] = legal.index(action if action in legal else without_button)
    return index_A
