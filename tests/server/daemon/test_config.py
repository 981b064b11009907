"""The settings of the daemon: flag, environment, file and default, in this order."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ooc_moe_server.daemon.cli import PROGRAM, SERVE_HELP, serve_groups, server_config
from ooc_moe_server.daemon.config import ServerConfig
from ooc_moe_wire.command_line import parse
from ooc_moe_wire.errors import InvalidRequest


def config_of(*words: str, **environ: str) -> ServerConfig:
    return server_config(parse(serve_groups(), words, prog="ooc-moe-server", description=SERVE_HELP), environ)


def test_the_program_prints_its_version(capsys):
    assert PROGRAM.run(["--version"]) == 0
    assert capsys.readouterr().out == f"ooc-moe-server {version('ooc-moe')}\n"


def test_every_flag_reaches_the_configuration():
    words = (
        "--data-dir d --dram-bytes 2MiB --listen 127.0.0.1:0 --listen unix:/tmp/x --dram-policy s3fifo --nvme-bytes 1GB --bank-bytes 1MB"
    )
    assert config_of(*words.split(), "--no-local", "--insecure", "--grace-s", "3") == ServerConfig(
        data_dir=Path("d"),
        dram_bytes=2 << 20,
        listen=("127.0.0.1:0", "unix:/tmp/x"),
        dram_policy="s3fifo",
        nvme_bytes=10**9,
        bank_bytes=10**6,
        local=False,
        insecure=True,
        grace_s=3.0,
    )


def test_a_flag_overrides_the_environment_which_overrides_the_file_which_overrides_the_default(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('data_dir = "file"\ndram_bytes = "1MiB"\ngrace_s = 1\nlisten = ["127.0.0.1:0", "[::1]:0"]\nlocal = false')
    environ = {"OOC_MOE_SERVER_DRAM_BYTES": "2MiB", "OOC_MOE_SERVER_GRACE_S": "2", "OOC_MOE_STORE": "for the client"}
    config = config_of("--config", str(file), "--grace-s", "3", **environ)
    assert (config.grace_s, config.dram_bytes, config.data_dir) == (3.0, 2 << 20, Path("file"))
    assert (config.listen, config.local, config.dram_policy) == (("127.0.0.1:0", "[::1]:0"), False, "lru")


def test_only_the_directory_must_be_given():
    assert config_of("--data-dir", "d") == ServerConfig(data_dir=Path("d"))
    with pytest.raises(InvalidRequest, match="--data-dir is required"):
        config_of()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OOC_MOE_SERVER_DRAM": "1MiB"}, "environment: unknown variable 'OOC_MOE_SERVER_DRAM'; did you mean 'OOC_MOE_SERVER_"),
        ({"OOC_MOE_SERVER_DRAM_BYTES": "much"}, "dram_bytes: 'much' is not a size"),
    ],
)
def test_a_mistake_in_the_environment_is_named(environ, said):
    with pytest.raises(InvalidRequest) as error:
        config_of("--data-dir", "d", **environ)
    assert str(error.value).startswith(said)


def test_an_unknown_key_of_the_file_is_named_with_the_closest_one(tmp_path):
    (tmp_path / "server.toml").write_text('data-dir = "d"')
    with pytest.raises(InvalidRequest, match="unknown key 'data-dir'; did you mean 'data_dir'"):
        config_of("--config", str(tmp_path / "server.toml"))


def test_python_m_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "ooc_moe_server"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", "error: --data-dir is required; see `ooc-moe-server --help`\n")


@pytest.mark.parametrize("command", ["", "verify", "rebuild"])
def test_the_help_shows_an_example(command):
    words = [sys.executable, "-m", "ooc_moe_server", *command.split(), "--help"]
    assert f"$ ooc-moe-server {command}" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
