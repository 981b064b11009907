"""Out-of-core mixture of experts for multi-task reinforcement learning: router, MoE layer, agent, games, PPO, reports, CLI."""
