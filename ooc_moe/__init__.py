"""Out-of-core mixture of experts for multi-task reinforcement learning.

For a model of your own: `TieredMoE` is a layer whose experts (`TieredExperts`) live in a store behind a cache. `Router` chooses experts,
`balance_loss` spreads the tokens over them, and `ExpertAdam` trains them. `ffn_layout` describes them to a store.

For games: `train` makes a run from a `RunConfig`, `resume` continues it, `evaluate_run` and `write_report` measure it, and `load` opens it
to play with its agent. `Agent` is the network, and `envs.make` makes the games.

Nothing is imported before it is used: `import ooc_moe` does not import torch.
"""

from typing import TYPE_CHECKING

from ooc_moe_wire.lazy_names import lazy_names

if TYPE_CHECKING:
    from ooc_moe import envs as envs
    from ooc_moe.agent.agent import Agent as Agent
    from ooc_moe.config.agent import PRESETS as PRESETS
    from ooc_moe.config.agent import AgentConfig as AgentConfig
    from ooc_moe.config.run import PPOConfig as PPOConfig
    from ooc_moe.config.run import RunConfig as RunConfig
    from ooc_moe.evaluation.evaluate import evaluate_run as evaluate_run
    from ooc_moe.moe.expert_adam import ExpertAdam as ExpertAdam
    from ooc_moe.moe.expert_layout import ffn_layout as ffn_layout
    from ooc_moe.moe.layer import TieredExperts as TieredExperts
    from ooc_moe.moe.layer import TieredMoE as TieredMoE
    from ooc_moe.moe.router import Router as Router
    from ooc_moe.moe.router import balance_loss as balance_loss
    from ooc_moe.report.report import write_report as write_report
    from ooc_moe.run.train import resume as resume
    from ooc_moe.run.train import train as train
    from ooc_moe.session.daemon import embedded_daemon as embedded_daemon
    from ooc_moe.session.load import load as load

_MODULES = {
    "PRESETS": "config.agent",
    "Agent": "agent.agent",
    "AgentConfig": "config.agent",
    "ExpertAdam": "moe.expert_adam",
    "PPOConfig": "config.run",
    "Router": "moe.router",
    "RunConfig": "config.run",
    "TieredExperts": "moe.layer",
    "TieredMoE": "moe.layer",
    "balance_loss": "moe.router",
    "embedded_daemon": "session.daemon",
    "envs": "",
    "evaluate_run": "evaluation.evaluate",
    "load": "session.load",
    "ffn_layout": "moe.expert_layout",
    "resume": "run.train",
    "train": "run.train",
    "write_report": "report.report",
}
__all__ = list(_MODULES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
